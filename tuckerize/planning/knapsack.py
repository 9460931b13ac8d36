"""Candidates of every layer, and the best of them within a budget for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

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


class Knapsack:
    """Dynamic programming over the budget, layer by layer, once for all budgets.

    Units do not depend on the budget and costs are rounded up to them, so that what fits a budget
    fits a larger one as well.

    Args:
        frontiers: Candidates of every layer.
        finest: Bytes of one value, below which a unit makes no sense.

    Source:
        The multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, chapter 11).
    """

    def __init__(self, frontiers: Sequence[Frontier], *, finest: float) -> None:
        self.frontiers = frontiers
        self.least = sum(frontier.bytes[0] for frontier in frontiers)
        self.most = sum(frontier.bytes[-1] - frontier.bytes[0] for frontier in frontiers)
        self.unit = max(finest, self.most / _UNITS)

    def choose(self, budget: float) -> list[Choice]:
        """The choice of every layer with the smallest sum of KL divergences.

        Args:
            budget: Bytes of all layers together.
        """
        left = budget - self.least
        if self.most <= left:
            return [frontier.choice(len(frontier.bytes) - 1) for frontier in self.frontiers]
        units = int(left // self.unit)
        choices = []
        for frontier, (costs, places) in zip(
            reversed(self.frontiers), reversed(self._tables), strict=True
        ):
            place = int(places[units])
            choices.append(frontier.choice(place))
            units -= int(costs[place])
        return choices[::-1]

    @cached_property
    def _tables(self) -> list[tuple[Array, Array]]:
        """Costs of every layer's candidates, and the best one by cost of the layers so far."""
        units = int(self.most // self.unit)
        least = np.zeros(units + 1)  # KL divergence of the layers so far, by cost
        tables = []
        for frontier in self.frontiers:
            costs = np.ceil((frontier.bytes - frontier.bytes[0]) / self.unit).astype(int)
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
        return tables
