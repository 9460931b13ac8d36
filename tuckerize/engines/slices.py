"""Slices of a group's tensors that one worker of a serving engine owns.

Tensor-parallel workers split the neurons of every expert (the `intermediate` layout),
expert-parallel ones the experts; either way a worker computes a partial sum of the routed output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuckerize.domain import Layout
from tuckerize.format.config import GroupShape
from tuckerize.format.cores import part_dtype
from tuckerize.names import TensorName
from tuckerize.parallel.layouts import owned_slice, split_dimensions


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """One worker's part of a group of experts.

    Attributes:
        shape: Sizes of the whole group.
        hidden: Hidden size I.
        own: Places in the group of the experts that the worker owns, in its order.
        tp_size: Workers that share the neurons of an expert.
        tp_rank: Which of them it is.
    """

    shape: GroupShape
    hidden: int
    own: Sequence[int]
    tp_size: int = 1
    tp_rank: int = 0

    @property
    def names(self) -> list[TensorName]:
        """Names relative to the group of all its tensors in the checkpoint."""
        return list(self.shape.tensor_shapes(self.hidden))

    def empty(self, dtype: torch.dtype) -> dict[TensorName, Tensor]:
        """The worker's tensors without values, on the default device, by the worker's names."""
        tensors = {}
        for name, shape in self.shape.tensor_shapes(self.hidden).items():
            if self.owns(name):
                own = self.cut(name, torch.empty(shape, device="meta"))
                own_dtype = part_dtype(name.part, self.shape.core_type, dtype)
                tensors[self.own_name(name)] = torch.empty(own.shape, dtype=own_dtype)
        return tensors

    def owns(self, name: TensorName) -> bool:
        """Whether the worker owns a part of a tensor."""
        return name.expert is None or name.expert in self.own

    def own_name(self, name: TensorName) -> TensorName:
        """The worker's name of a tensor that it owns a part of: its own experts are numbered."""
        if name.expert is None:
            return name
        return replace(name, expert=list(self.own).index(name.expert))

    def cut(self, name: TensorName, tensor: Tensor) -> Tensor:
        """The worker's part of a tensor of the checkpoint."""
        stack = self.shape.stack_shape(self.hidden)
        ranks, core_type = self.shape.ranks, self.shape.core_type
        cut = split_dimensions(Layout.INTERMEDIATE, name, ranks, stack, core_type)
        if cut.experts is not None:
            own = torch.tensor(self.own, dtype=torch.long, device=tensor.device)
            tensor = tensor.index_select(cut.experts, own)
        if cut.tp is None:
            return tensor
        size = tensor.shape[cut.tp]
        return tensor.narrow(cut.tp, *owned_slice(size, self.tp_size, self.tp_rank, cut.unit))
