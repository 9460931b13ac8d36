"""One budget for all layers: sizes with the least predicted damage at an exact parameter count."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tuckerize.calibration.profile import LayerProfile
from tuckerize.domain import MultilinearRank, StackShape, stored_parameters
from tuckerize.errors import UsageError

Array = npt.NDArray[np.float64]

Allocate = Literal["error", "uniform"]
Shape = Literal["auto", "latent", "neurons"]


class Sizes(NamedTuple):
    """Sizes of one layer: the width, and the core sizes r_I of gate and up, and of down."""

    neurons: int
    gate_up: int
    down: int


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


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The sizes of one layer that no others beat in both parameters and damage, ascending."""

    sizes: npt.NDArray[np.int64]
    parameters: Array
    errors: Array
    sensitivity: float

    def choice(self, index: int) -> Choice:
        error = float(self.errors[index])
        return Choice(
            Sizes(*(int(size) for size in self.sizes[index])),
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
    gate_up = MultilinearRank(shape.experts, sizes.neurons, sizes.gate_up)
    down = MultilinearRank(shape.experts, sizes.neurons, sizes.down)
    return groups * (stored_parameters(slim, gate_up, coupled=2) + stored_parameters(slim, down))


def allocate(
    profiles: Sequence[LayerProfile],
    shape: StackShape,
    *,
    groups: int,
    keep: float,
    multiples: tuple[int, int],
    allowed: Shape = "auto",
    how: Allocate = "error",
) -> list[Choice]:
    """Sizes of all layers within `keep` of their dense parameters.

    The damage of a layer is its predicted error times its sensitivity. Along the convex hull of
    every layer's frontier the cheapest reduction of damage is bought first, over all layers, until
    the budget is spent (a Lagrangian allocation); one more step, of any layer, uses what is left.
    A larger budget never has more predicted damage; the whole budget leaves all layers dense.

    Args:
        profiles: Curves of the layers.
        shape: Sizes (E, H, I) of one group's stack.
        groups: Groups in a layer.
        keep: Kept share of the dense parameters of these layers, in (0, 1].
        multiples: Truncated widths and hidden core sizes are multiples of these.
        allowed: `latent` truncates the hidden mode only, `neurons` the width only, `auto` both.
        how: `uniform` gives every layer the same share.

    Raises:
        UsageError: The budget does not pay for the smallest sizes.

    Source:
        Shoham & Gersho 1988 (Lagrangian bit allocation).
    """
    check_keep(shape, groups=groups, keep=keep, multiples=multiples, allowed=allowed)
    frontiers = [_frontier(p, shape, groups, multiples, allowed) for p in profiles]
    dense = layer_parameters(shape, groups, Sizes(shape.intermediate, shape.hidden, shape.hidden))
    if how == "uniform":
        return [f.choice(f.best_within(math.floor(keep * dense))) for f in frontiers]
    return _lagrangian(frontiers, math.floor(keep * dense * len(profiles)))


def check_keep(
    shape: StackShape,
    *,
    groups: int,
    keep: float,
    multiples: tuple[int, int],
    allowed: Shape = "auto",
) -> None:
    """Refuse a budget that does not pay for the smallest sizes; see `allocate` for the arguments.

    Raises:
        UsageError: It does not; the hint names the smallest that does.
    """
    dense = layer_parameters(shape, groups, Sizes(shape.intermediate, shape.hidden, shape.hidden))
    least = _grid_parameters(_grid(shape, multiples, allowed), shape, groups).min()
    if least > math.floor(keep * dense):
        raise UsageError(
            f"keep {keep:g} is below what the smallest sizes store",
            hint=f"choose keep of at least {math.ceil(1000 * least / dense) / 1000:g}, "
            "or a smaller --multiple",
        )


def _lagrangian(frontiers: list[_Frontier], budget: float) -> list[Choice]:
    steps = []
    for layer, frontier in enumerate(frontiers):
        damages = frontier.errors * frontier.sensitivity
        hull = _lower_hull(frontier.parameters, damages)
        steepest = -math.inf
        for before, after in itertools.pairwise(hull):
            cost = frontier.parameters[after] - frontier.parameters[before]
            gain = damages[before] - damages[after]
            # Rounding must not put a step in front of the one that it follows.
            steepest = max(steepest, -gain / cost)
            steps.append((steepest, layer, after, cost))
    places = [0] * len(frontiers)
    left = budget - sum(frontier.parameters[0] for frontier in frontiers)
    for _, layer, place, cost in sorted(steps):
        if cost > left:
            break
        places[layer] = place
        left -= cost
    _spend_rest(frontiers, places, left)
    return [frontier.choice(place) for frontier, place in zip(frontiers, places, strict=True)]


def _spend_rest(frontiers: list[_Frontier], places: list[int], left: float) -> None:
    """Make the one step within what is left that lowers the damage most."""
    best = (0.0, 0, 0)
    for layer, (frontier, place) in enumerate(zip(frontiers, places, strict=True)):
        better = frontier.best_within(frontier.parameters[place] + left)
        gain = (frontier.errors[place] - frontier.errors[better]) * frontier.sensitivity
        best = max(best, (float(gain), layer, better))
    if best[0] > 0:
        places[best[1]] = best[2]


def _frontier(
    profile: LayerProfile,
    shape: StackShape,
    groups: int,
    multiples: tuple[int, int],
    allowed: Shape,
) -> _Frontier:
    grid = _grid(shape, multiples, allowed)
    widths, hidden = np.unique(grid[:, 0]), np.unique(grid[:, 1])
    errors = profile.errors(widths, hidden, hidden)
    parameters = _grid_parameters(grid, shape, groups)
    flat = errors.reshape(-1)
    order = np.lexsort((flat, parameters))
    smallest = np.minimum.accumulate(flat[order])
    better = np.append(True, smallest[1:] < smallest[:-1])
    chosen = order[better]
    return _Frontier(
        sizes=grid[chosen].astype(np.int64),
        parameters=parameters[chosen],
        errors=flat[chosen],
        sensitivity=max(profile.sensitivity, 1e-12),
    )


def _grid(shape: StackShape, multiples: tuple[int, int], allowed: Shape) -> Array:
    """All sizes of a layer, one a row: widths, r_I of gate and up, r_I of down, all ascending."""
    widths = _steps(shape.intermediate, multiples[0], truncate=allowed != "latent")
    hidden = _steps(shape.hidden, multiples[1], truncate=allowed != "neurons")
    return np.stack(np.meshgrid(widths, hidden, hidden, indexing="ij"), axis=-1).reshape(-1, 3)


def _grid_parameters(grid: Array, shape: StackShape, groups: int) -> Array:
    """`layer_parameters` of every row of a grid of sizes."""
    neurons, gate_up, down = grid.T
    cores = shape.experts * neurons * (2 * gate_up + down)
    factors = shape.hidden * (gate_up * (gate_up < shape.hidden) + down * (down < shape.hidden))
    total: Array = groups * (cores + factors)
    return total


def _steps(size: int, multiple: int, *, truncate: bool) -> Array:
    """Multiples below a size, and the size itself."""
    below = list(range(multiple, size, multiple)) if truncate else []
    return np.array([*below, size], dtype=np.float64)


def _lower_hull(x: Array, y: Array) -> list[int]:
    """Indices of the lower convex hull of points with ascending x and descending y."""
    hull: list[int] = []
    for index in range(len(x)):
        while len(hull) >= 2:
            first, second = hull[-2], hull[-1]
            turn = (x[second] - x[first]) * (y[index] - y[first])
            if turn > (y[second] - y[first]) * (x[index] - x[first]):
                break
            hull.pop()
        hull.append(index)
    return hull
