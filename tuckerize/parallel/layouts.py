"""Slices that each process owns, and the communication of a layout: pure arithmetic.

Over a tensor-parallel axis of tp processes, for T tokens with k experts per token:

`intermediate` is Megatron's: cores are split on H (U_H by rows where the mode is truncated), all
else is replicated. gate and up yield the process's own columns, down yields a partial sum, and one
all-reduce of T·r_I values completes the layer.

`rank` splits U_I of gate and up by columns, their cores on r_I, the core of down on r_H, and each
U_H by rows; only U_E and the U_I of down are replicated. One all-reduce of T·k·2·r_H values
completes gate and up before the activation (a reduce-scatter if H is not truncated), one
reduce-scatter of T·k·r_H values completes the input of down's core (none if H is not truncated),
and one all-reduce completes the layer.

Over an expert-parallel axis a process owns whole groups or, in a layer of one group, the rows of
U_E or core of its experts. U_H and U_I, and the core if there is a U_E, are then replicated, so
that tokens can be dispatched in the latent space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tuckerize.domain import CoreType, Layout, Mode, MultilinearRank, Projection, StackShape
from tuckerize.names import CorePart, TensorKind, TensorName


class Slice(NamedTuple):
    """A slice of one dimension: first index and length."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """Index after the last."""
        return self.start + self.length


class Collective(StrEnum):
    """A kind of collective."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"


Traffic = Mapping[Collective, float]
"""Average bytes that a process sends per token of its own, by kind, with ring algorithms."""


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of a mesh, and how tokens are communicated on it.

    Attributes:
        tp: Tensor-parallel processes.
        ep: Expert-parallel processes.
        cp: Context-parallel processes.
        sequence_parallel: Whether each tp process has its own tokens.
        all_to_all: Whether tokens are sent to the owners of their experts only, not to all.
    """

    tp: int = 1
    ep: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    all_to_all: bool = True


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Location of a token's experts, averaged over tokens.

    Attributes:
        top_k: Experts per token.
        rows: Number of them in each group.
        copies: Number of other expert-parallel processes that own any of them.
        remote: Number of them on other processes.
    """

    top_k: int
    rows: Sequence[float]
    copies: float = 0.0
    remote: float = 0.0


class CommunicationSpace(NamedTuple):
    """Space in which activations are communicated: latent (r_I values per token) or hidden (I).

    Attributes:
        latent_input: Whether tokens are dispatched in the latent space.
        latent_output: Whether outputs are combined in the latent space.
    """

    latent_input: bool
    latent_output: bool


