"""Gram matrices of mode-n unfoldings and their leading eigenvectors.

A factor of a Tucker decomposition is a leading eigenspace of a Gram matrix. In float32 a Gram
matrix resolves relative residuals down to about 3e-4, in float64 to about 1e-8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tuckerize.control_groups import usable_cores
from tuckerize.linalg.threads import Workers, parallel_workers
from tuckerize.linalg.tucker import on_solver

# Width of the row blocks of a symmetric product. Only blocks on or above the diagonal are computed:
# narrow blocks save more work, but still narrower ones run at a lower rate.
_BLOCK_COLUMNS = 128
# (minimum columns, threads). `eigh` is not bitwise reproducible across thread counts, so the count
# depends on the matrix size alone. The threads meet at every step of the solver, and wait there
# where another process holds a core: two then take ten times the time of one at 512 columns.
_EIGENSOLVER_THREADS = ((4096, 8), (2048, 2), (0, 1))
# Processes of this host that solve at the same time.
_processes = 1


def add_gram(gram_NN: Tensor, matrix_MN: Tensor, workers: Workers) -> None:
    """Add matrixᵀ matrix to the upper triangle of a Gram matrix, in place.

    Args:
        gram_NN: Accumulator, shape (N, N); entries below the diagonal blocks are left alone.
        matrix_MN: Rows to add, shape (M, N), in the dtype of the accumulator.
        workers: Threads that multiply row blocks in parallel.
    """
    if matrix_MN.device.type != "cpu":  # fewer and larger products
        gram_NN.addmm_(matrix_MN.T, matrix_MN)
        return
    columns = matrix_MN.shape[1]
    blocks = max(1, columns // _BLOCK_COLUMNS)
    edges = [columns * block // blocks for block in range(blocks + 1)]

    def add(block: tuple[int, int]) -> None:
        start, stop = block
        gram_NN[start:stop, start:].addmm_(matrix_MN[:, start:stop].T, matrix_MN[:, start:])

    workers.do(add, itertools.pairwise(edges))


def gram(matrix_MN: Tensor) -> Tensor:
    """The Gram matrix matrixᵀ matrix, shape (N, N); on a CPU at half the price of a product."""
    columns = matrix_MN.shape[1]
    gram_NN = matrix_MN.new_zeros(columns, columns)
    with parallel_workers(matrix_MN.device) as workers:
        add_gram(gram_NN, matrix_MN, workers)
    return symmetric(gram_NN)


def symmetric(gram_NN: Tensor) -> Tensor:
    """The Gram matrix whose upper triangle was accumulated."""
    upper_NN = gram_NN.triu()
    return upper_NN + upper_NN.triu(1).T


def eigenvalues_and_vectors(gram_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, clamped at zero, and their eigenvectors as columns.

    Reads the upper triangle only.

    Args:
        gram_NN: Symmetric positive semidefinite matrix, shape (N, N), float32 or float64.
    """
    with _eigensolver_threads(len(gram_NN)):
        values, vectors = torch.linalg.eigh(on_solver(gram_NN), UPLO="U")
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    return values.to(gram_NN.device), vectors.to(gram_NN.device)


def eigenvalues(gram_NN: Tensor) -> Tensor:
    """The eigenvalues alone, which take a fraction of the time."""
    with _eigensolver_threads(len(gram_NN)):
        values: Tensor = torch.linalg.eigvalsh(on_solver(gram_NN), UPLO="U")
    return values.flip(0).clamp_min(0).to(gram_NN.device)


def leading_eigenvectors(gram_NN: Tensor, count: int) -> Tensor:
    """Orthonormal basis of the leading eigenspace of a Gram matrix, shape (N, count)."""
    return eigenvalues_and_vectors(gram_NN)[1][:, :count].contiguous()


@contextmanager
def solving_at_once(processes: int) -> Iterator[None]:
    """Share the cores out among processes of this host whose results depend on their number anyway.

    Args:
        processes: How many there are; each gets at most its share of the threads.
    """
    global _processes  # noqa: PLW0603 threads of a pool have no context of their own
    before, _processes = _processes, processes
    try:
        yield
    finally:
        _processes = before


@contextmanager
def _eigensolver_threads(columns: int) -> Iterator[None]:
    before = torch.get_num_threads()
    wanted = next(threads for least, threads in _EIGENSOLVER_THREADS if columns >= least)
    torch.set_num_threads(min(wanted, max(1, usable_cores() // _processes)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
