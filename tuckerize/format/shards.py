"""The shardings of a Tucker checkpoint on disk: find the one that fits, and check it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tuckerize.checkpoint.files import sha256_of
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.reader import WeightFile
from tuckerize.errors import CheckpointError, ParallelError
from tuckerize.format.manifest import ShardManifest, ShardRecord, read_shard_manifest, sharding_name
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.layouts import Parallelism
from tuckerize.parallel.mesh import Position, check_world


@dataclass(frozen=True, slots=True)
class ShardFault:
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
        cp: Context-parallel processes that have the same ones.
    """

    folder: Path
    manifest: ShardManifest
    cp: int = 1

    @property
    def mesh(self) -> Parallelism:
        """The mesh."""
        return Parallelism(self.manifest.tp_size, self.manifest.ep_size, self.cp)

    def damage(self, position: Position, layers: Collection[int]) -> list[ShardFault]:
        """Files of one process that are missing or changed since they were written."""
        place = {"tp_rank": position.tp.rank, "ep_rank": position.ep.rank}
        owned = (s for s in self.manifest.owned_by(**place) if s.layer in layers)
        return [damage for shard in owned if (damage := self._damage(shard)) is not None]

    def _damage(self, shard: ShardRecord) -> ShardFault | None:
        path = self.folder / shard.file.name
        if not path.exists():
            return ShardFault(shard.layer, f"{path.name} is missing", readable=False)
        if path.stat().st_size != shard.file.bytes:
            return ShardFault(shard.layer, f"{path.name} has another size", readable=False)
        if sha256_of(path) == shard.file.sha256:
            return None
        message = f"{path.name} was changed: its SHA-256 is not the manifest's"
        return ShardFault(shard.layer, message, readable=_opens(path))


def available_shardings(folder: Path) -> tuple[Parallelism, ...]:
    """Meshes that a Tucker checkpoint has finished shards for."""
    names = (path.parent.name for path in folder.glob(f"tp*/{MANIFEST}"))
    found = (re.fullmatch(r"tp(\d+)(?:-ep(\d+))?", name) for name in names)
    sizes = sorted((int(match[1]), int(match[2] or 1)) for match in found if match)
    return tuple(Parallelism(tp, ep) for tp, ep in sizes)


def find_sharding(
    tucker: TuckerCheckpoint, processes: int, *, tp: int | None, ep: int | None, cp: int
) -> Sharding:
    """The sharding for a number of processes.

    Args:
        tucker: The Tucker checkpoint.
        processes: Number of processes.
        tp: Tensor-parallel ones; None takes the sharding that fits.
        ep: Expert-parallel ones, likewise.
        cp: Context-parallel ones, which have the same shards.

    Raises:
        ParallelError: There is none, or the sizes do not fit the processes; the hint gives what
            does.
        CheckpointError: It was cut from another version of the checkpoint.
    """
    if tp is None and ep is None:
        mesh = _fitting(tucker, processes, cp)
    else:
        ep = ep or max(1, processes // ((tp or 1) * cp))
        mesh = Parallelism(tp or max(1, processes // (ep * cp)), ep, cp)
        check_world(processes, mesh)
    return Sharding(*open_shards(tucker.folder, tp=mesh.tp, ep=mesh.ep), cp)


def _fitting(tucker: TuckerCheckpoint, processes: int, cp: int) -> Parallelism:
    """The mesh of the sharding without expert parallelism, or of the only one that fits."""
    present = available_shardings(tucker.folder)
    fitting = [mesh for mesh in present if mesh.tp * mesh.ep * cp == processes]
    without_ep = [mesh for mesh in fitting if mesh.ep == 1]
    if without_ep or len(fitting) == 1:
        return replace((without_ep or fitting)[0], cp=cp)
    run = [
        f"torchrun --nproc-per-node {mesh.tp * mesh.ep * cp} -m tuckerize verify {tucker.folder} "
        f"--tp {mesh.tp} --ep {mesh.ep} --cp {cp}"
        for mesh in fitting or present
    ]
    cut = f"tuckerize shard {tucker.folder} --tp {max(1, processes // cp)}"
    names = [sharding_name(tp=mesh.tp, ep=mesh.ep) for mesh in present]
    only = f", only {', '.join(names)}" if names else ""
    what = "several shardings" if fitting else "no shards"
    raise ParallelError(
        f"{tucker.folder} has {what} for {processes} processes{only}",
        hint="run one of:\n  " + "\n  ".join([*run, cut]),
    )


def open_shards(tucker: Path, *, tp: int, ep: int) -> tuple[Path, ShardManifest]:
    """Folder and manifest of the shards of a Tucker checkpoint for a mesh.

    Raises:
        ParallelError: There are none; the hint gives the command.
        CheckpointError: They were cut from another version of the checkpoint.
    """
    folder = tucker / sharding_name(tp=tp, ep=ep)
    command = f"tuckerize shard {tucker} --tp {tp}" + (f" --ep {ep}" if ep > 1 else "")
    if not (folder / MANIFEST).exists():
        raise ParallelError(
            f"{tucker} has no shards for tp x ep = {tp} x {ep}", hint=f"run: {command}"
        )
    manifest = read_shard_manifest(folder)
    if manifest.tucker_manifest_sha256 != sha256_of(tucker / MANIFEST):
        raise CheckpointError(
            f"{folder} was cut from another version of {tucker}",
            hint=f"run: {command} --overwrite",
        )
    return folder, manifest


def _opens(path: Path) -> bool:
    try:
        WeightFile.open(path)
    except CheckpointError:
        return False
    return True
