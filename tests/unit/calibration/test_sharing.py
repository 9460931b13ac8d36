"""Processes that share experts and windows, as far as one process can tell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.calibration.sharing import SharedByProcesses, num_own_windows, own_windows
from tuckerize.calibration.states import States
from tuckerize.errors import ParallelError
from tuckerize.parallel.mesh import Axis


@given(st.integers(1, 9), st.integers(1, 9))
def test_windows_of_all_processes_are_all_in_order_and_equally_many(count: int, size: int) -> None:
    tokens_SL = torch.arange(count)[:, None]
    states = States(tokens_SL[..., None].float(), tokens_SL)
    processes = [SharedByProcesses(Axis(size, rank), group_size=9) for rank in range(size)]
    own = [own_windows(states, sharing) for sharing in processes]
    assert len({len(part) for part in own}) == 1
    assert States.joined(own, size * count).tokens_SL[:count, 0].tolist() == list(range(count))
    once = [num_own_windows(count, sharing) for sharing in processes]
    kept = [part.tokens_SL[:num, 0] for part, num in zip(own, once, strict=True)]
    assert torch.cat(kept).tolist() == list(range(count))


def test_more_processes_than_experts_of_a_group_are_refused() -> None:
    with pytest.raises(ParallelError, match="3 processes cannot share the 2 experts") as caught:
        SharedByProcesses(Axis(3, 0), group_size=2)
    assert "start 2 processes at most" in caught.value.hint
