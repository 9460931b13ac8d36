"""One budget for all layers: the sizes with the smallest predicted KL divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import (
    DOWN,
    GATE_UP,
    Allocation,
    Mode,
    MultilinearRank,
    StackShape,
    Truncation,
    WeightType,
    stored_bytes,
)
from tuckerize.planning.budget import check_budget

Array = npt.NDArray[np.float64]

# Steps of the core size of the expert mode.
_EXPERT_STEPS = 16
# Resolution of the knapsack: steps into which the budget above the smallest sizes is divided.
_UNITS = 16384
# Lower bound on a layer's sensitivity, so that no layer is free to truncate.
_LEAST_SENSITIVITY = 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """Target of one layer and its predicted cost.

    Attributes:
        target: Sizes that the stacks of every group are compressed to.
        bytes: Bytes stored of all groups.
        error: Relative squared output error of the layer.
        predicted_kl: KL divergence from the source that this error causes, nats per token.
    """

    target: CompressionTarget
    bytes: int
    error: float
    predicted_kl: float


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Sizes that the layers of a model may be given.

    Attributes:
        shape: Sizes (E, H, I) of one group's stack.
        groups: Groups in a layer.
        weights: Type of the stored cores and factors.
        multiples: Alignment of truncated widths of experts, and of truncated hidden core sizes.
        truncation: Modes that may be truncated.
        equal_widths: All experts of a layer are equally wide.
    """

    shape: StackShape
    groups: int
    weights: WeightType
    multiples: tuple[int, int]
    truncation: Truncation = Truncation.AUTO
    equal_widths: bool = False

    @property
    def dense_bytes(self) -> int:
        """Bytes of a dense layer."""
        return self.groups * 3 * stored_bytes(self.shape, self.shape, self.weights)

    def stored_parameters(self, target: CompressionTarget) -> int:
        """Parameters that a layer stores."""
        return self.groups * sum(
            target.stored_parameters(self.shape, coupling) for coupling in target.couplings
        )

    def target(self, row: Array) -> CompressionTarget:
        """The target of a row of sizes, see `_Points`."""
        neurons, *cores = (int(size) for size in row)
        return CompressionTarget(
            neurons,
            {GATE_UP: MultilinearRank(*cores[:3]), DOWN: MultilinearRank(*cores[3:])},
            multiple=self.multiples[0],
            equal_widths=self.equal_widths,
        )


class _Points(NamedTuple):
    """Sizes, bytes stored of one group, and predicted errors of candidates.

    A row of sizes is the width and the core sizes of gate and up, and of down; or some of these.
    """

    sizes: Array
    bytes: Array
    errors: Array


@dataclass(frozen=True, slots=True)
class _Frontier:
    """Pareto-optimal candidates of one layer, by ascending bytes."""

    space: SearchSpace
    sizes: Array
    bytes: Array
    errors: Array
    sensitivity: float

    def choice(self, index: int) -> Choice:
        error = float(self.errors[index])
        return Choice(
            self.space.target(self.sizes[index]),
            int(self.bytes[index]),
            error,
            error * self.sensitivity,
        )

    def best_within(self, budget: float) -> int:
        """Index of the smallest error within so many bytes; -1 if there is none."""
        return int(np.searchsorted(self.bytes, budget, side="right")) - 1


def allocate(
    profiles: Sequence[LayerProfile],
    space: SearchSpace,
    *,
    keep: float,
    how: Allocation = Allocation.ERROR,
) -> list[Choice]:
    """Targets of all layers within `keep` of their dense bytes.

    The KL divergence that a layer causes is predicted as its squared error times its sensitivity.
    The sum over all layers is the minimum that the budget allows, up to the rounding of costs to
    1/16384 of it. A larger budget never has a higher prediction; at `keep` 1 all layers stay dense.

    Args:
        profiles: Curves of the layers.
        space: Sizes that the layers may be given.
        keep: Kept share of the dense bytes of these layers, in (0, 1].
        how: `uniform` gives every layer the same share.

    Raises:
        UsageError: The budget does not pay for the smallest sizes.

    Source:
        The multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, chapter 11).
    """
    check_keep(space, keep)
    frontiers = [_frontier(profile, space) for profile in profiles]
    if how == Allocation.UNIFORM:
        return [f.choice(f.best_within(math.floor(keep * space.dense_bytes))) for f in frontiers]
    budget = math.floor(keep * space.dense_bytes * len(profiles))
    return _knapsack(frontiers, budget, finest=space.weights.bits / 8)


