"""What the processes of a mesh exchange in front of, between and behind the steps of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.ascend.dispatch import FusedPair
from tuckerize.parallel.collectives import (
    all_reduce,
    count_others,
    exchange_counts,
    exchange_rows,
    gather_rows,
    largest_count,
    reduce_scatter_columns,
    scatter_rows,
    spread,
)
from tuckerize.parallel.layouts import Collective, Layout, Travel, part
from tuckerize.parallel.mesh import Axis, Position

Matrices = Sequence[Tensor]

NO_EXPERT = -1
"""Stands for an expert that another process has."""


class Tokens(NamedTuple):
    """Tokens on their way to their experts.

    Attributes:
        vectors: What is known of them, matrices with a row for each, of one dtype.
        experts_Tk: Their experts, shape (T, k).
        weights_Tk: The weights of these, shape (T, k).
    """

    vectors: Matrices
    experts_Tk: Tensor
    weights_Tk: Tensor


WayBack = Callable[[Matrices], Matrices]
"""Brings what was computed of tokens to where they came from, summed over the processes."""


class Step(Protocol):
    """One exchange of tokens over one axis of the mesh."""

    def send(self, tokens: Tokens) -> tuple[Tokens, WayBack]:
        """Exchange tokens; all processes do it together."""


@dataclass(frozen=True)
class Exchange:
    """A process that owns everything and exchanges nothing; layouts override what they need.

    `truncated` says of each matrix whether its columns are the r_H core sizes of a truncated
    intermediate mode, in front of or behind a U_H, or the H neurons themselves.

    Attributes:
        early: Exchanges of the tokens themselves.
        late: Exchanges of what U_I makes of them.
        low_output: Whether outputs go back before the U_I of down expands them.
    """

    early: Sequence[Step] = ()
    late: Sequence[Step] = ()
    low_output: bool = True

    def own_hidden(self, x_TI: Tensor) -> Tensor:
        """The part of the tokens that the process's cores of gate and up work on without U_I."""
        return x_TI

    def gate_up(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:  # noqa: ARG002
        """Complete the products of the cores of gate and up."""
        return middles

    def down(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:  # noqa: ARG002
        """Complete what the core of down works on."""
        return middles


@dataclass(frozen=True, kw_only=True)
class RankExchange(Exchange):
    """The rank layout: cores are split, so what they and the U_H of down give are partial sums."""

    tp: Axis

    def own_hidden(self, x_TI: Tensor) -> Tensor:
        """The columns that the process's slice of the cores belongs to."""
        own = part(x_TI.shape[1], self.tp.size, self.tp.rank)
        return x_TI[:, own.start : own.stop]

    def gate_up(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:
        """Sum: to all core sizes where U_H follows, to the process's own neurons where not."""
        return _by_kind(middles, truncated, self._sum, self._reduce_scatter)

    def down(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:
        """Sum to the process's own core rows; without U_H its neurons are these rows already."""
        return _by_kind(middles, truncated, self._reduce_scatter, lambda matrices: matrices)

    def _sum(self, matrices: Matrices) -> Matrices:
        # Each process goes on with its own rows of U_H.
        return spread(all_reduce(matrices, self.tp), self.tp)

    def _reduce_scatter(self, matrices: Matrices) -> Matrices:
        return reduce_scatter_columns(matrices, self.tp)


@dataclass(frozen=True)
class Share(Step):
    """Tokens are on all processes of an axis, each computes a part, and all get the sums."""

    axis: Axis

    def send(self, tokens: Tokens) -> tuple[Tokens, WayBack]:
        """Nothing moves but gradients."""
        *vectors, weights_Tk = spread([*tokens.vectors, tokens.weights_Tk], self.axis)
        return Tokens(vectors, tokens.experts_Tk, weights_Tk), partial(all_reduce, axis=self.axis)


@dataclass(frozen=True)
class Gather(Step):
    """Each process of an axis has as many tokens, and all get them; sequence parallelism."""

    axis: Axis

    def send(self, tokens: Tokens) -> tuple[Tokens, WayBack]:
        """Gather the tokens of all; the way back scatters sums."""
        packed, unpack = _pack(tokens)
        gathered = gather_rows(packed, self.axis)
        experts_Tk = gather_rows(tokens.experts_Tk, self.axis)

        def back(outputs: Matrices) -> Matrices:
            return _as_one(outputs, partial(scatter_rows, axis=self.axis))

        return unpack(gathered, experts_Tk), back


@dataclass(frozen=True)
class GatherToExperts(Step):
    """Expert parallelism without an exchange of rows: every process gets all tokens of its axis.

    Attributes:
        axis: The processes.
        experts: How many experts each has.
    """

    axis: Axis
    experts: int

    def send(self, tokens: Tokens) -> tuple[Tokens, WayBack]:
        """Gather as many rows of each as the largest has; those that are no tokens have none."""
        count = len(tokens.experts_Tk)
        rows = largest_count(count, self.axis, tokens.experts_Tk.device) - count
        padded = Tokens(
            [functional.pad(vectors, (0, 0, 0, rows)) for vectors in tokens.vectors],
            functional.pad(tokens.experts_Tk, (0, 0, 0, rows), value=NO_EXPERT),
            functional.pad(tokens.weights_Tk, (0, 0, 0, rows)),
        )
        gathered, way = Gather(self.axis).send(padded)
        own_Tk = _own_experts(gathered.experts_Tk, self.axis, self.experts)

        def back(outputs: Matrices) -> Matrices:
            return [output[:count] for output in way(outputs)]

        return gathered._replace(experts_Tk=own_Tk), back


@dataclass(frozen=True)
class SendToExperts(Step):
    """Expert parallelism: a token goes once to every process of an axis that has experts of it.

    Attributes:
        axis: The processes.
        experts: How many experts each has.
    """

    axis: Axis
    experts: int

    def send(self, tokens: Tokens) -> tuple[Tokens, WayBack]:
        """Exchange rows, after their numbers, which the host has to know."""
        device = tokens.experts_Tk.device
        owners_Tk = tokens.experts_Tk.cpu().div(self.experts, rounding_mode="floor")
        goes_PT = (owners_Tk == torch.arange(self.axis.size).view(-1, 1, 1)).any(2)
        rows = goes_PT.nonzero()[:, 1].to(device)
        sent: list[int] = goes_PT.sum(1).tolist()
        received = exchange_counts(sent, self.axis, device)
        packed, unpack = _pack(tokens)
        arrived = exchange_rows(packed.index_select(0, rows), sent, received, self.axis)
        chosen_Nk = tokens.experts_Tk.index_select(0, rows)
        experts_Tk = exchange_rows(chosen_Nk, sent, received, self.axis)
        own_Tk = _own_experts(experts_Tk, self.axis, self.experts)

        def back(outputs: Matrices) -> Matrices:
            def sum_of(packed_NX: Tensor) -> Tensor:
                returned_NX = exchange_rows(packed_NX, received, sent, self.axis)
                total_TX = returned_NX.new_zeros((len(owners_Tk), returned_NX.shape[1]))
                return total_TX.index_add(0, rows, returned_NX)

            return _as_one(outputs, sum_of)

        return unpack(arrived, own_Tk), back


@dataclass(frozen=True)
class SendFused(Step):
    """Expert parallelism with Ascend's fused operators: nothing waits for the host.

    A row arrives for every expert of a token, sorted by expert, and is all that its process knows
    of the token: it has that expert alone, of weight 1. The routing weights are applied where the
    token came from. Rows behind the last expert's mean nothing, and have none.

    Attributes:
        pair: The operators.
        otherwise: What takes their place with gradients, which they lack, and for other types.
    """

    pair: FusedPair
    otherwise: Step

    def send(self, tokens: Tokens) -> tuple[Tokens, WayBack]:
        """Dispatch rows; the way back combines them."""
        packed_TX = torch.cat(list(tokens.vectors), 1)
        use = self.pair.use
        if torch.is_grad_enabled() or packed_TX.dtype != use.dtype:
            return self.otherwise.send(tokens)
        sent = self.pair.dispatch(_filled(packed_TX, use.hidden), tokens.experts_Tk)
        self._count(tokens.experts_Tk)
        places_A = torch.arange(len(sent.rows), device=sent.rows.device)
        ends_E = sent.counts.cumsum(0)
        # Behind the last expert's rows this is the number of experts, which none has.
        experts_A = torch.searchsorted(ends_E, places_A, right=True)
        widths = [vectors.shape[1] for vectors in tokens.vectors]
        arrived = Tokens(
            sent.rows[:, : sum(widths)].split_with_sizes(widths, 1),
            experts_A.unsqueeze(1),
            sent.rows.new_ones(len(places_A), 1),
        )

        def back(outputs: Matrices) -> Matrices:
            def combine(rows_AX: Tensor) -> Tensor:
                filled = _filled(rows_AX, use.hidden)
                total_TX = self.pair.combine(filled, sent, tokens.weights_Tk)
                return total_TX[:, : rows_AX.shape[1]]

            return _as_one(outputs, combine)

        return arrived, back

    def _count(self, experts_Tk: Tensor) -> None:
        """Count the rows that leave this process, and come back to it."""
        use = self.pair.use

        def sent() -> float:
            owners_Tk = experts_Tk.div(use.num_experts // use.ep_size, rounding_mode="floor")
            return int((owners_Tk != self.pair.ep_rank).sum()) * 2 * use.hidden * use.dtype.itemsize

        count_others(Collective.ALL_TO_ALL, sent)


def send_all(steps: Sequence[Step], tokens: Tokens) -> tuple[Tokens, list[WayBack]]:
    """Exchange tokens step by step.

    Returns:
        The tokens that arrive, and the ways back in the order in which they are gone.
    """
    ways: list[WayBack] = []
    for step in steps:
        tokens = tokens._replace(weights_Tk=tokens.weights_Tk.to(tokens.vectors[0].dtype))
        tokens, way = step.send(tokens)
        ways.insert(0, way)
    return tokens, ways


def exchange_for(
    layout: Layout,
    position: Position,
    low: Travel,
    *,
    experts: int,
    fused: FusedPair | None = None,
) -> Exchange:
    """The exchange of a layout for one process.

    Args:
        layout: The layout.
        position: The process.
        low: How tokens and outputs travel.
        experts: Experts of a layer that each expert-parallel process has.
        fused: Ascend's fused dispatch and combine, where they may be used.
    """
    tp, ep = position.tp, position.ep
    share = Gather(tp) if position.sequence_parallel else Share(tp)
    send: Step = SendToExperts(ep, experts) if ep.has_all_to_all else GatherToExperts(ep, experts)
    if fused is not None:
        send = SendFused(fused, send)
    over_tp: Sequence[Step] = [share] if tp.size > 1 else []
    over_ep: Sequence[Step] = [send] if ep.size > 1 else []
    if not low.low_input:
        exchange = Exchange([*over_tp, *over_ep], [], low.low_output)
    elif layout == Layout.RANK and tp.size > 1:
        # Only here is U_I cut.
        exchange = Exchange(over_tp, over_ep, low.low_output)
    else:
        exchange = Exchange([], [*over_tp, *over_ep], low.low_output)
    if layout == Layout.INTERMEDIATE or tp.size == 1:
        return exchange
    return RankExchange(exchange.early, exchange.late, exchange.low_output, tp=tp)


def _pack(tokens: Tokens) -> tuple[Tensor, Callable[[Tensor, Tensor], Tokens]]:
    """Vectors and weights of tokens as one matrix, and what makes tokens of such a matrix."""
    matrices = [*tokens.vectors, tokens.weights_Tk]
    widths = [matrix.shape[1] for matrix in matrices]

    def unpack(packed: Tensor, experts_Tk: Tensor) -> Tokens:
        *vectors, weights_Tk = packed.split_with_sizes(widths, 1)
        return Tokens(vectors, experts_Tk, weights_Tk)

    return torch.cat(matrices, 1), unpack


def _filled(matrix: Tensor, width: int) -> Tensor:
    """A matrix with columns of zeros up to a width."""
    return functional.pad(matrix, (0, width - matrix.shape[1]))


def _as_one(matrices: Matrices, change: Callable[[Tensor], Tensor]) -> Matrices:
    """Change the rows of several matrices as those of one."""
    widths = [matrix.shape[1] for matrix in matrices]
    return change(torch.cat(list(matrices), 1)).split_with_sizes(widths, 1)


def _own_experts(experts_Tk: Tensor, axis: Axis, experts: int) -> Tensor:
    """Experts counted from the first that the process has."""
    local_Tk = experts_Tk - axis.rank * experts
    return local_Tk.masked_fill((local_Tk < 0) | (local_Tk >= experts), NO_EXPERT)


def _by_kind(
    matrices: Matrices,
    truncated: Sequence[bool],
    if_truncated: Callable[[Matrices], Matrices],
    otherwise: Callable[[Matrices], Matrices],
) -> Matrices:
    """Hand the matrices of each kind to its collective in one call; the order is kept."""
    results = dict(enumerate(matrices))
    for kind, collective in ((True, if_truncated), (False, otherwise)):
        chosen = [index for index, flag in enumerate(truncated) if flag == kind]
        if chosen:
            done = collective([matrices[index] for index in chosen])
            results.update(zip(chosen, done, strict=True))
    return list(results.values())
