"""Communication of a sharded MoE layer: dispatch, collectives inside it, combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.ascend.dispatch import FusedPair
from tuckerize.domain import Layout
from tuckerize.parallel.collectives import (
    all_reduce,
    count_sent,
    exchange_counts,
    exchange_rows,
    gather_rows,
    largest_count,
    reduce_scatter_columns,
    replicate,
    scatter_rows,
)
from tuckerize.parallel.layouts import Collective, CommunicationSpace, owned_slice
from tuckerize.parallel.mesh import Axis, Position

Matrices = Sequence[Tensor]

NO_EXPERT = -1
"""Index of any expert of another process."""


class Tokens(NamedTuple):
    """Tokens and their routing.

    Attributes:
        vectors: Hidden states or latents, matrices with one row per token, of one dtype.
        experts_Tk: Experts of each token, shape (T, k).
        weights_Tk: Routing weights, shape (T, k).
    """

    vectors: Matrices
    experts_Tk: Tensor
    weights_Tk: Tensor


Combine = Callable[[Matrices], Matrices]
"""Function that returns outputs to the processes of their tokens, and sums them."""


class DispatchStep(Protocol):
    """Dispatch of tokens over one axis of the mesh."""

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """Dispatch tokens; a collective call. Returns the received tokens and their combine."""


@dataclass(frozen=True)
class Exchange:
    """Communication of one layer; of the intermediate layout as it is.

    `truncated` tells for each matrix whether its columns are the r_H core columns of a truncated
    intermediate mode, before or after a U_H, or the H neurons themselves.

    Attributes:
        hidden_steps: Dispatch steps of hidden states.
        latent_steps: Dispatch steps of latents, after U_I.
        latent_output: Whether outputs are combined in the latent space, before the U_I of down.
    """

    hidden_steps: Sequence[DispatchStep] = ()
    latent_steps: Sequence[DispatchStep] = ()
    latent_output: bool = True

    def own_hidden(self, x_TI: Tensor) -> Tensor:
        """Columns of the tokens for this process's cores of gate and up, if they have no U_I."""
        return x_TI

    def gate_up(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:  # noqa: ARG002
        """Complete the products with the cores of gate and up."""
        return middles

    def down(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:  # noqa: ARG002
        """Complete the input of the core of down."""
        return middles


@dataclass(frozen=True, kw_only=True)
class RankExchange(Exchange):
    """Communication of the rank layout, in which products with split cores are partial sums."""

    tp: Axis

    def own_hidden(self, x_TI: Tensor) -> Tensor:
        """Columns for this process's slice of the cores."""
        own = owned_slice(x_TI.shape[1], self.tp.size, self.tp.rank)
        return x_TI[:, own.start : own.stop]

    def gate_up(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:
        """Sum; all core columns are kept if U_H follows, else this process's neurons."""
        return _by_kind(middles, truncated, self._sum, self._reduce_scatter)

    def down(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:
        """Sum this process's core rows; without U_H its neurons are these rows already."""
        return _by_kind(middles, truncated, self._reduce_scatter, lambda matrices: matrices)

    def _sum(self, matrices: Matrices) -> Matrices:
        # Each process continues with its own rows of U_H.
        return replicate(all_reduce(matrices, self.tp), self.tp)

    def _reduce_scatter(self, matrices: Matrices) -> Matrices:
        return reduce_scatter_columns(matrices, self.tp)


@dataclass(frozen=True)
class ReplicatedDispatch(DispatchStep):
    """Tokens are replicated along an axis; each process computes a part, and outputs are summed.

    Attributes:
        axis: The mesh axis.
    """

    axis: Axis

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """Only gradients are communicated; combine is an all-reduce."""
        *vectors, weights_Tk = replicate([*tokens.vectors, tokens.weights_Tk], self.axis)
        return Tokens(vectors, tokens.experts_Tk, weights_Tk), partial(all_reduce, axis=self.axis)


@dataclass(frozen=True)
class SequenceParallelDispatch(DispatchStep):
    """Sequence parallelism: each process has the same number of tokens, and all get all tokens.

    Attributes:
        axis: The mesh axis.
    """

    axis: Axis

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """All-gather tokens; combine is a reduce-scatter."""
        packed, unpack = _pack(tokens)
        gathered = gather_rows(packed, self.axis)
        experts_Tk = gather_rows(tokens.experts_Tk, self.axis)

        def combine(outputs: Matrices) -> Matrices:
            return _as_one(outputs, partial(scatter_rows, axis=self.axis))

        return unpack(gathered, experts_Tk), combine


@dataclass(frozen=True)
class AllGatherDispatch(DispatchStep):
    """Expert parallelism without all-to-all: every process gets all tokens of the axis.

    Attributes:
        axis: The mesh axis.
        num_experts: Experts per process.
    """

    axis: Axis
    num_experts: int

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """All-gather rows, padded to the largest count with rows that have no expert."""
        count = len(tokens.experts_Tk)
        rows = largest_count(count, self.axis, tokens.experts_Tk.device) - count
        padded = Tokens(
            [functional.pad(vectors, (0, 0, 0, rows)) for vectors in tokens.vectors],
            functional.pad(tokens.experts_Tk, (0, 0, 0, rows), value=NO_EXPERT),
            functional.pad(tokens.weights_Tk, (0, 0, 0, rows)),
        )
        gathered, combine_padded = SequenceParallelDispatch(self.axis).dispatch(padded)
        own_Tk = _own_experts(gathered.experts_Tk, self.axis, self.num_experts)

        def combine(outputs: Matrices) -> Matrices:
            return [output[:count] for output in combine_padded(outputs)]

        return gathered._replace(experts_Tk=own_Tk), combine


@dataclass(frozen=True)
class AllToAllDispatch(DispatchStep):
    """Expert parallelism: each token is sent once to each process that owns any of its experts.

    Attributes:
        axis: The mesh axis.
        num_experts: Experts per process.
    """

    axis: Axis
    num_experts: int

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """All-to-all of rows, after their counts, which need a host synchronisation."""
        device = tokens.experts_Tk.device
        owners_Tk = tokens.experts_Tk.cpu().div(self.num_experts, rounding_mode="floor")
        goes_PT = (owners_Tk == torch.arange(self.axis.size).view(-1, 1, 1)).any(2)
        rows = goes_PT.nonzero()[:, 1].to(device)
        sent: list[int] = goes_PT.sum(1).tolist()
        received = exchange_counts(sent, self.axis, device)
        packed, unpack = _pack(tokens)
        arrived = exchange_rows(packed.index_select(0, rows), sent, received, self.axis)
        chosen_Nk = tokens.experts_Tk.index_select(0, rows)
        experts_Tk = exchange_rows(chosen_Nk, sent, received, self.axis)
        own_Tk = _own_experts(experts_Tk, self.axis, self.num_experts)

        def combine(outputs: Matrices) -> Matrices:
            def sum_of(packed_NX: Tensor) -> Tensor:
                returned_NX = exchange_rows(packed_NX, received, sent, self.axis)
                total_TX = returned_NX.new_zeros((len(owners_Tk), returned_NX.shape[1]))
                return total_TX.index_add(0, rows, returned_NX)

            return _as_one(outputs, sum_of)

        return unpack(arrived, own_Tk), combine


@dataclass(frozen=True)
class FusedDispatch(DispatchStep):
    """Expert parallelism with Ascend's fused operators, without host synchronisation.

    One row arrives per expert of a token, sorted by expert; to the receiver it is a token with that
    expert alone, of weight 1. Routing weights are applied by combine, where the token came from.
    Rows after those of the last expert are undefined and have no expert.

    Attributes:
        pair: The operators.
        otherwise: Used with gradients, which the operators lack, and for other types.
    """

    pair: FusedPair
    otherwise: DispatchStep

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """Fused dispatch; combine is the fused combine."""
        packed_TX = torch.cat(list(tokens.vectors), 1)
        use = self.pair.use
        if torch.is_grad_enabled() or packed_TX.dtype != use.dtype:
            return self.otherwise.dispatch(tokens)
        sent = self.pair.dispatch(_zero_padded(packed_TX, use.hidden), tokens.experts_Tk)
        self._count(tokens.experts_Tk)
        places_A = torch.arange(len(sent.rows), device=sent.rows.device)
        ends_E = sent.counts.cumsum(0)
        # For rows after those of the last expert this is the number of experts, which is no expert.
        experts_A = torch.searchsorted(ends_E, places_A, right=True)
        widths = [vectors.shape[1] for vectors in tokens.vectors]
        arrived = Tokens(
            sent.rows[:, : sum(widths)].split_with_sizes(widths, 1),
            experts_A.unsqueeze(1),
            sent.rows.new_ones(len(places_A), 1),
        )

        def combine(outputs: Matrices) -> Matrices:
            def combine_rows(rows_AX: Tensor) -> Tensor:
                padded = _zero_padded(rows_AX, use.hidden)
                total_TX = self.pair.combine(padded, sent, tokens.weights_Tk)
                return total_TX[:, : rows_AX.shape[1]]

            return _as_one(outputs, combine_rows)

        return arrived, combine

    def _count(self, experts_Tk: Tensor) -> None:
        """Count the rows sent by this process and back to it."""
        use = self.pair.use

        def sent() -> float:
            owners_Tk = experts_Tk.div(use.num_experts // use.ep_size, rounding_mode="floor")
            return int((owners_Tk != self.pair.ep_rank).sum()) * 2 * use.hidden * use.dtype.itemsize

        count_sent(Collective.ALL_TO_ALL, sent)


def dispatch_all(steps: Sequence[DispatchStep], tokens: Tokens) -> tuple[Tokens, list[Combine]]:
    """Dispatch tokens step by step.

    Returns:
        The received tokens, and the combines in the order of their calls.
    """
    combines: list[Combine] = []
    for step in steps:
        tokens = tokens._replace(weights_Tk=tokens.weights_Tk.to(tokens.vectors[0].dtype))
        tokens, combine = step.dispatch(tokens)
        combines.insert(0, combine)
    return tokens, combines


def exchange_for(
    layout: Layout,
    position: Position,
    space: CommunicationSpace,
    *,
    num_experts: int,
    fused: FusedPair | None = None,
) -> Exchange:
    """Communication of a layer for one process.

    Args:
        layout: The layout.
        position: Position of the process.
        space: Space in which tokens and outputs are communicated.
        num_experts: Experts of the layer per expert-parallel process.
        fused: Ascend's fused dispatch and combine, where they may be used.
    """
    tp, ep = position.tp, position.ep
    share = SequenceParallelDispatch(tp) if position.sequence_parallel else ReplicatedDispatch(tp)
    send: DispatchStep = (
        AllToAllDispatch(ep, num_experts)
        if ep.has_all_to_all
        else AllGatherDispatch(ep, num_experts)
    )
    if fused is not None:
        send = FusedDispatch(fused, send)
    over_tp: Sequence[DispatchStep] = [share] if tp.size > 1 else []
    over_ep: Sequence[DispatchStep] = [send] if ep.size > 1 else []
    if not space.latent_input:
        exchange = Exchange([*over_tp, *over_ep], [], space.latent_output)
    elif layout == Layout.RANK and tp.size > 1:
        # Only here is U_I split.
        exchange = Exchange(over_tp, over_ep, space.latent_output)
    else:
        exchange = Exchange([], [*over_tp, *over_ep], space.latent_output)
    if layout == Layout.INTERMEDIATE or tp.size == 1:
        return exchange
    return RankExchange(exchange.hidden_steps, exchange.latent_steps, exchange.latent_output, tp=tp)


def _pack(tokens: Tokens) -> tuple[Tensor, Callable[[Tensor, Tensor], Tokens]]:
    """Concatenate vectors and weights into one matrix; returns it and its inverse function."""
    matrices = [*tokens.vectors, tokens.weights_Tk]
    widths = [matrix.shape[1] for matrix in matrices]

    def unpack(packed: Tensor, experts_Tk: Tensor) -> Tokens:
        *vectors, weights_Tk = packed.split_with_sizes(widths, 1)
        return Tokens(vectors, experts_Tk, weights_Tk)

    return torch.cat(matrices, 1), unpack


def _zero_padded(matrix: Tensor, width: int) -> Tensor:
    """Zero-pad a matrix to a width."""
    return functional.pad(matrix, (0, width - matrix.shape[1]))


def _as_one(matrices: Matrices, transform: Callable[[Tensor], Tensor]) -> Matrices:
    """Transform several matrices as one, concatenated by columns."""
    widths = [matrix.shape[1] for matrix in matrices]
    return transform(torch.cat(list(matrices), 1)).split_with_sizes(widths, 1)


def _own_experts(experts_Tk: Tensor, axis: Axis, num_experts: int) -> Tensor:
    """Experts counted from the first of this process; NO_EXPERT for those of others."""
    local_Tk = experts_Tk - axis.rank * num_experts
    return local_Tk.masked_fill((local_Tk < 0) | (local_Tk >= num_experts), NO_EXPERT)


def _by_kind(
    matrices: Matrices,
    truncated: Sequence[bool],
    if_truncated: Callable[[Matrices], Matrices],
    otherwise: Callable[[Matrices], Matrices],
) -> Matrices:
    """Apply one collective per kind to all matrices of that kind, keeping their order."""
    results = dict(enumerate(matrices))
    for kind, collective in ((True, if_truncated), (False, otherwise)):
        chosen = [index for index, flag in enumerate(truncated) if flag == kind]
        if chosen:
            done = collective([matrices[index] for index in chosen])
            results.update(zip(chosen, done, strict=True))
    return list(results.values())
