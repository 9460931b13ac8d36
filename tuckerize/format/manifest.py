"""Manifests of a Tucker checkpoint and of its shards.

Both are JSON with an integer `schema_version`, written last: docs/reference/format.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from tuckerize.checkpoint.files import (
    Count,
    FileRecord,
    Record,
    Sha256,
    check_plain_name,
    read_json_object,
)
from tuckerize.checkpoint.hub import similar_folder
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.sealed import json_sha256
from tuckerize.domain import (
    Cores,
    Joint,
    Layout,
    MultilinearRank,
    Projection,
    Size,
    StackResult,
    StackShape,
    cores_of,
)
from tuckerize.errors import CheckpointError
from tuckerize.format.records import (
    HealRecord,
    LayerRecord,
    LayoutRecord,
    Mask,
    SourceRecord,
    unpack_neurons,
)
from tuckerize.parallel.layouts import LayerShape, Parallelism

SCHEMA_VERSION = 1


class TuckerManifest(Record):
    """Contents and origin of a Tucker checkpoint.

    Attributes:
        schema_version: Version of this file.
        tuckerize_version: Version of the program that wrote it.
        family: `model_type` of the model.
        layout: How its routed experts lay on disk; None in manifests of version 0.1.
        source: The dense checkpoint that was decomposed; None if transformers has saved the result
            again, see `format/saved.py`.
        recipe: The recipe as carried out.
        dtype: safetensors' name of the type of factors and cores.
        cores: Encoding of the cores, or by layer, if it is another one; left out of the file if
            not.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        group_size: Experts in a group.
        joint: Projections that share one U_I, if any.
        stacks: Every decomposed stack, ordered by layer, group and projection.
        calibrated: Result of calibration for every layer; empty if data-free.
        healed: Training after the decomposition, if any, left out of the file if not; residuals
            are then not known.
        before: Size of the source.
        after: Size of this checkpoint.
        files: Its weight files.
        other_files: Its other files: config.json, index, tokenizer, loader, card; empty in
            checkpoints of early versions.
        checksum: Hash of the rest of this file; see `sealed`.
    """

    schema_version: Literal[1] = 1
    tuckerize_version: str
    family: str
    layout: LayoutRecord | None = None
    source: SourceRecord | None
    recipe: dict[str, Any]
    dtype: str
    cores: Cores = None
    shape: StackShape
    group_size: Annotated[int, Field(ge=1)]
    joint: Joint | None
    stacks: Annotated[tuple[StackResult, ...], Field(min_length=1)]
    calibrated: tuple[LayerRecord, ...] = ()
    healed: HealRecord | None = None
    before: Size
    after: Size
    files: tuple[FileRecord, ...]
    other_files: tuple[FileRecord, ...] = ()
    checksum: Sha256 | None = None

    @model_validator(mode="after")
    def _groups_fit(self) -> TuckerManifest:
        if min(self.shape) < 1 or self.shape.experts % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not fit the shape {self.shape}")
        if any(not 0 <= stack.group < self.groups for stack in self.stacks):
            raise ValueError(f"a stack is of a group that is not one of {self.groups}")
        return self

    @model_validator(mode="after")
    def _neurons_fit(self) -> TuckerManifest:
        for record in self.calibrated:
            kept = [unpack_neurons(text, self._group_shape) for text in record.kept]
            groups = self.groups if record.neurons < self.shape.intermediate else 0
            wanted = [self.group_size * record.neurons] * groups
            silent = any(not own_EH.any(axis=1).all() for own_EH in kept)
            sums = [int(own_EH.sum()) for own_EH in kept]
            if record.neurons > self.shape.intermediate or sums != wanted or silent:
                raise ValueError(
                    f"layer {record.layer} does not keep {record.neurons} neurons an expert"
                )
        return self

    @property
    def _group_shape(self) -> StackShape:
        """Sizes of one dense stack."""
        return self.shape._replace(experts=self.group_size)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the decomposed layers."""
        return tuple(sorted({stack.layer for stack in self.stacks}))

    @property
    def largest_residual(self) -> float | None:
        """Largest relative residual of a stack; None if the weights were trained since."""
        largest = max(stack.relative_residual for stack in self.stacks)
        return None if math.isnan(largest) else largest

    @property
    def groups(self) -> int:
        """Groups in a layer."""
        return self.shape.experts // self.group_size

    def ranks(self, layer: int) -> list[dict[Projection, MultilinearRank]]:
        """Core sizes of the projections of every group of a layer."""
        groups: list[dict[Projection, MultilinearRank]] = [{} for _ in range(self.groups)]
        for stack in self.stacks:
            if stack.layer == layer:
                groups[stack.group][stack.projection] = stack.multilinear_rank
        return groups

    def stack_shape(self, layer: int) -> StackShape:
        """Sizes of one stack of a layer; H is the mean width of its experts."""
        neurons = next((r.neurons for r in self.calibrated if r.layer == layer), None)
        return self._group_shape._replace(intermediate=neurons or self.shape.intermediate)

    def layer_shape(self, layer: int) -> LayerShape:
        """Sizes that decide how a layer is split over processes."""
        return LayerShape(
            self.ranks(layer),
            self.stack_shape(layer),
            joint=self.joint is not None,
            core_type=cores_of(self.cores, layer),
        )

    def widths(self, layer: int, group: int) -> tuple[int, ...]:
        """Neurons of every expert of a group."""
        kept_EH = self.kept_neurons(layer, group)
        if kept_EH is None:
            return (self.shape.intermediate,) * self.group_size
        return tuple(int(width) for width in kept_EH.sum(axis=1))

    def kept_neurons(self, layer: int, group: int) -> Mask | None:
        """Mask of the kept neurons of a group, shape (E, H); None if all are kept."""
        record = next((r for r in self.calibrated if r.layer == layer and r.kept), None)
        return None if record is None else unpack_neurons(record.kept[group], self._group_shape)