def check_keep(space: SearchSpace, keep: float) -> None:
    """Refuse a budget that does not pay for the smallest sizes.

    Raises:
        UsageError: It does not; the hint names the smallest that does.
    """
    least = np.inf
    if space.truncation != Truncation.FULL:
        least = _latent_grid(space, space.multiples[0])[1].min()
    if space.truncation in (Truncation.AUTO, Truncation.FULL):
        smallest = sum(_tucker_grid(space, coupled=n)[1].min() for n in (1, 2))
        least = min(least, smallest)
    check_budget(
        keep,
        dense=space.dense_bytes,
        least=space.groups * least,
        advice=", or a smaller --multiple",
    )


def _knapsack(frontiers: list[_Frontier], budget: float, *, finest: float) -> list[Choice]:
    """Dynamic programming over the budget, layer by layer.

    Units do not depend on the budget and costs are rounded up to them, so that what fits a budget
    fits a larger one as well.

    Args:
        frontiers: Candidates of every layer.
        budget: Bytes of all layers together.
        finest: Bytes of one value, below which a unit makes no sense.
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


def _frontier(profile: LayerProfile, space: SearchSpace) -> _Frontier:
    points = []
    if space.truncation != Truncation.FULL:
        points.append(_latent_points(profile, space))
    if space.truncation in (Truncation.AUTO, Truncation.FULL):
        points.append(_full_points(profile, space))
    sizes, stored, errors = _undominated(*map(np.concatenate, zip(*points, strict=True)))
    sensitivity = max(profile.sensitivity, _LEAST_SENSITIVITY)
    return _Frontier(space, sizes, space.groups * stored, errors, sensitivity)


def _latent_points(profile: LayerProfile, space: SearchSpace) -> _Points:
    """Widths with truncated hidden modes."""
    if space.equal_widths:
        profile = replace(profile, selection_H=profile.equal_selection_H)
    # Widths of experts are multiples; their mean need not be one.
    aligned = 1 if space.equal_widths else math.gcd(space.multiples[0], space.shape.experts)
    sizes, stored = _latent_grid(space, space.multiples[0] // aligned)
    widths, gate_up, down = np.unique(sizes[:, 0]), np.unique(sizes[:, 3]), np.unique(sizes[:, 6])
    table = profile.errors(widths, gate_up, down)
    errors = table[
        np.searchsorted(widths, sizes[:, 0]),
        np.searchsorted(gate_up, sizes[:, 3]),
        np.searchsorted(down, sizes[:, 6]),
    ]
    return _undominated(sizes, stored, errors)


def _latent_grid(space: SearchSpace, width_step: int) -> tuple[Array, Array]:
    """Sizes of all mean widths with truncated hidden modes, and the bytes that a group stores."""
    shape, multiples, truncation = space.shape, space.multiples, space.truncation
    widths = _steps(
        shape.intermediate, multiples[0], truncate=truncation != Truncation.LATENT, step=width_step
    )
    hidden = _steps(shape.hidden, multiples[1], truncate=truncation != Truncation.NEURONS)
    grid = np.meshgrid(widths, hidden, hidden, indexing="ij")
    neurons, gate_up, down = (axis.reshape(-1) for axis in grid)
    experts = np.full_like(neurons, shape.experts)
    sizes = np.stack([neurons, experts, neurons, gate_up, experts, neurons, down], axis=1)
    slim = (experts, neurons, np.full_like(neurons, shape.hidden))
    stored = stored_bytes(slim, (experts, neurons, gate_up), space.weights, coupled=2)
    stored += stored_bytes(slim, (experts, neurons, down), space.weights)
    # A core cannot use more columns than it has rows, over all experts (and gate and up).
    usable = (gate_up == shape.hidden) | (gate_up <= 2 * shape.experts * neurons)
    usable &= (down == shape.hidden) | (down <= shape.experts * neurons)
    if truncation == Truncation.NARROW_LATENT:  # one latent size, or the layer as it is
        latent = (gate_up == down) & (down < shape.hidden)
        usable &= latent | ((gate_up == down) & (neurons == shape.intermediate))
    return sizes[usable], stored[usable]


def _full_points(profile: LayerProfile, space: SearchSpace) -> _Points:
    """All neurons, with all three modes of gate and up, and of down, truncated."""
    gate_up = _tucker_points(
        space,
        (profile.gate_up_expert_E, profile.gate_up_intermediate_H, profile.gate_up_KI[0]),
        coupled=2,
    )
    down = _tucker_points(
        space,
        (profile.down_expert_E, profile.down_intermediate_H, profile.down_I),
        coupled=1,
    )
    first, second = (
        axis.reshape(-1)
        for axis in np.meshgrid(
            np.arange(len(gate_up.errors)), np.arange(len(down.errors)), indexing="ij"
        )
    )
    neurons = np.full((len(first), 1), space.shape.intermediate, dtype=np.float64)
    return _undominated(
        np.concatenate([neurons, gate_up.sizes[first], down.sizes[second]], axis=1),
        gate_up.bytes[first] + down.bytes[second],
        gate_up.errors[first] + down.errors[second],
    )


def _tucker_points(
    space: SearchSpace, tails: tuple[Array, Array, Array], *, coupled: int
) -> _Points:
    """Core sizes of coupled stacks; the errors of the modes add up, as in the bound of HOSVD."""
    sizes, stored = _tucker_grid(space, coupled=coupled)
    columns = sizes.T.astype(int)
    errors = np.sum([tail[own] for tail, own in zip(tails, columns, strict=True)], axis=0)
    return _undominated(sizes, stored, errors)


def _tucker_grid(space: SearchSpace, *, coupled: int) -> tuple[Array, Array]:
    """All core sizes that coupled stacks can use, and the bytes that they store."""
    shape = space.shape
    axes = [
        _steps(shape.experts, max(1, shape.experts // _EXPERT_STEPS), truncate=True),
        _steps(shape.intermediate, space.multiples[0], truncate=True),
        _steps(shape.hidden, space.multiples[1], truncate=True),
    ]
    expert, intermediate, hidden = (axis.reshape(-1) for axis in np.meshgrid(*axes, indexing="ij"))
    sizes = np.stack([expert, intermediate, hidden], axis=-1)
    core = sizes.prod(axis=1)
    usable = np.ones(len(sizes), dtype=bool)
    for mode in Mode:
        own = sizes[:, mode]
        columns = core / own * (coupled if mode == Mode.HIDDEN else 1)
        usable &= (own == shape[mode]) | (own <= columns)
    full = (
        np.full_like(core, shape[0]),
        np.full_like(core, shape[1]),
        np.full_like(core, shape[2]),
    )
    stored = stored_bytes(full, (expert, intermediate, hidden), space.weights, coupled=coupled)
    return sizes[usable], stored[usable]


def _undominated(sizes: Array, stored: Array, errors: Array) -> _Points:
    """The Pareto front of bytes and error, by ascending bytes."""
    order = np.lexsort((errors, stored))
    smallest = np.minimum.accumulate(errors[order])
    chosen = order[np.append(True, smallest[1:] < smallest[:-1])]
    return _Points(sizes[chosen], stored[chosen], errors[chosen])


def _steps(size: int, multiple: int, *, truncate: bool, step: int = 0) -> Array:
    """Multiples below a size, in finer steps if asked for, and the size itself."""
    stop = min(size, size // multiple * multiple + 1)
    below = list(range(multiple, stop, step or multiple)) if truncate else []
    return np.array([*below, size], dtype=np.float64)
