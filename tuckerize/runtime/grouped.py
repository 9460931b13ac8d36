"""Grouped GEMM: rows sorted by expert times the matrices of their experts.

Row counts per expert live on the device. A grouped GEMM needs no host synchronisation; the fallback
loop over experts synchronises once per layer.

A grouped GEMM of experts of unequal widths multiplies a temporary copy, zero-padded to the widest.
Without it the host would wait in every layer, could not run ahead of the device, and a graph could
not be captured. On the CPU nothing waits, so there is no copy. For few tokens the copy moves more
bytes than the GEMM; experts of equal widths need neither copy nor synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tuckerize.ascend.grouped_matmul import grouped_matmul, has_grouped_matmul

# Sizes and strides of the matrices must be multiples of this, in bytes.
_ALIGNMENT = 16
# Lowest compute capability with a grouped GEMM.
_CUDA_CAPABILITY = (8, 0)


def _has_cpu_kernels(dtype: str) -> bool:
    """Whether oneDNN multiplies a 16-bit type on this processor; otherwise torch's own loops do."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return supported is not None and bool(supported())


# 16-bit types, and oneDNN's names of them.
_HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Those that the CPU multiplies faster by way of float32.
_SLOW_ON_CPU = {dtype for dtype, name in _HALVES.items() if not _has_cpu_kernels(name)}


def is_slow(tensor: Tensor) -> bool:
    """Whether a CPU multiplies tensors of this type faster by way of float32."""
    return tensor.device.type == "cpu" and tensor.dtype in _SLOW_ON_CPU


def gemm(rows_NX: Tensor, matrix_XY: Tensor) -> Tensor:
    """`rows_NX @ matrix_XY`; on a CPU without kernels for 16 bits by way of float32.

    There, with bfloat16, 48 rows times 1408 x 2048 take 1 / 180 of the time, and one row 1 / 45
    (benchmarks/products.py). A row or two are multiplied as they are.

    Args:
        rows_NX: Rows, shape (..., N, X).
        matrix_XY: Matrices, shape (..., X, Y), in the rows' dtype.
    """
    if not is_slow(rows_NX):
        return rows_NX @ matrix_XY
    if rows_NX.ndim == 2 and len(rows_NX) == 1:  # the conversion would take longer than this
        return torch.mv(matrix_XY.mT, rows_NX[0]).unsqueeze(0)
    if rows_NX.ndim == 2 and len(rows_NX) == 2 and matrix_XY.stride(0) == 1:
        return rows_NX @ matrix_XY
    return (rows_NX.float() @ matrix_XY.float()).to(rows_NX.dtype)


def by_columns(matrices: Tensor) -> Tensor:
    """A right operand of products as a CPU reads it fastest in 16 bits: column by column.

    A product adds along columns, so that few rows take half the time (benchmarks/products.py).

    Args:
        matrices: Matrices, shape (..., X, Y). A parameter that has no gradient is laid out anew in
            place, its shape and values stay; everything else is returned as it is.
    """
    if (
        matrices.device.type != "cpu"
        or matrices.dtype not in _HALVES
        or matrices.requires_grad
        or type(matrices) is not nn.Parameter
        or matrices.stride(-1) > 1
        or min(matrices.shape[-2:]) <= 1
        or torch.compiler.is_compiling()
    ):
        return matrices
    with torch.inference_mode(mode=matrices.is_inference()):
        stored = matrices.data
        columns = stored.new_empty(stored.mT.shape)
        pairs = (own.reshape(-1, *own.shape[-2:]) for own in (columns, stored))
        for own_YX, stored_XY in zip(*pairs, strict=True):
            own_YX.copy_(stored_XY.mT)  # in a quarter of the time that all at once take
        matrices.data = columns.mT
    return matrices


