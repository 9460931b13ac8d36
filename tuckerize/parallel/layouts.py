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

Over an expert-parallel axis a process owns whole groups, or, where a layer is one group, the rows
of U_E or core that belong to its experts. U_H and U_I, and the core where there is a U_E, are on
all processes then, so that tokens can travel as what U_I makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tuckerize.domain import Mode, MultilinearRank, Projection, StackShape
from tuckerize.names import TensorKind, TensorName


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


class Collective(StrEnum):
    """A kind of collective."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"


Traffic = Mapping[Collective, float]
"""Bytes that a process sends on average for each of its tokens, by kind, with ring algorithms."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of a mesh, and how tokens travel on it.

    Attributes:
        tp: Tensor-parallel processes.
        ep: Expert-parallel ones.
        cp: Context-parallel ones.
        sequence_parallel: Whether each of the tp processes has its own tokens.
        all_to_all: Whether tokens are sent to the processes that own their experts only, or to all.
    """

    tp: int = 1
    ep: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    all_to_all: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    """Where the experts of tokens are, on average over tokens.

    Attributes:
        top_k: Experts a token.
        rows: How many of them are in each group.
        copies: Expert-parallel processes, other than its own, that a token has experts on.
        remote: How many of its experts are on these.
    """

    top_k: int
    rows: Sequence[float]
    copies: float = 0.0
    remote: float = 0.0


class Travel(NamedTuple):
    """Whether tokens and outputs move as numbers of the hidden core sizes rather than of I."""

    low_input: bool
    low_output: bool


RankByProjection = Mapping[Projection, MultilinearRank]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What decides how a layer is split.

    Attributes:
        ranks: Core sizes of the projections of every group.
        shape: Sizes of one stack.
        joint: Whether gate and up share one U_I.
    """

    ranks: Sequence[RankByProjection]
    shape: StackShape
    joint: bool

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return len(self.ranks) * self.shape.experts

    @property
    def input_ranks(self) -> list[int]:
        """Numbers of what each U_I of gate and up makes of a token; without, it stays itself."""
        found = []
        for ranks in self.ranks:
            gate, up = ranks[Projection.GATE].hidden, ranks[Projection.UP].hidden
            found += [gate] if self.joint or gate == up == self.shape.hidden else [gate, up]
        return found

    @property
    def output_ranks(self) -> list[int]:
        """Numbers of a token that go into the U_I of down of every group."""
        return [ranks[Projection.DOWN].hidden for ranks in self.ranks]


class Cut(NamedTuple):
    """Dimensions along which a stored tensor is split; None if replicated.

    Attributes:
        tp: Over tensor-parallel processes.
        experts: Over the owners of the group's experts.
    """

    tp: int | None
    experts: int | None


INDEX_BYTES = 8
"""Bytes of the number of an expert, as it travels with a token."""


def part(size: int, tp_size: int, tp_rank: int) -> Part:
    """The slice of a dimension that a process owns; sizes differ by one at most, nothing is lost.

    >>> [part(10, 4, tp_rank).length for tp_rank in range(4)]
    [3, 3, 2, 2]
    """
    base, larger = divmod(size, tp_size)
    return Part(tp_rank * base + min(tp_rank, larger), base + (tp_rank < larger))


def cut_of(layout: Layout, name: TensorName, ranks: RankByProjection, shape: StackShape) -> Cut:
    """How a stored tensor is split; core rows of one expert belong to the owner of the expert.

    Args:
        layout: The layout.
        name: Name of the tensor.
        ranks: Core sizes of the projections of its group.
        shape: Sizes of one stack of the group.
    """
    rank = ranks[name.projection]
    whole_core = name.kind == TensorKind.CORE and name.expert is None
    by_expert = name.kind == TensorKind.U_E or (whole_core and rank.expert == shape.experts)
    return Cut(_split_over_tp(layout, name, rank, shape), 0 if by_expert else None)


def _split_over_tp(
    layout: Layout, name: TensorName, rank: MultilinearRank, shape: StackShape
) -> int | None:
    """The dimension of a stored tensor that is split over tp; None if replicated."""
    if name.kind == TensorKind.U_H:
        return 0
    on_hidden = layout == Layout.RANK and name.projection != Projection.DOWN
    if name.kind != TensorKind.CORE:
        return 1 if name.kind == TensorKind.U_I and on_hidden else None
    if layout == Layout.INTERMEDIATE and rank.intermediate < shape.intermediate:
        return None
    dimension = Mode.HIDDEN if on_hidden else Mode.INTERMEDIATE
    return dimension if name.expert is None else dimension - 1


def experts_are_split(sizes: LayerShape, ep: int) -> bool:
    """Whether expert-parallel processes own experts of one group, rather than whole groups."""
    return ep > 1 and len(sizes.ranks) == 1


def owners_of(group: int, *, groups: int, ep: int) -> range:
    """The expert-parallel processes that own a group, or share its experts.

    >>> owners_of(3, groups=4, ep=2), owners_of(0, groups=1, ep=2)
    (range(1, 2), range(0, 2))
    """
    if groups == 1:
        return range(ep)
    owner = group // (groups // ep)
    return range(owner, owner + 1)


