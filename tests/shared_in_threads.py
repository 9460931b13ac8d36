"""Threads that share experts as processes do, for laws that need no torchrun."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tuckerize.linalg.sharing import Sharing
from tuckerize.parallel.layouts import owned_slice

T = TypeVar("T")


class SharedByThreads(Sharing):
    """One of several threads; values pass through a list."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self.board, self.barrier = board, barrier

    def own(self, count: int) -> slice:
        own = owned_slice(count, self.size, self.rank)
        return slice(own.start, own.stop)

    def total(self, count: int) -> int:
        return sum(self.of_all(count))

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.of_all(tensor)).sum(0)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self.of_all(rows))

    def gram(self, matrix_EM: Tensor) -> Tensor:
        whole_EM = self.gather(matrix_EM)
        return whole_EM @ whole_EM.T

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        found = self.of_all([call() for call in calls[self.rank :: self.size]])
        return [found[index % self.size][index // self.size] for index in range(len(calls))]

    def of_all(self, value: T) -> list[T]:
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def of_first(self, call: Callable[[], T]) -> T:
        return self.of_all(call() if self.is_first else None)[0]  # type: ignore[return-value]


def in_threads(size: int, work: Callable[[Sharing], T]) -> list[T]:
    """The results of work that threads share, one for each."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def run(rank: int) -> T:
        try:
            return work(SharedByThreads(rank, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
