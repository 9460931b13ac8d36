"""Budgets: never exceeded, and used up to less than the smallest step."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from tuckerize.domain import WEIGHT_TYPES, StackShape
from tuckerize.errors import UsageError
from tuckerize.planning.uniform import BudgetUnit, ranks_for_keep

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
        ranks = ranks_for_keep(units, keep)
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
