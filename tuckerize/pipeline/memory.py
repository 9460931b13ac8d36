"""The memory that a command may take, and how its work is made to fit."""

from __future__ import annotations

import torch

from tuckerize.errors import UsageError
from tuckerize.parallel.memory import available_bytes, parse_bytes
from tuckerize.parallel.processes import Processes
from tuckerize.planning.estimate import BASE_BYTES, Need, need_within, peak_need
from tuckerize.planning.plan import Plan


def most_bytes(max_memory: str | None) -> int | None:
    """Memory that the user allows a process; None without a limit.

    Raises:
        UsageError: It is no amount of memory.
    """
    if max_memory is None:
        return None
    most = parse_bytes(max_memory)
    if not most:
        raise UsageError(
            f"--max-memory {max_memory!r} is not an amount of memory",
            hint="use the form 16GiB; the units are MB, MiB, GB, GiB and TiB",
        )
    return most


def fit_memory(
    plan: Plan,
    processes: Processes,
    device: torch.device,
    most: int | None,
    *,
    profile_of: bool | None = None,
) -> Need:
    """Choose what is held in memory, and use as many threads as it allows.

    Args:
        plan: The plan.
        processes: The processes of the run.
        device: Where the products run.
        most: Bytes that the user allows a process; None for what is free.
        profile_of: Whether modes may be truncated, where a profile is all that is wanted.

    Raises:
        UsageError: Nothing fits.
    """
    free = available_bytes() if device.type == "cpu" else None
    bounds = [] if free is None else [free // processes.local_size]
    if most is not None:
        bounds.append(max(0, most - BASE_BYTES))
    if not bounds:
        return peak_need(plan, torch.get_num_threads(), processes.size)
    need = need_within(
        plan,
        min(bounds),
        processes.size,
        profile_of=profile_of,
        on_host=device.type == "cpu",
    )
    torch.set_num_threads(need.threads)
    return need
