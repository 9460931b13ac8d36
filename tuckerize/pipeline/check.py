"""The `check` command: hash every file that tuckerize has written to a folder."""

from __future__ import annotations

from pathlib import Path

from tuckerize.checkpoint.output import RECONSTRUCTED
from tuckerize.format.check import take_inventory, take_inventory_of_reconstruction
from tuckerize.format.manifest import available_shardings
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report.checkpoint import CheckReport


def check(folder: str | Path, progress: Progress | None = None) -> CheckReport:
    """Compare every file of a Tucker checkpoint, its shards or a reconstruction with its hash.

    Takes the time of reading the files once; computes nothing, and needs no torchrun.

    Args:
        folder: The Tucker checkpoint, or a folder that `reconstruct` wrote.
        progress: Shows how far the work is, in bytes.

    Raises:
        CheckpointError: The folder is neither, or not finished.
        UsageError: It was reconstructed by a version that recorded no hashes.

    Example:
        >>> check("OUT").passed  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    place = Path(folder)
    if (place / RECONSTRUCTED).exists():
        inventory = take_inventory_of_reconstruction(place)
    else:
        inventory = take_inventory(place, available_shardings(place))
    progress.start(inventory.bytes)
    found = inventory.hash(inventory.files, progress.advance)
    progress.close()
    faults, notes = inventory.verdict(found)
    return CheckReport(str(place), len(inventory.files), inventory.bytes, faults, notes)
