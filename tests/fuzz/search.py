"""Search for contents of a file that are neither read nor refused, soon and in little memory."""

from __future__ import annotations

import hashlib
import resource
import time
import warnings
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.mutations import mutated
from tests.fuzz.readers import READERS, read_changed
from tuckerize.errors import TuckerizeError

CASES = Path(__file__).parent / "cases"
MOST_SECONDS = 20.0
MOST_BYTES = 2**30


def read_or_refuse(work: Path, name: str, content: bytes) -> None:
    """Give a reader its file in another content: nothing but a TuckerizeError may leave."""
    before, started = _peak_bytes(), time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, on what they are given
            read_changed(work, READERS[name], content)
    except TuckerizeError:
        pass
    assert time.monotonic() - started < MOST_SECONDS
    assert _peak_bytes() - before < MOST_BYTES


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Search:
    """A search of one reader, which keeps as a case what it finds.

    Attributes:
        inputs: Contents of the reader's file.
        count: How many of them were tried.
    """

    def __init__(self, work: Path, name: str) -> None:
        self._work, self._name = work, name
        self.inputs = mutated(READERS[name].path(work).read_bytes())
        if READERS[name].file == "recipe.yaml":
            self.inputs |= st.binary()
        self.count = 0
        self._case: Path | None = None

    def try_one(self, content: bytes) -> None:
        """Give the reader a content; what leaves it is raised."""
        self.count += 1
        try:
            read_or_refuse(self._work, self._name, content)
        except BaseException:
            if self._case is not None:  # of which this is a smaller one
                self._case.unlink()
            digest = hashlib.sha256(content).hexdigest()[:8]
            self._case = CASES / f"{self._name}-{digest}"
            self._case.write_bytes(content)
            raise

    @property
    def told(self) -> str:
        """What was done, in a line."""
        return f"{self._name}: {self.count} inputs"
