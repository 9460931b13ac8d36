"""Shards of a Tucker checkpoint: find those of a mesh, check their files, read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tuckerize.checkpoint.files import read_json_object
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.reader import WeightFile, read_tensors
from tuckerize.checkpoint.weight_set import CONFIG
from tuckerize.domain import Layout
from tuckerize.errors import CheckpointError, ParallelError
from tuckerize.format.manifest import (
    ShardManifest,
    ShardRecord,
    TuckerManifest,
    available_shardings,
    read_shard_manifest,
    sharding_name,
)
from tuckerize.format.saved import read_or_describe, tucker_sha256
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, family_of
from tuckerize.moe.family import Family
from tuckerize.names import TensorName, group_module
from tuckerize.parallel.layouts import LayerShape, Parallelism, experts_are_split
from tuckerize.parallel.mesh import Position, check_world


@dataclass(frozen=True, slots=True)
class Sharding:
    """The shards of a Tucker checkpoint for one mesh; manifests are read and compared once.

    Attributes:
        checkpoint: Folder of the Tucker checkpoint.
        tucker: Its manifest.
        config: Its config.json.
        family: Its model family.
        manifest: Manifest of the shards.
        cp: Context-parallel processes; all of them have the same shards.
    """

    checkpoint: Path
    tucker: TuckerManifest
    config: Mapping[str, Any]
    family: Family
    manifest: ShardManifest
    cp: int = 1

    @classmethod
    def open(cls, checkpoint: Path, *, tp: int, ep: int) -> Sharding:
        """Open shards by the folder of their checkpoint, whose weight files need not be there.

        Args:
            checkpoint: Folder of the Tucker checkpoint.
            tp: Tensor-parallel processes.
            ep: Expert-parallel processes.

        Raises:
            ParallelError: There are no shards for the mesh; the hint gives the command.
            CheckpointError: They were cut from another version of the checkpoint, or a manifest
                cannot be read.
        """
        tucker = read_or_describe(checkpoint)
        family = family_of(tucker, checkpoint)
        manifest = _open_manifest(checkpoint, tucker_sha256(checkpoint), tp=tp, ep=ep)
        return cls(checkpoint, tucker, read_json_object(checkpoint / CONFIG), family, manifest)

    @classmethod
    def of(cls, tucker: TuckerCheckpoint, mesh: Parallelism) -> Sharding:
        """Open shards of an open checkpoint.

        Raises:
            ParallelError: There are no shards for the mesh; the hint gives the command.
            CheckpointError: They were cut from another version of the checkpoint.
        """
        manifest = _open_manifest(tucker.folder, tucker.manifest_sha256, tp=mesh.tp, ep=mesh.ep)
        return cls(tucker.folder, tucker.manifest, tucker.config, tucker.family, manifest, mesh.cp)

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return self.checkpoint / sharding_name(tp=self.manifest.tp_size, ep=self.manifest.ep_size)

    @property
    def mesh(self) -> Parallelism:
        """The mesh."""
        return Parallelism(self.manifest.tp_size, self.manifest.ep_size, self.cp)

    @property
    def layout(self) -> Layout:
        """Split of the tensors over tensor-parallel processes."""
        return self.manifest.layout

    def layer_shape(self, layer: int) -> LayerShape:
        """Sizes of a whole layer.

        Raises:
            CheckpointError: The layer is not decomposed.
        """
        if layer not in self.tucker.layers:
            raise CheckpointError(
                f"layer {layer} of {self.checkpoint} is not decomposed",
                hint=f"decomposed layers: {', '.join(map(str, self.tucker.layers))}",
            )
        return self.tucker.layer_shape(layer)

    def read_layer(self, layer: int, position: Position) -> list[dict[TensorName, Tensor]]:
        """Slices of one process of a layer's groups, by their names relative to the group.

        Experts with core rows of their own are numbered from the first of the process.

        Raises:
            CheckpointError: The layer is not decomposed, or a file cannot be read.
        """
        sizes, ep = self.layer_shape(layer), position.ep
        first = sizes.experts // ep.size * ep.rank if experts_are_split(sizes, ep.size) else 0
        experts = self.family.experts_prefix(layer)
        return [
            _read_shard(self.folder / shard.file.name, group_module(shard.group, experts), first)
            for shard in self._owned_by(position)
            if shard.layer == layer
        ]

    def _owned_by(self, position: Position) -> list[ShardRecord]:
        return self.manifest.owned_by(tp_rank=position.tp.rank, ep_rank=position.ep.rank)


def find_sharding(
    tucker: TuckerCheckpoint, processes: int, *, tp: int | None, ep: int | None, cp: int
) -> Sharding:
    """The sharding for a number of processes.

    Args:
        tucker: The Tucker checkpoint.
        processes: Number of processes.
        tp: Tensor-parallel processes; None takes the sharding that fits.
        ep: Expert-parallel ones, likewise.
        cp: Context-parallel ones, which have the same shards.

    Raises:
        ParallelError: There is none, or the sizes do not fit the processes; the hint gives what
            does.
        CheckpointError: It was cut from another version of the checkpoint.
    """
    return Sharding.of(tucker, find_mesh(tucker.folder, processes, tp=tp, ep=ep, cp=cp))


def find_mesh(
    folder: Path, processes: int, *, tp: int | None, ep: int | None, cp: int
) -> Parallelism:
    """The mesh of the sharding for a number of processes; reads no files.

    Args:
        folder: Folder of the Tucker checkpoint.
        processes: Number of processes.
        tp: Tensor-parallel processes; None takes the sharding that fits.
        ep: Expert-parallel ones, likewise.
        cp: Context-parallel ones, which have the same shards.

    Raises:
        ParallelError: No sharding fits, or the sizes do not fit the processes.
    """
    if tp is None and ep is None:
        return _fitting(folder, processes, cp)
    ep = ep or max(1, processes // ((tp or 1) * cp))
    mesh = Parallelism(tp or max(1, processes // (ep * cp)), ep, cp)
    check_world(processes, mesh)
    return mesh


def _fitting(folder: Path, processes: int, cp: int) -> Parallelism:
    """The mesh of the sharding without expert parallelism, or of the only one that fits."""
    present = available_shardings(folder)
    fitting = [mesh for mesh in present.values() if mesh.tp * mesh.ep * cp == processes]
    without_ep = [mesh for mesh in fitting if mesh.ep == 1]
    if without_ep or len(fitting) == 1:
        return replace((without_ep or fitting)[0], cp=cp)
    run = [
        f"torchrun --nproc-per-node {mesh.tp * mesh.ep * cp} -m tuckerize verify {folder} "
        f"--tp {mesh.tp} --ep {mesh.ep} --cp {cp}"
        for mesh in fitting or present.values()
    ]
    cut = f"tuckerize shard {folder} --tp {max(1, processes // cp)}"
    only = f", only {', '.join(present)}" if present else ""
    what = "several shardings" if fitting else "no shards"
    raise ParallelError(
        f"{folder} has {what} for {processes} processes{only}",
        hint="run one of:\n  " + "\n  ".join([*run, cut]),
    )


def _open_manifest(tucker: Path, tucker_sha256: str, *, tp: int, ep: int) -> ShardManifest:
    """Manifest of the shards for a mesh, checked against that of their checkpoint."""
    folder = tucker / sharding_name(tp=tp, ep=ep)
    command = f"tuckerize shard {tucker} --tp {tp}" + (f" --ep {ep}" if ep > 1 else "")
    if not (folder / MANIFEST).exists():
        raise ParallelError(
            f"{tucker} has no shards for tp x ep = {tp} x {ep}", hint=f"run: {command}"
        )
    manifest = read_shard_manifest(folder)
    if manifest.tucker_manifest_sha256 != tucker_sha256:
        raise CheckpointError(
            f"{folder} was cut from another version of {tucker}",
            hint=f"run: {command} --overwrite",
        )
    return manifest


def _read_shard(path: Path, module: str, first: int) -> dict[TensorName, Tensor]:
    """Tensors of a group by their names relative to it; experts are numbered from the first.

    Raises:
        CheckpointError: The file cannot be read, or holds another tensor.
    """
    found = {}
    for text, tensor in read_tensors(path, WeightFile.open(path).tensors):
        name = TensorName.find(text)
        if name is None or name.module != module:
            raise CheckpointError(
                f"{path} holds {text}, which is not of {module}", hint="write the shards again"
            )
        own = None if name.expert is None else name.expert - first
        found[replace(name.within_group, expert=own)] = tensor
    return found
