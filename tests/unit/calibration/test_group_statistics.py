"""Elimination of some experts, which stand for all, against that of all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eliminating import eliminate
from tests.expert_cases import SWIGLU, make_group, make_tokens
from tuckerize.calibration import group_statistics
from tuckerize.calibration.group_statistics import GroupStatistics, extended, spread
from tuckerize.domain import StackShape
from tuckerize.linalg.selection import Elimination


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(
    experts=st.integers(1, 8),
    sampled=st.integers(1, 8),
    neurons=st.integers(1, 9),
    scale=st.floats(1e-3, 1e3),
)
def test_known_experts_stay_and_alike_ones_are_found(
    experts: int, sampled: int, neurons: int, scale: float
) -> None:
    """Experts that differ in size and in the order of their neurons alone."""
    generator = torch.Generator().manual_seed(neurons)
    h_NH = torch.randn(40, neurons, generator=generator).double() @ torch.diag(
        torch.logspace(0, 1, neurons).double()
    )
    down_HI = torch.randn(neurons, 6, generator=generator).double()
    sizes_E = torch.linspace(1, scale, experts).double()
    orders = [torch.randperm(neurons, generator=generator) for _ in range(experts)]
    moments_EHH = torch.stack(
        [size * (h_NH.T @ h_NH)[own][:, own] for size, own in zip(sizes_E, orders, strict=True)]
    )
    downs_EHI = torch.stack([down_HI[own] for own in orders])
    energies_EH = moments_EHH.diagonal(dim1=1, dim2=2) * downs_EHI.square().sum(2)
    whole, some = eliminate(moments_EHH, downs_EHI), spread(experts, sampled)
    known = Elimination(whole.order_EH[some], whole.costs_EH[some])
    found = extended(known, some, energies_EH)
    assert torch.equal(found.order_EH[some], whole.order_EH[some])
    torch.testing.assert_close(found.costs_EH, whole.costs_EH, rtol=1e-9, atol=0)
    assert torch.equal(found.order_EH.sort(1).values, torch.arange(neurons).expand(experts, -1))


def test_some_experts_tell_what_pruning_all_of_them_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = StackShape(24, 12, 10)
    group, tokens = make_group(shape), make_tokens(3000, shape.hidden, shape.experts)
    errors = {}
    for count in (shape.experts, 6):
        monkeypatch.setattr(group_statistics, "ELIMINATED_EXPERTS", count)
        found = GroupStatistics.gather(group, tokens, activation=SWIGLU).elimination
        assert found.order_EH.shape == found.costs_EH.shape == (24, 12)
        errors[count] = found.errors_H.numpy()[1:]
    assert not np.array_equal(errors[6], errors[24])
    np.testing.assert_allclose(errors[6], errors[24], rtol=0.15)


@pytest.mark.parametrize(("length", "count"), [(64, 8), (7, 3), (5, 9), (1, 1)])
def test_spread_is_even(length: int, count: int) -> None:
    found = spread(length, count)
    assert len(found) == min(length, count)
    assert found == sorted(set(found))
    gaps = np.diff([-1 - found[0], *found, 2 * length - 1 - found[-1]])
    assert max(gaps) <= math.ceil(length / len(found)) + 1
