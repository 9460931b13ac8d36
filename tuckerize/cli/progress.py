"""Progress: a bar on a terminal, lines in the log of a distributed run; on process 0 only."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm


class TerminalProgress:
    """A bar with the remaining time on stderr; leaving its context closes the bar.

    Where stderr is no terminal, processes that torchrun started write a line for every stage, so
    that a log tells slow work from a dead job; a single process writes nothing.
    """

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Before anything else is printed: a bar that is still open is drawn again at exit.
        self.close()

    def start(self, total: float) -> None:
        """Begin work of a total amount."""
        self.close()
        self._bar = tqdm(
            total=total,
            disable=not sys.stderr.isatty() or not is_leader(),
            bar_format="{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} remaining{desc}",
        )

    def stage(self, name: str) -> None:
        """Begin a part of the work."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description_str(f"  {name}")
        elif "RANK" in os.environ and is_leader():
            sys.stderr.write(f"{time.monotonic() - self._started:7.1f} s: {name}\n")
            sys.stderr.flush()

    def advance(self, amount: float, note: str) -> None:
        """Note that an amount is done; the note says which."""
        if self._bar is not None:
            self._bar.set_description_str(f"  {note}", refresh=False)
            self._bar.update(amount)

    def note(self, text: str) -> None:
        """Print a note, above the bar."""
        tqdm.write(f"note: {text}", file=sys.stderr)

    def close(self) -> None:
        """End the work."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def is_leader() -> bool:
    """Whether this is the process that reports."""
    return os.environ.get("RANK", "0") == "0"
