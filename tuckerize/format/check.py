"""Files of a Tucker checkpoint and its shards, compared with what their manifests record.

Every file is hashed, none is interpreted: torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.files import (
    FileRecord,
    check_plain_name,
    read_json_object,
    sha256_of,
)
from tuckerize.checkpoint.output import MANIFEST, RECONSTRUCTED, REPORT
from tuckerize.checkpoint.weight_set import CONFIG, INDEX
from tuckerize.errors import CheckpointError, UsageError
from tuckerize.format.card import CARD, SOURCE_CARD
from tuckerize.format.manifest import (
    ShardManifest,
    TuckerManifest,
    checksum,
    read_shard_manifest,
    read_tucker_manifest,
    shard_file_name,
)
from tuckerize.parallel.layouts import owners_of

_WEIGHTS = (".safetensors", ".bin")
# The files that layers are computed from, beside weight files and manifests.
_DECISIVE = (CONFIG, INDEX)
_SAVED_AGAIN = (
    "transformers has saved this checkpoint again, perhaps after training: its files were not "
    "checked, as nothing records their hashes"
)
# Keys of the records of reconstructions that had no hashes.
_EARLY_RECORD = {"tuckerize_version", "tucker_manifest_sha256"}
# The files that people are expected to edit.
_PROSE = (CARD, SOURCE_CARD)


@dataclass(frozen=True, slots=True)
class FileFault:
    """A file that is not as it was written.

    Attributes:
        name: The file, relative to the folder of the checkpoint.
        problem: How it differs.
    """

    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


@dataclass(frozen=True, slots=True)
class Inventory:
    """The files that the manifests of a checkpoint and of its shards record.

    Attributes:
        folder: Folder of the checkpoint.
        files: The files; their names are relative to the folder.
        layer_of: Layer of every shard file.
        faults: Faults that are known before a file is hashed.
        notes: Remarks on what cannot be checked.
    """

    folder: Path
    files: tuple[FileRecord, ...]
    layer_of: Mapping[str, int]
    faults: tuple[FileFault, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files as recorded."""
        return sum(file.bytes for file in self.files)

    def hash(
        self, files: Sequence[FileRecord], read: Callable[[int, str], object]
    ) -> list[FileFault]:
        """Hash some of the files; returns those that differ.

        Args:
            files: The files.
            read: Called with a number of bytes and the name of the file that they are of.
        """
        return [
            FileFault(file.name, problem)
            for file in files
            if (problem := _problem(self.folder / file.name, file, read)) is not None
        ]

    def verdict(self, found: Iterable[FileFault]) -> tuple[tuple[FileFault, ...], tuple[str, ...]]:
        """All faults, and all notes: a model card that was edited is not a fault.

        Args:
            found: What `hash` found for all files.
        """
        every = {*self.faults, *found}
        edited = sorted(f"{fault} (a text for people)" for fault in every if fault.name in _PROSE)
        faults = sorted((f for f in every if f.name not in _PROSE), key=str)
        return tuple(faults), (*self.notes, *edited)

    def prevents_computing(self, fault: FileFault) -> bool:
        """Whether a fault makes it impossible to tell what a layer is made of."""
        name = fault.name
        is_weights = name.endswith(_WEIGHTS) and name not in self.layer_of
        return is_weights or name in _DECISIVE or Path(name).name == MANIFEST


def take_inventory(folder: Path, shardings: Iterable[str]) -> Inventory:
    """List the files of a checkpoint and of some of its shards; reads manifests only.

    Args:
        folder: Folder of the checkpoint.
        shardings: Folders of shards in it: `tp2`, say.

    Raises:
        CheckpointError: The folder is not a finished Tucker checkpoint.
    """
    if not (folder / MANIFEST).exists():
        from tuckerize.format.saved import read_or_describe, tucker_sha256  # need torch

        manifest = read_or_describe(folder)
        whole = tucker_sha256(folder) if shardings else ""
        files, faults = list[FileRecord](), list[FileFault]()
        notes: tuple[str, ...] = (_SAVED_AGAIN,)
    else:
        try:
            manifest = read_tucker_manifest(folder)
        except CheckpointError as error:
            return Inventory(folder, (), {}, (FileFault(MANIFEST, f"is damaged: {error}"),), ())
        whole = sha256_of(folder / MANIFEST)
        files = [*manifest.files, *manifest.other_files]
        faults = [*_changed(folder, MANIFEST), *_unrecorded_weights(folder, files)]
        notes = _unknown(folder, files, "" if manifest.other_files else manifest.tuckerize_version)
    layer_of = {}
    for name in shardings:
        place = f"{name}/{MANIFEST}"
        try:
            shards = read_shard_manifest(folder / name)
        except CheckpointError as error:
            faults.append(FileFault(place, f"is damaged: {error}"))
            continue
        faults += _changed(folder, place)
        faults += [FileFault(place, problem) for problem in _misplaced(manifest, shards)]
        if shards.tucker_manifest_sha256 != whole:
            faults.append(FileFault(place, f"was cut from another version of {folder}"))
        for shard in shards.shards:
            record = shard.file.model_copy(update={"name": f"{name}/{shard.file.name}"})
            files.append(record)
            layer_of[record.name] = shard.layer
    return Inventory(folder, tuple(files), layer_of, tuple(faults), notes)


