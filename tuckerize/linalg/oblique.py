"""Oblique projections: a smaller space between two matrices that are both known."""

from __future__ import annotations

import torch
from torch import Tensor

from tuckerize.linalg.gram import eigenvalues_and_vectors

# Eigenvalues below this share of the largest are rounding.
_LEAST_EIGENVALUE = 1e-14


def oblique_projection(
    readers_NN: Tensor, inputs_NN: Tensor, size: int
) -> tuple[Tensor, Tensor, float]:
    """The best factors of a projection P = expand · reduce, of a rank, between inputs and readers.

    It minimises ‖R (1 − P) Z‖ over all P of that rank, where R are all rows that read the space and
    Z all vectors in it: the best approximation of R Z (Eckart-Young), with R outside of the norm
    again. The rows of `reduce` are orthonormal.

    Args:
        readers_NN: Rᵀ R, shape (N, N), float64.
        inputs_NN: Z Zᵀ, shape (N, N), float64.
        size: The rank r, from 1 to N.

    Returns:
        expand, shape (N, r); reduce, shape (r, N); and the relative residual ‖R (1 − P) Z‖ / ‖R Z‖.
    """
    values_N, vectors_NN = eigenvalues_and_vectors(readers_NN)
    roots_N = values_N.sqrt()
    is_read_N = values_N > _LEAST_EIGENVALUE * values_N[:1]
    root_NN = vectors_NN * roots_N @ vectors_NN.T
    inverse_N = torch.where(is_read_N, roots_N, torch.inf).reciprocal()
    inverse_NN = vectors_NN * inverse_N @ vectors_NN.T
    energies_N, leading_NN = eigenvalues_and_vectors(root_NN @ inputs_NN @ root_NN)
    leading_NR = leading_NN[:, :size]
    rows_NR, mixing_RR = torch.linalg.qr(root_NN @ leading_NR)
    expand_NR = inverse_NN @ leading_NR @ mixing_RR.T
    lost = energies_N[size:].sum() / energies_N.sum().clamp_min(torch.finfo(energies_N.dtype).tiny)
    return expand_NR, rows_NR.T, float(lost) ** 0.5
