"""Progress: a bar on a terminal, lines in the log of a distributed run; on process 0 only."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from tqdm import tqdm


class TerminalProgress:
    """Draws a bar with the time left on stderr.

    Where stderr is no terminal, processes that torchrun started write a line for every stage, so
    that a log tells slow work from a dead job; a single process writes nothing.
    """

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._started = time.monotonic()

    def start(self, total: float) -> None:
        """Begin work of a total amount."""
        hidden = not sys.stderr.isatty() or not _is_leader()
        self._bar = tqdm(
            total=total,
            disable=hidden,
            bar_format="{percentage:3.0f}% |{bar}| {elapsed} passed, {remaining} left  {postfix}",
        )

    def stage(self, name: str) -> None:
        """A part of the work begins."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(name)
        elif "RANK" in os.environ and _is_leader():
            sys.stderr.write(f"{time.monotonic() - self._started:7.1f} s: {name}\n")
            sys.stderr.flush()

    def advance(self, amount: float, note: str) -> None:
        """Some of it is done; the note says what."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def close(self) -> None:
        """The work has ended."""
        if self._bar is not None:
            self._bar.close()


def _is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"
