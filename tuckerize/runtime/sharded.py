"""Sharded routed experts of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tuckerize.ascend.dispatch import ROW_STEP, FusedPair, FusedUse
from tuckerize.domain import Layout, Projection
from tuckerize.format.shards import Sharding
from tuckerize.names import TensorKind, TensorName
from tuckerize.parallel.collectives import all_reduce
from tuckerize.parallel.layouts import (
    CommunicationSpace,
    LayerShape,
    communication_space,
    experts_are_split,
    split_dimensions,
    width_over_ep,
)
from tuckerize.parallel.mesh import AXES, Position
from tuckerize.runtime.activations import Activation, activation_of
from tuckerize.runtime.exchange import exchange_for
from tuckerize.runtime.experts import TuckerExperts


class ShardedExperts(TuckerExperts):
    """The routed experts of one layer, computed by all processes of a mesh together.

    Args:
        groups: This process's slices of its groups, by their names relative to the group; experts
            with core rows of their own are numbered from its first.
        layout: How the tensors were split.
        sizes: Sizes of the whole layer.
        position: This process.
        activation: From gate and up to neurons.
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
        space = communication_space(layout, sizes, position.parallelism)
        super().__init__(
            groups,
            group_size=sizes.shape.experts // (ep if split else 1),
            activation=activation,
            exchange=exchange_for(
                layout, position, space, num_experts=sizes.experts // ep, fused=fused
            ),
        )
        self.position = position
        self._summed = {
            name: _axes_to_sum(name, layout, sizes, space, position)
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
                they replace the plain collectives wherever gradients are off.

        Raises:
            ParallelError: The processes have not met, or there are no shards for the mesh.
            CheckpointError: The shards, or the checkpoint, are not usable.
        """
        position = Position.on(mesh, sequence_parallel=sequence_parallel)
        sharding = Sharding.open(Path(folder), tp=position.tp.size, ep=position.ep.size)
        return cls.of_layer(sharding, layer, position, fused=fused)

    @classmethod
    def of_layer(
        cls, sharding: Sharding, layer: int, position: Position, *, fused: FusedPair | None = None
    ) -> ShardedExperts:
        """Load the shards of one layer; on the host, in the dtype of the checkpoint.

        Args:
            sharding: Shards for the mesh of the position.
            layer: Index of the layer.
            position: The process.
            fused: As in `from_shards`.

        Raises:
            CheckpointError: The layer is not decomposed, or a file cannot be read.
        """
        return cls(
            sharding.read_layer(layer, position),
            layout=sharding.layout,
            sizes=sharding.layer_shape(layer),
            position=position,
            activation=activation_of(sharding.family.glu(sharding.config, layer)),
            fused=fused,
        )

    def sum_gradients(self) -> None:
        """Sum the gradients of tensors that several processes hold.

        All processes call it after `backward` and before the optimizer step: `backward` gives the
        gradients of one process's tokens and neurons. The loss is the sum over all positions of cp
        and ep, and of tp with sequence parallelism.
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
    """Requirements of a sharded checkpoint on Ascend's fused dispatch and combine.

    Args:
        folder: A Tucker checkpoint that is sharded for the mesh.
        mesh: The mesh of all processes of the run.
        tokens: Largest number of tokens per process.
        dtype: Their type.
        sequence_parallel: Whether each of the tp processes has its own tokens.
    """
    position = Position.on(mesh, sequence_parallel=sequence_parallel)
    sharding = Sharding.open(Path(folder), tp=position.tp.size, ep=position.ep.size)
    device = torch.device(mesh.device_type)
    return fused_use_of(sharding, position, device, tokens=tokens, dtype=dtype)


def fused_use_of(
    sharding: Sharding,
    position: Position,
    device: torch.device,
    *,
    tokens: int,
    dtype: torch.dtype,
) -> FusedUse:
    """The same for open shards.

    Args:
        sharding: Shards for the mesh of the position.
        position: This process.
        device: Its device.
        tokens: Largest number of tokens per process.
        dtype: Their type.
    """
    widths = (
        width_over_ep(sharding.layout, sharding.layer_shape(layer), position.parallelism)
        for layer in sharding.tucker.layers
    )
    return FusedUse.on(
        device,
        max_tokens=tokens * (position.tp.size if position.sequence_parallel else 1),
        hidden=-(-max(widths) // ROW_STEP) * ROW_STEP,
        top_k=sharding.family.routing(sharding.config).top_k,
        num_experts=sharding.tucker.shape.experts,
        ep_size=position.ep.size,
        dtype=dtype,
    )


def _axes_to_sum(
    text: str, layout: Layout, sizes: LayerShape, space: CommunicationSpace, position: Position
) -> set[str]:
    """Mesh axes over which a parameter's gradient is a partial sum."""
    name = TensorName.parse(text)
    ranks = sizes.ranks[name.group or 0]
    cut = split_dimensions(layout, name, ranks, sizes.shape, sizes.core_type)
    # Outside of the exchange over tp, all of its processes compute the same tokens.
    outside = name.kind == TensorKind.U_I and not position.sequence_parallel
    is_down_bias = name.kind == TensorKind.BIAS and name.projection == Projection.DOWN
    outside &= space.latent_output if name.projection == Projection.DOWN else space.latent_input
    outside |= is_down_bias and not position.sequence_parallel
    split = experts_are_split(sizes, position.ep.size)
    parts = {
        "tp": cut.tp is None and not outside,
        "ep": split and cut.experts is None and name.expert is None,
        "cp": True,
    }
    return {axis for axis in AXES if parts[axis] and getattr(position, axis).size > 1}
