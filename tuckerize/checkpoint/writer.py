"""Writing safetensors weight files, whole and atomically."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from tuckerize.checkpoint.files import atomic_path, copy_range, sha256_of
from tuckerize.checkpoint.reader import WeightFile

FORMAT = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A weight file that was written: its name, size and SHA-256."""

    name: str
    bytes: int
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write tensors as a safetensors file."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={**FORMAT, **(metadata or {})},
        )
        return _described(path, temporary)


def copy_tensors(path: Path, source: WeightFile, names: list[str]) -> WrittenFile:
    """Copy tensors of a weight file byte for byte into a new one, without loading them.

    Args:
        path: The new file.
        source: The file to copy from.
        names: Tensors to copy; the order of the source is kept.
    """
    wanted = set(names)
    ranges = {name: place for name, place in source.tensors.items() if name in wanted}
    offset = 0
    header: dict[str, object] = {"__metadata__": FORMAT}
    for name, (described, _) in ranges.items():
        header[name] = {
            "dtype": described.dtype,
            "shape": described.shape,
            "data_offsets": [offset, offset + described.bytes],
        }
        offset += described.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for described, start in ranges.values():
                copy_range(source.path, start, described.bytes, file)
        return _described(path, temporary)


def _described(path: Path, written: Path) -> WrittenFile:
    return WrittenFile(path.name, written.stat().st_size, sha256_of(written))
