"""Collectives over one axis of the mesh: differentiable, counted, several tensors in one call.

The gradients of a collective go through its counterpart, as in Megatron-LM (Shoeybi et al. 2019,
figure 3; Korthikanti et al. 2022, section 4.2): a sum passes them as they are and `spread` sums
them, a gather of rows scatters sums of them and the other way round, an exchange goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tuckerize.parallel.layouts import Collective, Part, Traffic, part
from tuckerize.parallel.mesh import Axis

_Change = Callable[[Tensor], Tensor]

_counters: list[dict[Collective, float]] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the bytes that this process sends, by kind of collective, with ring algorithms.

    The few bytes that tell the processes how many rows come are not counted.

    Source:
        Thakur et al. 2005: with n processes an all-reduce sends 2(n-1)/n of its payload, a
        reduce-scatter (n-1)/n; an all-gather sends what it is given n-1 times.
    """
    counter = dict.fromkeys(Collective, 0.0)
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.pop()


def count_others(kind: Collective, sent: Callable[[], float]) -> None:
    """Count bytes that something else sends, found out only while bytes are counted."""
    if _counters:
        _count(kind, sent())


def all_reduce(tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Sum tensors over an axis; every process gets the sums, and does the same with them."""
    return _packed(tensors, lambda buffer: _paired(buffer, partial(_sum, axis=axis), _same))


def spread(tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Tensors that are the same on every process of an axis, and of which each uses a part."""
    if not any(tensor.requires_grad for tensor in tensors):
        return list(tensors)
    return _packed(tensors, lambda buffer: _paired(buffer, _same, partial(_sum, axis=axis)))


def gather_rows(rows: Tensor, axis: Axis) -> Tensor:
    """The rows of all processes, equally many of each, of which every process uses a part."""
    return _paired(rows, partial(_gather, axis=axis), partial(_scatter, axis=axis))


def scatter_rows(rows: Tensor, axis: Axis) -> Tensor:
    """Sum over an axis; every process gets an equal share of the rows."""
    return _paired(rows, partial(_scatter, axis=axis), partial(_gather, axis=axis))


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """Give every process of an axis its rows.

    Args:
        rows: The rows for all of them, in their order.
        sent: How many are for each.
        received: How many come from each.
        axis: The processes.
    """
    there = partial(_swap, sent=sent, received=received, axis=axis)
    return _paired(rows, there, partial(_swap, sent=received, received=sent, axis=axis))


def exchange_counts(counts: Sequence[int], axis: Axis, device: torch.device) -> list[int]:
    """How many rows come from every process of an axis, from how many go to each."""
    outgoing = torch.tensor(counts, device=device)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=axis.group)
    received: list[int] = incoming.tolist()
    return received


def largest_count(count: int, axis: Axis, device: torch.device) -> int:
    """The largest number of rows that a process of an axis has."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
    return int(largest)


def reduce_scatter_columns(matrices: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Sum matrices over an axis; every process gets its own columns of the sums.

    Args:
        matrices: Matrices of shapes (rows, columns), the same on every process.
        axis: The processes.

    Returns:
        Columns `part(columns, axis.size, axis.rank)` of every sum. Where the processes do not
        divide the columns, what is sent is padded with zeros to equal sizes.
    """
    widths = [-(-matrix.shape[1] // axis.size) for matrix in matrices]
    outgoing = [
        torch.cat(
            [
                _columns(matrix, part(matrix.shape[1], axis.size, receiver), width)
                for matrix, width in zip(matrices, widths, strict=True)
            ]
        )
        for receiver in range(axis.size)
    ]
    incoming = scatter_rows(torch.cat(outgoing), axis)
    sizes = [len(matrix) * width for matrix, width in zip(matrices, widths, strict=True)]
    return [
        piece.view(len(matrix), width)[:, : part(matrix.shape[1], axis.size, axis.rank).length]
        for piece, matrix, width in zip(
            incoming.split_with_sizes(sizes), matrices, widths, strict=True
        )
    ]


class _Pair(torch.autograd.Function):
    """A change of a tensor, and the change that gradients go through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: _Change, back: _Change) -> Tensor:  # noqa: ANN401
        ctx.back = back
        return there(tensor.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return ctx.back(gradients[0].contiguous()), None, None


def _paired(tensor: Tensor, there: _Change, back: _Change) -> Tensor:
    result: Tensor = _Pair.apply(tensor, there, back)  # type: ignore[no-untyped-call]
    return result


def _packed(tensors: Sequence[Tensor], change: _Change) -> list[Tensor]:
    """Change tensors as one."""
    buffer = change(torch.cat([tensor.flatten() for tensor in tensors]))
    pieces = buffer.split_with_sizes([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _same(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def _sum(tensor: Tensor, axis: Axis) -> Tensor:
    _count(Collective.ALL_REDUCE, tensor.nbytes * 2 * (axis.size - 1) / axis.size)
    total = tensor.clone()
    dist.all_reduce(total, group=axis.group)
    return total


def _gather(rows: Tensor, axis: Axis) -> Tensor:
    _count(Collective.ALL_GATHER, rows.nbytes * (axis.size - 1))
    gathered = rows.new_empty((axis.size * len(rows), *rows.shape[1:]))
    dist.all_gather(_shares(gathered, axis), rows, group=axis.group)
    return gathered


def _scatter(rows: Tensor, axis: Axis) -> Tensor:
    _count(Collective.REDUCE_SCATTER, rows.nbytes * (axis.size - 1) / axis.size)
    own = rows.new_empty((len(rows) // axis.size, *rows.shape[1:]))
    dist.reduce_scatter(own, _shares(rows, axis), group=axis.group)
    return own


def _shares(rows: Tensor, axis: Axis) -> list[Tensor]:
    return list(rows.split_with_sizes([len(rows) // axis.size] * axis.size))


def _swap(rows: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    bytes_per_row = rows[:1].nbytes
    _count(Collective.ALL_TO_ALL, bytes_per_row * (sum(sent) - sent[axis.rank]))
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows, list(received), list(sent), group=axis.group)
    return arrived


def _count(kind: Collective, sent: float) -> None:
    for counter in _counters:
        counter[kind] += sent


def _columns(matrix: Tensor, own: Part, width: int) -> Tensor:
    """Some columns of a matrix, padded with zeros to a width, flattened."""
    padding = (0, width - own.length)
    return torch.nn.functional.pad(matrix[:, own.start : own.stop], padding).flatten()
