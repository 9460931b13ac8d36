"""Writing safetensors weight files, whole and atomically."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tuckerize.checkpoint.files import (
    FileRecord,
    atomic_path,
    copy_range,
    describe_file,
    write_json,
)
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, WeightFile
from tuckerize.checkpoint.weight_set import INDEX
from tuckerize.domain import TensorHeader

FORMAT = {"format": "pt"}

# safetensors' types in its own order: files begin with the last of them.
_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = tuple(_TYPES)
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES.values())}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write tensors as a safetensors file: the same bytes on every run, and no file beside it.

    In safetensors' own order, wide types first, and with sorted metadata.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    header: dict[str, object] = {
        "__metadata__": dict(sorted({**FORMAT, **(metadata or {})}.items()))
    }
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _NAMES[_ORDER[tensor.dtype]]
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [offset, end]}
        offset = end
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            _write_header(file, header)
            for _, tensor in ordered:
                file.write(raw_bytes(tensor))
        return describe_file(temporary, name=path.name)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they are stored."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_header(file: BinaryIO, header: Mapping[str, object]) -> None:
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)


def copy_tensors(path: Path, source: WeightFile, names: Collection[str]) -> FileRecord:
    """Copy tensors of a weight file byte for byte into a new one, without loading them.

    Args:
        path: The new file.
        source: The file to copy from.
        names: Tensors to copy; the order of the source is kept.
    """
    wanted = set(names)
    ranges = {name: place for name, place in source.tensors.items() if name in wanted}
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            _write_header(file, _header_of({name: place.header for name, place in ranges.items()}))
            for described, start in ranges.values():
                copy_range(source.path, start, described.bytes, file)
        return describe_file(temporary, name=path.name)


def write_dense(
    path: Path, checkpoint: Checkpoint, file: str, names: Collection[str], dtype: str | None = None
) -> FileRecord:
    """Write tensors of one weight file of a checkpoint as dense ones, one in memory at a time.

    Args:
        path: The new file.
        checkpoint: The checkpoint, read as a dense one.
        file: Name of its weight file.
        names: Dense names of the tensors to write.
        dtype: safetensors' name of the type of weights that were quantized; the others are copied.
    """
    quantized = [name for name in names if name in checkpoint.quantized]
    if not quantized:
        return copy_tensors(path, checkpoint.files[file], names)
    inside = [name for name in names if checkpoint.files_of(name) == {file}]
    outside = [name for name in names if name not in {*inside}]
    headers = {name: checkpoint.tensors[name] for name in (*inside, *outside)}
    for name in quantized:
        kind = dtype or headers[name].dtype
        size = headers[name].parameters * TORCH_DTYPES[kind].itemsize
        headers[name] = TensorHeader(kind, headers[name].shape, size)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as target:
            _write_header(target, _header_of(headers))
            tensors = (checkpoint.read(own) for own in (inside, *([name] for name in outside)))
            for name, tensor in chain.from_iterable(tensors):
                own = TORCH_DTYPES.get(headers[name].dtype, tensor.dtype)
                target.write(raw_bytes(tensor.to(own)))
        return describe_file(temporary, name=path.name)


def _header_of(tensors: Mapping[str, TensorHeader]) -> dict[str, object]:
    """Header of a safetensors file whose tensors follow in their order."""
    offset = 0
    header: dict[str, object] = {"__metadata__": FORMAT}
    for name, described in tensors.items():
        header[name] = {
            "dtype": described.dtype,
            "shape": described.shape,
            "data_offsets": [offset, offset + described.bytes],
        }
        offset += described.bytes
    return header


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
