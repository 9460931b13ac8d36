"""The part of a group's tensors that one worker of a serving engine owns: pure slicing.

Over tensor-parallel workers every expert's neurons are split (the `intermediate` layout), over
expert-parallel ones the experts; both give partial sums of the routed output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuckerize.domain import (
    CORE,
    SHARED_U_I,
    Mode,
    MultilinearRank,
    Projection,
    StackShape,
    expert_core_name,
    expert_of,
)
from tuckerize.format.config import group_shapes, widths_of
from tuckerize.parallel.layouts import Layout, part, split_dimension


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
    def names(self) -> list[str]:
        """Names below the group of all its tensors in the checkpoint."""
        return list(self._shapes())

    def empty(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The worker's tensors without values, on the default device, by their names below it."""
        tensors = {}
        for name, shape in self._shapes().items():
            if self.owns(name):
                part_of = self.cut(name, torch.empty(shape, device="meta"))
                tensors[self.own_name(name)] = torch.empty(part_of.shape, dtype=dtype)
        return tensors

    def owns(self, name: str) -> bool:
        """Whether the worker owns a part of a tensor."""
        expert = expert_of(name.partition(".")[2])
        return expert is None or expert in self.own

    def own_name(self, name: str) -> str:
        """The worker's name of a tensor that it owns a part of: experts are counted anew."""
        owner, _, tensor = name.partition(".")
        expert = expert_of(tensor)
        if expert is None:
            return name
        return f"{owner}.{expert_core_name(list(self.own).index(expert))}"

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The worker's part of a tensor of the checkpoint."""
        owner, _, kind = name.partition(".")
        projection = Projection.GATE if owner == SHARED_U_I else Projection(owner)
        rank = MultilinearRank(*self.announced[projection])
        by_expert = kind == Mode.EXPERT.factor_name or (
            kind == CORE and rank.expert == self.experts
        )
        if by_expert:
            tensor = tensor[list(self.own)]
        neurons = sum(widths_of(self.announced, self.experts)) // self.experts
        stack = StackShape(self.experts, neurons, self.hidden)
        dimension = split_dimension(Layout.INTERMEDIATE, projection, kind, rank, stack)
        if dimension is None:
            return tensor
        return tensor.narrow(dimension, *part(tensor.shape[dimension], self.tp_size, self.tp_rank))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return group_shapes(
            self.announced, experts=self.experts, hidden=self.hidden, joint=self.joint
        )
