"""Neuron selection against naive least squares: every removal tried, every refit done on data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.eliminating import eliminate
from tuckerize.domain import StackShape
from tuckerize.linalg.selection import (
    Elimination,
    KeptNeurons,
    all_neurons,
    kept_neurons,
    refit_down,
    refitted_energy,
)

F64 = torch.float64
RIDGE = 1e-4
REFIT_RIDGE = 1e-3


def make_neurons(
    experts: int, tokens: int, neurons: int, *, rank: int | None = None, seed: int = 0
) -> Tensor:
    """Correlated neurons of uneven energy, shape (E, N, H), in float64."""
    generator = torch.Generator().manual_seed(seed)
    inner = rank or neurons
    return torch.stack(
        [
            torch.randn(tokens, inner, generator=generator, dtype=F64)
            @ torch.randn(inner, neurons, generator=generator, dtype=F64)
            * torch.logspace(0, -1.5, neurons, dtype=F64)[
                torch.randperm(neurons, generator=generator)
            ]
            for _ in range(experts)
        ]
    )


def make_down(experts: int, neurons: int, hidden: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, neurons, hidden, generator=generator, dtype=F64)


def with_ridge(h_NH: Tensor, share: float) -> Tensor:
    """The data with rows whose second moment is the ridge."""
    ridge = share * float(h_NH.square().sum(0).mean()) or 1.0
    return torch.cat([h_NH, ridge**0.5 * torch.eye(h_NH.shape[1], dtype=F64)])


def refitted(h_NH: Tensor, down_HI: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """down on the kept neurons by least squares on the data, and the squared output error."""
    exact_NI = h_NH @ down_HI
    if not kept:
        return down_HI[:0], float(exact_NI.square().sum())
    fitted_KI: Tensor = torch.linalg.lstsq(h_NH[:, kept], exact_NI).solution
    return fitted_KI, float((h_NH[:, kept] @ fitted_KI - exact_NI).square().sum())


def moments(h_ENH: Tensor) -> Tensor:
    return h_ENH.mT @ h_ENH


def both(now_EKK: Tensor, cross_EKH: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Moments for the refit of one expert after another."""
    return list(zip(now_EKK, cross_EKH, strict=True))


def test_first_removal_is_the_cheapest_of_all_and_costs_what_a_refit_loses() -> None:
    h_ENH, down_EHI = make_neurons(3, 60, 7), make_down(3, 7, 5)
    found = eliminate(moments(h_ENH), down_EHI)
    least = []
    for h_NH, down_HI, order_H in zip(h_ENH, down_EHI, found.order_EH, strict=True):
        data = with_ridge(h_NH, RIDGE)
        costs = [refitted(data, down_HI, [n for n in range(7) if n != j])[1] for j in range(7)]
        assert int(order_H[0]) == min(range(7), key=costs.__getitem__)
        least.append(min(costs))
    assert float(found.errors_H[1]) == pytest.approx(sum(least), rel=1e-6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    experts, neurons = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    tokens, seed = draw(st.integers(1, 30)), draw(st.integers(0, 1000))
    rank = draw(st.integers(1, neurons))
    h_ENH = make_neurons(experts, tokens, neurons, rank=rank, seed=seed)
    return h_ENH, make_down(experts, neurons, draw(st.integers(1, 6)), seed=seed + 1)


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(problem=problems())
def test_errors_of_all_widths_are_those_of_the_least_squares_refit(
    problem: tuple[Tensor, Tensor],
) -> None:
    h_ENH, down_EHI = problem
    experts, _, neurons = h_ENH.shape
    found = eliminate(moments(h_ENH), down_EHI)
    assert found.errors_H.shape == (neurons + 1,)
    assert float(found.errors_H[0]) == 0
    assert bool((found.errors_H.diff() >= 0).all())
    assert all(sorted(order) == list(range(neurons)) for order in found.order_EH.tolist())
    for width in range(neurons + 1):
        assert found.kept(width, equal=True).widths == (width,) * experts
        equal = found.costs_EH[:, : neurons - width].sum()
        assert float(found.equal_errors_H[neurons - width]) == pytest.approx(float(equal))
    for width in range(1, neurons + 1):
        kept = found.kept(width)
        assert sum(kept.widths) == experts * width
        with_, without, costs = 0.0, 0.0, 0.0
        for expert, (h_NH, down_HI) in enumerate(zip(h_ENH, down_EHI, strict=True)):
            kept_K = kept.of_expert(expert).tolist()
            assert kept_K == sorted(set(kept_K))
            with_ += refitted(with_ridge(h_NH, RIDGE), down_HI, kept_K)[1]
            without += refitted(h_NH, down_HI, kept_K)[1]
            costs += float(found.costs_EH[expert, : neurons - len(kept_K)].sum())
        scale = float(found.errors_H[-1])
        assert costs == pytest.approx(with_, rel=1e-5, abs=1e-9 * scale)
        assert without <= costs * (1 + 1e-5) + 1e-9 * scale
        # The curve is of widths without a floor.
        error = float(found.errors_H[neurons - width])
        if min(kept.widths) > max(1, width // 4):
            assert error == pytest.approx(costs, rel=1e-5, abs=1e-9 * scale)


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(
    costs=st.lists(st.lists(st.floats(0, 10), min_size=9, max_size=9), min_size=2, max_size=2),
    width=st.sampled_from([2, 4, 6, 8]),
    multiple=st.sampled_from([1, 2]),
)
def test_widths_are_those_of_least_cost_among_all_of_the_same_sum(
    costs: list[list[float]], width: int, multiple: int
) -> None:
    """By trying all: costs that never fall along an order, as they do but for rounding."""
    costs_EH = torch.tensor(costs, dtype=F64).sort(dim=1).values
    found = Elimination(torch.arange(9).expand(2, -1), costs_EH)
    kept = found.kept(width, multiple=multiple)
    assert sum(kept.widths) == 2 * width
    assert all(own % multiple == 0 for own in kept.widths)

    def lost(first: int) -> float:
        second = 2 * width - first
        return float(costs_EH[0, : 9 - first].sum() + costs_EH[1, : 9 - second].sum())

    least = max(1, int(0.25 * width) // multiple) * multiple
    most = 9 - 9 % multiple
    possible = [
        first for first in range(least, most + 1, multiple) if least <= 2 * width - first <= most
    ]
    assert lost(kept.widths[0]) == pytest.approx(min(lost(first) for first in possible))


def test_kept_neurons_are_told_from_a_mask_and_back() -> None:
    mask_EH = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]]).bool()
    kept = kept_neurons(mask_EH)
    assert kept.widths == (3, 1, 2)
    assert [kept.of_expert(e).tolist() for e in range(3)] == [[0, 2, 3], [2], [0, 1]]
    assert all(len(set(places)) == 3 for places in kept.places_EK.tolist())
    assert torch.equal(kept.mask(4), mask_EH)
    stack_EHI = torch.randn(3, 4, 5)
    rows_EKI = kept.rows(stack_EHI)
    for expert, width in enumerate(kept.widths):
        assert torch.equal(rows_EKI[expert, :width], stack_EHI[expert][mask_EH[expert]])
        assert not rows_EKI[expert, width:].any()


