"""Core sizes within an exact budget of bytes, from shapes alone: every stack the same share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuckerize.domain import MultilinearRank, StackShape, WeightType, stored_bytes
from tuckerize.planning.budget import check_budget

# Grouped GEMMs of devices need aligned sizes: 16 bytes. For small models, which run anywhere, the
# step would be a large part of the budget.
_ALIGNED = 8
_ALIGNED_FROM = 1024


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
    def step(self) -> int:
        """Difference of the core sizes that the hidden mode may have."""
        return _ALIGNED if self.shape.hidden >= _ALIGNED_FROM else 1

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
    that do not correspond. Core sizes of large models are multiples of 8. What rounding down leaves
    of the budget buys one more step per unit, first unit first, so the result falls short by less
    than one step of one unit.

    Args:
        units: Stacks that share the budget.
        keep: Kept share of the dense bytes, in (0, 1].

    Raises:
        UsageError: The budget does not pay for one step per unit; the hint names the smallest.
    """
    for unit in units:
        check_budget(keep, dense=unit.dense_bytes, least=unit.bytes(unit.step))
    budget = int(keep * sum(unit.dense_bytes for unit in units))
    hidden = [_largest_hidden(unit, keep) for unit in units]
    left = budget - sum(unit.bytes(size) for unit, size in zip(units, hidden, strict=True))
    for index, unit in enumerate(units):
        if hidden[index] == unit.shape.hidden:
            continue
        size = min(hidden[index] + unit.step, unit.shape.hidden)
        step = unit.bytes(size) - unit.bytes(hidden[index])
        if step <= left:
            hidden[index] = size
            left -= step
    return [unit.rank(size) for unit, size in zip(units, hidden, strict=True)]


def _largest_hidden(unit: BudgetUnit, keep: float) -> int:
    """Largest core size of the hidden mode that stores at most `keep`."""
    if keep >= 1.0:
        return unit.shape.hidden
    budget = int(keep * unit.dense_bytes)
    size = min(budget // unit.bytes(1), unit.shape.hidden - 1)
    return size // unit.step * unit.step
