"""Control groups (cgroups): what a container or a scheduler lets this process take of its host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def group_folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Folders of the groups of this process, and of those above them, of versions 1 and 2.

    Not all exist: in a container only the last may be there.

    Args:
        controller: `memory` or `cpu`.
        root: Where `proc` and `sys` lie.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if controllers:  # version 1
            if controller not in controllers.split(","):
                continue
            base /= controller
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder
            if folder == base:
                break


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process can keep busy: those it may run on, within the quota of its groups.

    Threads beyond a quota wait for each other in turns: torch counts the cores of the host.

    Args:
        root: Where `proc` and `sys` lie.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    return max(1, int(min([cores, *map(_quota, group_folders("cpu", root))])))


def _quota(folder: Path) -> float:
    """Cores' worth of processor time that a group may take; infinite where it says none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):  # "max", or another controller's group
        return float("inf")
    return quota / period if quota > 0 else float("inf")
