"""Dealing out a budget of stored numbers to the last rank that fits."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

TILTS = (0.0, 0.12, -0.12)
"""Shares of `down`'s budget that are moved to it from gate and up; see `projection_shares`."""


def projection_shares(keep: float, tilt: float) -> tuple[float, float, float]:
    """Kept shares of gate, up and down with the same mean, down's higher by `tilt` of it."""
    down = min(keep * (1 + tilt), 1.0)
    others = (3 * keep - down) / 2
    return others, others, down


def equal_sizes(budget: int, cost: int, gains: Sequence[Tensor]) -> list[int]:
    """Sizes (ranks) of several parts that share a budget: equal ones, then one more for some.

    What equal sizes leave over goes, one step a part, to where the next step gains most.

    Args:
        budget: Numbers that may be stored.
        cost: Numbers that one step of one part costs.
        gains: What every step of a part gains, in falling order; as many as it has steps.
    """
    parts = len(gains)
    steps = budget // cost
    sizes = [min(steps // parts, len(gain)) for gain in gains]
    left = min(steps, sum(len(gain) for gain in gains)) - sum(sizes)
    waiting = [
        (-float(gain[size]), part)
        for part, (gain, size) in enumerate(zip(gains, sizes, strict=True))
        if size < len(gain)
    ]
    heapq.heapify(waiting)
    while left and waiting:
        _, part = heapq.heappop(waiting)
        sizes[part] += 1
        left -= 1
    return sizes


def pooled_sizes(budget: int, cost: int, gains: Sequence[Tensor]) -> list[int]:
    """Sizes of several parts that share a budget: the steps that gain most, whatever the part."""
    return [len(chosen) for chosen in largest(gains, budget // cost)]


def covering_sizes(count: int, gains: Sequence[Tensor], weights: Tensor) -> list[int]:
    """Sizes of several parts that share a number of steps, by what each part keeps of its gains.

    With s as large as the number allows, a part gets the first of its steps that together gain
    min(s w, 1) of all that the part could, w being its weight.

    Args:
        count: Steps of all parts.
        gains: What every step of a part gains, not negative, in falling order.
        weights: Of every part, positive.
    """
    # A step is there as soon as s w times the total is more than what the steps before it gain.
    needed = [
        (gain.cumsum(0) - gain) / (gain.sum().clamp_min(1e-30) * weight)
        for gain, weight in zip(gains, weights, strict=True)
    ]
    return [len(chosen) for chosen in largest([-own for own in needed], count)]


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Indices, sorted, of the `count` largest scores of all tensors together, for each tensor."""
    threshold = torch.cat(list(scores)).argsort(descending=True, stable=True)[:count]
    chosen = []
    start = 0
    for score in scores:
        here = threshold[(threshold >= start) & (threshold < start + len(score))] - start
        chosen.append(here.sort().values)
        start += len(score)
    return chosen
