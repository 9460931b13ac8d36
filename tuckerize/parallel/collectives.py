"""Sums over the tensor-parallel processes, several tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tuckerize.parallel.layouts import Part, part


def all_reduce(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum tensors over all processes; every process gets the sums."""
    buffer = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(buffer)
    pieces = buffer.split_with_sizes([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def reduce_scatter_columns(matrices: Sequence[Tensor], tp_size: int, tp_rank: int) -> list[Tensor]:
    """Sum matrices over all processes; every process gets its own columns of the sums.

    Args:
        matrices: Matrices of shapes (rows, columns), the same on every process.
        tp_size: Number of processes.
        tp_rank: Index of this one.

    Returns:
        Columns `part(columns, tp_size, tp_rank)` of every sum. Where `tp_size` does not divide the
        columns, what is sent is padded with zeros to equal sizes.
    """
    widths = [-(-matrix.shape[1] // tp_size) for matrix in matrices]
    outgoing = [
        torch.cat(
            [
                _columns(matrix, part(matrix.shape[1], tp_size, receiver), width)
                for matrix, width in zip(matrices, widths, strict=True)
            ]
        )
        for receiver in range(tp_size)
    ]
    incoming = torch.empty_like(outgoing[tp_rank])
    dist.reduce_scatter(incoming, outgoing)
    sizes = [len(matrix) * width for matrix, width in zip(matrices, widths, strict=True)]
    return [
        piece.view(len(matrix), width)[:, : part(matrix.shape[1], tp_size, tp_rank).length]
        for piece, matrix, width in zip(
            incoming.split_with_sizes(sizes), matrices, widths, strict=True
        )
    ]


def _columns(matrix: Tensor, own: Part, width: int) -> Tensor:
    """Some columns of a matrix, padded with zeros to a width, flattened."""
    padding = (0, width - own.length)
    return torch.nn.functional.pad(matrix[:, own.start : own.stop], padding).flatten()
