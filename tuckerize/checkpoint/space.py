"""Room on disk, known before hours of work are begun."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuckerize.errors import OutputError


def require_space(folder: Path, needed: int) -> None:
    """Refuse work whose files do not fit on the disk.

    Args:
        folder: Where the files go; weight files that lie there already count as written.
        needed: Bytes of all of them.

    Raises:
        OutputError: The disk has less.
    """
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed - written > free:
        raise OutputError(
            f"{folder} needs {_size(needed - written)} more, and its disk has {_size(free)}",
            hint="make room, or choose an --output on another disk; the same command continues",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
