from __future__ import annotations

import pytest

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import UsageError
from tuckerize.planning.uniform import BudgetUnit, ranks_for_keep

LITE = StackShape(64, 1408, 2048)


def stored(units: list[BudgetUnit], ranks: list[MultilinearRank]) -> int:
    return sum(unit.parameters(rank.hidden) for unit, rank in zip(units, ranks, strict=True))


def test_budget_unit_counts_dense_and_stored_parameters() -> None:
    unit = BudgetUnit(StackShape(2, 3, 5), coupled=2)
    assert unit.dense_parameters == 60
    assert unit.parameters(4) == 2 * 2 * 3 * 4 + 5 * 4
    assert unit.parameters(5) == 60
    assert unit.rank(4) == MultilinearRank(2, 3, 4)


def test_ranks_for_keep_one_are_full_modes() -> None:
    units = [BudgetUnit(LITE, 2), BudgetUnit(LITE, 1)]
    assert ranks_for_keep(units, 1.0) == [MultilinearRank(*LITE)] * 2


def test_ranks_for_keep_give_what_rounding_left_to_the_first_units() -> None:
    # A column of U_I and core is 2 x 3 + 5 = 11 numbers, of 30; keep 0.7 of five units is 105: one
    # column each is 55, and four more columns fit.
    units = [BudgetUnit(StackShape(2, 3, 5), 1)] * 5
    ranks = ranks_for_keep(units, 0.7)
    assert [rank.hidden for rank in ranks] == [2, 2, 2, 2, 1]
    assert stored(units, ranks) == 99


def test_ranks_for_keep_of_a_large_model_come_within_a_column_of_the_budget() -> None:
    units = [BudgetUnit(LITE, coupled) for _ in range(26) for coupled in (2, 1)]
    dense = sum(unit.dense_parameters for unit in units)
    left = 0.75 * dense - stored(units, ranks_for_keep(units, 0.75))
    assert 0 <= left < 64 * 1408 + 2048


def test_ranks_for_keep_below_one_column_are_refused_with_the_least_that_works() -> None:
    units = [BudgetUnit(StackShape(2, 3, 5), 1)] * 2
    with pytest.raises(UsageError) as caught:
        ranks_for_keep(units, 0.3)
    assert caught.value.message == "keep 0.3 is below what the smallest core size stores"
    assert caught.value.hint == "choose keep of at least 0.367"
    assert ranks_for_keep(units, 0.367) == [MultilinearRank(2, 3, 1)] * 2
