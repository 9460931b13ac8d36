"""Core sizes for an exact parameter budget, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuckerize.domain import MultilinearRank, StackShape, stored_parameters
from tuckerize.errors import UsageError


@dataclass(frozen=True, slots=True)
class BudgetUnit:
    """Stacks that share one U_I and so one core size r_I.

    Attributes:
        shape: Sizes (E, H, I) of each of them.
        coupled: How many they are.
    """

    shape: StackShape
    coupled: int

    @property
    def dense_parameters(self) -> int:
        """Numbers in the dense stacks."""
        return self.coupled * self.shape.parameters

    def parameters(self, hidden: int) -> int:
        """Numbers stored at core size `hidden` of the hidden mode, the other modes full."""
        return stored_parameters(self.shape, self.rank(hidden), coupled=self.coupled)

    def rank(self, hidden: int) -> MultilinearRank:
        """Core sizes (E, H, hidden)."""
        return MultilinearRank(self.shape.experts, self.shape.intermediate, hidden)


def ranks_for_keep(units: Sequence[BudgetUnit], keep: float) -> list[MultilinearRank]:
    """Core sizes that store at most `keep` of the dense parameters of all units together.

    Without calibration data nothing tells one stack from another: all get the same share. Only the
    hidden mode is truncated (the latent shape); a factor on the intermediate mode would mix neurons
    that do not correspond. What rounding down leaves over is given back one column a unit, first
    unit first, so the result falls short of the budget by less than one column of one unit.

    Args:
        units: What shares the budget.
        keep: Kept share of the dense parameters, in (0, 1].

    Raises:
        UsageError: The budget does not pay for one column a unit; the hint names the smallest.
    """
    budget = int(keep * sum(unit.dense_parameters for unit in units))
    hidden = [_largest_hidden(unit, keep) for unit in units]
    if 0 in hidden:
        least = sum(unit.parameters(1) for unit in units)
        total = sum(unit.dense_parameters for unit in units)
        raise UsageError(
            f"keep {keep:g} is below what the smallest core size stores",
            hint=f"choose keep of at least {math.ceil(1000 * least / total) / 1000:g}",
        )
    left = budget - sum(unit.parameters(size) for unit, size in zip(units, hidden, strict=True))
    for index, unit in enumerate(units):
        if hidden[index] == unit.shape.hidden:
            continue
        step = unit.parameters(hidden[index] + 1) - unit.parameters(hidden[index])
        if step <= left:
            hidden[index] += 1
            left -= step
    return [unit.rank(size) for unit, size in zip(units, hidden, strict=True)]


def _largest_hidden(unit: BudgetUnit, keep: float) -> int:
    """Largest core size of the hidden mode that stores at most `keep`; 0 if even 1 is too much."""
    if keep >= 1.0:
        return unit.shape.hidden
    budget = int(keep * unit.dense_parameters)
    size = min(budget // unit.parameters(1), unit.shape.hidden - 1)
    return int(size)
