"""Sizes and layers as users write them: `full,50%,1024`, `75%`, `1-3,7,20-`."""

from __future__ import annotations

import re

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import RecipeError

_LAYER = re.compile(r"\d+")
_RANGE = re.compile(r"(\d*)\s*-\s*(\d*)")
_SIZE = re.compile(r"full|[1-9]\d{0,17}|\d+(\.\d+)?%")


def check_rank_text(text: str) -> str:
    """The text of core sizes, as it is.

    Raises:
        ValueError: It is not three sizes, percentages or `full`.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3:
        raise ValueError(
            f"'{text}' has {len(parts)} sizes, expected three: r_E,r_H,r_I (experts, "
            "intermediate, hidden), as in full,full,64"
        )
    for part in parts:
        if not _SIZE.fullmatch(part):
            raise ValueError(
                f"'{part}' in '{text}' is not a size of 1 or more, a percentage or 'full'"
            )
        if part.endswith("%") and not 0 < float(part[:-1]) <= 100:
            raise ValueError(f"'{part}' in '{text}' is not above 0 % and at most 100 %")
    return text


def resolve_rank(text: str, shape: StackShape) -> MultilinearRank:
    """Core sizes from their text.

    Percentages are of the size of the mode, rounded to the nearest number, at least 1. Sizes above
    their mode are returned as they are; the decomposition refuses them.

    >>> resolve_rank("full,50%,1024", StackShape(64, 1408, 2048))
    MultilinearRank(expert=64, intermediate=704, hidden=1024)
    """
    sizes = [_resolve_size(part, size) for part, size in zip(text.split(","), shape, strict=True)]
    return MultilinearRank(*sizes)


def select_layers(text: str | None, present: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that a text like `1-3,7,20-` selects of those present; all without a text.

    >>> select_layers("1-3,7", (1, 2, 3, 4, 5, 6, 7))
    (1, 2, 3, 7)

    Raises:
        RecipeError: It is not of that form, names a single layer that is not present, or none.
    """
    if text is None:
        return present
    try:
        ranges = layer_ranges(text)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    absent = [start for start, stop in ranges if start == stop and start not in present]
    selected = tuple(layer for layer in present if is_selected(ranges, layer))
    if absent or not selected:
        what = f"layer {absent[0]:.0f}" if absent else "a range"
        raise RecipeError(
            f"layers '{text}' names {what} without routed experts",
            hint=f"the layers with routed experts are {present[0]} to {present[-1]}",
        )
    return selected


def is_selected(ranges: list[tuple[float, float]], layer: int) -> bool:
    """Whether a layer is in one of some inclusive ranges."""
    return any(start <= layer <= stop for start, stop in ranges)


def _resolve_size(part: str, size: int) -> int:
    if part == "full":
        return size
    if part.endswith("%"):
        return max(1, round(size * float(part[:-1]) / 100))
    return int(part)


def layer_ranges(text: str) -> list[tuple[float, float]]:
    """`1-3,7,20-` as inclusive ranges.

    Raises:
        ValueError: It is not of that form.
    """
    ranges = []
    for part in (part.strip() for part in text.split(",")):
        if _LAYER.fullmatch(part):
            ranges.append((float(part), float(part)))
            continue
        match = _RANGE.fullmatch(part)
        if match is None or not any(match.groups()):
            raise ValueError(f"'{part}' in layers is not a layer or a range like 1-3 or 20-")
        start, stop = float(match[1] or 0), float(match[2] or "inf")
        if stop < start:
            raise ValueError(f"the range '{part}' in layers ends before it starts")
        ranges.append((start, stop))
    return ranges