@dataclass(frozen=True)
class Assignments:
    """Rows of one group, each a pair of a token and one of its experts, sorted by expert.

    On the CPU these are the rows of the group's experts only. On a device their number is unknown
    to the host: all T·k rows are present, those of other groups last.

    Attributes:
        places_N: Index of each row among the T·k pairs, shape (N,).
        experts_N: Expert of each row, counted within the group, shape (N,); E for other groups.
        counts_E: Rows per expert of the group, shape (E,).
        top_k: Experts per token.
    """

    places_N: Tensor
    experts_N: Tensor
    counts_E: Tensor
    top_k: int

    @cached_property
    def tokens_N(self) -> Tensor:  # noqa: N802
        """Token of each row, shape (N,)."""
        return torch.div(self.places_N, self.top_k, rounding_mode="floor")

    @cached_property
    def counts(self) -> list[int]:
        """Rows per expert, on the host: the one synchronisation."""
        return [int(count) for count in self.counts_E.tolist()]

    @cached_property
    def _is_foreign_N1(self) -> Tensor | None:  # noqa: N802
        """Mask of rows of other groups, shape (N, 1); None if there cannot be any."""
        if self.places_N.device.type == "cpu":
            return None
        return (self.experts_N == len(self.counts_E)).unsqueeze(1)

    def own_rows(self, rows_NX: Tensor) -> Tensor:
        """Zero the rows of other groups."""
        if self._is_foreign_N1 is None:
            return rows_NX
        return rows_NX.masked_fill(self._is_foreign_N1, 0.0)

    def sum_over_experts(self, rows_NX: Tensor, weights_Tk: Tensor) -> Tensor:
        """Weighted sum of each token's rows, shape (T, X), in the dtype of the rows."""
        width = rows_NX.shape[1]
        # Each index gets at most one row: adding it to zero is exact and independent of order.
        rows_PX = rows_NX.new_zeros(weights_Tk.numel(), width)
        rows_PX.index_add_(0, self.places_N, rows_NX)
        rows_TkX = rows_PX.view(*weights_Tk.shape, width)
        weights_T1k = weights_Tk.to(rows_NX.dtype).unsqueeze(1)
        if is_slow(rows_NX):
            return torch.einsum("tkx,tok->tx", rows_TkX, weights_T1k)
        summed_T1X: Tensor = weights_T1k @ rows_TkX  # by einsum ten times as long on a CPU
        return summed_T1X.squeeze(1)


def assign(experts_Tk: Tensor, experts: range) -> Assignments:
    """Sort the pairs of a token and one of its experts by the experts of a group.

    Args:
        experts_Tk: Experts of each token, shape (T, k); an index outside of the layer, such as -1,
            is an expert of another process.
        experts: Experts of the group.
    """
    num_experts = len(experts)
    flat = experts_Tk.flatten().long() - experts.start
    flat = flat.masked_fill((flat < 0) | (flat >= num_experts), num_experts)
    experts_N, places_N = flat.sort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts_E = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
    if flat.device.type == "cpu":
        own = int(counts_E.sum())
        experts_N, places_N = experts_N[:own], places_N[:own]
    return Assignments(places_N, experts_N, counts_E, experts_Tk.shape[1])


def multiply(rows_NX: Tensor, matrices_EXY: Tensor, assigned: Assignments) -> Tensor:
    """Multiply each row by the matrix of its expert, shape (N, Y).

    Args:
        rows_NX: Rows, shape (N, X).
        matrices_EXY: One matrix per expert of the group, shape (E, X, Y), in the rows' dtype.
        assigned: Assignment of rows to experts.
    """
    if rows_NX.device.type == "cuda" and 2 * len(rows_NX) <= len(matrices_EXY):
        return multiply_gathered(rows_NX, matrices_EXY, assigned)
    if not _has_grouped_gemm(rows_NX, matrices_EXY):
        return multiply_one_by_one(rows_NX, list(matrices_EXY), assigned)
    own_NX = assigned.own_rows(rows_NX.contiguous())
    if own_NX.device.type == "npu":
        product_NY = grouped_matmul(own_NX, matrices_EXY, assigned.counts_E)
    else:
        ends_E = assigned.counts_E.cumsum(0, dtype=torch.int32)
        product_NY = functional.grouped_mm(own_NX, matrices_EXY, offs=ends_E)
    return assigned.own_rows(product_NY)