def smallest_split_size(layout: Layout, ranks: RankByProjection, shape: StackShape) -> int:
    """The smallest size that the layout splits: with more processes some would own nothing."""
    sizes = [shape.intermediate]
    if layout == Layout.RANK:
        sizes += [ranks[projection].hidden for projection in (Projection.GATE, Projection.UP)]
        sizes.append(ranks[Projection.DOWN].intermediate)
    return min(sizes)


def even_load(top_k: int, *, experts: int, groups: int, ep: int) -> Load:
    """The load of a router that takes any `top_k` experts of a layer equally often.

    >>> even_load(2, experts=4, groups=1, ep=2)
    Load(top_k=2, rows=[2.0], copies=0.8333333333333334, remote=1.0)
    """
    absent = math.comb(experts - experts // ep, top_k) / math.comb(experts, top_k)
    remote = top_k * (ep - 1) / ep
    return Load(top_k, [top_k / groups] * groups, (ep - 1) * (1 - absent), remote)


def travel(layout: Layout, sizes: LayerShape, mesh: Parallelism) -> Travel:
    """How a layer's tokens and outputs travel: with fewer numbers, where every process can."""
    if mesh.ep > 1 and not experts_are_split(sizes, mesh.ep):
        return Travel(low_input=False, low_output=False)
    width_in = sum(sizes.input_ranks) / (mesh.tp if layout == Layout.RANK else 1)
    width_out = sum(sizes.output_ranks)
    return Travel(width_in < sizes.shape.hidden, width_out <= sizes.shape.hidden)


def width_over_ep(layout: Layout, sizes: LayerShape, mesh: Parallelism) -> int:
    """Most numbers of a row that travels over ep, there or back."""
    low = travel(layout, sizes, mesh)
    cut = mesh.tp if layout == Layout.RANK else 1
    there = sum(-(-rank // cut) for rank in sizes.input_ranks)
    back = sum(sizes.output_ranks)
    hidden = sizes.shape.hidden
    return max(there if low.low_input else hidden, back if low.low_output else hidden)


def layer_traffic(
    layout: Layout,
    sizes: LayerShape,
    mesh: Parallelism,
    load: Load,
    *,
    number_bytes: int,
    fused_width: int | None = None,
) -> Traffic:
    """What a layer's collectives move.

    Args:
        layout: The layout.
        sizes: Sizes of the layer.
        mesh: The mesh.
        load: Where the experts of tokens are.
        number_bytes: Bytes of one number of the tokens.
        fused_width: Numbers of a row of the fused dispatch and combine, which send one for each of
            a token's experts and leave its routes out of it; None for the plain collectives.

    Source:
        Thakur et al. 2005: of a payload n processes send (n-1)/n each in a reduce-scatter, as much
        in an all-gather, and twice that in an all-reduce.
    """
    low = travel(layout, sizes, mesh)
    token = sum(sizes.input_ranks) if low.low_input else sizes.shape.hidden
    output = sum(sizes.output_ranks) if low.low_output else sizes.shape.hidden
    output *= number_bytes
    routes = load.top_k * (number_bytes + INDEX_BYTES)
    share = (mesh.tp - 1) / mesh.tp
    moved = dict.fromkeys(Collective, 0.0)
    if mesh.sequence_parallel:
        whole = sizes.shape.hidden if layout == Layout.RANK else token
        moved[Collective.ALL_GATHER] += share * (whole * number_bytes + routes)
        moved[Collective.REDUCE_SCATTER] += share * output
    else:
        moved[Collective.ALL_REDUCE] += share * 2 * output
    sent = token * number_bytes / (mesh.tp if layout == Layout.RANK and low.low_input else 1)
    if fused_width is not None:
        moved[Collective.ALL_TO_ALL] += load.remote * 2 * fused_width * number_bytes
    elif mesh.all_to_all:
        moved[Collective.ALL_TO_ALL] += load.copies * (sent + routes + output)
    else:
        moved[Collective.ALL_GATHER] += (mesh.ep - 1) * (sent + routes)
        moved[Collective.REDUCE_SCATTER] += (mesh.ep - 1) * output
    if layout == Layout.RANK:
        for kind, numbers in _middles(sizes, mesh.tp, load):
            rounds = 2 if kind == Collective.ALL_REDUCE else 1
            moved[kind] += share * rounds * numbers * number_bytes
    return moved


def _middles(sizes: LayerShape, tp: int, load: Load) -> Iterator[tuple[Collective, float]]:
    """The collectives of the rank layout inside a layer: kind, and numbers for one token."""
    for ranks, rows in zip(sizes.ranks, load.rows, strict=True):
        for projection in Projection:
            neurons = ranks[projection].intermediate
            truncated = neurons < sizes.shape.intermediate
            if projection != Projection.DOWN and truncated:
                yield Collective.ALL_REDUCE, rows * neurons
            elif projection != Projection.DOWN or truncated:
                # What is scattered has equal sizes.
                yield Collective.REDUCE_SCATTER, rows * -(-neurons // tp) * tp
