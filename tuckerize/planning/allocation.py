"""One budget for all layers: sizes with the least predicted damage at an exact parameter count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.domain import (
    Allocation,
    Mode,
    MultilinearRank,
    StackShape,
    Truncation,
    stored_parameters,
)
from tuckerize.errors import UsageError

Array = npt.NDArray[np.float64]

# Steps of the core size of the expert mode.
_EXPERT_STEPS = 16
# Units in which what the smallest sizes leave of a budget is shared out.
_UNITS = 16384
# A layer to which the prediction seems not to listen at all still counts a little.
_LEAST_SENSITIVITY = 1e-12


class Sizes(NamedTuple):
    """Sizes of one layer: the width, and the core sizes of gate and up, and of down."""

    neurons: int
    gate_up: MultilinearRank
    down: MultilinearRank


@dataclass(frozen=True, slots=True)
class Choice:
    """Sizes of one layer and what they are predicted to cost.

    Attributes:
        sizes: The sizes.
        parameters: Numbers stored.
        error: Relative squared output error of the layer.
        damage: The same in nats a token of the model's prediction.
    """

    sizes: Sizes
    parameters: int
    error: float
    damage: float


class _Points(NamedTuple):
    """Sizes, numbers stored, and predicted errors of candidates.

    A row of sizes is the width and the core sizes of gate and up, and of down; or some of these.
    """

    sizes: Array
    parameters: Array
    errors: Array


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The candidates of one layer that no others beat, by ascending parameters."""

    sizes: Array
    parameters: Array
    errors: Array
    sensitivity: float

    def choice(self, index: int) -> Choice:
        error = float(self.errors[index])
        return Choice(
            _sizes(self.sizes[index]),
            int(self.parameters[index]),
            error,
            error * self.sensitivity,
        )

    def best_within(self, parameters: float) -> int:
        """Index of the least damage that stores at most so many numbers; -1 if none does."""
        return int(np.searchsorted(self.parameters, parameters, side="right")) - 1


def layer_parameters(shape: StackShape, groups: int, sizes: Sizes) -> int:
    """Numbers that a layer stores at some sizes; gate and up share one U_I."""
    slim = shape._replace(intermediate=sizes.neurons)
    return groups * (
        stored_parameters(slim, sizes.gate_up, coupled=2) + stored_parameters(slim, sizes.down)
    )


def _dense_parameters(shape: StackShape, groups: int) -> int:
    return groups * 3 * shape.parameters


def allocate(
    profiles: Sequence[LayerProfile],
    shape: StackShape,
    *,
    groups: int,
    keep: float,
    multiples: tuple[int, int],
    allowed: Truncation = Truncation.AUTO,
    how: Allocation = Allocation.ERROR,
    equal_widths: bool = False,
) -> list[Choice]:
    """Sizes of all layers within `keep` of their dense parameters.

    The damage of a layer is its predicted error times its sensitivity. The sum over all layers is
    the least that the budget allows, up to the rounding of parameter counts to 1/16384 of it. A
    larger budget never has more predicted damage; the whole budget leaves all layers dense.

    Args:
        profiles: Curves of the layers.
        shape: Sizes (E, H, I) of one group's stack.
        groups: Groups in a layer.
        keep: Kept share of the dense parameters of these layers, in (0, 1].
        multiples: Truncated widths of experts and hidden core sizes are multiples of these.
        allowed: `latent` truncates the hidden mode only, `neurons` the width only, `full` all three
            modes of every stack; `auto` takes for each layer a width with a latent, or `full`.
        how: `uniform` gives every layer the same share.
        equal_widths: All experts of a layer will be equally wide.

    Raises:
        UsageError: The budget does not pay for the smallest sizes.

    Source:
        The multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, chapter 11).
    """
    check_keep(shape, groups=groups, keep=keep, multiples=multiples, allowed=allowed)
    if equal_widths:
        profiles = [replace(p, selection_H=p.equal_selection_H) for p in profiles]
    # Widths of experts are multiples; their mean need not be one.
    step = multiples[0] // (1 if equal_widths else math.gcd(multiples[0], shape.experts))
    frontiers = [_frontier(p, shape, groups, multiples, step, allowed) for p in profiles]
    dense = _dense_parameters(shape, groups)
    if how == Allocation.UNIFORM:
        return [f.choice(f.best_within(math.floor(keep * dense))) for f in frontiers]
    return _least_damage(frontiers, math.floor(keep * dense * len(profiles)))


