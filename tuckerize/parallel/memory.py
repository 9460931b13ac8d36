"""Memory that this process may still take: of the host, and of the control groups it runs in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tuckerize.control_groups import ROOT, group_folders
from tuckerize.errors import UsageError

UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TIB": 2**40}
"""Bytes of units of memory, in capitals."""

# Where a group says its limit, its use, and how much of that are files that can go.
_NAMES = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes of host memory that can be had; None where the system does not say.

    Args:
        root: Where `proc` and `sys` lie.
    """
    found = [value * 1024 for value in _fields(root / "proc/meminfo", "MemAvailable:")]
    if not found:
        return None
    for folder in group_folders("memory", root):
        found += _free_in(folder)
    return max(0, min(found))


def parse_bytes(text: str) -> int | None:
    """Read an amount of memory; None if it is none.

    >>> parse_bytes("1.5 GiB"), parse_bytes("400MB"), parse_bytes("much")
    (1610612736, 400000000, None)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    return int(float(match[1]) * unit) if match and unit else None


def require_memory(needed: float, what: str, advice: str, *, processes: int = 1) -> None:
    """Refuse work that cannot fit in the free memory of the host, before it begins.

    Args:
        needed: Bytes that one process holds at once, at the least.
        what: What they are, for the error.
        advice: What makes them fewer.
        processes: Processes on this host.

    Raises:
        UsageError: There is less.
    """
    free = available_bytes()
    if free is not None and needed > free // processes:
        raise UsageError(
            f"a process holds at least {needed / 2**30:.1f} GiB at once, {what}, and "
            f"{free / processes / 2**30:.1f} GiB of memory are free for it, of the host or of its "
            "control group",
            hint=f"raise the limit, or {advice}",
        )


def _free_in(folder: Path) -> Iterator[int]:
    """Free bytes of a group."""
    for most, used, files in _NAMES:
        try:
            free = int((folder / most).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # "max", or another controller's group
            continue
        yield free + sum(_fields(folder / "memory.stat", files))


def _fields(path: Path, name: str) -> list[int]:
    """The value of a line `name value` of a file; none if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [int(words[1]) for words in map(str.split, lines) if name in words[:1]]
