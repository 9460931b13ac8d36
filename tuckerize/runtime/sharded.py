"""The routed experts of one layer, of which this process has its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tuckerize.ascend.dispatch import ROW_STEP, FusedPair, FusedUse
from tuckerize.checkpoint.files import read_json_object
from tuckerize.checkpoint.reader import CONFIG, WeightFile, read_tensors
from tuckerize.domain import Projection
from tuckerize.errors import CheckpointError
from tuckerize.format.manifest import (
    read_tucker_manifest,
)
from tuckerize.format.shards import open_shards
from tuckerize.moe.families import FAMILIES
from tuckerize.names import TensorKind, TensorName, group_module
from tuckerize.parallel.collectives import all_reduce
from tuckerize.parallel.layouts import (
    LayerShape,
    Layout,
    Travel,
    cut_of,
    experts_are_split,
    travel,
    width_over_ep,
)
from tuckerize.parallel.mesh import AXES, Position
from tuckerize.runtime.exchange import exchange_for
from tuckerize.runtime.experts import Activation, TuckerExperts, activation_of


class ShardedExperts(TuckerExperts):
    """The routed experts of one layer, computed by all processes of a mesh together.

    Args:
        groups: This process's slices of its groups, by their names relative to the group; experts
            with core rows of their own are numbered from its first.
        layout: How the tensors were split.
        sizes: Sizes of the whole layer.
        position: This process.
        activation: Between gate and up.
        fused: Ascend's fused dispatch and combine over ep, where they may be used.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[TensorName, Tensor]],
        *,
        layout: Layout,
        sizes: LayerShape,
        position: Position,
        activation: Activation,
        fused: FusedPair | None = None,
    ) -> None:
        ep = position.ep.size
        split = experts_are_split(sizes, ep)
        low = travel(layout, sizes, position.parallelism)
        super().__init__(
            groups,
            group_size=sizes.shape.experts // (ep if split else 1),
            activation=activation,
            exchange=exchange_for(layout, position, low, experts=sizes.experts // ep, fused=fused),
        )
        self.position = position
        self._summed = {
            name: _axes_to_sum(name, layout, sizes, low, position)
            for name, _ in self.named_parameters()
        }

    @classmethod
    def from_shards(
        cls,
        folder: str | Path,
        layer: int,
        mesh: DeviceMesh,
        *,
        sequence_parallel: bool = False,
        fused: FusedPair | None = None,
    ) -> ShardedExperts:
        """Load this process's shards of one layer; on the host, in the dtype of the checkpoint.

        Args:
            folder: A Tucker checkpoint that is sharded for the mesh.
            layer: Index of the layer.
            mesh: Device mesh with axes of the names `tp`, `ep` and `cp`, or some of them.
            sequence_parallel: Whether each of the tp processes has its own tokens, equally many.
            fused: Ascend's fused dispatch and combine, made once for all layers (`fused_use`);
                they take the place of the plain collectives wherever gradients are off.

        Raises:
            ParallelError: The processes have not met, or there are no shards for the mesh.
            CheckpointError: The shards, or the checkpoint, are not usable.
        """
        position = Position.on(mesh, sequence_parallel=sequence_parallel)
        tp, ep = position.tp, position.ep
        tucker = Path(folder)
        manifest = read_tucker_manifest(tucker)
        if layer not in manifest.layers:
            raise CheckpointError(
                f"layer {layer} of {tucker} is not decomposed",
                hint=f"decomposed layers: {', '.join(map(str, manifest.layers))}",
            )
        place, shards = open_shards(tucker, tp=tp.size, ep=ep.size)
        sizes = manifest.layer_shape(layer)
        first = sizes.experts // ep.size * ep.rank if experts_are_split(sizes, ep.size) else 0
        experts = FAMILIES[manifest.family].experts_prefix(layer)
        return cls(
            [
                _read_shard(place / shard.file.name, group_module(shard.group, experts), first)
                for shard in shards.owned_by(tp_rank=tp.rank, ep_rank=ep.rank)
                if shard.layer == layer
            ],
            layout=Layout(shards.layout),
            sizes=sizes,
            position=position,
            activation=activation_of(read_json_object(tucker / CONFIG)),
            fused=fused,
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


def fused_use(
    folder: str | Path,
    mesh: DeviceMesh,
    *,
    tokens: int,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
) -> FusedUse:
    """What the layers of a sharded checkpoint need Ascend's fused dispatch and combine for.

    Args:
        folder: A Tucker checkpoint that is sharded for the mesh.
        mesh: The mesh of all processes of the run.
        tokens: Most tokens of a process.
        dtype: Their type.
        sequence_parallel: Whether each of the tp processes has its own tokens.
    """
    position = Position.on(mesh, sequence_parallel=sequence_parallel)
    tucker = Path(folder)
    manifest = read_tucker_manifest(tucker)
    _, shards = open_shards(tucker, tp=position.tp.size, ep=position.ep.size)
    widths = (
        width_over_ep(Layout(shards.layout), manifest.layer_shape(layer), position.parallelism)
        for layer in manifest.layers
    )
    routing = FAMILIES[manifest.family].routing(read_json_object(tucker / CONFIG))
    return FusedUse.on(
        torch.device(mesh.device_type),
        max_tokens=tokens * (position.tp.size if sequence_parallel else 1),
        hidden=-(-max(widths) // ROW_STEP) * ROW_STEP,
        top_k=routing.top_k,
        num_experts=manifest.shape.experts,
        ep_size=position.ep.size,
        dtype=dtype,
    )


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


def _axes_to_sum(
    text: str, layout: Layout, sizes: LayerShape, low: Travel, position: Position
) -> set[str]:
    """The axes along which processes have parts of a parameter's gradient."""
    name = TensorName.parse(text)
    cut = cut_of(layout, name, sizes.ranks[name.group or 0], sizes.shape)
    # What lies outside of the exchange over tp meets the same tokens on all of its processes.
    outside = name.kind == TensorKind.U_I and not position.sequence_parallel
    outside &= low.low_output if name.projection == Projection.DOWN else low.low_input
    split = experts_are_split(sizes, position.ep.size)
    parts = {
        "tp": cut.tp is None and not outside,
        "ep": split and cut.experts is None and name.expert is None,
        "cp": True,
    }
    return {axis for axis in AXES if parts[axis] and getattr(position, axis).size > 1}
