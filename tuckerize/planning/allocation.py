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
    CoreType,
    Mode,
    MultilinearRank,
    StackShape,
    Truncation,
)
from tuckerize.planning.budget import Budget
from tuckerize.planning.knapsack import Choice, Frontier, Knapsack, Slopes
from tuckerize.weight_types import WeightType, stored_bytes

Array = npt.NDArray[np.float64]

# Steps of the core size of the expert mode.
_EXPERT_STEPS = 16
_ADVICE = ", or a smaller --multiple"
# Lower bound on a layer's sensitivity, so that no layer is free to truncate.
_LEAST_SENSITIVITY = 1e-12


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Sizes that the layers of a model may be given.

    Attributes:
        shape: Sizes (E, H, I) of one group's stack.
        groups: Groups in a layer.
        weights: Type of the stored factors and cores.
        multiples: Alignment of truncated widths of experts, and of truncated hidden core sizes.
        truncation: Modes that may be truncated.
        equal_widths: All experts of a layer are equally wide.
        quantize: Encoding that cores get in the end, if they are not counted in one.
    """

    shape: StackShape
    groups: int
    weights: WeightType
    multiples: tuple[int, int]
    truncation: Truncation = Truncation.AUTO
    equal_widths: bool = False
    quantize: CoreType | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of a dense layer in the type of the factors."""
        return self.groups * 3 * stored_bytes(self.shape, self.shape, self.weights.plain)

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
            cores=self.weights.cores,
        )


class _Points(NamedTuple):
    """Sizes, bytes stored of one group, and predicted errors of candidates.

    A row of sizes is the width and the core sizes of gate and up, and of down; or some of these.
    """

    sizes: Array
    bytes: Array
    errors: Array


@dataclass(frozen=True, slots=True)
class Allocator:
    """Shares budgets out over the layers of a model.

    The predicted KL divergence is the minimum that the budget allows, or at most 1.16 of it where
    later layers switch experts, up to the rounding of costs to 1/16384; a larger budget never has a
    higher one. With the whole budget all layers stay dense.

    Attributes:
        frontiers: Candidates of the layers.
        dense_bytes: Bytes of one dense layer.
        knapsack: The best of them within a budget.
        how: `uniform` gives every layer the same share.
    """

    frontiers: tuple[Frontier, ...]
    dense_bytes: int
    knapsack: Knapsack
    how: Allocation

    @classmethod
    def of(
        cls,
        profiles: Sequence[LayerProfile],
        spaces: Sequence[SearchSpace],
        how: Allocation = Allocation.ERROR,
    ) -> Allocator:
        """Find the candidates of all layers.

        Args:
            profiles: Curves of the layers.
            spaces: Sizes that each layer may be given: one space for every encoding of cores.
            how: Distribution over the layers.
        """
        frontiers = tuple(_frontier(profile, spaces) for profile in profiles)
        knapsack = Knapsack(frontiers, finest=spaces[0].weights.bits / 8)
        return cls(frontiers, spaces[0].dense_bytes, knapsack, how)

    def choose(self, budget: Budget) -> list[Choice]:
        """Targets of all layers within a budget.

        Raises:
            UsageError: The budget does not pay for the smallest sizes.
        """
        least = max(frontier.bytes[0] for frontier in self.frontiers)
        budget.check(dense=self.dense_bytes, least=least, advice=_ADVICE)
        if self.how == Allocation.UNIFORM:
            even = budget.bytes(self.dense_bytes)
            return [frontier.choice(frontier.best_within(even)) for frontier in self.frontiers]
        total = budget.bytes(self.dense_bytes * len(self.frontiers))
        return self.knapsack.choose(total)


def check_budget(spaces: Sequence[SearchSpace], budget: Budget) -> None:
    """Refuse a budget that does not pay for the smallest sizes, before there are profiles.

    Raises:
        UsageError: It does not; the hint names the smallest that does.
    """
    budget.check(dense=spaces[0].dense_bytes, least=min(map(_least_bytes, spaces)), advice=_ADVICE)


def widest_within(budget: Budget, space: SearchSpace) -> CompressionTarget:
    """The widest experts that a budget pays for, of layers that differ in nothing else.

    Args:
        budget: A budget that pays for the narrowest; see `check_budget`.
        space: Sizes of equally wide experts without factors.
    """
    experts, _, hidden = space.shape
    widths, _, stored_WGD = _latent_grid(space, space.multiples[0])
    paid_W = space.groups * stored_WGD[:, -1, -1] <= budget.bytes(space.dense_bytes)
    width = widths[paid_W].max()
    return space.target(np.array([width, experts, width, hidden, experts, width, hidden]))


def _least_bytes(space: SearchSpace) -> float:
    """Bytes of a layer of the smallest sizes."""
    least = np.inf
    if space.truncation != Truncation.FULL:
        least = _latent_grid(space, space.multiples[0])[2].min()
    if space.truncation in (Truncation.AUTO, Truncation.FULL):
        smallest = sum(_tucker_grid(space, coupled=n)[1].min() for n in (1, 2))
        least = min(least, smallest)
    return float(space.groups * least)