def test_neuron_that_others_replace_goes_first_at_no_cost() -> None:
    h_ENH = make_neurons(2, 80, 8)
    h_ENH[0, :, 5] = -2 * h_ENH[0, :, 3]
    h_ENH[1, :, 0] = h_ENH[1, :, 2] + h_ENH[1, :, 6]
    found = eliminate(moments(h_ENH), make_down(2, 8, 6))
    assert int(found.order_EH[0, 0]) in (3, 5)
    assert int(found.order_EH[1, 0]) in (0, 2, 6)
    assert float(found.errors_H[1]) < RIDGE * float(found.errors_H[-1])


def test_silent_neurons_and_unused_ones_go_first() -> None:
    h_ENH, down_EHI = make_neurons(1, 50, 6), make_down(1, 6, 4)
    h_ENH[0, :, 4] = 0
    down_EHI[0, 1] = 0
    found = eliminate(moments(h_ENH), down_EHI)
    assert set(found.order_EH[0, :2].tolist()) == {1, 4}
    assert float(found.errors_H[2]) < 1e-3 * float(found.errors_H[-1])


def test_expert_without_any_data_is_no_obstacle() -> None:
    h_ENH, down_EHI = make_neurons(3, 40, 5), make_down(3, 5, 4)
    h_ENH[1] = 0
    found = eliminate(moments(h_ENH).float(), down_EHI.float())
    assert bool(found.errors_H.isfinite().all())
    assert sorted(found.order_EH[1].tolist()) == list(range(5))


def test_moment_that_rounding_made_indefinite_is_no_obstacle() -> None:
    h_ENH, down_EHI = make_neurons(2, 40, 5), make_down(2, 5, 4)
    moments_EHH = moments(h_ENH)
    moments_EHH[1] -= 0.01 * moments_EHH[1].diagonal().mean() * torch.eye(5)
    assert float(torch.linalg.eigvalsh(moments_EHH[1])[0]) < 0
    found = eliminate(moments_EHH, down_EHI)
    assert bool(found.errors_H.isfinite().all())
    fitted = refit_down(both(moments_EHH, moments_EHH), down_EHI, all_neurons(StackShape(2, 5, 4)))
    assert bool(fitted.isfinite().all())


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_order_does_not_depend_on_the_unit(scale: float) -> None:
    h_ENH, down_EHI = make_neurons(2, 40, 6), make_down(2, 6, 4)
    expected = eliminate(moments(h_ENH), down_EHI)
    found = eliminate(moments(h_ENH) * scale, down_EHI)
    assert torch.equal(found.order_EH, expected.order_EH)
    torch.testing.assert_close(found.errors_H, expected.errors_H * scale, rtol=1e-6, atol=0)