def check_keep(
    shape: StackShape,
    *,
    groups: int,
    keep: float,
    multiples: tuple[int, int],
    allowed: Truncation = Truncation.AUTO,
) -> None:
    """Refuse a budget that does not pay for the smallest sizes; see `allocate` for the arguments.

    Raises:
        UsageError: It does not; the hint names the smallest that does.
    """
    least = np.inf
    if allowed != Truncation.FULL:
        least = _latent_grid(shape, multiples, multiples[0], allowed)[1].min()
    if allowed in (Truncation.AUTO, Truncation.FULL):
        smallest = sum(_tucker_grid(shape, multiples, coupled=n)[1].min() for n in (1, 2))
        least = min(least, smallest)
    dense = _dense_parameters(shape, groups)
    if groups * least > math.floor(keep * dense):
        raise UsageError(
            f"keep {keep:g} is below what the smallest sizes store",
            hint=f"choose keep of at least {math.ceil(1000 * groups * least / dense) / 1000:g}, "
            "or a smaller --multiple",
        )


def _least_damage(frontiers: list[_Frontier], budget: float) -> list[Choice]:
    """Dynamic programming over the budget, layer by layer.

    Units do not depend on the budget and costs are rounded up to them, so that what fits a budget
    fits a larger one as well.
    """
    left = budget - sum(frontier.parameters[0] for frontier in frontiers)
    most = sum(frontier.parameters[-1] - frontier.parameters[0] for frontier in frontiers)
    if most <= left:
        return [frontier.choice(len(frontier.parameters) - 1) for frontier in frontiers]
    unit = max(1.0, most / _UNITS)
    units = int(left // unit)
    least = np.zeros(units + 1)  # damage of the layers so far, by what they may cost together
    tables = []
    for frontier in frontiers:
        costs = np.ceil((frontier.parameters - frontier.parameters[0]) / unit).astype(int)
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


def _frontier(
    profile: LayerProfile,
    shape: StackShape,
    groups: int,
    multiples: tuple[int, int],
    width_step: int,
    allowed: Truncation,
) -> _Frontier:
    points = []
    if allowed != Truncation.FULL:
        points.append(_latent_points(profile, shape, multiples, width_step, allowed))
    if allowed in (Truncation.AUTO, Truncation.FULL):
        points.append(_full_points(profile, shape, multiples))
    sizes, parameters, errors = _undominated(*map(np.concatenate, zip(*points, strict=True)))
    sensitivity = max(profile.sensitivity, _LEAST_SENSITIVITY)
    return _Frontier(sizes, groups * parameters, errors, sensitivity)


def _latent_points(
    profile: LayerProfile,
    shape: StackShape,
    multiples: tuple[int, int],
    width_step: int,
    allowed: Truncation,
) -> _Points:
    """Widths with truncated hidden modes."""
    sizes, parameters = _latent_grid(shape, multiples, width_step, allowed)
    widths, gate_up, down = np.unique(sizes[:, 0]), np.unique(sizes[:, 3]), np.unique(sizes[:, 6])
    table = profile.errors(widths, gate_up, down)
    errors = table[
        np.searchsorted(widths, sizes[:, 0]),
        np.searchsorted(gate_up, sizes[:, 3]),
        np.searchsorted(down, sizes[:, 6]),
    ]
    return _undominated(sizes, parameters, errors)


def _latent_grid(
    shape: StackShape, multiples: tuple[int, int], width_step: int, allowed: Truncation
) -> tuple[Array, Array]:
    """Sizes of all mean widths with truncated hidden modes, and the numbers that a group stores."""
    widths = _steps(
        shape.intermediate, multiples[0], truncate=allowed != Truncation.LATENT, step=width_step
    )
    hidden = _steps(shape.hidden, multiples[1], truncate=allowed != Truncation.NEURONS)
    grid = np.meshgrid(widths, hidden, hidden, indexing="ij")
    neurons, gate_up, down = (axis.reshape(-1) for axis in grid)
    experts = np.full_like(neurons, shape.experts)
    sizes = np.stack([neurons, experts, neurons, gate_up, experts, neurons, down], axis=1)
    cut_gate_up, cut_down = gate_up < shape.hidden, down < shape.hidden
    parameters = shape.experts * neurons * (2 * gate_up + down)
    parameters += shape.hidden * (gate_up * cut_gate_up + down * cut_down)
    # A core cannot use more columns than it has rows, over all experts (and gate and up).
    usable = ~cut_gate_up | (gate_up <= 2 * shape.experts * neurons)
    usable &= ~cut_down | (down <= shape.experts * neurons)
    return sizes[usable], parameters[usable]


def _full_points(profile: LayerProfile, shape: StackShape, multiples: tuple[int, int]) -> _Points:
    """All neurons, with all three modes of gate and up, and of down, truncated."""
    gate_up = _tucker_points(
        shape,
        multiples,
        (profile.gate_up_expert_E, profile.gate_up_intermediate_H, profile.gate_up_KI[0]),
        coupled=2,
    )
    down = _tucker_points(
        shape,
        multiples,
        (profile.down_expert_E, profile.down_intermediate_H, profile.down_I),
        coupled=1,
    )
    first, second = (
        axis.reshape(-1)
        for axis in np.meshgrid(
            np.arange(len(gate_up.errors)), np.arange(len(down.errors)), indexing="ij"
        )
    )
    neurons = np.full((len(first), 1), shape.intermediate, dtype=np.float64)
    return _undominated(
        np.concatenate([neurons, gate_up.sizes[first], down.sizes[second]], axis=1),
        gate_up.parameters[first] + down.parameters[second],
        gate_up.errors[first] + down.errors[second],
    )


def _tucker_points(
    shape: StackShape,
    multiples: tuple[int, int],
    tails: tuple[Array, Array, Array],
    *,
    coupled: int,
) -> _Points:
    """Core sizes of coupled stacks; the errors of the modes add up, as in the bound of HOSVD."""
    sizes, parameters = _tucker_grid(shape, multiples, coupled=coupled)
    columns = sizes.T.astype(int)
    errors = np.sum([tail[own] for tail, own in zip(tails, columns, strict=True)], axis=0)
    return _undominated(sizes, parameters, errors)


def _tucker_grid(
    shape: StackShape, multiples: tuple[int, int], *, coupled: int
) -> tuple[Array, Array]:
    """All core sizes that coupled stacks can use, and the numbers that they store."""
    axes = [
        _steps(shape.experts, max(1, shape.experts // _EXPERT_STEPS), truncate=True),
        _steps(shape.intermediate, multiples[0], truncate=True),
        _steps(shape.hidden, multiples[1], truncate=True),
    ]
    sizes = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    core = sizes.prod(axis=1)
    parameters = coupled * core
    usable = np.ones(len(sizes), dtype=bool)
    for mode in Mode:
        own = sizes[:, mode]
        truncated = own < shape[mode]
        is_hidden = mode == Mode.HIDDEN
        parameters += (1 if is_hidden else coupled) * shape[mode] * own * truncated
        usable &= ~truncated | (own <= core / own * (coupled if is_hidden else 1))
    return sizes[usable], parameters[usable]


def _undominated(sizes: Array, parameters: Array, errors: Array) -> _Points:
    """The points that no others beat in both parameters and error, by ascending parameters."""
    order = np.lexsort((errors, parameters))
    smallest = np.minimum.accumulate(errors[order])
    chosen = order[np.append(True, smallest[1:] < smallest[:-1])]
    return _Points(sizes[chosen], parameters[chosen], errors[chosen])


def _sizes(row: Array) -> Sizes:
    neurons, *cores = (int(size) for size in row)
    return Sizes(neurons, MultilinearRank(*cores[:3]), MultilinearRank(*cores[3:]))


def _steps(size: int, multiple: int, *, truncate: bool, step: int = 0) -> Array:
    """Multiples below a size, in finer steps if asked for, and the size itself."""
    stop = min(size, size // multiple * multiple + 1)
    below = list(range(multiple, stop, step or multiple)) if truncate else []
    return np.array([*below, size], dtype=np.float64)
