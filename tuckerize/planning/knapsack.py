"""Candidates of every layer, and the best of them within a budget for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tuckerize.compression.target import CompressionTarget

Array = npt.NDArray[np.float64]

# Resolution: steps into which the budget above the smallest sizes is divided.
_UNITS = 16384
# Levels of the term of first order at which all layers are chosen, each a third of the one before:
# where all is of first order, the sum is at most (3 + 1) / (2 * 3**0.5) = 1.16 of its minimum.
_LEVELS, _RATIO = 6, 3


class Slopes(NamedTuple):
    """Growth of the KL divergence with the error of a layer; see `LayerProfile`."""

    sensitivity: float
    small_sensitivity: float
    switching: float

    def terms(self, errors: Array) -> tuple[Array, Array]:
        """Part that grows with the squared error, and square of that which grows with the error.

        The latter grows up to the larger error that was probed. Beyond it, where nothing is known,
        all that errors add grows with their square.

        Args:
            errors: Relative squared output errors.
        """
        second, first = errors * self.small_sensitivity, errors * self.switching**2
        if self.sensitivity <= self.small_sensitivity:
            return second, first
        probed = (self.switching / (self.sensitivity - self.small_sensitivity)) ** 2
        beyond = np.maximum(errors - probed, 0) * (self.sensitivity - self.small_sensitivity)
        return second + beyond, np.minimum(first, probed * self.switching**2)


@dataclass(frozen=True, slots=True)
class Choice:
    """Target of one layer and what it costs.

    Attributes:
        target: Sizes that the stacks of every group are compressed to.
        bytes: Bytes stored of all groups.
        error: Relative squared output error of the layer.
        slopes: See `Slopes`.
    """

    target: CompressionTarget
    bytes: int
    error: float
    slopes: Slopes


def predicted_kl(choices: Sequence[Choice]) -> float:
    """KL divergence from the source, nats per token, that the errors of all layers cause.

    Divergences that grow with the squared error add up. A further part, of tokens that later layers
    send to other experts, grows with the error itself: with the root of the sum of squares, as the
    errors of layers are uncorrelated.
    """
    terms = [choice.slopes.terms(np.array(choice.error)) for choice in choices]
    return float(sum(second for second, _ in terms) + sqrt(sum(first for _, first in terms)))


@dataclass(frozen=True, slots=True)
class Frontier:
    """Pareto-optimal candidates of one layer, by ascending bytes.

    Attributes:
        targets: Sizes of the candidates; made when they are asked for.
        bytes: Bytes stored of all groups.
        errors: Relative squared output errors.
        slopes: See `Slopes`.
    """

    targets: Callable[[int], CompressionTarget]
    bytes: Array
    errors: Array
    slopes: Slopes

    def choice(self, index: int) -> Choice:
        """One of the candidates."""
        stored, error = int(self.bytes[index]), float(self.errors[index])
        return Choice(self.targets(index), stored, error, self.slopes)

    def best_within(self, budget: float) -> int:
        """Index of the smallest error within so many bytes; -1 if there is none."""
        return int(np.searchsorted(self.bytes, budget, side="right")) - 1


class _Table(NamedTuple):
    """Best choices of all layers at one level of the term of first order, by cost.

    Attributes:
        layers: Costs of every layer's candidates, and the best one by cost of the layers so far.
        predicted: KL divergence of all layers, see `predicted_kl`, by cost.
    """

    layers: list[tuple[Array, Array]]
    predicted: Array


class Knapsack:
    """Dynamic programming over the budget, layer by layer, once for all budgets.

    Units do not depend on the budget and costs are rounded up to them, so that what fits a budget
    fits a larger one as well. The root in the prediction is the least of its tangents,
    r <= r² / 2t + t / 2, which are sums over layers: for some t, of which the best counts.

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
        """The choice of every layer with the smallest predicted KL divergence.

        Args:
            budget: Bytes of all layers together.
        """
        left = budget - self.least
        if self.most <= left:
            return [frontier.choice(len(frontier.bytes) - 1) for frontier in self.frontiers]
        within = slice(int(left // self.unit) + 1)
        table = min(self._tables, key=lambda own: own.predicted[within].min())
        units = int(table.predicted[within].argmin())
        choices = []
        for frontier, (costs, places) in zip(
            reversed(self.frontiers), reversed(table.layers), strict=True
        ):
            place = int(places[units])
            choices.append(frontier.choice(place))
            units -= int(costs[place])
        return choices[::-1]

    @cached_property
    def _terms(self) -> list[tuple[Array, Array]]:
        return [frontier.slopes.terms(frontier.errors) for frontier in self.frontiers]

    @cached_property
    def _tables(self) -> list[_Table]:
        largest = sqrt(sum(first.max() for _, first in self._terms))
        if not largest:
            return [self._table(np.inf)]
        return [self._table(largest / _RATIO**step) for step in range(_LEVELS)]

    def _table(self, level: float) -> _Table:
        units = int(self.most // self.unit)
        least = np.zeros(units + 1)  # sum over the layers so far, by cost
        second, first = np.zeros((2, units + 1))  # its two terms, the latter squared
        layers = []
        for frontier, own in zip(self.frontiers, self._terms, strict=True):
            weighed = own[0] + own[1] / (2 * level)
            costs = np.ceil((frontier.bytes - frontier.bytes[0]) / self.unit).astype(int)
            with_own = np.full(units + 1, np.inf)
            places = np.zeros(units + 1, dtype=int)
            useful = np.append(np.diff(costs) > 0, True) & (costs <= units)
            for place in np.flatnonzero(useful).tolist():
                cost = costs[place]
                total = least[: units + 1 - cost] + weighed[place]
                better = total < with_own[cost:]
                np.copyto(with_own[cost:], total, where=better)
                np.copyto(places[cost:], place, where=better)
            least = with_own
            before = np.arange(units + 1) - costs[places]
            second = second[before] + own[0][places]
            first = first[before] + own[1][places]
            layers.append((costs, places))
        return _Table(layers, second + np.sqrt(first))
