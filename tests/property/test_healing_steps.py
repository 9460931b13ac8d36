"""Learning rates and clipping of recovery training, against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from tuckerize.domain import Part
from tuckerize.healing.tensors import TrainedTensor, clip
from tuckerize.healing.training import Schedule


@given(st.integers(1, 120))
def test_rates_are_those_of_torch(steps: int) -> None:
    schedule = Schedule(steps, batch=1, at_once=1, learning_rate=1.0, seed=0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = max(1, round(0.05 * steps))
    parts = [
        LinearLR(optimizer, 1 / warm, total_iters=max(1, warm - 1)),
        CosineAnnealingLR(optimizer, max(1, steps - warm)),
    ]
    theirs = SequentialLR(optimizer, parts, milestones=[warm])
    for step in range(steps):
        assert schedule.rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 25))
def test_every_pass_reads_every_window_once(count: int, batch: int, steps: int) -> None:
    schedule = Schedule(steps, batch, at_once=1, learning_rate=1.0, seed=3)
    read = torch.cat([schedule.windows(step, count) for step in range(steps)])
    assert len(read) == steps * batch
    for own in torch.split(read, count):
        assert len(set(own.tolist())) == len(own)


@given(
    st.lists(st.floats(1, 1e4), min_size=1, max_size=5), st.floats(1e-3, 1e5), st.integers(0, 99)
)
def test_gradients_are_clipped_as_by_torch(sizes: list[float], largest: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours = [nn.Parameter(torch.zeros(3, 4)) for _ in range(len(sizes) + 1)]
    theirs = [nn.Parameter(torch.zeros(3, 4)) for _ in ours]
    for own, other, size in zip(ours, theirs, sizes, strict=False):  # the last has no gradient
        own.grad = size * torch.randn(3, 4, generator=generator)
        other.grad = own.grad.clone()
    tensors = [TrainedTensor("", Part.NORMS, own, torch.float32) for own in ours]
    norm = clip(tensors, largest)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, largest)), rel=1e-5)
    for own, other in zip(ours, theirs, strict=True):
        expected = torch.zeros(3, 4) if other.grad is None else other.grad
        torch.testing.assert_close(own.grad, expected, rtol=1e-5, atol=0)
