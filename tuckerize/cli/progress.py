"""Progress: a bar on a terminal, lines in a log; on process 0 only."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn, Self

from tqdm import tqdm

# Between the lines of a single process.
_SECONDS_BETWEEN_LINES = 10.0


class TerminalProgress:
    """A bar with the remaining time on stderr; leaving its context closes the bar.

    Its clock goes on while a stage lasts. Where stderr is no terminal, stages are lines, so that a
    log tells slow work from a dead job: every stage under torchrun, and of a single process one in
    ten seconds.
    """

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._started = self._logged = time.monotonic()
        self._total = self._done = 0.0
        self._closed = threading.Event()
        self._clock: threading.Thread | None = None

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
        self._started = self._logged = time.monotonic()
        self._total, self._done = total, 0.0
        self._bar = tqdm(
            total=total,
            disable=not sys.stderr.isatty() or not is_leader(),
            bar_format="{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} remaining{desc}",
        )
        if not self._bar.disable:
            self._closed.clear()
            self._clock = threading.Thread(target=self._tick, daemon=True)
            self._clock.start()

    def stage(self, name: str) -> None:
        """Begin a part of the work."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description_str(f"  {name}")
        elif is_leader():
            self._log(name)

    def advance(self, amount: float, note: str) -> None:
        """Note that an amount is done; the note says which."""
        self._done += amount
        if self._bar is not None:
            self._bar.set_description_str(f"  {note}", refresh=False)
            self._bar.update(amount)

    def note(self, text: str) -> None:
        """Print a note, above the bar."""
        tqdm.write(f"note: {text}", file=sys.stderr)

    def close(self) -> None:
        """End the work."""
        self._closed.set()
        if self._clock is not None:
            self._clock.join()
            self._clock = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tick(self) -> None:
        """Draw the bar every second."""
        while not self._closed.wait(1.0):
            if self._bar is not None:
                self._bar.refresh()

    def _log(self, name: str) -> None:
        """Write a line on a stage, with what is left of the work at the rate so far."""
        now = time.monotonic()
        if "RANK" not in os.environ and now - self._logged < _SECONDS_BETWEEN_LINES:
            return
        self._logged, passed = now, now - self._started
        line = f"{passed:7.1f} s: {name}"
        if 0 < self._done < self._total:
            share = self._done / self._total
            line += f" ({share:.0%}, about {passed * (1 / share - 1):.0f} s left)"
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def is_leader() -> bool:
    """Whether this is the process that reports."""
    return os.environ.get("RANK", "0") == "0"
