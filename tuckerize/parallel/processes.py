"""Processes of a run: one alone, or several started by torchrun."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tuckerize.ascend.environment import MAX_CONNECT_TIMEOUT, STREAM_TIMEOUT, set_hccl_timeouts
from tuckerize.control_groups import usable_cores
from tuckerize.errors import LeaderFailedError, ParallelError, ProcessLostError, TuckerizeError
from tuckerize.parallel.backends import backend_for

T = TypeVar("T")

# A stack of a large model can take an hour on a slow host.
_TIMEOUT = timedelta(hours=24)

# Parts of the error messages of gloo, the store and HCCL.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed")
_LATE = ("Timed out", "timed out", "timeout after", "Socket Timeout", STREAM_TIMEOUT)

_STARTED = "started"
_NEXT = "next"

# torchrun keeps one store while its processes live: each of their groups has keys of its own.
_GROUPS = count()


@dataclass(slots=True)
class Processes:
    """The processes of the run, seen from one of them.

    Attributes:
        rank: Index of this process (`process_rank`).
        size: Number of processes.
        local_rank: Index of this process on its host.
        local_size: Number of processes on this host.
        store: Key-value store shared by all processes; None for a single process.
        timeout: How long a process waits for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Store | None = None
    timeout: timedelta = _TIMEOUT
    _queues: int = 0
    _started: int = 0

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0, which does the reporting."""
        return self.rank == 0

    def leader_first(self, work: Callable[[], T]) -> T:
        """Do work on all processes, on process 0 first, whose error is the only one to be reported.

        Raises:
            LeaderFailedError: On the other processes, if process 0 failed.
            ParallelError: On another process, if the work failed there only.
        """
        return self._everywhere(work, leader_first=True)

    def together(self, work: Callable[[], T]) -> T:
        """The same of work that changes nothing: all processes do it at the same time."""
        return self._everywhere(work, leader_first=False)

    def _everywhere(self, work: Callable[[], T], *, leader_first: bool) -> T:
        if self.store is None:
            return work()
        key = f"{_STARTED}/{self._started}"
        self._started += 1
        if self.is_leader:
            return _lead(work, self.store, key)
        if leader_first:
            _follow(self.store, key, self.timeout)
        try:
            result = work()
        except TuckerizeError as error:
            _follow(self.store, key, self.timeout)
            raise ParallelError(
                f"on {socket.gethostname()}, in {Path.cwd()}: {error.message}",
                hint="process 0 had no such error: models, outputs and shards must be on "
                "storage that all nodes see under the same path",
            ) from error
        _follow(self.store, key, self.timeout)
        return result

    def queue(self, count: int) -> Iterator[int]:
        """Yield indices below `count` in order, each to the first process that is free.

        All processes make their queues in the same order.
        """
        if self.store is None:
            yield from range(count)
            return
        key = f"{_NEXT}/{self._queues}"
        self._queues += 1
        while (index := int(self.store.add(key, 1)) - 1) < count:
            yield index

    @contextmanager
    def while_others_wait(self) -> Iterator[None]:
        """Use all cores of the host while the other processes wait."""
        before = torch.get_num_threads()
        if self.size > 1:
            torch.set_num_threads(usable_cores())
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Values of all processes, on every process."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return [value for value in values if value is not None]

    def broadcast(self, value: T | None) -> T:
        """Value of process 0, on every process; the others pass None."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        (received,) = values
        if received is None:
            raise TypeError("process 0 must pass a value")
        return received


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _check_environment() -> None:
    """Check the variables that torchrun sets; a scheduler or a container may set some of them."""
    numbers = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in numbers if name in os.environ}
    odd = next((name for name, value in given.items() if not value.isdecimal()), None)
    absent = next(
        (n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ),
        None,
    )
    if odd or absent:
        raise ParallelError(
            f"the environment variable {odd} is {given[odd]!r}, expected a number"
            if odd
            else f"RANK and WORLD_SIZE are set as torchrun sets them, but {absent} is not",
            hint="start the command with torchrun; for one process: "
            f"env {' '.join(f'-u {name}' for name in given)} tuckerize ...",
        )
    if not int(given["RANK"]) < int(given["WORLD_SIZE"]):
        raise ParallelError(
            f"RANK={given['RANK']} is not below WORLD_SIZE={given['WORLD_SIZE']}",
            hint="start the command with torchrun, which sets both",
        )


@contextmanager
def process_group(
    choose: Callable[[int], torch.device], timeout: timedelta | None = None
) -> Iterator[tuple[Processes, torch.device]]:
    """Join the process group of the run, and leave it at the end.

    Args:
        choose: Chooses the device of this process from its index on the host.
        timeout: How long a process waits for the others; by default 2 hours on NPUs, else 24.

    Yields:
        The processes, and the device of this process.

    Raises:
        ParallelError: Another process has ended, or has not responded within the time-out, or
            the caller has a process group of its own.
    """
    if dist.is_initialized():
        raise ParallelError(
            "these processes have a process group already, and this makes its own",
            hint="call torch.distributed.destroy_process_group() first",
        )
    if not started_by_torchrun():
        yield Processes(), choose(0)
        return
    _check_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose(local_rank)
    if timeout is None:
        timeout = MAX_CONNECT_TIMEOUT if device.type == "npu" else _TIMEOUT
    if device.type == "npu":
        set_hccl_timeouts(timeout)
    with _explain_losses(timeout):
        whole, rank, size = next(rendezvous("env://", timeout=timeout))
        store = PrefixStore(f"tuckerize/{next(_GROUPS)}", whole)
        dist.init_process_group(
            backend_for(device), store=store, rank=rank, world_size=size, timeout=timeout
        )
        # By default each process would use all cores of the host, or, under torchrun, only one.
        torch.set_num_threads(max(1, usable_cores() // local_size))
        try:
            yield Processes(rank, size, local_rank, local_size, store, timeout), device
        finally:
            dist.destroy_process_group()


@contextmanager
def _explain_losses(timeout: timedelta) -> Iterator[None]:
    """Raise ParallelError instead of a library's error when another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _LOST):
            raise ProcessLostError(
                "another process of the run has ended", hint="see its own error message"
            ) from error
        if any(words in str(error) for words in _LATE):
            raise ParallelError(
                f"the other processes have not answered for {timeout}",
                hint="find the process that hangs, or wait longer with --collective-timeout",
            ) from error
        raise


def _lead(work: Callable[[], T], store: Store, key: str) -> T:
    """Do work, and tell the other processes whether it failed."""
    try:
        result = work()
    except BaseException:
        store.set(key, "failed")
        raise
    store.set(key, "ok")
    return result


def _follow(store: Store, key: str, timeout: timedelta) -> None:
    """Wait until process 0 has done the work.

    Raises:
        LeaderFailedError: It failed.
    """
    store.wait([key], timeout)
    if store.get(key) != b"ok":
        raise LeaderFailedError
