"""A Tucker checkpoint made ready for training, on one device or spread over several."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tuckerize.checkpoint.reader import TORCH_DTYPES
from tuckerize.domain import Layout, Part
from tuckerize.engines.trainable import Model
from tuckerize.errors import CheckpointError, ParallelError, UsageError
from tuckerize.format.shards import Sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.healing.tensors import TrainedTensor, parts_of, unfreeze
from tuckerize.names import TensorName
from tuckerize.parallel.layouts import Parallelism, split_dimensions
from tuckerize.parallel.mesh import Axis, Position, axis_of
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.runtime.sharded import ShardedExperts
from tuckerize.runtime.trained import train_rounded

_WRITTEN = (Part.CORES, Part.FACTORS, Part.SCALES)


@dataclass(frozen=True, slots=True)
class Spread:
    """Spread of a model over processes.

    Attributes:
        mesh: Mesh with the axes `tp` and `cp`, the replicas; None for a single process.
        is_sharded: Whether the replicas share all parameters (FSDP), not only the tokens.
    """

    mesh: DeviceMesh | None = None
    is_sharded: bool = False

    @property
    def tp(self) -> Axis:
        """The tensor-parallel processes."""
        return Axis() if self.mesh is None else axis_of(self.mesh, "tp")

    @property
    def replicas(self) -> Axis:
        """The processes with tokens of their own."""
        return Axis() if self.mesh is None else axis_of(self.mesh, "cp")

    @property
    def parts(self) -> Axis:
        """The processes that share tensors."""
        return self.replicas if self.is_sharded else self.tp

    @property
    def is_first(self) -> bool:
        """Whether no process before this one has the same parts of tensors."""
        return self.is_sharded or self.replicas.rank == 0


class Ready(NamedTuple):
    """A model that can be trained.

    Attributes:
        model: The model.
        tensors: What is trained.
        experts: Its factored layers.
    """

    model: Model
    tensors: Sequence[TrainedTensor]
    experts: Sequence[TuckerExperts]

    def sum_gradients(self) -> None:
        """Sum the gradients of what tensor-parallel processes have in common."""
        for experts in self.experts:
            if isinstance(experts, ShardedExperts):
                experts.sum_gradients()


def check_parts(tucker: TuckerCheckpoint, wanted: Collection[Part] | None) -> dict[str, Part]:
    """Parts of the tensors that are to be trained, by their names.

    Args:
        tucker: The checkpoint.
        wanted: The parts; None for those that compression wrote, as far as it has them.

    Raises:
        UsageError: It lacks one of them.
        CheckpointError: A tensor is quantized and no core: its values cannot be trained.
    """
    layers = tucker.family.moe_layers(tucker.config, tucker.checkpoint.tensors)
    found = parts_of(tucker.checkpoint.tensors, tucker.family, layers, wanted or _WRITTEN)
    if missing := [part for part in wanted or () if part not in found.values()]:
        raise UsageError(
            f"{tucker.folder} has no {missing[0]} to train",
            hint=f"train some of: {', '.join(sorted({*parts_of_all(tucker).values()}))}",
        )
    for name, part in found.items():
        if name in tucker.checkpoint.quantized:
            raise CheckpointError(
                f"{name} of {tucker.folder} is quantized and cannot be trained",
                hint=f"leave the {part} out of --train",
            )
    return found


def parts_of_all(tucker: TuckerCheckpoint) -> dict[str, Part]:
    """Parts of all tensors of a checkpoint that belong to one."""
    layers = tucker.family.moe_layers(tucker.config, tucker.checkpoint.tensors)
    return parts_of(tucker.checkpoint.tensors, tucker.family, layers, tuple(Part))


def make_ready(
    tucker: TuckerCheckpoint, parts: dict[str, Part], device: torch.device, spread: Spread
) -> Ready:
    """Load a checkpoint to be trained.

    Args:
        tucker: The checkpoint, with shards for the tensor-parallel processes, if there are any.
        parts: Parts of the tensors that are trained, by their names.
        device: This process's device.
        spread: Spread over processes.

    Raises:
        ParallelError: There are no shards, or shards of the rank layout.
        CheckpointError: The model cannot be loaded, or transformers joins what is to be trained.
    """
    dtype: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    model = Model(tucker.folder, dtype)
    sharding = None
    if spread.tp.size > 1:
        sharding = _split_experts(model, tucker, spread.tp)
    paths = [model.path(tucker.family.experts_prefix(layer)) for layer in tucker.manifest.layers]
    experts = [model.module.get_submodule(path) for path in paths]
    if {Part.CORES, Part.SCALES} & {*parts.values()}:
        for module in experts:
            train_rounded(module)
    known = model.parameters(parts)
    if unknown := [name for name in parts if name not in known]:
        raise CheckpointError(
            f"transformers has no parameter for {unknown[0]} alone",
            hint=f"leave the {parts[unknown[0]]} out of --train",
        )
    unfreeze(known, parts)
    model.module.to(device)
    if spread.is_sharded and spread.mesh is not None:
        for layer in (*model.layers(), model.module):
            fully_shard(layer, mesh=spread.mesh["cp"])
    known = model.parameters(parts)
    tensors = [
        _trained(tucker, name, part, known[name], spread, sharding) for name, part in parts.items()
    ]
    return Ready(model, tensors, experts)


def _split_experts(model: Model, tucker: TuckerCheckpoint, tp: Axis) -> Sharding:
    """Put this process's shards in the place of whole experts."""
    sharding = Sharding.of(tucker, Parallelism(tp.size))
    if sharding.layout != Layout.INTERMEDIATE:
        raise ParallelError(
            f"the shards of {tucker.folder} are of the {sharding.layout} layout, and training "
            "needs the intermediate one",
            hint=f"run: tuckerize shard {tucker.folder} --tp {tp.size} --layout intermediate "
            "--overwrite",
        )
    for layer in tucker.manifest.layers:
        path = model.path(tucker.family.experts_prefix(layer))
        like = next(
            p for p in model.module.get_submodule(path).parameters() if p.is_floating_point()
        )
        own = ShardedExperts.of_layer(sharding, layer, Position(tp=tp))
        model.module.set_submodule(path, own.to(like.dtype))
    return sharding


def _trained(
    tucker: TuckerCheckpoint,
    name: str,
    part: Part,
    parameter: nn.Parameter,
    spread: Spread,
    sharding: Sharding | None,
) -> TrainedTensor:
    """A parameter as what is trained."""
    stored = TORCH_DTYPES.get(tucker.checkpoint.tensors[name].dtype, torch.float32)
    factored = TensorName.find(name)
    if factored is not None and factored.part is not None:
        stored = torch.float32
    if spread.is_sharded:
        return TrainedTensor(name, part, parameter, stored, 0, spread.replicas)
    layer = tucker.family.layer_of(name)
    if sharding is None or factored is None or layer is None:
        return TrainedTensor(name, part, parameter, stored)
    sizes = sharding.layer_shape(layer)
    ranks = sizes.ranks[factored.group or 0]
    cut = split_dimensions(sharding.layout, factored, ranks, sizes.shape, sizes.core_type)
    axis = Axis() if cut.tp is None else spread.tp
    return TrainedTensor(name, part, parameter, stored, cut.tp, axis)
