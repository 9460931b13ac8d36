"""Parallel GEMMs whose results do not depend on the number of threads.

A multithreaded GEMM splits its work by thread count, and the rounding changes with the split. Here
each GEMM runs on one thread, and independent GEMMs run in parallel.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """Runs independent calls, on several threads if it has a pool."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool = pool
        self._count = count

    def map(self, function: Callable[..., T], *items: Iterable[object]) -> Iterator[T]:
        """Yield `function` of one item of each iterable, in order, like the built-in `map`.

        Calls are submitted as results are taken, as many ahead as there are threads.
        """
        calls = zip(*items, strict=True)
        if self._pool is None:
            yield from itertools.starmap(function, calls)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for arguments in calls:
                waiting.append(self._pool.submit(function, *arguments))
                if len(waiting) > self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)

    def do(self, function: Callable[..., None], *items: Iterable[object]) -> None:
        """Make the same calls for their side effects."""
        deque(self.map(function, *items), maxlen=0)


@contextmanager
def parallel_workers(device: torch.device) -> Iterator[Workers]:
    """Workers for tensors on a device: as many as torch has threads, while torch itself gets one.

    On an accelerator calls run one after another on the calling thread, which queues their work.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield Workers()
        return
    torch.set_num_threads(1)
    try:
        yield Workers(_pool(count), count)
    finally:
        torch.set_num_threads(count)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    """So many threads, kept: to start them takes as long as a product of small matrices."""
    # BLAS takes its thread count from the calling thread, not from torch.
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
