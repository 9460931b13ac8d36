"""How long work tells how far it is; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Shows how far long work is; the command line draws it, tests ignore it."""

    def start(self, total: float) -> None:
        """Begin work of a total amount."""

    def stage(self, name: str) -> None:
        """A part of the work begins."""

    def advance(self, amount: float, note: str) -> None:
        """Some of it is done; the note says what."""

    def close(self) -> None:
        """The work has ended."""


class SilentProgress:
    """Shows nothing."""

    def start(self, total: float) -> None:
        """Do nothing."""

    def stage(self, name: str) -> None:
        """Do nothing."""

    def advance(self, amount: float, note: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
