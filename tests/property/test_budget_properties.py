"""Budgets: never exceeded, and used up to less than the smallest step, or to 1 % in bits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from tuckerize.domain import CoreType, StackShape
from tuckerize.errors import UsageError
from tuckerize.planning.budget import Budget
from tuckerize.planning.uniform import BudgetUnit, encoding_for_budget, ranks_for_budget
from tuckerize.weight_types import WEIGHT_TYPES

keeps = st.floats(0.01, 1.0)


@st.composite
def plans(draw: st.DrawFn) -> list[BudgetUnit]:
    """What shares a budget: the couplings of one recipe in all layers and groups."""
    shape = StackShape(draw(st.integers(1, 12)), draw(st.integers(1, 40)), draw(st.integers(2, 60)))
    couplings = draw(st.sampled_from([(2, 1), (1, 1, 1)]))
    groups, layers = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    return [
        BudgetUnit(shape, coupled, WEIGHT_TYPES["BF16"])
        for _ in range(layers)
        for coupled in couplings
        for _ in range(groups)
    ]


def dense(units: list[BudgetUnit]) -> int:
    return sum(unit.dense_bytes for unit in units)


def stored(units: list[BudgetUnit], keep: float) -> int:
    try:
        ranks = ranks_for_budget(units, Budget(keep))
    except UsageError:
        assume(False)
        raise
    return sum(unit.bytes(rank.hidden) for unit, rank in zip(units, ranks, strict=True))


@given(plans(), keeps)
def test_stored_bytes_never_exceed_the_budget(units: list[BudgetUnit], keep: float) -> None:
    assert stored(units, keep) <= keep * dense(units)


@given(plans(), keeps)
def test_stored_bytes_fall_short_by_less_than_the_smallest_step(
    units: list[BudgetUnit], keep: float
) -> None:
    total = stored(units, keep)
    assume(total < dense(units))
    # A column of every core, and one of U_I: what one more core size of one unit stores.
    shape = units[0].shape
    coupled = min(unit.coupled for unit in units)
    step = 2 * (coupled * shape.experts * shape.intermediate + shape.hidden)
    short = keep * dense(units) - total
    assert short < step
    if step < keep * dense(units) / 100:
        assert short < keep * dense(units) / 100


@given(plans(), keeps, keeps)
def test_stored_bytes_never_fall_when_keep_grows(
    units: list[BudgetUnit], keep: float, other: float
) -> None:
    low, high = sorted((keep, other))
    assert stored(units, low) <= stored(units, high)


@given(plans())
def test_keep_one_stores_what_the_dense_stacks_do(units: list[BudgetUnit]) -> None:
    assert stored(units, 1.0) == dense(units)


def is_of_128(cores: CoreType | None) -> bool:
    return cores is not None and cores.group_size == 128


@st.composite
def wide_plans(draw: st.DrawFn) -> tuple[list[BudgetUnit], CoreType | None]:
    """Layers of a size at which a step is far below 1 % of a budget."""
    cores = draw(st.sampled_from([None, *CoreType]))
    step = 2 if is_of_128(cores) else 1  # groups are whole
    hidden = 64 * step * draw(st.integers(24 // step, 112 // step))
    neurons = 64 * step * draw(st.integers(8 // step, 32 // step))
    shape = StackShape(draw(st.integers(8, 128)), neurons, hidden)
    weights = replace(WEIGHT_TYPES["BF16"], cores=cores)
    layers = draw(st.integers(24, 60))
    return [
        BudgetUnit(shape, coupled, weights, transposed=coupled == 1)
        for _ in range(layers)
        for coupled in (2, 1)
    ], cores


@given(wide_plans(), st.floats(1.0, 16.0))
def test_bits_are_exact_to_one_percent_from_below(
    plan: tuple[list[BudgetUnit], CoreType | None], bits: float
) -> None:
    units, cores = plan
    routed = sum(unit.coupled * unit.shape.parameters for unit in units)
    ranks = ranks_for_budget(units, Budget.of_bits(bits, dense_bits=16))
    total = sum(unit.bytes(rank.hidden) for unit, rank in zip(units, ranks, strict=True))
    assert 8 * total / routed <= bits
    whole = all(rank.hidden == unit.shape.hidden for unit, rank in zip(units, ranks, strict=True))
    if not whole:
        # From full modes to the largest latent space, which needs U_I, nothing lies in between.
        largest = [unit.bytes(unit.shape.hidden - unit.step) for unit in units]
        # Groups of 128 are a large part of a hidden mode: less than a step of a stack is left.
        step = max(u.bytes(2 * u.step) - u.bytes(u.step) for u in units) if is_of_128(cores) else 0
        missed = max(0.01 * bits, 8 * step / routed)
        assert 8 * total / routed >= min(bits - missed, 8 * sum(largest) / routed)
    else:
        scales = 16 / cores.group_size if cores and cores.group_size else 0.1
        assert 8 * total / routed <= (cores.bits + scales if cores else 16)


@given(wide_plans(), st.floats(1.0, 16.0))
def test_cores_have_the_most_bits_that_need_no_truncation(
    plan: tuple[list[BudgetUnit], CoreType | None], bits: float
) -> None:
    units, _ = plan

    def encoded(cores: CoreType | None) -> list[BudgetUnit]:
        return [replace(unit, weights=replace(unit.weights, cores=cores)) for unit in units]

    found = encoding_for_budget(encoded, Budget.of_bits(bits, dense_bits=16))
    assert found == (None if bits >= 16 else CoreType.W8 if bits >= 8.1 else CoreType.W4) or (
        8.0 < bits < 8.1
    )
