"""All errors that a user can meet: what is wrong, where, and what to change.

A message is one sentence with the offending value, the place and the expected value; the hint says
what to change. The command line prints both and exits with `exit_code`. Any other exception is a
bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class TuckerizeError(Exception):
    """Base class of all errors.

    Args:
        message: One sentence: the offending value, the place, the expected value.
        hint: What to change; empty if the message says it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TuckerizeError):
    """Command options that contradict each other or the model."""


class RecipeError(TuckerizeError):
    """A recipe that cannot be read, or that does not fit the model."""


class CheckpointError(TuckerizeError):
    """A folder that is not a usable checkpoint: missing, corrupt, unfinished or unsupported."""


class OutputError(TuckerizeError):
    """An output folder that must not be written to."""


class DecompositionError(TuckerizeError):
    """A stack that cannot be decomposed as asked."""


class MultilinearRankError(DecompositionError):
    """A core size below 1 or above the size of its mode."""


class NonFiniteError(DecompositionError):
    """A stack that holds NaN or infinity."""


@contextmanager
def located(place: str) -> Iterator[None]:
    """Prefix the message of a DecompositionError raised inside with a place."""
    try:
        yield
    except DecompositionError as error:
        raise type(error)(f"{place}: {error.message}", hint=error.hint) from None


class ParallelError(TuckerizeError):
    """A world size, mesh or device that cannot be used."""


class ProcessLostError(ParallelError):
    """Another process of the run has ended: a consequence, of which that process says the cause."""


class LeaderFailedError(Exception):
    """Process 0 has failed and reported the error; the other processes exit quietly."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'gate_proj'? ` for the known word that is most like it, or nothing.

    >>> did_you_mean("kep", ["rank", "keep"])
    "did you mean 'keep'? "
    """
    by_lower = {text.lower(): text for text in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.55)
    return f"did you mean '{by_lower[close[0]]}'? " if close else ""
