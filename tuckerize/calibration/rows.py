"""Rows of tokens that are made some at a time, in memory or in a file that memory maps."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tuckerize.linalg.sharing import Sharing

# Values of every process that are gathered at once, where they go to a file.
_GATHERED_VALUES = 2**24


class Rows:
    """Rows of one tensor, filled in from the first to the last.

    Args:
        count: Number of rows, or more than that.
        folder: Where a file holds them, which has no name and ends with the tensor: the system can
            take its pages away. None for memory, as on every device but the host.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self._count, self._folder = count, folder
        self._filled = 0
        self._whole: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Copy the next rows."""
        if self._whole is None:
            self._whole = _empty_like(rows, self._count, self._folder)
        self._whole[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    @property
    def whole(self) -> Tensor:
        """The rows that have been added, of which there must be some."""
        if self._whole is None:
            raise TypeError("there are no rows")
        return self._whole[: self._filled]


def joined(parts: Iterable[Tensor], count: int, folder: Path | None = None) -> Tensor:
    """The rows of all parts, of which only one is needed at a time; there must be one."""
    rows = Rows(count, folder)
    for part in parts:
        rows.add(part)
    return rows.whole


def gathered(rows: Tensor, sharing: Sharing, count: int, folder: Path | None = None) -> Tensor:
    """The first rows of all processes, one process after another; each has equally many."""
    if sharing.size == 1 or folder is None or rows.device.type != "cpu":
        return sharing.gather(rows)[:count]
    whole = _empty_like(rows, sharing.size * len(rows), folder)
    places = whole.view(sharing.size, len(rows), *rows.shape[1:])
    step = max(1, _GATHERED_VALUES // max(1, math.prod(rows.shape[1:])))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        own = sharing.gather(part)
        places[:, start : start + len(part)] = own.view(sharing.size, *part.shape)
    return whole[:count]


def _empty_like(rows: Tensor, count: int, folder: Path | None) -> Tensor:
    """A tensor of so many rows like some."""
    shape = (count, *rows.shape[1:])
    if folder is None or rows.device.type != "cpu" or not math.prod(shape):
        return rows.new_empty(shape)
    values = math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="states-") as file:
        try:  # of a sparse file on a full disk, a write to memory would end the process
            os.posix_fallocate(file.fileno(), 0, values * rows.itemsize)
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.name) from error
        mapped = torch.from_file(file.name, shared=True, size=values, dtype=rows.dtype)
    return mapped.view(shape)
