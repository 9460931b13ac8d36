"""Products side by side, so that no bit of a result depends on the number of threads.

A BLAS divides one product among its threads, and where it divides otherwise it rounds otherwise.
Here every product has one thread, and independent ones run at the same time.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """Carries out independent calls, on several threads where it has a pool."""

    def __init__(self, pool: ThreadPoolExecutor | None = None, count: int = 1) -> None:
        self._pool = pool
        self._count = count

    def map(self, function: Callable[..., T], *items: Iterable[object]) -> Iterator[T]:
        """What calls with one item of each return, in their order.

        Calls start as results are taken, a few in advance.
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

    def do(self, function: Callable[..., None], *items: Iterable[object]) -> None:
        """The same calls, for what they do."""
        deque(self.map(function, *items), maxlen=0)


@contextmanager
def side_by_side(device: torch.device) -> Iterator[Workers]:
    """Workers for tensors on a device: as many as torch has threads; torch has one meanwhile.

    Work of an accelerator is queued by this thread alone, one call after another.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield Workers()
        return
    torch.set_num_threads(1)
    try:
        # The BLAS of a thread asks that thread how many it may use, not torch.
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(count)
