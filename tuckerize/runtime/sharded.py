"""The routed experts of one layer, of which this process has its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tuckerize.checkpoint.files import read_json_object
from tuckerize.checkpoint.manifest import (
    MANIFEST,
    TuckerManifest,
    read_shard_manifest,
    read_tucker_manifest,
    sharding_name,
)
from tuckerize.checkpoint.reader import CONFIG, WeightFile, read_tensors
from tuckerize.domain import Mode, Projection, expert_core_name, expert_of
from tuckerize.errors import CheckpointError, ParallelError
from tuckerize.moe.families import FAMILIES
from tuckerize.parallel.collectives import all_reduce
from tuckerize.parallel.layouts import (
    LayerSizes,
    Layout,
    Travel,
    cut_of,
    experts_are_split,
    part,
    travel,
)
from tuckerize.parallel.mesh import AXES, Position
from tuckerize.runtime.exchange import exchange_for
from tuckerize.runtime.experts import Activation, TuckerExperts, activation_of


class ShardedExperts(TuckerExperts):
    """The routed experts of one layer, computed by all processes of a mesh together.

    Args:
        groups: This process's slices of its groups, by their names below the group; experts with a
            core of their own are counted from its first.
        layout: How the tensors were split.
        sizes: Sizes of the whole layer.
        position: This process.
        activation: Between gate and up.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Tensor]],
        *,
        layout: Layout,
        sizes: LayerSizes,
        position: Position,
        activation: Activation,
    ) -> None:
        ep = position.ep.size
        split = experts_are_split(sizes, ep)
        low = travel(layout, sizes, position.parallelism)
        super().__init__(
            groups,
            group_size=sizes.shape.experts // (ep if split else 1),
            activation=activation,
            exchange=exchange_for(layout, position, low, experts=sizes.experts // ep),
        )
        self.position = position
        self._summed = {
            name: _axes_to_sum(name, layout, sizes, low, position)
            for name, _ in self.named_parameters()
        }

    @classmethod
    def from_shards(
        cls, folder: str | Path, layer: int, mesh: DeviceMesh, *, sequence_parallel: bool = False
    ) -> ShardedExperts:
        """Load this process's shards of one layer; on the host, in the dtype of the checkpoint.

        Args:
            folder: A Tucker checkpoint that is sharded for the mesh.
            layer: Index of the layer.
            mesh: Device mesh with axes of the names `tp`, `ep` and `cp`, or some of them.
            sequence_parallel: Whether each of the tp processes has its own tokens, equally many.

        Raises:
            ParallelError: The processes have not met, or there are no shards for the mesh.
            CheckpointError: The shards, or the checkpoint, are not usable.
        """
        position = Position.on(mesh, sequence_parallel=sequence_parallel)
        manifest = read_tucker_manifest(Path(folder))
        if layer not in manifest.layers:
            raise CheckpointError(
                f"layer {layer} of {folder} is not decomposed",
                hint=f"decomposed layers: {', '.join(map(str, manifest.layers))}",
            )
        shards = sharding_folder(Path(folder), tp=position.tp.size, ep=position.ep.size)
        sizes = layer_sizes(manifest, layer)
        prefix = FAMILIES[manifest.family].experts_prefix(layer)
        return cls(
            read_shards(shards, prefix, layer, position, sizes),
            layout=Layout(read_shard_manifest(shards).layout),
            sizes=sizes,
            position=position,
            activation=activation_of(read_json_object(Path(folder) / CONFIG)),
        )

    def sum_gradients(self) -> None:
        """Complete the gradients of tensors that several processes have.

        To be called after `backward` and before the step of an optimizer, by all processes. What
        `backward` leaves is of the tokens and the neurons of one process. The loss is the sum of
        those of all positions of cp and ep, and of tp with sequence parallelism.
        """
        for name in AXES:
            shared = [
                parameter
                for key, parameter in self.named_parameters()
                if parameter.requires_grad and name in self._summed[key]
            ]
            if shared:
                # An expert without tokens has no gradient here, and may have one elsewhere.
                own = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
                sums = all_reduce(own, getattr(self.position, name))
                for parameter, total in zip(shared, sums, strict=True):
                    parameter.grad = total


def sharding_folder(tucker: Path, *, tp: int, ep: int) -> Path:
    """Folder of the shards of a Tucker checkpoint for a mesh.

    Raises:
        ParallelError: There are none; the hint gives the command.
    """
    folder = tucker / sharding_name(tp=tp, ep=ep)
    if not (folder / MANIFEST).exists():
        raise ParallelError(
            f"{tucker} has no shards for tp x ep = {tp} x {ep}",
            hint=f"run: {shard_command(tucker, tp=tp, ep=ep)}",
        )
    return folder


def shard_command(tucker: Path, *, tp: int, ep: int) -> str:
    """The command that writes the shards of a Tucker checkpoint for a mesh."""
    return f"tuckerize shard {tucker} --tp {tp}" + (f" --ep {ep}" if ep > 1 else "")


def read_shards(
    folder: Path, prefix: str, layer: int, position: Position, sizes: LayerSizes
) -> list[dict[str, Tensor]]:
    """A process's slices of a layer: for each of its groups the tensors by their names below it.

    Args:
        folder: The shards.
        prefix: What names in the layer begin with.
        layer: Index of the layer.
        position: The process.
        sizes: Sizes of the layer.
    """
    ep = position.ep
    first = part(sizes.experts, ep.size, ep.rank).start if experts_are_split(sizes, ep.size) else 0
    groups = []
    for shard in read_shard_manifest(folder).owned_by(tp_rank=position.tp.rank, ep_rank=ep.rank):
        if shard.layer == layer:
            names = WeightFile.open(folder / shard.file.name).tensors
            tensors = read_tensors(folder / shard.file.name, names)
            start = f"{prefix}.group_{shard.group}."
            groups.append({_local(n.removeprefix(start), first): t for n, t in tensors})
    return groups


def layer_sizes(manifest: TuckerManifest, layer: int) -> LayerSizes:
    """What decides how a layer of a Tucker checkpoint is split."""
    joint = manifest.joint is not None
    return LayerSizes(manifest.ranks(layer), manifest.stack_shape(layer), joint=joint)


def _local(name: str, first: int) -> str:
    """The name of a tensor where experts are counted from the first of the process."""
    owner, _, tensor = name.partition(".")
    expert = expert_of(tensor)
    return name if expert is None else f"{owner}.{expert_core_name(expert - first)}"


def _axes_to_sum(
    name: str, layout: Layout, sizes: LayerSizes, low: Travel, position: Position
) -> set[str]:
    """The axes along which processes have parts of a parameter's gradient."""
    group, _, below = name.partition(".")
    owner, _, tensor = below.partition(".")
    cut = cut_of(layout, sizes, int(group.removeprefix("group_")), below, ep=position.ep.size)
    # What lies outside of the exchange over tp meets the same tokens on all of its processes.
    outside = tensor == Mode.HIDDEN.factor_name and not position.sequence_parallel
    outside &= low.low_output if owner == Projection.DOWN else low.low_input
    split = experts_are_split(sizes, position.ep.size)
    parts = {
        "tp": cut.tp is None and not outside,
        "ep": split and cut.ep is None and expert_of(tensor) is None,
        "cp": True,
    }
    return {axis for axis in AXES if parts[axis] and getattr(position, axis).size > 1}
