"""Lazy reading of Hugging Face checkpoints: headers first, tensors one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuckerize.checkpoint.dequantize import dequantize
from tuckerize.checkpoint.files import (
    is_lfs_pointer,
    lfs_error,
    read_json_object,
    system_error,
    unreadable,
)
from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.quantized import QuantizedWeight, find_quantized
from tuckerize.checkpoint.weight_set import (
    CONFIG,
    find_weight_files,
    refuse_other_formats,
)
from tuckerize.domain import Size, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.names import TensorName

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Floating types that are read and written, by safetensors' name."""

# The limit of safetensors itself.
_MAX_HEADER_BYTES = 100_000_000

# Raised by JSON of an unexpected form.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)


class DataRange(NamedTuple):
    """Header of a tensor and the offset of its data in the file."""

    header: TensorHeader
    start: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file and its tensors, in file order."""

    path: Path
    tensors: dict[str, DataRange]

    @classmethod
    def open(cls, path: Path) -> WeightFile:
        """Read the header of a safetensors file.

        Raises:
            CheckpointError: The file is missing, truncated or not safetensors.
        """
        if is_lfs_pointer(path):
            raise lfs_error(path)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(_MAX_HEADER_BYTES, size):
                    raise CheckpointError(f"{path} is not a safetensors file, or is truncated")
                header = json.loads(file.read(length))
            tensors = dict(_ranges(header, 8 + length))
        except FileNotFoundError:
            raise CheckpointError(
                f"the weight file {path} is missing", hint="fetch the checkpoint again"
            ) from None
        except OSError as error:
            raise unreadable(path, error) from error
        except (struct.error, RecursionError, *_MALFORMED) as error:
            raise CheckpointError(
                f"{path} has no valid safetensors header: {error}", hint="fetch the file again"
            ) from error
        end = max((r.start + r.header.bytes for r in tensors.values()), default=8 + length)
        if end != size:
            raise CheckpointError(
                f"{path} has {size} bytes, its header describes {end}", hint="fetch the file again"
            )
        return cls(path, tensors)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with config.json and safetensors weight files.

    Attributes:
        folder: The folder.
        config: Contents of config.json.
        files: Weight files by name.
        tensors: Header of every tensor, in the order of the files.
        file_of: Name of the weight file of every stored tensor.
        quantized: Tensors that are dequantized when they are read, by name; see `dense`.
    """

    folder: Path
    config: dict[str, Any]
    files: dict[str, WeightFile]
    tensors: dict[str, TensorHeader]
    file_of: dict[str, str]
    quantized: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config, index and all headers; no weights.

        Raises:
            CheckpointError: Something is missing, unreadable or contradictory.
        """
        refuse_other_formats(folder)
        config = read_json_object(folder / CONFIG)
        files = {name: WeightFile.open(folder / name) for name in find_weight_files(folder)}
        file_of = _file_of_tensors(files)
        tensors = {
            tensor: place.header
            for name, file in files.items()
            for tensor, place in file.tensors.items()
            if file_of[tensor] == name
        }
        return cls(folder, config, files, tensors, file_of)

    def dense(
        self, description: QuantizationDescription, *, but: Callable[[str], bool] = lambda _: False
    ) -> Checkpoint:
        """The same checkpoint, read as if its weights were not quantized.

        A quantized weight has its dense name, shape and type, and the bytes that it is stored in.

        Args:
            description: What config.json says of the weights.
            but: Names of tensors that are left as they are.

        Raises:
            CheckpointError: The weights are quantized in a way that cannot be read.
        """
        stored = {name: header for name, header in self.tensors.items() if not but(name)}
        found = find_quantized(stored, description, _dtype_of(self.config))
        dense = replace(self, quantized={**self.quantized, **found})
        return replace(dense, tensors=dense.dense_headers(self.tensors))

    def dense_headers(self, stored: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
        """Headers of stored tensors, or some of them, as those of dense ones."""
        weights = {part: name for name, own in self.quantized.items() for part in own.parts}
        dense: dict[str, TensorHeader] = {}
        for name, header in stored.items():
            weight = weights.get(name)
            if weight is None:
                dense[name] = header
            else:
                dense[weight] = self.quantized[weight].header
        return dense

    def names_in(self, file: str) -> list[str]:
        """Names of the dense tensors of a weight file; quantized ones are where their codes are."""
        weights = {own.codes: name for name, own in self.quantized.items()}
        others = {part for own in self.quantized.values() for part in own.parts} - weights.keys()
        return [
            weights.get(name, name)
            for name in self.files[file].tensors
            if name not in others and self.file_of.get(name) == file
        ]

    def stored(self, name: str) -> tuple[str, ...]:
        """Names of the tensors in the files that a tensor is made of; its own, if it is dense."""
        return self.quantized[name].parts if name in self.quantized else (name,)

    def files_of(self, name: str) -> set[str]:
        """Names of the weight files that hold a tensor, or the parts that it is made of."""
        return {self.file_of[part] for part in self.stored(name)}

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.bytes for header in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Parameters of all tensors."""
        return sum(header.parameters for header in self.tensors.values())

    def read(
        self, names: Iterable[str], *, rows: range | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one at a time, file by file; files are closed as soon as they are read.

        Args:
            names: Names of the tensors, in any order.
            rows: Consecutive indices of the first dimension: nothing else is loaded. All by
                default.

        Raises:
            CheckpointError: A tensor is missing or cannot be read.
        """
        by_files: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            for part in self.stored(name):
                if part not in self.file_of:
                    raise CheckpointError(
                        f"{self.folder} has no tensor {part}",
                        hint="fetch or write the folder again",
                    )
            places = dict.fromkeys(self.file_of[part] for part in self.stored(name))
            by_files.setdefault(tuple(places), []).append(name)
        for files, members in by_files.items():
            if len(files) == 1:
                parts = [part for name in members for part in self.stored(name)]
                stream = read_tensors(self.folder / files[0], parts, rows=rows)
                for name in members:
                    yield name, self._dense(name, dict(islice(stream, len(self.stored(name)))))
            else:
                for name in members:
                    yield name, self._dense(name, self._gather(self.stored(name), rows))

    def _gather(self, parts: Iterable[str], rows: range | None) -> dict[str, Tensor]:
        """Stored tensors that lie in several files."""
        return {
            part: tensor
            for name in parts
            for part, tensor in read_tensors(self.folder / self.file_of[name], [name], rows=rows)
        }

    def _dense(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        if name not in self.quantized:
            return parts[name]
        return dequantize(self.quantized[name], parts, TORCH_DTYPES[self.tensors[name].dtype])

    def read_one(self, name: str) -> Tensor:
        """Read one tensor."""
        return next(self.read([name]))[1]


def _dtype_of(config: Mapping[str, Any]) -> str:
    """Name of the type that a model computes in; that of bfloat16 if it does not say."""
    nested = config.get("text_config")
    for own in (config, nested if isinstance(nested, dict) else {}):
        said = str(own.get("dtype", own.get("torch_dtype")))
        for name, dtype in TORCH_DTYPES.items():
            if str(dtype).removeprefix("torch.") == said:
                return name
    return "BF16"


def read_tensors(
    path: Path, names: Iterable[str], *, rows: range | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors of one safetensors file one at a time.

    Args:
        path: The file.
        names: Names of the tensors.
        rows: Consecutive indices of the first dimension; all by default.

    Raises:
        CheckpointError: The file or a tensor cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                if rows is None:
                    yield name, file.get_tensor(name)
                else:
                    yield name, file.get_slice(name)[rows.start : rows.stop]
    except (OSError, SafetensorError) as error:
        cause = system_error(error)
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="fetch or write the file again"
        ) from error


def measure_size(
    tensors: Mapping[str, TensorHeader],
    *,
    is_routed: Callable[[str], bool],
    quantised_parameters: int = 0,
) -> Size:
    """Parameters and bytes of the routed experts and of all tensors.

    Args:
        tensors: Headers by name.
        is_routed: Whether a tensor is of routed experts.
        quantised_parameters: Parameters of quantised cores, whose tensors do not tell.
    """
    routed = [header for name, header in tensors.items() if is_routed(name)]
    plain = {name: header for name, header in tensors.items() if not _is_part_of_core(name)}
    return Size(
        routed_parameters=quantised_parameters
        + sum(header.parameters for name, header in plain.items() if is_routed(name)),
        routed_bytes=sum(header.bytes for header in routed),
        total_parameters=quantised_parameters + sum(header.parameters for header in plain.values()),
        total_bytes=sum(header.bytes for header in tensors.values()),
    )


def _is_part_of_core(name: str) -> bool:
    found = TensorName.find(name)
    return found is not None and found.part is not None


def _ranges(header: dict[str, Any], data_start: int) -> Iterator[tuple[str, DataRange]]:
    """Tensors of a parsed safetensors header, in file order."""
    described = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_typed = isinstance(dtype, str) and isinstance(shape, list)
        if not well_typed or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
            raise ValueError(f"the type, shape or place of {name!r} is not valid")
        if start != end or stop < start:
            raise ValueError(f"the data of {name!r} does not follow that of the tensor before it")
        end = stop
        yield name, DataRange(TensorHeader(dtype, tuple(shape), stop - start), data_start + start)


def _file_of_tensors(files: Mapping[str, WeightFile]) -> dict[str, str]:
    """Weight file of every tensor; one that lies in several files must be the same in all."""
    file_of: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.tensors:
            first = file_of.setdefault(tensor, name)
            if first != name and not _same_bytes(files[first], file, tensor):
                raise CheckpointError(
                    f"{files[first].path} and {name} hold different tensors named {tensor}",
                    hint="one of the files is from another checkpoint: fetch both again",
                )
    return file_of


def _same_bytes(one: WeightFile, other: WeightFile, tensor: str) -> bool:
    """Whether a tensor is the same in two files."""
    places = one.tensors[tensor], other.tensors[tensor]
    if places[0].header != places[1].header:
        return False
    parts = []
    for file, place in zip((one, other), places, strict=True):
        with file.path.open("rb") as opened:
            opened.seek(place.start)
            parts.append(opened.read(place.header.bytes))
    return parts[0] == parts[1]
