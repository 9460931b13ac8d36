"""Rows of tokens, sorted by expert, times the matrices of their experts.

How many rows an expert has is known to the device alone. Where it has a grouped matrix product, the
host never asks; elsewhere experts are multiplied one after another, and it asks once a layer.

Experts of different widths are filled up to the widest for a grouped product, in a copy that lives
as long as the product. It is made where asking is dear: a host that waits in every layer cannot run
ahead of its device, and a graph that asks cannot be captured. On the CPU asking is free. For few
tokens the copy moves more bytes than the product: experts of equal widths need neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tuckerize.ascend.grouped_matmul import grouped_matmul, has_grouped_matmul

# Rows and columns of the matrices must be whole blocks of so many bytes, and as far apart.
_ALIGNMENT = 16
# The first generation of CUDA devices with the product.
_CUDA_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Assignments:
    """The rows of one group: tokens with one of their experts each, sorted by expert.

    On the host these are the rows of the group's experts. A device does not know how many that are:
    all T·k rows are there, those of other groups last.

    Attributes:
        places_N: Place among the T·k pairs of a token and an expert of every row, shape (N,).
        experts_N: Its expert, counted in the group, shape (N,); E for those of other groups.
        counts_E: Rows of every expert of the group, shape (E,).
        top_k: Experts a token.
    """

    places_N: Tensor
    experts_N: Tensor
    counts_E: Tensor
    top_k: int

    @cached_property
    def tokens_N(self) -> Tensor:  # noqa: N802
        """Token of every row, shape (N,)."""
        return torch.div(self.places_N, self.top_k, rounding_mode="floor")

    @cached_property
    def counts(self) -> list[int]:
        """Rows of every expert, on the host: the one question to the device."""
        return [int(count) for count in self.counts_E.tolist()]

    @cached_property
    def _foreign_N1(self) -> Tensor | None:  # noqa: N802
        """True for rows of other groups, shape (N, 1); None where there are none."""
        if self.places_N.device.type == "cpu":
            return None
        return (self.experts_N == len(self.counts_E)).unsqueeze(1)

    def own_rows(self, rows_NX: Tensor) -> Tensor:
        """The rows, with zeros in those of other groups."""
        if self._foreign_N1 is None:
            return rows_NX
        return rows_NX.masked_fill(self._foreign_N1, 0.0)

    def sum_over_experts(self, rows_NX: Tensor, weights_Tk: Tensor) -> Tensor:
        """Weighted sum of every token's rows, shape (T, X), in the dtype of the rows."""
        width = rows_NX.shape[1]
        # Every place gets one row: added to zero it is neither rounded nor subject to an order.
        rows_PX = rows_NX.new_zeros(weights_Tk.numel(), width)
        rows_PX.index_add_(0, self.places_N, rows_NX)
        rows_TkX = rows_PX.view(*weights_Tk.shape, width)
        return torch.einsum("tkx,tk->tx", rows_TkX, weights_Tk.to(rows_NX.dtype))


def assign(experts_Tk: Tensor, experts: range) -> Assignments:
    """Sort the pairs of a token and one of its experts by the experts of a group.

    Args:
        experts_Tk: Experts of every token, shape (T, k); a number that is none of the layer's,
            such as -1, is an expert of another process.
        experts: The group's.
    """
    number = len(experts)
    flat = experts_Tk.flatten().long() - experts.start
    flat = flat.masked_fill((flat < 0) | (flat >= number), number)
    experts_N, places_N = flat.sort(stable=True)
    counts = torch.zeros(number + 1, dtype=torch.int64, device=flat.device)
    counts_E = counts.scatter_add_(0, flat, torch.ones_like(flat))[:number]
    if flat.device.type == "cpu":
        own = int(counts_E.sum())
        experts_N, places_N = experts_N[:own], places_N[:own]
    return Assignments(places_N, experts_N, counts_E, experts_Tk.shape[1])


def multiply(rows_NX: Tensor, matrices_EXY: Tensor, assigned: Assignments) -> Tensor:
    """Every row times the matrix of its expert, shape (N, Y).

    Args:
        rows_NX: Rows, shape (N, X).
        matrices_EXY: A matrix for each expert of the group, shape (E, X, Y), in the rows' dtype.
        assigned: Which expert each row belongs to.
    """
    if not _has_grouped_product(rows_NX, matrices_EXY):
        return multiply_one_by_one(rows_NX, list(matrices_EXY), assigned)
    own_NX = assigned.own_rows(rows_NX.contiguous())
    if own_NX.device.type == "npu":
        product_NY = grouped_matmul(own_NX, matrices_EXY, assigned.counts_E)
    else:
        ends_E = assigned.counts_E.cumsum(0, dtype=torch.int32)
        product_NY = functional.grouped_mm(own_NX, matrices_EXY, offs=ends_E)
    return assigned.own_rows(product_NY)