def multiply_gathered(rows_NX: Tensor, matrices_EXY: Tensor, assigned: Assignments) -> Tensor:
    """`multiply` with a copy of each row's matrix: on CUDA the fastest for few rows."""
    matrices_NXY = matrices_EXY[assigned.experts_N.clamp_max(len(matrices_EXY) - 1)]
    return assigned.own_rows(torch.bmm(rows_NX.unsqueeze(1), matrices_NXY).squeeze(1))


def multiply_uneven(
    rows_NX: Tensor, matrices_EXY: Sequence[Tensor], assigned: Assignments
) -> Tensor:
    """Multiply each row by the matrix of its expert; matrices may differ in X or in Y.

    Rows narrower than the widest are zero-padded on the right, as are results.

    Args:
        rows_NX: Rows, shape (N, X), X the largest.
        matrices_EXY: One matrix per expert of the group, in the rows' dtype.
        assigned: Assignment of rows to experts.
    """
    sizes = [matrix.numel() for matrix in matrices_EXY]
    widest = matrices_EXY[sizes.index(max(sizes))]
    like_EXY = widest.expand(len(matrices_EXY), -1, -1)  # takes no memory
    if rows_NX.device.type == "cpu" or not _has_grouped_gemm(rows_NX, like_EXY):
        return multiply_one_by_one(rows_NX, matrices_EXY, assigned)
    return multiply(rows_NX, zero_padded(matrices_EXY), assigned)


def zero_padded(matrices_EXY: Sequence[Tensor]) -> Tensor:
    """Stack matrices that differ in X or in Y, zero-padded, shape (E, X, Y)."""
    if len({len(matrix) for matrix in matrices_EXY}) > 1:
        return pad_sequence([*matrices_EXY], batch_first=True)
    return pad_sequence([matrix.mT for matrix in matrices_EXY], batch_first=True).mT


def multiply_one_by_one(
    rows_NX: Tensor,
    matrices_EXY: Sequence[Tensor],
    assigned: Assignments,
    *,
    width: int | None = None,
) -> Tensor:
    """`multiply_uneven` with one GEMM per expert that has rows, without a copy.

    Args:
        rows_NX: Rows, shape (N, X).
        matrices_EXY: One matrix per expert; those of experts with rows are looked up.
        assigned: Assignment of rows to experts.
        width: The largest Y, of matrices that are made when they are looked up; None for tensors.
            Where there are gradients, all are looked up.
    """
    device = rows_NX.device.type
    if torch.is_autocast_enabled(device):  # which does not know this operation
        dtype = torch.get_autocast_dtype(device)
        rows_NX, matrices_EXY = rows_NX.to(dtype), [own.to(dtype) for own in matrices_EXY]
    largest = max(matrix.shape[1] for matrix in matrices_EXY) if width is None else width
    some = matrices_EXY if width is None else islice(matrices_EXY, 1)
    if torch.is_grad_enabled() and any(own.requires_grad for own in (rows_NX, *some)):
        product_NY: Tensor = _OneByOne.apply(  # type: ignore[no-untyped-call]
            rows_NX, assigned.counts, largest, *matrices_EXY
        )
        return product_NY
    return _products(rows_NX, matrices_EXY, assigned.counts, largest)


class _OneByOne(torch.autograd.Function):
    """Products of the rows of every expert, as one operation: theirs need no padding and joining.

    A matrix without rows has a gradient of zeros: DDP waits for every one.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        rows_NX: Tensor,
        counts: list[int],
        width: int,
        *matrices_EXY: Tensor,
    ) -> Tensor:
        """The products, shape (N, width)."""
        ctx.save_for_backward(rows_NX, *matrices_EXY)
        ctx.counts = counts
        return _products(rows_NX, matrices_EXY, counts, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NY: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of the rows and of the matrices."""
        rows_NX, *matrices_EXY = ctx.saved_tensors
        by_rows, _, _, *by_matrices = ctx.needs_input_grad
        grad_NX: Tensor | None = None
        if by_rows:
            transposed = [matrix.mT for matrix in matrices_EXY]
            grad_NX = _products(grad_NY, transposed, ctx.counts, rows_NX.shape[1])
        grads: list[Tensor | None] = []
        others = len(rows_NX) - sum(ctx.counts)
        parts = (torch.split(own, [*ctx.counts, others]) for own in (rows_NX, grad_NY))
        for matrix_XY, wanted, all_NX, all_NY in zip(  # the last part is of other groups
            matrices_EXY, by_matrices, *parts, strict=False
        ):
            inner, outer = matrix_XY.shape
            x_NX, y_NY = all_NX[:, :inner], all_NY[:, :outer]
            if not wanted:
                grads.append(None)
            elif matrix_XY.stride(0) == 1:  # as the matrix lies, so that it need not be copied
                grads.append(gemm(y_NY.mT, x_NX).mT)
            else:
                grads.append(gemm(x_NX.mT, y_NY))
        return grad_NX, None, None, *grads


