"""Rows in memory and in files are the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuckerize.calibration.rows import Rows, joined

TYPES = (torch.float32, torch.bfloat16, torch.int64)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(TYPES),
    in_file=st.booleans(),
    more=st.integers(0, 3),
)
def test_parts_are_joined_as_torch_does(
    tmp_path: Path, counts: list[int], dtype: torch.dtype, *, in_file: bool, more: int
) -> None:
    parts = [(100 * torch.randn(count, 3, 2)).to(dtype) for count in counts]
    found = joined(iter(parts), sum(counts) + more, tmp_path if in_file else None)
    assert torch.equal(found, torch.cat(parts))
    assert found.dtype == dtype
    assert not list(tmp_path.iterdir())  # the file has no name any more
    found += 1  # and belongs to the tensor
    assert torch.equal(found, torch.cat(parts) + 1)


def test_a_file_that_no_disk_has_space_for_is_refused_before_it_is_written(tmp_path: Path) -> None:
    rows = Rows(2**50, tmp_path)
    with pytest.raises(OSError, match=r"File too large|No space left") as caught:
        rows.add(torch.zeros(1, 1024))
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_rows_that_are_missing_are_a_mistake() -> None:
    with pytest.raises(TypeError, match="no rows"):
        _ = Rows(3).whole
