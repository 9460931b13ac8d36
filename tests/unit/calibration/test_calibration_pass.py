"""Hidden states of a pass: how long they are relative to each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuckerize.calibration.calibration_pass import relative_norms, token_norms

quick = settings(derandomize=True, max_examples=25, deadline=None, database=None)


@quick
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), windows=st.integers(1, 4))
def test_lengths_are_relative_to_their_median(seed: int, scale: float, windows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden_SLI = scale * torch.randn(windows, 5, 8, generator=generator)
    found_T1 = relative_norms(token_norms(hidden_SLI))
    assert found_T1.shape == (windows * 5, 1)
    assert float(found_T1.median()) == 1
    rows_TI = hidden_SLI.double().flatten(0, 1)
    lengths_T1 = rows_TI.norm(dim=1, keepdim=True)
    expected_T1 = (lengths_T1 / float(lengths_T1.float().median())).clamp_min(0.1)
    torch.testing.assert_close(found_T1.double(), expected_T1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_short_states_count_no_more_than_ten_times_as_much(dtype: torch.dtype) -> None:
    hidden_SLI = torch.tensor([[[0.0], [0.01], [1.0], [1.0], [1000.0]]], dtype=dtype)
    assert relative_norms(token_norms(hidden_SLI))[:, 0].tolist() == pytest.approx(
        [0.1, 0.1, 1, 1, 1000]
    )
    assert relative_norms(torch.zeros(3, 1)).isfinite().all()
