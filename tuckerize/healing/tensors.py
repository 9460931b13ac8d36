"""The tensors that are trained, whole or a process's part of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tuckerize.domain import Part
from tuckerize.moe.family import Family
from tuckerize.names import CorePart, TensorKind, TensorName
from tuckerize.parallel.mesh import Axis

_ALONE = Axis()


@dataclass(frozen=True, slots=True)
class TrainedTensor:
    """One tensor that is trained, in float32.

    Attributes:
        name: Its name in the checkpoint; that of the codes, for the weights of a quantised core.
        part: The part of the model that it belongs to.
        parameter: Its values, or this process's part of them.
        stored: Type that it is stored in; float32 for quantised cores, which every forward rounds.
        dimension: Dimension along which the processes of an axis share it; None if each has all.
        axis: Those processes.
    """

    name: str
    part: Part
    parameter: nn.Parameter
    stored: torch.dtype
    dimension: int | None = None
    axis: Axis = _ALONE

    @property
    def is_factor(self) -> bool:
        """Whether its columns are orthonormal."""
        return self.part == Part.FACTORS

    @property
    def is_codes(self) -> bool:
        """Whether it holds the codes of a quantised core."""
        name = TensorName.find(self.name)
        return name is not None and name.part in (CorePart.CODES, CorePart.PACKED_CODES)

    @property
    def gradient(self) -> Tensor:
        """This process's part of the gradient; zeros where no token had a part in it."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return local(self.parameter.grad)

    def set(self, target: Tensor, whole: Tensor) -> None:
        """Set a tensor, of which this process has a part, from the whole of it.

        All processes of the axis call it.
        """
        own = local(target).detach()
        if self.dimension is not None:
            length = torch.tensor([own.shape[self.dimension]], device=own.device)
            lengths = [torch.empty_like(length) for _ in range(self.axis.size)]
            dist.all_gather(lengths, length, group=self.axis.group)
            start = sum(map(int, lengths[: self.axis.rank]))
            whole = whole.narrow(self.dimension, start, int(length))
        own.copy_(whole)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP has split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts_of(
    names: Iterable[str], family: Family, layers: Iterable[int], wanted: Collection[Part]
) -> dict[str, Part]:
    """Parts of a model that its tensors belong to, of those that are wanted.

    Args:
        names: Names of the tensors in the checkpoint.
        family: The model's family.
        layers: Indices of the layers with routed experts.
        wanted: The parts.
    """
    below = (family.row.router, family.row.router_bias)
    routers = {family.name(layer, name) for layer in layers for name in below if name}
    found = {name: _part_of(name, family, routers) for name in names}
    return {name: part for name, part in found.items() if part is not None and part in wanted}


def _part_of(name: str, family: Family, routers: Collection[str]) -> Part | None:
    factored = TensorName.find(name)
    if factored is not None:
        if factored.kind == TensorKind.BIAS:
            return None
        if factored.kind != TensorKind.CORE:
            return Part.FACTORS
        return Part.SCALES if factored.part == CorePart.SCALES else Part.CORES
    if name in routers:
        return Part.ROUTERS
    module, _, last = name.rpartition(".")
    above, _, norm = module.rpartition(".")
    in_model = name.startswith(f"{family.layers}.") or above == family.layers.rpartition(".")[0]
    return Part.NORMS if in_model and last == "weight" and "norm" in norm else None


def unfreeze(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> None:
    """Make parameters trainable, in float32.

    Args:
        parameters: Parameters of the model by their names in the checkpoint.
        names: Those that are trained.
    """
    for name in names:
        parameter = parameters[name]
        parameter.data = parameter.data.float()
        parameter.requires_grad_()


@torch.no_grad()
def orthonormalise(tensors: Iterable[TrainedTensor]) -> None:
    """Move factors back to orthonormal columns; exact to rounding, as they were nearly so.

    A step of Newton's iteration for the polar factor: products alone, on any device.

    Source:
        Higham 2008, Functions of Matrices, section 8.3 (Newton-Schulz).
    """
    for tensor in tensors:
        if tensor.is_factor:
            own = local(tensor.parameter)
            gram = own.mT @ own
            if tensor.dimension is not None:
                dist.all_reduce(gram, group=tensor.axis.group)
            identity = torch.eye(len(gram), device=gram.device)
            own.copy_(own @ (1.5 * identity - 0.5 * gram))


@torch.no_grad()
def clip(tensors: Sequence[TrainedTensor], largest: float) -> float:
    """Scale gradients down to a norm of all together; returns the norm before.

    Args:
        tensors: The tensors.
        largest: The largest norm.
    """
    squares = torch.stack([tensor.gradient.square().sum() for tensor in tensors])
    is_split = torch.tensor([t.dimension is not None for t in tensors], device=squares.device)
    split = (squares * is_split).sum()
    if (axis := next((t.axis for t in tensors if t.dimension is not None), None)) is not None:
        dist.all_reduce(split, group=axis.group)
    norm = float((split + (squares * ~is_split).sum()).sqrt())
    if norm > largest:
        for tensor in tensors:
            tensor.gradient.mul_(largest / norm)
    return norm


@torch.no_grad()
def sum_gradients(tensors: Iterable[TrainedTensor], axis: Axis) -> None:
    """Sum gradients over processes that have tokens of their own."""
    if axis.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor.gradient, group=axis.group)