def multiply_uneven(
    rows_NX: Tensor, matrices_EXY: Sequence[Tensor], assigned: Assignments
) -> Tensor:
    """The same with matrices that may differ in one of their sizes, X or Y.

    An expert's rows are as wide as its matrix is high, zeros behind; results are as wide as the
    widest matrix, zeros behind.
    """
    widest = max(matrices_EXY, key=Tensor.numel)
    like_EXY = widest.expand(len(matrices_EXY), -1, -1)  # takes no memory
    if rows_NX.device.type == "cpu" or not _has_grouped_product(rows_NX, like_EXY):
        return multiply_one_by_one(rows_NX, matrices_EXY, assigned)
    return multiply(rows_NX, filled_up(matrices_EXY), assigned)


def filled_up(matrices_EXY: Sequence[Tensor]) -> Tensor:
    """Matrices that differ in one of their sizes, with zeros behind, shape (E, X, Y)."""
    if len({len(matrix) for matrix in matrices_EXY}) > 1:
        return pad_sequence([*matrices_EXY], batch_first=True)
    return pad_sequence([matrix.mT for matrix in matrices_EXY], batch_first=True).mT


def multiply_one_by_one(
    rows_NX: Tensor, matrices_EXY: Sequence[Tensor], assigned: Assignments
) -> Tensor:
    """The same with a product for each expert that has rows, without a copy."""
    width = max(matrix.shape[1] for matrix in matrices_EXY)
    results: list[Tensor] = []
    first = 0
    for matrix_XY, count in zip(matrices_EXY, assigned.counts, strict=True):
        if count:
            product = rows_NX[first : first + count, : len(matrix_XY)] @ matrix_XY
            results.append(functional.pad(product, (0, width - product.shape[1])))
            first += count
    if first < len(rows_NX) or not results:
        results.append(rows_NX.new_zeros(len(rows_NX) - first, width))
    return torch.cat(results)


def mix_and_multiply(
    rows_NX: Tensor, U_E: Tensor, matrices_PXY: Tensor, assigned: Assignments
) -> Tensor:
    """Multiply where an expert's matrix is a mixture of shared ones, shape (N, Y).

    Few rows are multiplied by all shared matrices, which are read once; for many the experts'
    matrices are mixed first, for the length of the product.

    Args:
        rows_NX: Rows, shape (N, X).
        U_E: Shares of the matrices in every expert's, shape (E, P).
        matrices_PXY: The shared matrices, shape (P, X, Y).
        assigned: Which expert each row belongs to.
    """
    experts = len(U_E)
    if len(rows_NX) > experts:
        return multiply(rows_NX, torch.tensordot(U_E, matrices_PXY, dims=1), assigned)
    shares_NP = assigned.own_rows(U_E[assigned.experts_N.clamp_max(experts - 1)])
    mixed_PNX = shares_NP.T.unsqueeze(2) * rows_NX
    return torch.bmm(mixed_PNX, matrices_PXY).sum(0)


def _has_grouped_product(rows_NX: Tensor, matrices_EXY: Tensor) -> bool:
    """Whether groups of such rows can be multiplied by such matrices on their device."""
    device, dtype = matrices_EXY.device, matrices_EXY.dtype
    if device.type == "npu":
        experts, inner, outer = matrices_EXY.shape
        trained = rows_NX.requires_grad or matrices_EXY.requires_grad
        has_gradient = torch.is_grad_enabled() and trained
        return not has_gradient and has_grouped_matmul(experts, inner, outer, dtype)
    if not hasattr(functional, "grouped_mm"):  # torch before 2.10
        return False
    if dtype not in {torch.bfloat16, torch.float16, torch.float32}:
        return False
    distances = {*matrices_EXY.shape[1:], *({*matrices_EXY.stride()} - {1})}
    if any(distance * dtype.itemsize % _ALIGNMENT for distance in distances):
        return False
    if device.type == "cuda":
        capability = torch.get_device_module(device).get_device_capability(device)
        return bool(capability >= _CUDA_CAPABILITY)
    return device.type == "cpu"
