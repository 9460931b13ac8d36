"""Gram matrices of mode-n unfoldings and their leading eigenvectors.

A factor of a Tucker decomposition is a leading eigenspace of a Gram matrix. In float32 a Gram
matrix resolves relative residuals down to about 3e-4, in float64 to about 1e-8.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Rows of a symmetric product that are computed together. With four row blocks or more only 5/8 of
# the full product is spent; below 512 columns a single product is faster.
_ROW_BLOCKS = 4
_MIN_COLUMNS_FOR_BLOCKS = 512

# Sums over many rows are made of this many partial sums at most, in an order of our own: a BLAS
# divides a tall product among its threads, and then the bits depend on their number.
_MAX_PARTIAL_SUMS = 128
_MIN_ROWS_OF_PARTIAL_SUM = 128
# LAPACK's eigensolver, too, gives other bits with another number of threads: from this many columns
# on it gets this many, whatever the number of processes on the host. Few, since each step of it
# waits for all of them, also where another process holds a core.
_EIGENSOLVER_THREADS = ((4096, 8), (512, 2), (0, 1))


def add_gram(gram_NN: Tensor, matrix_MN: Tensor) -> None:
    """Add matrixᵀ matrix to the upper triangle of a Gram matrix, in place.

    Args:
        gram_NN: Accumulator, shape (N, N); entries below the diagonal blocks stay as they are.
        matrix_MN: Rows to add, shape (M, N), the dtype of the accumulator.
    """
    columns = matrix_MN.shape[1]
    blocks = _ROW_BLOCKS if columns >= _MIN_COLUMNS_FOR_BLOCKS else 1
    edges = [columns * block // blocks for block in range(blocks + 1)]
    for start, stop in itertools.pairwise(edges):
        _add_product(gram_NN[start:stop, start:], matrix_MN[:, start:stop], matrix_MN[:, start:])


def _add_product(sum_JK: Tensor, left_MJ: Tensor, right_MK: Tensor) -> None:
    """Add leftᵀ right in place; of tall matrices in partial sums, on their own side by side."""
    rows, columns = right_MK.shape
    parts = min(_MAX_PARTIAL_SUMS, rows // max(columns, _MIN_ROWS_OF_PARTIAL_SUM))
    if parts < 2:
        sum_JK.addmm_(left_MJ.T, right_MK)
        return
    whole = rows - rows % parts
    left = left_MJ[:whole].view(parts, whole // parts, -1)
    right = right_MK[:whole].view(parts, whole // parts, -1)
    sum_JK += (left.mT @ right).sum(0)
    sum_JK.addmm_(left_MJ[whole:].T, right_MK[whole:])


def eigenvalues_and_vectors(gram_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, clamped at zero, and their eigenvectors as columns.

    Reads the upper triangle only. Runs on the host, where every platform has LAPACK, and returns
    tensors on the device of the argument.

    Args:
        gram_NN: Symmetric positive semidefinite matrix, shape (N, N), float32 or float64.
    """
    with _eigensolver_threads(len(gram_NN)):
        values, vectors = torch.linalg.eigh(gram_NN.cpu(), UPLO="U")
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return values.to(gram_NN.device), vectors.to(gram_NN.device)


def leading_eigenvectors(gram_NN: Tensor, count: int) -> Tensor:
    """Orthonormal basis of the leading eigenspace of a Gram matrix, shape (N, count)."""
    return eigenvalues_and_vectors(gram_NN)[1][:, :count].contiguous()


@contextmanager
def _eigensolver_threads(columns: int) -> Iterator[None]:
    before = torch.get_num_threads()
    wanted = next(threads for least, threads in _EIGENSOLVER_THREADS if columns >= least)
    torch.set_num_threads(min(wanted, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
