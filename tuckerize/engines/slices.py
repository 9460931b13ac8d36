"""The part of a group's tensors that one worker of a serving engine owns: pure slicing.

Over tensor-parallel workers every expert's neurons are split (the `intermediate` layout), over
expert-parallel ones the experts; both give partial sums of the routed output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tuckerize.domain import MultilinearRank, Projection, StackShape
from tuckerize.format.config import group_shapes, widths_of
from tuckerize.names import TensorName
from tuckerize.parallel.layouts import Layout, cut_of, part


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """One group of experts as one worker has it.

    Attributes:
        announced: What config.json announces of the group.
        experts: Experts in the group, on all workers.
        hidden: Hidden size I.
        joint: Projections that share one U_I.
        own: Places in the group of the experts that the worker owns, in its order.
        tp_size: Workers that share the neurons of an expert.
        tp_rank: Which of them it is.
    """

    announced: Mapping[str, Any]
    experts: int
    hidden: int
    joint: str | None
    own: Sequence[int]
    tp_size: int = 1
    tp_rank: int = 0

    @property
    def names(self) -> list[TensorName]:
        """Names relative to the group of all its tensors in the checkpoint."""
        return list(self._shapes())

    def empty(self, dtype: torch.dtype) -> dict[TensorName, Tensor]:
        """The worker's tensors without values, on the default device, by the worker's names."""
        tensors = {}
        for name, shape in self._shapes().items():
            if self.owns(name):
                own = self.cut(name, torch.empty(shape, device="meta"))
                tensors[self.own_name(name)] = torch.empty(own.shape, dtype=dtype)
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
        ranks = {p: MultilinearRank(*self.announced[p]) for p in Projection}
        neurons = sum(widths_of(self.announced, self.experts)) // self.experts
        stack = StackShape(self.experts, neurons, self.hidden)
        cut = cut_of(Layout.INTERMEDIATE, name, ranks, stack)
        if cut.experts is not None:
            own = torch.tensor(self.own, dtype=torch.long, device=tensor.device)
            tensor = tensor.index_select(cut.experts, own)
        if cut.tp is None:
            return tensor
        return tensor.narrow(cut.tp, *part(tensor.shape[cut.tp], self.tp_size, self.tp_rank))

    def _shapes(self) -> dict[TensorName, tuple[int, ...]]:
        return group_shapes(
            self.announced, experts=self.experts, hidden=self.hidden, joint=self.joint
        )
