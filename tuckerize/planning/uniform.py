"""Core sizes within an exact budget of bytes, from shapes alone: every stack the same share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuckerize.domain import ENCODINGS, CoreType, MultilinearRank, StackShape
from tuckerize.planning.budget import Budget
from tuckerize.weight_types import WeightType, stored_bytes

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
        weights: Type of the stored factors and cores.
        transposed: Whether they are of down_proj.
    """

    shape: StackShape
    coupled: int
    weights: WeightType
    transposed: bool = False

    @property
    def step(self) -> int:
        """Difference of the core sizes that the hidden mode may have."""
        if self.shape.hidden < _ALIGNED_FROM:
            return 1
        return max(_ALIGNED, (self.weights.cores and self.weights.cores.group_size) or 1)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense stacks in the type of the factors."""
        return replace(self, weights=self.weights.plain).bytes(self.shape.hidden)

    def bytes(self, hidden: int) -> int:
        """Bytes stored at core size `hidden` of the hidden mode, the other modes full."""
        return stored_bytes(
            self.shape,
            self.rank(hidden),
            self.weights,
            coupled=self.coupled,
            transposed=self.transposed,
        )

    def rank(self, hidden: int) -> MultilinearRank:
        """Core sizes (E, H, hidden)."""
        return MultilinearRank(self.shape.experts, self.shape.intermediate, hidden)


def ranks_for_budget(units: Sequence[BudgetUnit], budget: Budget) -> list[MultilinearRank]:
    """Core sizes that store at most the budget's share of the dense bytes of all units together.

    Without calibration data nothing tells one stack from another: all get the same share. Only the
    hidden mode is truncated (the latent shape); a factor on the intermediate mode would mix neurons
    that do not correspond. Core sizes of large models are multiples of 8, of 32 with cores of 4
    bits. What rounding down leaves of the budget buys one more step per unit, first unit first, so
    the result falls short by less than one step of one unit.

    Args:
        units: Stacks that share the budget.
        budget: Share of the dense bytes.

    Raises:
        UsageError: The budget does not pay for one step per unit; the hint names the smallest.
    """
    for unit in units:
        budget.check(dense=unit.dense_bytes, least=unit.bytes(unit.step))
    hidden = [_largest_hidden(unit, budget.bytes(unit.dense_bytes)) for unit in units]
    left = budget.bytes(sum(unit.dense_bytes for unit in units))
    left -= sum(unit.bytes(size) for unit, size in zip(units, hidden, strict=True))
    for index, unit in enumerate(units):
        if hidden[index] == unit.shape.hidden:
            continue
        size = min(hidden[index] + unit.step, unit.shape.hidden)
        step = unit.bytes(size) - unit.bytes(hidden[index])
        if step <= left:
            hidden[index] = size
            left -= step
    return [unit.rank(size) for unit, size in zip(units, hidden, strict=True)]


def encoding_for_budget(
    units: Callable[[CoreType | None], Sequence[BudgetUnit]], budget: Budget
) -> CoreType | None:
    """The encoding with the most bits at which nothing is truncated, else the one with the fewest.

    Down to 4 bits per value, rounding loses less than truncation without calibration.

    Args:
        units: Gives the stacks that share the budget, by the encoding of their cores.
        budget: Share of the dense bytes.
    """
    for cores in ENCODINGS:
        own = units(cores)
        whole = sum(unit.bytes(unit.shape.hidden) for unit in own)
        if whole <= budget.bytes(sum(unit.dense_bytes for unit in own)):
            return cores
    return ENCODINGS[-1]


def _largest_hidden(unit: BudgetUnit, budget: int) -> int:
    """Largest core size of the hidden mode that stores at most so many bytes."""
    if unit.bytes(unit.shape.hidden) <= budget:  # without a factor, full modes may be the smaller
        return unit.shape.hidden
    sizes = range(0, unit.shape.hidden, unit.step)
    return sizes[bisect_right(sizes, budget, key=unit.bytes) - 1]
