"""Collectives over one axis of the mesh: differentiable, counted, several tensors per call.

The backward of a collective is its counterpart, as in Megatron-LM (Shoeybi et al. 2019, figure 3;
Korthikanti et al. 2022, section 4.2): identity for an all-reduce, all-reduce for `replicate`,
reduce-scatter for an all-gather and vice versa, and the reverse all-to-all for an all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tuckerize.parallel.layouts import Collective, Slice, Traffic, owned_slice
from tuckerize.parallel.mesh import Axis

_Transform = Callable[[Tensor], Tensor]

_counters: list[dict[Collective, float]] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the bytes that this process sends by kind of collective, assuming ring algorithms.

    The few bytes of exchanged row counts are not included.

    Source:
        Thakur et al. 2005: with n processes an all-reduce sends 2(n-1)/n of its payload, a
        reduce-scatter (n-1)/n; an all-gather sends its input n-1 times.
    """
    counter = dict.fromkeys(Collective, 0.0)
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.pop()


def count_sent(kind: Collective, sent: Callable[[], float]) -> None:
    """Count bytes sent by other means; `sent` is called only inside `counted`."""
    if _counters:
        _count(kind, sent())


def all_reduce(tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Sum tensors over an axis; all processes get the sums and use them alike."""
    return _packed(tensors, lambda buffer: _paired(buffer, partial(_sum, axis=axis), _same))


def replicate(tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Pass on tensors that are equal on all processes of an axis, of which each uses a part."""
    if not any(tensor.requires_grad for tensor in tensors):
        return list(tensors)
    return _packed(tensors, lambda buffer: _paired(buffer, _same, partial(_sum, axis=axis)))


def gather_rows(rows: Tensor, axis: Axis) -> Tensor:
    """All-gather rows, the same number from each process, of which each process uses a part."""
    return _paired(rows, partial(_gather, axis=axis), partial(_scatter, axis=axis))


def scatter_rows(rows: Tensor, axis: Axis) -> Tensor:
    """Reduce-scatter rows over an axis in equal shares."""
    return _paired(rows, partial(_scatter, axis=axis), partial(_gather, axis=axis))


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """All-to-all of rows.

    Args:
        rows: Rows to send, sorted by receiver.
        sent: Number of rows for each process.
        received: Number of rows from each process.
        axis: The mesh axis.
    """
    there = partial(_swap, sent=sent, received=received, axis=axis)
    return _paired(rows, there, partial(_swap, sent=received, received=sent, axis=axis))


def exchange_counts(counts: Sequence[int], axis: Axis, device: torch.device) -> list[int]:
    """Number of rows from each process of an axis, given the number for each."""
    outgoing = torch.tensor(counts, device=device)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=axis.group)
    received: list[int] = incoming.tolist()
    return received


def largest_count(count: int, axis: Axis, device: torch.device) -> int:
    """Largest count over the processes of an axis."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
    return int(largest)


def reduce_scatter_columns(matrices: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Reduce-scatter matrices by columns over an axis.

    Args:
        matrices: Matrices of shapes (rows, columns), the same shapes on every process.
        axis: The mesh axis.

    Returns:
        Columns `owned_slice(columns, axis.size, axis.rank)` of each sum. If the processes do not
        divide the columns, the messages are zero-padded to equal sizes.
    """
    widths = [-(-matrix.shape[1] // axis.size) for matrix in matrices]
    outgoing = [
        torch.cat(
            [
                _columns(matrix, owned_slice(matrix.shape[1], axis.size, receiver), width)
                for matrix, width in zip(matrices, widths, strict=True)
            ]
        )
        for receiver in range(axis.size)
    ]
    incoming = scatter_rows(torch.cat(outgoing), axis)
    sizes = [len(matrix) * width for matrix, width in zip(matrices, widths, strict=True)]
    return [
        piece.view(len(matrix), width)[
            :, : owned_slice(matrix.shape[1], axis.size, axis.rank).length
        ]
        for piece, matrix, width in zip(
            incoming.split_with_sizes(sizes), matrices, widths, strict=True
        )
    ]


class _Pair(torch.autograd.Function):
    """A transform of a tensor, and the transform of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: _Transform, back: _Transform) -> Tensor:  # noqa: ANN401
        ctx.back = back
        return there(tensor.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return ctx.back(gradients[0].contiguous()), None, None


def _paired(tensor: Tensor, there: _Transform, back: _Transform) -> Tensor:
    result: Tensor = _Pair.apply(tensor, there, back)  # type: ignore[no-untyped-call]
    return result


def _packed(tensors: Sequence[Tensor], transform: _Transform) -> list[Tensor]:
    """Transform several tensors as one buffer."""
    buffer = transform(torch.cat([tensor.flatten() for tensor in tensors]))
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
    if dist.get_backend(axis.group) == "gloo":  # that of torch 2.7 has no reduce-scatter
        parts = torch.empty_like(rows)
        dist.all_to_all_single(parts, rows, group=axis.group)
        return parts.view(axis.size, *own.shape).sum(0)
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


def _columns(matrix: Tensor, own: Slice, width: int) -> Tensor:
    """A slice of columns, zero-padded to a width and flattened."""
    padding = (0, width - own.length)
    return torch.nn.functional.pad(matrix[:, own.start : own.stop], padding).flatten()
