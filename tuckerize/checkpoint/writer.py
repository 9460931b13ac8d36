"""Writing safetensors weight files, whole and atomically."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tuckerize.checkpoint.files import (
    FileRecord,
    atomic_path,
    copy_range,
    describe_file,
    system_error,
    write_json,
)
from tuckerize.checkpoint.reader import WeightFile
from tuckerize.checkpoint.weight_set import INDEX

FORMAT = {"format": "pt"}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write tensors as a safetensors file."""
    with atomic_path(path) as temporary:
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={**FORMAT, **(metadata or {})},
            )
        except SafetensorError as error:
            raise system_error(error) from error
        _sort_metadata(temporary)
        return describe_file(temporary, name=path.name)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a header: safetensors' own order differs between runs."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(encoded.ljust(length))


def copy_tensors(path: Path, source: WeightFile, names: Collection[str]) -> FileRecord:
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
        return describe_file(temporary, name=path.name)


def write_index(folder: Path, files: Sequence[WeightFile]) -> None:
    """Write the index of a folder's weight files, as Hugging Face loaders expect it."""
    file_of = {tensor: file.path.name for file in files for tensor in file.tensors}
    headers = [place.header for file in files for place in file.tensors.values()]
    index = {
        "metadata": {
            "total_size": sum(header.bytes for header in headers),
            "total_parameters": sum(header.parameters for header in headers),
        },
        "weight_map": dict(sorted(file_of.items())),
    }
    write_json(folder / INDEX, index)