def _products(
    rows_NX: Tensor, matrices_EXY: Sequence[Tensor], counts: Sequence[int], width: int
) -> Tensor:
    """Products of the rows of every expert, zero-padded; zeros for those of other groups."""
    product_NY = rows_NX.new_empty(len(rows_NX), width)
    others = len(rows_NX) - sum(counts)
    *rows, _ = torch.split(rows_NX, [*counts, others])
    *products, others_NY = torch.split(product_NY, [*counts, others])
    others_NY.zero_()
    for expert, (all_NX, all_NY) in enumerate(zip(rows, products, strict=True)):
        if not len(all_NX):
            continue
        matrix_XY = matrices_EXY[expert]
        inner, outer = matrix_XY.shape
        own_NX, own_NY = all_NX[:, :inner], all_NY[:, :outer]
        if outer < width:
            all_NY[:, outer:].zero_()
        if is_slow(own_NX):
            own_NY.copy_(gemm(own_NX, matrix_XY))
        else:
            torch.mm(own_NX, matrix_XY, out=own_NY)
    return product_NY


def mix_and_multiply(
    rows_NX: Tensor, U_E: Tensor, matrices_PXY: Tensor, assigned: Assignments
) -> Tensor:
    """Multiply each row by the matrix of its expert, a mixture of shared matrices, shape (N, Y).

    Few rows are multiplied by all shared matrices, which are read once. For many rows the experts'
    matrices are formed first, in temporary memory.

    Args:
        rows_NX: Rows, shape (N, X).
        U_E: Coefficients of the shared matrices per expert, shape (E, P).
        matrices_PXY: Shared matrices, shape (P, X, Y).
        assigned: Assignment of rows to experts.
    """
    num_experts = len(U_E)
    if len(rows_NX) > num_experts:
        matrices_EXY = gemm(U_E, matrices_PXY.flatten(1)).view(-1, *matrices_PXY.shape[1:])
        return multiply(rows_NX, matrices_EXY, assigned)
    shares_NP = assigned.own_rows(U_E[assigned.experts_N.clamp_max(num_experts - 1)])
    mixed_PNX = shares_NP.T.unsqueeze(2) * rows_NX
    return gemm(mixed_PNX, matrices_PXY).sum(0)


def _has_grouped_gemm(rows_NX: Tensor, matrices_EXY: Tensor) -> bool:
    """Whether the device has a grouped GEMM for these operands."""
    device, dtype = matrices_EXY.device, matrices_EXY.dtype
    if device.type == "npu":
        num_experts, inner, outer = matrices_EXY.shape
        trained = rows_NX.requires_grad or matrices_EXY.requires_grad
        has_gradient = torch.is_grad_enabled() and trained
        return not has_gradient and has_grouped_matmul(num_experts, inner, outer, dtype)
    if not hasattr(functional, "grouped_mm") or is_slow(matrices_EXY):  # torch before 2.10
        return False
    others = set() if torch.compiler.is_compiling() else {torch.float16, torch.float32}
    if dtype not in {torch.bfloat16, *others}:  # tracing refuses them
        return False
    distances = {*matrices_EXY.shape[1:], *({*matrices_EXY.stride()} - {1})}
    if any(distance * dtype.itemsize % _ALIGNMENT for distance in distances):
        return False
    if device.type == "cuda":
        capability = torch.get_device_module(device).get_device_capability(device)
        return bool(capability >= _CUDA_CAPABILITY)
    return device.type == "cpu"
