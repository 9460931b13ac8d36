from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import UsageError
from tuckerize.planning.budget import Budget
from tuckerize.planning.uniform import BudgetUnit, ranks_for_budget
from tuckerize.weight_types import WEIGHT_TYPES

LITE = StackShape(64, 1408, 2048)
BF16 = WEIGHT_TYPES["BF16"]


def stored(units: list[BudgetUnit], ranks: list[MultilinearRank]) -> int:
    return sum(unit.bytes(rank.hidden) for unit, rank in zip(units, ranks, strict=True))


@pytest.mark.parametrize(("name", "itemsize"), [("BF16", 2), ("F16", 2), ("F32", 4)])
def test_budget_unit_counts_dense_and_stored_bytes(name: str, itemsize: int) -> None:
    unit = BudgetUnit(StackShape(2, 3, 5), 2, WEIGHT_TYPES[name])
    assert unit.dense_bytes == 60 * itemsize
    assert unit.bytes(4) == (2 * 2 * 3 * 4 + 5 * 4) * itemsize
    assert unit.bytes(5) == 60 * itemsize
    assert unit.rank(4) == MultilinearRank(2, 3, 4)


def test_ranks_for_budget_one_are_full_modes() -> None:
    units = [BudgetUnit(LITE, 2, BF16), BudgetUnit(LITE, 1, BF16)]
    assert ranks_for_budget(units, Budget(1.0)) == [MultilinearRank(*LITE)] * 2


def test_ranks_for_budget_give_what_rounding_left_to_the_first_units() -> None:
    # A column of U_I and core is 2 x 3 + 5 = 11 values, of 30; keep 0.7 of five units is 105: one
    # column each is 55, and four more columns fit.
    units = [BudgetUnit(StackShape(2, 3, 5), 1, BF16)] * 5
    ranks = ranks_for_budget(units, Budget(0.7))
    assert [rank.hidden for rank in ranks] == [2, 2, 2, 2, 1]
    assert stored(units, ranks) == 99 * 2


def test_ranks_for_budget_of_a_large_model_are_aligned_and_come_within_a_step_of_the_budget() -> (
    None
):
    units = [BudgetUnit(LITE, coupled, BF16) for _ in range(26) for coupled in (2, 1)]
    dense = sum(unit.dense_bytes for unit in units)
    ranks = ranks_for_budget(units, Budget(0.75))
    assert 0 <= 0.75 * dense - stored(units, ranks) < 2 * 8 * (64 * 1408 + 2048)
    assert all(rank.hidden % 8 == 0 for rank in ranks)


def test_ranks_for_budget_below_one_column_are_refused_with_the_least_that_works() -> None:
    units = [BudgetUnit(StackShape(2, 3, 5), 1, BF16)] * 2
    with pytest.raises(UsageError) as caught:
        ranks_for_budget(units, Budget(0.3))
    assert caught.value.message == "keep 0.3 is below what the smallest sizes store"
    assert caught.value.hint == "choose keep of at least 0.367"
    assert ranks_for_budget(units, Budget(0.367)) == [MultilinearRank(2, 3, 1)] * 2


def test_ranks_for_budget_below_one_column_of_the_lone_projection_name_what_that_one_needs() -> (
    None
):
    """Two stacks that share one U_I need a smaller share than a stack on its own."""
    units = [BudgetUnit(StackShape(2, 3, 5), coupled, BF16) for coupled in (2, 1)]
    with pytest.raises(UsageError) as caught:
        ranks_for_budget(units, Budget(0.3))
    assert caught.value.hint == "choose keep of at least 0.367"
    assert [rank.hidden for rank in ranks_for_budget(units, Budget(0.367))] == [1, 1]


@given(st.sampled_from(["F16", "F32", "F64"]), st.floats(0.4, 1), st.integers(1, 6))
def test_ranks_for_budget_do_not_depend_on_the_bytes_of_a_value(
    name: str, keep: float, count: int
) -> None:
    """For one type, shares of bytes and of parameters are the same."""
    shape = StackShape(3, 7, 29)
    both = [
        [BudgetUnit(shape, coupled, WEIGHT_TYPES[kind]) for coupled in (2, 1)] * count
        for kind in ("BF16", name)
    ]
    assert ranks_for_budget(both[0], Budget(keep)) == ranks_for_budget(both[1], Budget(keep))
