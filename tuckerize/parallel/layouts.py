"""Which slice of every tensor a process owns, and what a layout costs: pure arithmetic.

Over a tensor-parallel mesh of tp processes, for x of T tokens with k experts a token:

`intermediate` is Megatron's: cores are split on H (U_H by rows where the mode is truncated), all
else is replicated. gate and up give the process's own columns, down gives a partial sum, and one
all-reduce of T·r_I numbers ends the layer.

`rank` splits U_I of gate and up by columns, their cores on r_I, the core of down on r_H, and every
U_H by rows; only U_E and the U_I of down are replicated. One all-reduce of T·k·2·r_H numbers
completes gate and up before the activation (a reduce-scatter where H is not truncated), one
reduce-scatter of T·k·r_H completes the middle of down (none where H is not truncated), and one
all-reduce ends the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from tuckerize.domain import CORE, Mode, MultilinearRank, Projection, StackShape


class Layout(StrEnum):
    """How the tensors of a layer are split over the processes."""

    INTERMEDIATE = "intermediate"
    RANK = "rank"


class Part(NamedTuple):
    """The slice of one dimension that a process owns: first index and how many."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """Index behind the last."""
        return self.start + self.length


class Traffic(NamedTuple):
    """Numbers that a layer hands to each kind of collective for one token."""

    all_reduce: float
    reduce_scatter: float

    def sent_numbers(self, tp_size: int) -> float:
        """Numbers that each process sends, with ring algorithms.

        Source:
            Thakur et al. 2005: an all-reduce sends 2(n-1)/n of its payload, a reduce-scatter half.
        """
        return (2 * self.all_reduce + self.reduce_scatter) * (tp_size - 1) / tp_size


RankByProjection = Mapping[Projection, MultilinearRank]


def part(size: int, tp_size: int, tp_rank: int) -> Part:
    """The slice of a dimension that a process owns; sizes differ by one at most, nothing is lost.

    >>> [part(10, 4, tp_rank).length for tp_rank in range(4)]
    [3, 3, 2, 2]
    """
    base, larger = divmod(size, tp_size)
    return Part(tp_rank * base + min(tp_rank, larger), base + (tp_rank < larger))


def split_dimension(
    layout: Layout, projection: Projection, tensor: str, rank: MultilinearRank, shape: StackShape
) -> int | None:
    """The dimension of a stored tensor that is split over the processes; None if replicated.

    Args:
        layout: The layout.
        projection: Projection that the tensor belongs to; gate_proj for a U_I shared with up_proj.
        tensor: `core`, the name of one expert's rows of it, or a factor name.
        rank: Core sizes of the stack.
        shape: Sizes of the stack.
    """
    if tensor == Mode.INTERMEDIATE.factor_name:
        return 0
    full_rows = rank.intermediate == shape.intermediate
    if layout == Layout.INTERMEDIATE and not full_rows:
        return None
    if layout == Layout.INTERMEDIATE:
        return {CORE: 1}.get(tensor, 0 if tensor.startswith(CORE) else None)
    if projection == Projection.DOWN:
        return 1 if tensor == CORE else None
    return {CORE: 2, Mode.HIDDEN.factor_name: 1}.get(tensor)


def smallest_split_size(layout: Layout, ranks: RankByProjection, shape: StackShape) -> int:
    """The smallest size that the layout splits: with more processes some would own nothing."""
    sizes = [shape.intermediate]
    if layout == Layout.RANK:
        sizes += [ranks[projection].hidden for projection in (Projection.GATE, Projection.UP)]
        sizes.append(ranks[Projection.DOWN].intermediate)
    return min(sizes)


def output_width(hidden_ranks: list[int], hidden: int) -> int:
    """Numbers a token that the last all-reduce moves: core sizes of all groups, or I if fewer."""
    return min(sum(hidden_ranks), hidden)


def layer_traffic(
    layout: Layout, groups: Sequence[RankByProjection], shape: StackShape, *, top_k: int
) -> Traffic:
    """What a layer's collectives move for one token.

    Args:
        layout: The layout.
        groups: Core sizes of the projections of every group.
        shape: Sizes of one stack.
        top_k: Experts a token.
    """
    last = output_width([ranks[Projection.DOWN].hidden for ranks in groups], shape.hidden)
    if layout == Layout.INTERMEDIATE:
        return Traffic(last, 0.0)
    all_reduce = reduce_scatter = 0.0
    for ranks in groups:
        for projection in Projection:
            rows = ranks[projection].intermediate
            truncated = rows < shape.intermediate
            # On average an equal share of a token's experts lies in each group.
            numbers = rows * top_k / len(groups)
            if projection == Projection.DOWN:
                reduce_scatter += numbers * truncated
            elif truncated:
                all_reduce += numbers
            else:
                reduce_scatter += numbers
    return Traffic(all_reduce + last, reduce_scatter)
