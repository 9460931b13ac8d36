"""Progress of long work: the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol


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
