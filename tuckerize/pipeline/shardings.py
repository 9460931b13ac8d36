"""The shardings of a Tucker checkpoint on disk: find the one that fits, check and read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tuckerize.checkpoint.files import sha256_of
from tuckerize.checkpoint.manifest import MANIFEST, ShardManifest, ShardRecord, read_shard_manifest
from tuckerize.checkpoint.reader import WeightFile, read_tensors
from tuckerize.errors import CheckpointError, ParallelError
from tuckerize.pipeline.opened import OpenedTucker


@dataclass(frozen=True, slots=True)
class Damage:
    """A shard file that is not what was written.

    Attributes:
        layer: Layer whose shard it is.
        message: What is wrong.
        readable: Whether its tensors can be read all the same.
    """

    layer: int
    message: str
    readable: bool


@dataclass(frozen=True, slots=True)
class Sharding:
    """The shards of one mesh.

    Attributes:
        folder: Where the files are.
        manifest: What they are.
    """

    folder: Path
    manifest: ShardManifest

    def damage(self, tp_rank: int, layers: Collection[int]) -> list[Damage]:
        """Files of one process that are missing or changed since they were written."""
        owned = (s for s in self.manifest.owned_by(tp_rank) if s.layer in layers)
        return [damage for shard in owned if (damage := self._damage(shard)) is not None]

    def read_layer(self, tucker: OpenedTucker, layer: int, tp_rank: int) -> list[dict[str, Tensor]]:
        """One process's slices of a layer: for every group its tensors by their names below it."""
        groups = []
        for shard in self.manifest.owned_by(tp_rank):
            if shard.layer == layer:
                prefix = tucker.group_prefix(layer, shard.group)
                names = WeightFile.open(self.folder / shard.file.name).tensors
                tensors = read_tensors(self.folder / shard.file.name, names)
                groups.append({name.removeprefix(prefix): tensor for name, tensor in tensors})
        return groups

    def _damage(self, shard: ShardRecord) -> Damage | None:
        path = self.folder / shard.file.name
        if not path.exists():
            return Damage(shard.layer, f"{path.name} is missing", readable=False)
        if path.stat().st_size != shard.file.bytes:
            return Damage(shard.layer, f"{path.name} has another size", readable=False)
        if sha256_of(path) == shard.file.sha256:
            return None
        message = f"{path.name} was changed: its SHA-256 is not the manifest's"
        return Damage(shard.layer, message, readable=_opens(path))


def available_shardings(folder: Path) -> tuple[int, ...]:
    """Numbers of processes that a Tucker checkpoint has finished shards for."""
    sizes: Iterator[str] = (
        path.parent.name.removeprefix("tp") for path in folder.glob(f"tp*/{MANIFEST}")
    )
    return tuple(sorted(int(size) for size in sizes if size.isdigit()))


def find_sharding(tucker: OpenedTucker, world_size: int) -> Sharding:
    """The sharding for a number of processes.

    Raises:
        ParallelError: There is none; the hint gives the commands that help.
        CheckpointError: It was cut from another version of the checkpoint.
    """
    present = available_shardings(tucker.folder)
    cut = f"tuckerize shard {tucker.folder} --tp {world_size}"
    if world_size not in present:
        run = (
            f"torchrun --nproc-per-node {size} -m tuckerize verify {tucker.folder}"
            for size in present
        )
        only = f", only for {', '.join(map(str, present))}" if present else ""
        raise ParallelError(
            f"{tucker.folder} has no shards for {world_size} processes{only}",
            hint="run one of:\n  " + "\n  ".join([*run, cut]),
        )
    folder = tucker.folder / f"tp{world_size}"
    manifest = read_shard_manifest(folder)
    if manifest.tucker_manifest_sha256 != tucker.manifest_sha256:
        raise CheckpointError(
            f"{folder} was cut from another version of {tucker.folder}",
            hint=f"run: {cut} --overwrite",
        )
    return Sharding(folder, manifest)


def _opens(path: Path) -> bool:
    try:
        WeightFile.open(path)
    except CheckpointError:
        return False
    return True
