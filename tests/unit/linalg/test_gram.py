from __future__ import annotations

import pytest
import torch

from tuckerize.linalg import gram as gram_module
from tuckerize.linalg.gram import (
    add_gram,
    eigenvalues,
    eigenvalues_and_vectors,
    leading_eigenvectors,
    solving_at_once,
    symmetric,
)
from tuckerize.linalg.threads import Workers, parallel_workers

# (rows, columns): wide, tall, in equal and unequal row blocks.
SIZES = [(3, 7), (50, 7), (1000, 20), (300, 256), (300, 513)]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn((rows, columns), dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_add_gram_twice_equals_upper_triangle_of_both_products(
    rows: int, columns: int, *, transposed: bool
) -> None:
    first, second = matrix(rows, columns), matrix(2 * rows, columns)
    gram = torch.zeros((columns, columns), dtype=torch.float64)
    for part in (first, second):
        add_gram(gram, part.T.contiguous().T if transposed else part, Workers())
    expected = first.T @ first + second.T @ second
    torch.testing.assert_close(gram.triu(), expected.triu(), atol=1e-10, rtol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_eigenvectors_of_upper_triangle_equal_right_singular_vectors(
    rows: int, columns: int
) -> None:
    rows_MN = matrix(rows, columns)
    gram = torch.zeros((columns, columns), dtype=torch.float64)
    add_gram(gram, rows_MN, Workers())
    values, vectors = eigenvalues_and_vectors(gram)
    _, singular, right = torch.linalg.svd(rows_MN, full_matrices=False)
    kept = min(rows, columns, 3)
    torch.testing.assert_close(values[: len(singular)], singular**2, rtol=1e-9, atol=1e-9)
    overlap = (right[:kept] @ vectors[:, :kept]).abs()
    torch.testing.assert_close(overlap, torch.eye(kept, dtype=torch.float64), atol=1e-7, rtol=0)


def test_eigenvalues_of_a_deficient_matrix_are_never_negative() -> None:
    row = matrix(1, 40, torch.float32)
    values, vectors = eigenvalues_and_vectors(row.T @ row)
    assert bool((values >= 0).all())
    assert bool((values.diff() <= 0).all())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40), atol=1e-5, rtol=0)


def test_eigenvalues_with_noise_below_the_diagonal_ignore_it() -> None:
    rows_MN = matrix(30, 12)
    exact = rows_MN.T @ rows_MN
    noisy = exact.triu() + torch.full((12, 12), 1e9, dtype=torch.float64).tril(-1)
    torch.testing.assert_close(eigenvalues_and_vectors(noisy)[0], eigenvalues_and_vectors(exact)[0])
    torch.testing.assert_close(eigenvalues(noisy), eigenvalues_and_vectors(exact)[0])
    torch.testing.assert_close(symmetric(noisy), exact)


def test_leading_eigenvectors_of_diagonal_matrix_are_the_largest_axes() -> None:
    gram = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    vectors = leading_eigenvectors(gram, 2)
    assert vectors.is_contiguous()
    assert vectors.abs().tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_eigenvectors_leave_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        leading_eigenvectors(torch.eye(3), 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_add_gram_with_any_number_of_threads_gives_identical_bits(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    before = torch.get_num_threads()
    grams = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            grams.append(torch.zeros((columns, columns), dtype=dtype))
            with parallel_workers(torch.device("cpu")) as workers:
                add_gram(grams[-1], matrix(rows, columns, dtype), workers)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grams[0], grams[1])
    assert torch.equal(grams[0], grams[2])


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (2, 8), (3, 5), (16, 1)])
def test_solvers_of_processes_at_once_share_the_cores(
    processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits in one would hold the core of another."""
    monkeypatch.setattr(gram_module, "usable_cores", lambda: 16)
    before = torch.get_num_threads()
    with solving_at_once(processes), gram_module._eigensolver_threads(4096):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == before
    with gram_module._eigensolver_threads(4096):
        assert torch.get_num_threads() == 8
