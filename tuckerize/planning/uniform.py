"""Core sizes within an exact budget of bytes, from shapes alone: every stack the same share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuckerize.domain import MultilinearRank, StackShape, WeightType, stored_bytes
from tuckerize.planning.budget import check_budget


@dataclass(frozen=True, slots=True)
class BudgetUnit:
    """Stacks that share one U_I and so one core size r_I.

    Attributes:
        shape: Sizes (E, H, I) of each of them.
        coupled: Number of stacks.
        weights: Type of the stored cores and factors.
    """

    shape: StackShape
    coupled: int
    weights: WeightType

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense stacks in that type."""
        return self.bytes(self.shape.hidden)

    def bytes(self, hidden: int) -> int:
        """Bytes stored at core size `hidden` of the hidden mode, the other modes full."""
        return stored_bytes(self.shape, self.rank(hidden), self.weights, coupled=self.coupled)

    def rank(self, hidden: int) -> MultilinearRank:
        """Core sizes (E, H, hidden)."""
        return MultilinearRank(self.shape.experts, self.shape.intermediate, hidden)


def ranks_for_keep(units: Sequence[BudgetUnit], keep: float) -> list[MultilinearRank]:
    """Core sizes that store at most `keep` of the dense bytes of all units together.

    Without calibration data nothing tells one stack from another: all get the same share. Only the
    hidden mode is truncated (the latent shape); a factor on the intermediate mode would mix neurons
    that do not correspond. What rounding down leaves of the budget buys one more column per unit,
    first unit first, so the result falls short by less than one column of one unit.

    Args:
        units: Stacks that share the budget.
        keep: Kept share of the dense bytes, in (0, 1].

    Raises:
        UsageError: The budget does not pay for one column per unit; the hint names the smallest.
    """
    for unit in units:
        check_budget(keep, dense=unit.dense_bytes, least=unit.bytes(1))
    budget = int(keep * sum(unit.dense_bytes for unit in units))
    hidden = [_largest_hidden(unit, keep) for unit in units]
    left = budget - sum(unit.bytes(size) for unit, size in zip(units, hidden, strict=True))
    for index, unit in enumerate(units):
        if hidden[index] == unit.shape.hidden:
            continue
        step = unit.bytes(hidden[index] + 1) - unit.bytes(hidden[index])
        if step <= left:
            hidden[index] += 1
            left -= step
    return [unit.rank(size) for unit, size in zip(units, hidden, strict=True)]


def _largest_hidden(unit: BudgetUnit, keep: float) -> int:
    """Largest core size of the hidden mode that stores at most `keep`."""
    if keep >= 1.0:
        return unit.shape.hidden
    budget = int(keep * unit.dense_bytes)
    return min(budget // unit.bytes(1), unit.shape.hidden - 1)