RankByProjection = Mapping[Projection, MultilinearRank]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of a layer, as needed to split it.

    Attributes:
        ranks: Core sizes of the projections of each group.
        shape: Sizes of one stack.
        joint: Whether gate and up share one U_I.
        core_type: Encoding of quantised cores.
    """

    ranks: Sequence[RankByProjection]
    shape: StackShape
    joint: bool
    core_type: CoreType | None = None

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return len(self.ranks) * self.shape.experts

    @property
    def input_ranks(self) -> list[int]:
        """Values per token after each distinct U_I of gate and up; I without a U_I."""
        found = []
        for ranks in self.ranks:
            gate, up = ranks[Projection.GATE].hidden, ranks[Projection.UP].hidden
            found += [gate] if self.joint or gate == up == self.shape.hidden else [gate, up]
        return found

    @property
    def output_ranks(self) -> list[int]:
        """Values per token before the U_I of down of each group."""
        return [ranks[Projection.DOWN].hidden for ranks in self.ranks]


class SplitDimensions(NamedTuple):
    """Dimensions along which a stored tensor is split; None if replicated.

    Attributes:
        tp: Over tensor-parallel processes.
        experts: Over the owners of the group's experts.
        unit: Indices of the first that stay together: a scale is of a group of neurons.
    """

    tp: int | None
    experts: int | None
    unit: int = 1


INDEX_BYTES = 8
"""Bytes of an expert index sent with a token."""


def owned_slice(size: int, tp_size: int, tp_rank: int, unit: int = 1) -> Slice:
    """Slice of a dimension that a process owns; lengths differ by one unit at most.

    >>> [owned_slice(10, 4, tp_rank).length for tp_rank in range(4)]
    [3, 3, 2, 2]
    >>> [owned_slice(90, 2, tp_rank, 32).length for tp_rank in range(2)]
    [64, 26]
    """
    base, larger = divmod(-(-size // unit), tp_size)
    start = min(unit * (tp_rank * base + min(tp_rank, larger)), size)
    return Slice(start, min(unit * (base + (tp_rank < larger)), size - start))


def split_dimensions(
    layout: Layout,
    name: TensorName,
    ranks: RankByProjection,
    shape: StackShape,
    core_type: CoreType | None = None,
) -> SplitDimensions:
    """Dimensions along which a stored tensor is split; one expert's core rows belong to its owner.

    Args:
        layout: The layout.
        name: Name of the tensor.
        ranks: Core sizes of the projections of its group.
        shape: Sizes of one stack of the group.
        core_type: Encoding of quantised cores, which the intermediate layout alone can split.
    """
    rank = ranks[name.projection]
    whole_core = name.kind == TensorKind.CORE and name.expert is None
    by_expert = name.kind == TensorKind.U_E or (whole_core and rank.expert == shape.experts)
    # Biases of down are added where the tokens are, which may be of any expert.
    of_neurons = name.kind == TensorKind.BIAS and name.projection != Projection.DOWN
    by_expert |= of_neurons and name.expert is None
    over_tp, unit = _split_over_tp(layout, name, rank, shape), 1
    if core_type and over_tp is not None:
        over_tp, unit = _split_of_quantised(name, over_tp, core_type)
    return SplitDimensions(over_tp, 0 if by_expert else None, unit)


def _split_of_quantised(
    name: TensorName, neurons: int, core_type: CoreType
) -> tuple[int | None, int]:
    """Dimension of a tensor that is split on H, and its unit, beside quantised cores.

    Args:
        name: Its name.
        neurons: Dimension that is split of U_H or of the core.
        core_type: Encoding.
    """
    unit = core_type.group_size or 1
    if name.part is None or name.projection != Projection.DOWN:
        return neurons, unit
    # Neurons are the inputs of down_proj: the last dimension.
    if name.part != CorePart.SCALES:
        return neurons + 1, core_type.words(unit)
    return (None if core_type.group_size is None else neurons + 1), 1


def _split_over_tp(
    layout: Layout, name: TensorName, rank: MultilinearRank, shape: StackShape
) -> int | None:
    """Dimension of a stored tensor that is split over tp; None if replicated."""
    if name.kind == TensorKind.U_H:
        return 0
    if name.kind == TensorKind.BIAS:
        on_neurons = 1 if name.expert is None else 0
        return None if name.projection == Projection.DOWN else on_neurons
    on_hidden = layout == Layout.RANK and name.projection != Projection.DOWN
    if name.kind != TensorKind.CORE:
        return 1 if name.kind == TensorKind.U_I and on_hidden else None
    if layout == Layout.INTERMEDIATE and rank.intermediate < shape.intermediate:
        return None
    dimension = Mode.HIDDEN if on_hidden else Mode.INTERMEDIATE
    return dimension if name.expert is None else dimension - 1


def experts_are_split(sizes: LayerShape, ep: int) -> bool:
    """Whether expert-parallel processes share the experts of one group, not own whole groups."""
    return ep > 1 and len(sizes.ranks) == 1


def owners_of(group: int, *, groups: int, ep: int) -> range:
    """Expert-parallel processes that own a group, or share its experts.

    >>> owners_of(3, groups=4, ep=2), owners_of(0, groups=1, ep=2)
    (range(1, 2), range(0, 2))
    """
    if groups == 1:
        return range(ep)
    owner = group // (groups // ep)
    return range(owner, owner + 1)


def smallest_split_size(
    layout: Layout, ranks: RankByProjection, shape: StackShape, core_type: CoreType | None = None
) -> int:
    """Smallest size that a layout splits, and so its maximum number of tp processes.

    Args:
        layout: The layout.
        ranks: Core sizes of the projections of a group.
        shape: Sizes of one stack of the group, H being the width of the widest expert: of narrower
            ones the last processes may own nothing.
        core_type: Encoding of quantised cores, whose groups stay together.
    """
    unit = (core_type and core_type.group_size) or 1
    sizes = [-(-shape.intermediate // unit)]
    if layout == Layout.RANK:
        sizes += [ranks[projection].hidden for projection in (Projection.GATE, Projection.UP)]
        sizes.append(ranks[Projection.DOWN].intermediate)
    return min(sizes)


def even_load(top_k: int, *, experts: int, groups: int, ep: int) -> ExpertLoad:
    """Load of a router that selects all sets of `top_k` experts of a layer equally often.

    >>> even_load(2, experts=4, groups=1, ep=2)
    ExpertLoad(top_k=2, rows=[2.0], copies=0.8333333333333334, remote=1.0)
    """
    absent = math.comb(experts - experts // ep, top_k) / math.comb(experts, top_k)
    remote = top_k * (ep - 1) / ep
    return ExpertLoad(top_k, [top_k / groups] * groups, (ep - 1) * (1 - absent), remote)


def communication_space(layout: Layout, sizes: LayerShape, mesh: Parallelism) -> CommunicationSpace:
    """Choose the space of fewer values, where every process can project into it."""
    if mesh.ep > 1 and not experts_are_split(sizes, mesh.ep):
        return CommunicationSpace(latent_input=False, latent_output=False)
    width_in = sum(sizes.input_ranks) / (mesh.tp if layout == Layout.RANK else 1)
    width_out = sum(sizes.output_ranks)
    return CommunicationSpace(width_in < sizes.shape.hidden, width_out <= sizes.shape.hidden)


def width_over_ep(layout: Layout, sizes: LayerShape, mesh: Parallelism) -> int:
    """Largest width of the rows sent over ep, of dispatch and combine."""
    space = communication_space(layout, sizes, mesh)
    cut = mesh.tp if layout == Layout.RANK else 1
    there = sum(-(-rank // cut) for rank in sizes.input_ranks)
    back = sum(sizes.output_ranks)
    hidden = sizes.shape.hidden
    return max(there if space.latent_input else hidden, back if space.latent_output else hidden)


def layer_traffic(
    layout: Layout,
    sizes: LayerShape,
    mesh: Parallelism,
    load: ExpertLoad,
    *,
    value_bytes: int,
    fused_width: int | None = None,
) -> Traffic:
    """Predict the traffic of a layer's collectives.

    Args:
        layout: The layout.
        sizes: Sizes of the layer.
        mesh: The mesh.
        load: Location of the tokens' experts.
        value_bytes: Bytes per value of the tokens.
        fused_width: Row width of the fused dispatch and combine, which send one row per expert of a
            token, without its routing; None for the plain collectives.

    Source:
        Thakur et al. 2005: with n processes each sends (n-1)/n of the payload in a reduce-scatter
        or an all-gather, and twice that in an all-reduce.
    """
    space = communication_space(layout, sizes, mesh)
    token = sum(sizes.input_ranks) if space.latent_input else sizes.shape.hidden
    output = sum(sizes.output_ranks) if space.latent_output else sizes.shape.hidden
    output *= value_bytes
    routes = load.top_k * (value_bytes + INDEX_BYTES)
    share = (mesh.tp - 1) / mesh.tp
    moved = dict.fromkeys(Collective, 0.0)
    if mesh.sequence_parallel:
        whole = sizes.shape.hidden if layout == Layout.RANK else token
        moved[Collective.ALL_GATHER] += share * (whole * value_bytes + routes)
        moved[Collective.REDUCE_SCATTER] += share * output
    else:
        moved[Collective.ALL_REDUCE] += share * 2 * output
    sent = token * value_bytes / (mesh.tp if layout == Layout.RANK and space.latent_input else 1)
    if fused_width is not None:
        moved[Collective.ALL_TO_ALL] += load.remote * 2 * fused_width * value_bytes
    elif mesh.all_to_all:
        moved[Collective.ALL_TO_ALL] += load.copies * (sent + routes + output)
    else:
        moved[Collective.ALL_GATHER] += (mesh.ep - 1) * (sent + routes)
        moved[Collective.REDUCE_SCATTER] += (mesh.ep - 1) * output
    if layout == Layout.RANK:
        for kind, values in _inner_collectives(sizes, mesh.tp, load):
            rounds = 2 if kind == Collective.ALL_REDUCE else 1
            moved[kind] += share * rounds * values * value_bytes
    return moved


def _inner_collectives(
    sizes: LayerShape, tp: int, load: ExpertLoad
) -> Iterator[tuple[Collective, float]]:
    """Collectives of the rank layout inside a layer: kind, and values per token."""
    for ranks, rows in zip(sizes.ranks, load.rows, strict=True):
        for projection in Projection:
            neurons = ranks[projection].intermediate
            truncated = neurons < sizes.shape.intermediate
            if projection != Projection.DOWN and truncated:
                yield Collective.ALL_REDUCE, rows * neurons
            elif projection != Projection.DOWN or truncated:
                # Scattered slices are padded to equal sizes.
                yield Collective.REDUCE_SCATTER, rows * -(-neurons // tp) * tp