def _frontier(profile: LayerProfile, spaces: Sequence[SearchSpace]) -> Frontier:
    points, own = [], []
    for index, space in enumerate(spaces):
        rounding = profile.rounding_error(space.weights.cores or space.quantize)
        found = []
        if space.truncation != Truncation.FULL:
            found.append(_latent_points(profile, space))
        if space.truncation in (Truncation.AUTO, Truncation.FULL):
            found.append(_full_points(profile, space))
        for part in found:
            points.append(part._replace(errors=part.errors + rounding))
            own.append(np.full(len(part.bytes), index))
    sizes, stored, errors = map(np.concatenate, zip(*points, strict=True))
    chosen = _front(stored, errors)
    sizes, own_of = sizes[chosen], np.concatenate(own)[chosen]
    return Frontier(
        lambda index: spaces[own_of[index]].target(sizes[index]),
        spaces[0].groups * stored[chosen],
        errors[chosen],
        Slopes(
            max(profile.sensitivity, _LEAST_SENSITIVITY),
            max(profile.small_sensitivity, _LEAST_SENSITIVITY),
            profile.switching,
        ),
    )


def _latent_points(profile: LayerProfile, space: SearchSpace) -> _Points:
    """Widths with truncated hidden modes."""
    if space.equal_widths:
        profile = replace(profile, selection_H=profile.equal_selection_H)
    # Widths of experts are multiples; their mean need not be one.
    aligned = 1 if space.equal_widths else math.gcd(space.multiples[0], space.shape.experts)
    widths, hidden, stored_WGD = _latent_grid(space, space.multiples[0] // aligned)
    stored, errors = stored_WGD.ravel(), profile.errors(widths, hidden, hidden).ravel()
    chosen = _front(stored, errors)
    chosen = chosen[np.isfinite(stored[chosen])]
    own = np.unravel_index(chosen, stored_WGD.shape)
    neurons, gate_up, down = widths[own[0]], hidden[own[1]], hidden[own[2]]
    experts = np.full_like(neurons, space.shape.experts)
    sizes = np.stack([neurons, experts, neurons, gate_up, experts, neurons, down], axis=1)
    return _Points(sizes, stored[chosen], errors[chosen])


def _latent_grid(space: SearchSpace, width_step: int) -> tuple[Array, Array, Array]:
    """Mean widths, truncated hidden modes, and the bytes that a group stores of all their choices.

    The latter are those of a width and of core sizes r_I of gate and up, and of down, shape
    (W, G, G); infinite where a core cannot be used.
    """
    shape, multiples, truncation = space.shape, space.multiples, space.truncation
    widths = _steps(
        shape.intermediate, multiples[0], truncate=truncation != Truncation.LATENT, step=width_step
    )
    hidden = _steps(shape.hidden, multiples[1], truncate=truncation != Truncation.NEURONS)
    neurons, gate_up, down = np.ix_(widths, hidden, hidden)
    experts, whole = (np.full((1, 1, 1), float(n)) for n in (shape.experts, shape.hidden))
    slim = (experts, neurons, whole)
    stored = stored_bytes(slim, (experts, neurons, gate_up), space.weights, coupled=2)
    rank, step = (experts, neurons, down), None if space.equal_widths else multiples[0]
    even = stored_bytes(slim, rank, space.weights, transposed=True)
    uneven = stored_bytes(slim, rank, space.weights, transposed=True, width_step=step)
    stored = stored + np.where(neurons == shape.intermediate, even, uneven)
    # A core cannot use more columns than it has rows, over all experts (and gate and up).
    usable = (gate_up == shape.hidden) | (gate_up <= 2 * shape.experts * neurons)
    usable = usable & ((down == shape.hidden) | (down <= shape.experts * neurons))
    if truncation == Truncation.NARROW_LATENT:  # one latent size, or no factor
        usable = usable & (gate_up == down)
    return widths, hidden, np.where(usable, stored, np.inf)


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
    stored = stored_bytes(
        full,
        (expert, intermediate, hidden),
        space.weights,
        coupled=coupled,
        transposed=coupled == 1,
    )
    return sizes[usable], stored[usable]


def _undominated(sizes: Array, stored: Array, errors: Array) -> _Points:
    """The Pareto front of bytes and error, by ascending bytes."""
    chosen = _front(stored, errors)
    return _Points(sizes[chosen], stored[chosen], errors[chosen])


def _front(stored: Array, errors: Array) -> npt.NDArray[np.intp]:
    """Indices of the Pareto front of bytes and error, by ascending bytes."""
    order = np.argsort(stored, kind="stable")
    order = order[_falling(errors[order])]
    order = order[np.lexsort((errors[order], stored[order]))]  # of equal bytes the smallest error
    chosen: npt.NDArray[np.intp] = order[_falling(errors[order])]
    return chosen


def _falling(errors: Array) -> npt.NDArray[np.bool_]:
    """Whether each is smaller than all before it."""
    smallest = np.minimum.accumulate(errors)
    return np.append(True, smallest[1:] < smallest[:-1])


def _steps(size: int, multiple: int, *, truncate: bool, step: int = 0) -> Array:
    """Multiples below a size, in finer steps if asked for, and the size itself."""
    stop = min(size, size // multiple * multiple + 1)
    below = list(range(multiple, stop, step or multiple)) if truncate else []
    return np.array([*below, size], dtype=np.float64)
