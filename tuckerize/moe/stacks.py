"""Experts on disk to stacks and back.

In a stack every expert is a matrix (H, I); `down_proj`, stored as (I, H), is transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tuckerize.domain import Projection, StackShape
from tuckerize.moe.families import Family

Read = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
"""Reads tensors by name, in any order, one at a time."""


def read_stack(
    read: Read,
    family: Family,
    shape: StackShape,
    *,
    layer: int,
    experts: range,
    projection: Projection,
    dtype: torch.dtype,
) -> Tensor:
    """Stack of one projection of consecutive experts, shape (E, H, I).

    Args:
        read: Reads tensors by name.
        family: The checkpoint's family.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        layer: Index of the layer.
        experts: Experts of the group.
        projection: Which matrices.
        dtype: Type of the stack; the checkpoint's own loses nothing.
    """
    stack = torch.empty((len(experts), *shape[1:]), dtype=dtype)
    places = {
        family.weight_name(layer, expert, projection): place for place, expert in enumerate(experts)
    }
    for name, weight in read(places):
        stack[places[name]] = to_stack_orientation(weight, projection)
    return stack


def to_stack_orientation(weight: Tensor, projection: Projection) -> Tensor:
    """A weight as on disk as the matrix (H, I) of a stack; its own inverse."""
    return weight.T if projection == Projection.DOWN else weight


def group_experts(shape: StackShape, group_size: int, group: int) -> range:
    """The experts of a group."""
    return range(group * group_size, min((group + 1) * group_size, shape.experts))