def test_many_neurons_go_in_rounds_and_nearly_as_cheaply() -> None:
    """More neurons than rounds: several at once, with an exact error behind every round."""
    neurons = 300
    h_ENH, down_EHI = make_neurons(1, 500, neurons, rank=40), make_down(1, neurons, 6)
    found = eliminate(moments(h_ENH), down_EHI)
    assert sorted(found.order_EH[0].tolist()) == list(range(neurons))
    assert found.errors_H.shape == (neurons + 1,)
    assert bool((found.errors_H.diff() >= 0).all())
    kept_K = found.kept(60).of_expert(0).tolist()
    exact = refitted(with_ridge(h_ENH[0], RIDGE), down_EHI[0], kept_K)[1]
    assert float(found.errors_H[neurons - 60]) == pytest.approx(exact, rel=1e-6)
    # 40 independent ones are enough for all.
    assert exact < 1e-2 * float(found.errors_H[-1])


@pytest.mark.parametrize("tokens", [0, 3, 60])
def test_refit_of_down_is_least_squares_with_a_ridge_towards_the_kept_rows(tokens: int) -> None:
    h_ENH, down_EHI = make_neurons(2, tokens, 7), make_down(2, 7, 5)
    kept_EK = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5]])
    kept = KeptNeurons(kept_EK, (4, 4))
    now_ENK = h_ENH.gather(2, kept_EK[:, None].expand(-1, tokens, -1))
    now_ENK = now_ENK + 0.1 * now_ENK.roll(1, 1)  # as compressed gate and up would make them
    found_EKI = refit_down(both(now_ENK.mT @ now_ENK, now_ENK.mT @ h_ENH), down_EHI, kept)
    for h_NH, now_NK, down_HI, kept_K, found_KI in zip(
        h_ENH, now_ENK, down_EHI, kept_EK, found_EKI, strict=True
    ):
        ridge = max(REFIT_RIDGE * float(now_NK.square().sum(0).mean()), 1e-33)
        data = torch.cat([now_NK, ridge**0.5 * torch.eye(4, dtype=F64)])
        target = torch.cat([h_NH @ down_HI, ridge**0.5 * down_HI[kept_K]])
        expected_KI = torch.linalg.lstsq(data, target).solution
        torch.testing.assert_close(found_KI, expected_KI, rtol=1e-6, atol=1e-8)


def test_refit_recovers_what_its_error_lacks() -> None:
    (h_NH,), (down_HI,) = make_neurons(1, 50, 6), make_down(1, 6, 4)
    now_NH = h_NH + 0.3 * h_NH.roll(1, 1)
    recovered = refitted_energy(now_NH.T @ now_NH, now_NH.T @ h_NH @ down_HI, down_HI)
    shape = StackShape(1, 6, 4)
    fitted_HI = refit_down(
        [(now_NH.T @ now_NH, now_NH.T @ h_NH)], down_HI[None], all_neurons(shape)
    )[0]
    exact_NI = h_NH @ down_HI
    error = (now_NH @ fitted_HI - exact_NI).square().sum()
    assert float(exact_NI.square().sum()) - recovered == pytest.approx(float(error), rel=1e-6)
    of_columns = [
        refitted_energy(now_NH.T @ now_NH, now_NH.T @ h_NH @ down_H1, down_H1)
        for down_H1 in down_HI.split(1, dim=1)
    ]
    assert sum(of_columns) == pytest.approx(recovered, rel=1e-9)


@settings(derandomize=True, max_examples=30, deadline=None, database=None)
@given(problem=problems(), noise=st.floats(0, 1), data=st.data())
def test_refit_of_down_is_never_worse_than_the_rows_as_they_were(
    problem: tuple[Tensor, Tensor], noise: float, data: st.DataObject
) -> None:
    h_ENH, down_EHI = problem
    experts, tokens, neurons = h_ENH.shape
    width = data.draw(st.integers(1, neurons))
    kept = eliminate(moments(h_ENH), down_EHI).kept(width)
    noise_ENK = noise * make_neurons(experts, tokens, neurons, seed=7)
    now_ENK = kept.rows((h_ENH + noise_ENK).mT).mT
    found_EKI = refit_down(both(now_ENK.mT @ now_ENK, now_ENK.mT @ h_ENH), down_EHI, kept)
    kept_EKI = kept.rows(down_EHI)
    exact_ENI = h_ENH @ down_EHI
    before = (now_ENK @ kept_EKI - exact_ENI).square().sum(dim=(1, 2))
    after = (now_ENK @ found_EKI - exact_ENI).square().sum(dim=(1, 2))
    assert bool((after <= before + 1e-9 * exact_ENI.square().sum()).all())


def test_refit_of_all_neurons_as_they_were_changes_nothing() -> None:
    h_ENH, down_EHI = make_neurons(2, 30, 6, rank=3), make_down(2, 6, 4)
    kept = all_neurons(StackShape(2, 6, 4))
    found = refit_down(both(moments(h_ENH), moments(h_ENH)), down_EHI, kept)
    torch.testing.assert_close(found, down_EHI, rtol=1e-9, atol=1e-9)
