"""The `check` command: hash every file of a Tucker checkpoint and of its shards."""

from __future__ import annotations

from pathlib import Path

from tuckerize.format.check import take_inventory
from tuckerize.format.manifest import available_shardings
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report import CheckReport


def check(folder: str | Path, progress: Progress | None = None) -> CheckReport:
    """Compare every file of a Tucker checkpoint and of its shards with its recorded hash.

    Takes the time of reading the files once; computes nothing, and needs no torchrun.

    Args:
        folder: The Tucker checkpoint.
        progress: Shows how far the work is, in bytes.

    Raises:
        CheckpointError: The folder is not a finished Tucker checkpoint.

    Example:
        >>> check("OUT").passed  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    place = Path(folder)
    inventory = take_inventory(place, available_shardings(place))
    progress.start(inventory.bytes)
    found = inventory.hash(inventory.files, progress.advance)
    progress.close()
    faults, notes = inventory.verdict(found)
    return CheckReport(str(place), len(inventory.files), inventory.bytes, faults, notes)
