"""A Tucker checkpoint on disk: manifest, config.json and tensors, opened and checked together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import GATE_UP, Mode, Projection, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.format.check import Inventory
from tuckerize.format.config import GroupShape, find_quantization, without_quantization
from tuckerize.format.cores import dequantised
from tuckerize.format.manifest import TuckerManifest
from tuckerize.format.saved import read_or_describe, tucker_sha256
from tuckerize.linalg.selection import KeptNeurons, kept_neurons
from tuckerize.linalg.tucker import TuckerFactors
from tuckerize.moe.families import FAMILIES
from tuckerize.moe.family import Family
from tuckerize.moe.lookup import LAYERS
from tuckerize.moe.routing import Router, read_input_norm
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorKind, TensorName, expert_rows, group_module, in_group


@dataclass(frozen=True, slots=True)
class TuckerCheckpoint:
    """A finished Tucker checkpoint.

    Attributes:
        manifest: Its manifest.
        checkpoint: config.json and tensors, those of a quantized source read as dense ones.
        family: Its model family.
        groups: Names of the tensors of every group, by the group's module.
    """

    manifest: TuckerManifest
    checkpoint: Checkpoint
    family: Family
    groups: Mapping[str, Sequence[TensorName]]

    @classmethod
    def open(cls, folder: Path) -> TuckerCheckpoint:
        """Open a finished Tucker checkpoint; reads headers only.

        Raises:
            CheckpointError: It is unfinished, foreign, or a weight file is missing or damaged.
        """
        manifest = read_or_describe(folder)
        stored = Checkpoint.open(folder)
        rest = (find_quantization(stored.config) or {}).get("rest")
        description = QuantizationDescription.of({"quantization_config": rest})
        checkpoint = stored.dense(description, but=in_group)
        for file in manifest.files:
            size = (folder / file.name).stat().st_size if (folder / file.name).exists() else 0
            if size != file.bytes:
                raise CheckpointError(
                    f"{folder / file.name} has {size} bytes, the manifest says {file.bytes}",
                    hint="the file was changed: run 'tuckerize decompose' with --overwrite",
                )
        family = family_of(manifest, folder)
        groups: dict[str, list[TensorName]] = {}
        for name in filter(None, map(TensorName.find, checkpoint.tensors)):
            groups.setdefault(name.module, []).append(name)
        return cls(manifest, checkpoint, family, groups)

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    @property
    def manifest_sha256(self) -> str:
        """Hash of the manifest, and so of everything in the checkpoint."""
        return tucker_sha256(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    def group_module(self, layer: int, group: int) -> str:
        """Module of a group."""
        return group_module(group, self.family.experts_prefix(layer))

    def group_headers(self, layer: int, group: int) -> dict[TensorName, TensorHeader]:
        """Headers of a group's tensors by their names relative to the group."""
        names = self.groups.get(self.group_module(layer, group), ())
        return {name.within_group: self.checkpoint.tensors[str(name)] for name in names}

    def read_group(self, layer: int, group: int) -> dict[TensorName, Tensor]:
        """A group's tensors by their names relative to the group."""
        names = self.groups.get(self.group_module(layer, group), ())
        tensors = self.checkpoint.read(map(str, names))
        return {TensorName.parse(name).within_group: tensor for name, tensor in tensors}

    def read_factors(self, layer: int, group: int) -> dict[Projection, TuckerFactors]:
        """A group's Tucker tensors, cores that are quantised in float32."""
        ranks = self.manifest.ranks(layer)[group]
        shape = GroupShape(
            self.manifest.widths(layer, group), ranks, self.manifest.joint is not None
        )
        tensors = dequantised(self.read_group(layer, group), shape.core_shapes())
        return {projection: factors_of(tensors, projection) for projection in ranks}

    def read_biases(self, layer: int, group: int) -> dict[Projection, Tensor]:
        """A group's biases, shape (E, K), of down (E, I); none if its experts have none."""
        if not self.family.storage.biased:
            return {}
        return biases_of(self.read_group(layer, group))

    def router(self, layer: int) -> Router:
        """Router of a layer."""
        return Router.read(self.checkpoint, self.family, layer)

    def input_norm(self, layer: int) -> Tensor:
        """Factors of the norm before the MoE block of a layer, float32, shape (I,)."""
        return read_input_norm(self.checkpoint, self.family, layer)

    def dense_layers(self) -> SourceModel | None:
        """The layers that stayed dense as a model of their own; None if there are none.

        Raises:
            CheckpointError: Tensors of theirs are missing or of another shape or type.
        """
        tensors = {
            name: header
            for name, header in self.checkpoint.tensors.items()
            if self.family.layer_of(name) not in self.manifest.layers
        }
        if not self.family.moe_layers(self.config, tensors):
            return None
        config = without_quantization(self.config)
        return SourceModel.open(replace(self.checkpoint, config=config, tensors=tensors))

    def kept(self, layer: int, group: int) -> KeptNeurons | None:
        """Kept neurons of every expert of a group; None if all."""
        kept_EH = self.manifest.kept_neurons(layer, group)
        return None if kept_EH is None else kept_neurons(torch.from_numpy(kept_EH))


