"""Candidates of every layer, and the best of them within a budget for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuckerize.compression.target import CompressionTarget

Array = npt.NDArray[np.float64]

# Resolution: steps into which the budget above the smallest sizes is divided.
_UNITS = 16384


@dataclass(frozen=True, slots=True)
class Choice:
    """Target of one layer and its predicted cost.

    Attributes:
        target: Sizes that the stacks of every group are compressed to.
        bytes: Bytes stored of all groups.
        error: Relative squared output error of the layer.
        sensitivity: See `LayerProfile`.
    """

    target: CompressionTarget
    bytes: int
    error: float
    sensitivity: float

    @property
    def predicted_kl(self) -> float:
        """KL divergence from the source that the error causes, nats per token."""
        return self.error * self.sensitivity


@dataclass(frozen=True, slots=True)
class Frontier:
    """Pareto-optimal candidates of one layer, by ascending bytes.

    Attributes:
        targets: Sizes of the candidates; made when they are asked for.
        bytes: Bytes stored of all groups.
        errors: Relative squared output errors.
        sensitivity: See `LayerProfile`.
    """

    targets: Callable[[int], CompressionTarget]
    bytes: Array
    errors: Array
    sensitivity: float

    def choice(self, index: int) -> Choice:
        """One of the candidates."""
        stored, error = int(self.bytes[index]), float(self.errors[index])
        return Choice(self.targets(index), stored, error, self.sensitivity)

    def best_within(self, budget: float) -> int:
        """Index of the smallest error within so many bytes; -1 if there is none."""
        return int(np.searchsorted(self.bytes, budget, side="right")) - 1


def knapsack(frontiers: Sequence[Frontier], budget: float, *, finest: float) -> list[Choice]:
    """Dynamic programming over the budget, layer by layer.

    Units do not depend on the budget and costs are rounded up to them, so that what fits a budget
    fits a larger one as well.

    Args:
        frontiers: Candidates of every layer.
        budget: Bytes of all layers together.
        finest: Bytes of one value, below which a unit makes no sense.

    Source:
        The multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, chapter 11).
    """
    left = budget - sum(frontier.bytes[0] for frontier in frontiers)
    most = sum(frontier.bytes[-1] - frontier.bytes[0] for frontier in frontiers)
    if most <= left:
        return [frontier.choice(len(frontier.bytes) - 1) for frontier in frontiers]
    unit = max(finest, most / _UNITS)
    units = int(left // unit)
    least = np.zeros(units + 1)  # KL divergence of the layers so far, by cost
    tables = []
    for frontier in frontiers:
        costs = np.ceil((frontier.bytes - frontier.bytes[0]) / unit).astype(int)
        with_own = np.full(units + 1, np.inf)
        places = np.zeros(units + 1, dtype=int)
        useful = np.append(np.diff(costs) > 0, True) & (costs <= units)
        for place in np.flatnonzero(useful).tolist():
            cost = costs[place]
            total = least[: units + 1 - cost] + frontier.errors[place] * frontier.sensitivity
            better = total < with_own[cost:]
            with_own[cost:][better] = total[better]
            places[cost:][better] = place
        least = with_own
        tables.append((costs, places))
    choices = []
    for frontier, (costs, places) in zip(reversed(frontiers), reversed(tables), strict=True):
        place = int(places[units])
        choices.append(frontier.choice(place))
        units -= int(costs[place])
    return choices[::-1]
