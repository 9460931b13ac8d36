"""Progress bars: on a terminal, and on process 0 only."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from tqdm import tqdm


class TerminalProgress:
    """Draws a bar with the time left on stderr; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def start(self, total: float) -> None:
        """Begin work of a total amount."""
        hidden = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
        self._bar = tqdm(
            total=total,
            disable=hidden,
            bar_format="{percentage:3.0f}% |{bar}| {elapsed} passed, {remaining} left  {postfix}",
        )

    def advance(self, amount: float, note: str) -> None:
        """Some of it is done; the note says what."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def close(self) -> None:
        """The work has ended."""
        if self._bar is not None:
            self._bar.close()