def family_of(manifest: TuckerManifest, folder: Path) -> Family:
    """Model family of a Tucker checkpoint.

    Raises:
        CheckpointError: It is not known.
    """
    layout, names = manifest.layout, manifest.layout and manifest.layout.inferred
    row = names.row(manifest.family) if names else FAMILIES.get(manifest.family)
    if row is None:
        raise CheckpointError(f"{folder} is of the family '{manifest.family}', which is unknown")
    if layout is None:  # of version 0.1
        return Family(row, LAYERS[0], row.storages[0])
    return Family(row, layout.layers, layout.storage, layout.further, layout.depth)


def open_source(model: str, tucker: TuckerCheckpoint) -> SourceModel:
    """Open the source of a Tucker checkpoint, and check that it is the source.

    Raises:
        CheckpointError: It is missing, or another model.
    """
    source, record = SourceModel.open(resolve_model(model)), tucker.manifest.source
    present = {name: file.path.stat().st_size for name, file in source.checkpoint.files.items()}
    recorded = present if record is None else {file.name: file.bytes for file in record.files}
    if recorded != present or source.moe.shape != tucker.manifest.shape:
        raise CheckpointError(
            f"{model} is not the checkpoint that {tucker.folder} was made from: its weight files "
            "differ in name or size",
            hint=f"the source was {record.model}" if record else "check its sizes in config.json",
        )
    return source


def check_source_weights(
    source: SourceModel, tucker: TuckerCheckpoint, read: Callable[[int, str], object]
) -> None:
    """Check by the hashes of its weight files that a model is the source; reads all of them.

    Args:
        source: The model, as `open_source` has opened it.
        tucker: The Tucker checkpoint.
        read: Called with a number of bytes and the name of the file that they are of.

    Raises:
        CheckpointError: Its weights are others.
    """
    folder = source.checkpoint.folder
    files = () if tucker.manifest.source is None else tucker.manifest.source.files
    changed = Inventory(folder, files, {}, (), ()).hash(files, read)
    if changed:
        raise CheckpointError(
            f"{folder} is not the model that {tucker.folder} was made from: "
            f"{'; '.join(map(str, changed[:3]))}{'; ...' if len(changed) > 3 else ''}",
            hint="name the source itself with --model",
        )


def biases_of(group: Mapping[TensorName, Tensor]) -> dict[Projection, Tensor]:
    """Biases of a group from its tensors; zero beyond the width of an expert."""
    found = {}
    for projection in Projection:
        own = {name: tensor for name, tensor in group.items() if name.owner == projection}
        bias = own.get(TensorName.bias(projection))
        if rows := expert_rows(own, TensorKind.BIAS):
            bias = pad_sequence([own[name] for name in rows], batch_first=True)
        if bias is not None:
            found[projection] = bias
    return found


def factors_of(group: Mapping[TensorName, Tensor], projection: Projection) -> TuckerFactors:
    """Tucker tensor of one projection from its group's tensors, no core being quantised.

    Rows of the core beyond the width of an expert are zero.
    """
    own = {name: tensor for name, tensor in group.items() if name.owner == projection}
    core = own.get(TensorName.core(projection))
    if core is None:
        core = pad_sequence([own[name] for name in expert_rows(own)], batch_first=True)
    U_E, U_H, U_I = (own.get(TensorName.factor(mode, projection)) for mode in Mode)
    if U_I is None and projection in GATE_UP:
        U_I = group.get(TensorName.factor(Mode.HIDDEN, projection, GATE_UP))
    return TuckerFactors(core, U_E, U_H, U_I)
