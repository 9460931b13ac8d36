"""Progress of long work: the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol


class Stage(Protocol):
    """Tells the user which part of the work begins."""

    def __call__(self, name: str, effort: float = 0.0, /) -> object:
        """Begin a part when an effort is done since the last one, in a unit of the caller's."""


def silent(_name: str, _effort: float = 0.0, /) -> None:
    """Tell nobody."""


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
