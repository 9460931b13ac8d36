"""Sharing of the experts of a stack among processes: sums and rows that need those of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Sharing:
    """The processes that share the experts of every stack, seen from one of them; here it is alone.

    All processes make the same calls in the same order. Each has the rows of its own experts;
    what experts have in common is equal on all processes.
    """

    size: int = 1
    rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads and writes for all."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Which of so many experts, or other things in a row, are this process's."""
        return slice(0, count)

    def total(self, count: int) -> int:
        """The sum of every process's count."""
        return count

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, all of one shape."""
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one process after another; counts of rows may differ."""
        return rows

    def gram(self, matrix_EM: Tensor) -> Tensor:
        """Products of the rows of all processes, shape (E, E)."""
        return matrix_EM @ matrix_EM.T

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of calls that one process each makes for all."""
        return [call() for call in calls]

    def of_all(self, value: T) -> list[T]:
        """Every process's value."""
        return [value]

    def of_first(self, call: Callable[[], T]) -> T:
        """The result of a call that the first process makes for all."""
        return call()


ALONE = Sharing()
"""One process, which has all experts."""