def take_inventory_of_reconstruction(folder: Path) -> Inventory:
    """List the files of a reconstructed dense checkpoint; reads its record only.

    Args:
        folder: Folder with a record.

    Raises:
        UsageError: The record is of a version that recorded no hashes.
    """
    path = folder / RECONSTRUCTED
    try:
        record = read_json_object(path)
        if record.keys() <= _EARLY_RECORD:
            raise UsageError(
                f"{folder} was reconstructed by tuckerize {record['tuckerize_version']}, which "
                "recorded no hashes",
                hint="reconstruct the Tucker checkpoint again and compare: the bytes are the same",
            )
        files = [FileRecord(**file) for key in ("files", "other_files") for file in record[key]]
        for part in (part for file in files for part in file.name.split("/")):
            check_plain_name(part, found_in=path)
    except (CheckpointError, ValueError, TypeError, KeyError) as error:
        return Inventory(folder, (), {}, (FileFault(RECONSTRUCTED, f"is damaged: {error}"),), ())
    faults = _unrecorded_weights(folder, files)
    if record.get("checksum") != checksum(record):
        faults.append(FileFault(RECONSTRUCTED, "was changed: its checksum is another"))
    return Inventory(folder, tuple(files), {}, tuple(faults), _unknown(folder, files))


def _problem(path: Path, record: FileRecord, read: Callable[[int, str], object]) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != record.bytes:
            return f"has another size: {path.stat().st_size} bytes, not {record.bytes}"
        found = sha256_of(path, lambda count: read(count, record.name))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == record.sha256 else "was changed: its SHA-256 is not the manifest's"


def _changed(folder: Path, name: str) -> list[FileFault]:
    """The fault of a manifest that was changed; those of early versions cannot tell."""
    value: dict[str, Any] = read_json_object(folder / name)
    if value.get("checksum") in (None, checksum(value)):
        return []
    return [FileFault(name, "was changed: its checksum is another")]


def _unrecorded(folder: Path, files: Sequence[FileRecord]) -> list[str]:
    """Files beside those that are recorded; hidden ones are somebody else's."""
    known = {MANIFEST, RECONSTRUCTED, REPORT, *(file.name for file in files)}
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in present if name not in known and not name.startswith(".")]


def _unrecorded_weights(folder: Path, files: Sequence[FileRecord]) -> list[FileFault]:
    """Weight files that loaders may take for the model's."""
    return [
        FileFault(name, "is not in the manifest: a loader may read it in place of another file")
        for name in _unrecorded(folder, files)
        if name.endswith(_WEIGHTS)
    ]


def _unknown(folder: Path, files: Sequence[FileRecord], early: str = "") -> tuple[str, ...]:
    """Note on the files that cannot be checked; `early`: a version that recorded weights alone."""
    names = [name for name in _unrecorded(folder, files) if not name.endswith(_WEIGHTS)]
    if not names:
        return ()
    why = "the manifest does not record them"
    if early:
        why = f"tuckerize {early} did not record their hashes"
    return (f"not checked, {why}: {', '.join(names)}",)


def _misplaced(manifest: TuckerManifest, shards: ShardManifest) -> Iterator[str]:
    """Contradictions between the names of shard files, their records and the checkpoint."""
    tp, ep = shards.tp_size, shards.ep_size
    wanted = {
        (layer, group, ep_rank, tp_rank)
        for layer in manifest.layers
        for group in range(manifest.groups)
        for ep_rank, tp_rank in product(owners_of(group, groups=manifest.groups, ep=ep), range(tp))
    }
    for shard in shards.shards:
        place = (shard.layer, shard.group, shard.ep_rank, shard.tp_rank)
        rank = shard.ep_rank * tp + shard.tp_rank
        name = shard_file_name(shard.layer, shard.group, rank=rank, size=tp * ep)
        if name != shard.file.name or place not in wanted:
            yield (
                f"was changed: it gives {shard.file.name} to layer {shard.layer}, group "
                f"{shard.group}, tp_rank {shard.tp_rank}, ep_rank {shard.ep_rank}"
            )
        wanted.discard(place)
    if wanted:
        layer, group, ep_rank, tp_rank = min(wanted)
        yield (
            f"was changed: it has no shard of layer {layer}, group {group}, tp_rank {tp_rank}, "
            f"ep_rank {ep_rank}"
        )
