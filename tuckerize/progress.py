"""Progress of long work: the command line draws it, a library user may ignore it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

_Expert = TypeVar("_Expert")

# Experts that are treated one by one, of which the first is told.
_EXPERTS_PER_STAGE = 16


class Stage(Protocol):
    """Tells the user which part of the work begins."""

    def __call__(self, name: str, effort: float = 0.0, /) -> object:
        """Begin a part when an effort is done since the last one, in a unit of the caller's."""


def silent(_name: str, _effort: float = 0.0, /) -> None:
    """Tell nobody."""


def scaled(stage: Stage, effort: float) -> Stage:
    """A stage whose efforts are shares of one of the caller's."""

    def begin(name: str, share: float = 0.0, /) -> None:
        stage(name, effort * share)

    return begin


def told(experts: Iterable[_Expert], count: int, stage: Stage, name: str) -> Iterator[_Expert]:
    """Some experts, of which every 16th begins a stage.

    Args:
        experts: What is treated one by one.
        count: Number of them.
        stage: Is told them, with shares of the whole as efforts, and the end.
        name: Of the work.
    """
    done = 0
    for place, expert in enumerate(experts):
        if place % _EXPERTS_PER_STAGE == 0:
            stage(f"{name}, expert {place + 1} of {count}", (place - done) / count)
            done = place
        yield expert
    stage(name, (count - done) / count)


class Progress(Protocol):
    """Receiver of progress; the command line draws it, tests ignore it."""

    def start(self, total: float) -> None:
        """Begin work of a total amount."""

    def stage(self, name: str) -> None:
        """Begin a part of the work."""

    def advance(self, amount: float, note: str) -> None:
        """Add a finished amount; the note names it."""

    def note(self, text: str) -> None:
        """Tell the user something that does not end the work."""

    def close(self) -> None:
        """End the work."""


class SilentProgress:
    """Receiver that shows nothing."""

    def start(self, total: float) -> None:
        """Do nothing."""

    def stage(self, name: str) -> None:
        """Do nothing."""

    def advance(self, amount: float, note: str) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class LayerProgress:
    """Stages of one layer, which counts as one in all.

    Args:
        progress: Shows them.
        layer: Index of the layer.
        effort: Of its stages together, in a unit of the caller's.
    """

    def __init__(self, progress: Progress, layer: int, effort: float) -> None:
        self._progress = progress
        self._layer = layer
        self._effort = effort
        self._done = 0.0

    def stage(self, name: str, effort: float = 0.0, /) -> None:
        """Begin a stage when an effort is done since the last one."""
        share = min(effort / self._effort, 1.0 - self._done)
        self._done += share
        name = f"layer {self._layer}: {name}"
        self._progress.advance(share, name)
        self._progress.stage(name)

    def finish(self, note: str) -> None:
        """End the layer."""
        self._progress.advance(1.0 - self._done, note)