class ShardRecord(Record):
    """The shard of one group of one layer that one process owns."""

    layer: Count
    group: Count
    tp_rank: Count
    ep_rank: Count = 0
    file: FileRecord


class ShardManifest(Record):
    """One sharding of a Tucker checkpoint.

    Attributes:
        schema_version: Version of this file.
        tuckerize_version: Version of the program that wrote it.
        layout: How tensors are split.
        tp_size: Tensor-parallel processes.
        ep_size: Expert-parallel processes.
        tucker_manifest_sha256: Hash of the manifest of the Tucker checkpoint.
        uneven: Tensors with a size that `tp_size` does not divide: the first processes own one row
            or column more than the last. Nothing is dropped and no zeros are stored.
        shards: Every file.
        checksum: Hash of the rest of this file; see `sealed`.
    """

    schema_version: Literal[1] = 1
    tuckerize_version: str
    layout: Layout
    tp_size: Annotated[int, Field(ge=1)]
    ep_size: Annotated[int, Field(ge=1)] = 1
    tucker_manifest_sha256: Sha256
    uneven: tuple[str, ...]
    shards: tuple[ShardRecord, ...]
    checksum: Sha256 | None = None

    def owned_by(self, *, tp_rank: int, ep_rank: int) -> list[ShardRecord]:
        """The shards of one process."""
        place = (tp_rank, ep_rank)
        return [shard for shard in self.shards if (shard.tp_rank, shard.ep_rank) == place]


def shard_file_name(layer: int, group: int, *, rank: int, size: int) -> str:
    """Name of the file of one process's shard of a group."""
    return f"layer-{layer:05d}-group-{group:04d}-rank-{rank:05d}-of-{size:05d}.safetensors"


def sharding_name(*, tp: int, ep: int) -> str:
    """Name of the folder of a sharding: `tp4`, or `tp2-ep2`."""
    return f"tp{tp}-ep{ep}" if ep > 1 else f"tp{tp}"


def available_shardings(folder: Path) -> dict[str, Parallelism]:
    """Meshes that a Tucker checkpoint has finished shards for, by the folder of their shards."""
    names = (path.parent.name for path in folder.glob(f"tp*/{MANIFEST}"))
    found = (re.fullmatch(r"tp(\d+)(?:-ep(\d+))?", name) for name in names)
    sizes = sorted((int(match[1]), int(match[2] or 1)) for match in found if match)
    return {sharding_name(tp=tp, ep=ep): Parallelism(tp, ep) for tp, ep in sizes}


def sealed(manifest: TuckerManifest | ShardManifest) -> dict[str, Any]:
    """JSON values of a manifest, with their checksum."""
    value = manifest.model_dump(mode="json")
    for key in ("cores", "healed"):
        if value.get(key, "") is None:
            del value[key]
    layout = value.get("layout")  # that of shards is a word
    if isinstance(layout, dict):
        if layout["further"] is None:
            del layout["further"], layout["depth"]
        if layout["storage"].get("biased") is False:
            del layout["storage"]["biased"]
    for stack in value.get("stacks", ()):  # JSON has no NaN
        if math.isnan(stack["relative_residual"]):
            stack["relative_residual"] = "nan"
    return {**value, "checksum": checksum(value)}


def checksum(value: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's JSON values other than the checksum, however they are laid out."""
    rest = {key: item for key, item in value.items() if key != "checksum"}
    return json_sha256(rest)


_Manifest = TypeVar("_Manifest", TuckerManifest, ShardManifest)


def read_tucker_manifest(folder: Path) -> TuckerManifest:
    """Read the manifest of a Tucker checkpoint.

    Raises:
        CheckpointError: It is missing (the folder is unfinished or foreign) or invalid.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise CheckpointError(f"there is no folder {folder}", hint=similar_folder(folder))
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a finished Tucker checkpoint",
            hint="run 'tuckerize decompose' (again, if it was interrupted: it continues)",
        )
    value = read_json_object(path)
    if "shards" in value:
        raise CheckpointError(
            f"{folder} holds shards, and this needs the Tucker checkpoint that they were cut from",
            hint="give the folder that 'tuckerize shard' was given",
        )
    manifest = _validated(value, TuckerManifest, path)
    for file in manifest.files:
        check_plain_name(file.name, found_in=path)
    for file in manifest.other_files:
        for part in file.name.split("/"):
            check_plain_name(part, found_in=path)
    return manifest


def read_shard_manifest(folder: Path) -> ShardManifest:
    """Read the manifest of a sharding.

    Raises:
        CheckpointError: It is missing or invalid.
    """
    path = folder / MANIFEST
    manifest = _validated(read_json_object(path), ShardManifest, path)
    for shard in manifest.shards:
        check_plain_name(shard.file.name, found_in=path)
    return manifest


def _validated(value: dict[str, Any], kind: type[_Manifest], path: Path) -> _Manifest:
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version {version!r}, this program reads {SCHEMA_VERSION}",
            hint="use the version of tuckerize that wrote it, or write it again",
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is not a valid manifest: {place + ': ' if place else ''}{first['msg']}",
            hint="the file was changed or damaged: write the checkpoint again",
        ) from None
