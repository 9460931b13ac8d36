"""Tucker tensor of an expert stack, its expansion and its relative residual."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.errors import NonFiniteError
from tuckerize.linalg.threads import parallel_workers

# float32 products perturb the difference by about 1e-6 of the stack: residuals below this bound are
# recomputed in float64, if the stack itself is stored in float32.
_FLOAT32_DIFFERENCE_FLOOR = 1e-3
# Magnitudes within 2^-20 .. 2^20 can be squared and summed in float32 without scaling.
_ORDINARY_EXPONENT = 20


@dataclass(frozen=True, slots=True)
class TuckerFactors:
    """X̂ = core ×_E U_E ×_H U_H ×_I U_I; a factor that is None is the identity of a full mode.

    Attributes:
        core: Core, shape (r_E, r_H, r_I).
        U_E: Expert factor, shape (E, r_E), orthonormal columns, or None.
        U_H: Intermediate factor, shape (H, r_H), orthonormal columns, or None.
        U_I: Hidden factor, shape (I, r_I), orthonormal columns, or None.
    """

    core: Tensor
    U_E: Tensor | None = None
    U_H: Tensor | None = None
    U_I: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three factors in the order of the modes."""
        return self.U_E, self.U_H, self.U_I

    @property
    def rank(self) -> MultilinearRank:
        """Core sizes (r_E, r_H, r_I)."""
        return MultilinearRank(*self.core.shape)

    @property
    def truncated(self) -> bool:
        """Whether any mode has a factor."""
        return any(factor is not None for factor in self.factors)

    @property
    def shape(self) -> StackShape:
        """Sizes (E, H, I) of the dense stack."""
        return StackShape(
            *(
                size if factor is None else factor.shape[0]
                for size, factor in zip(self.core.shape, self.factors, strict=True)
            )
        )

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> TuckerFactors:
        """The same Tucker tensor, rounded to `dtype`, on `device`."""
        return TuckerFactors(
            self.core.to(device=device, dtype=dtype),
            *(f if f is None else f.to(device=device, dtype=dtype) for f in self.factors),
        )

    def expand_slices(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """Yield the matrices of X̂ expert by expert, see `expand_slice`."""
        source = self.ready_to_expand(dtype)
        for expert in range(self.shape.experts):
            yield source.expand_slice(expert, dtype)

    def ready_to_expand(self, dtype: torch.dtype | None = None) -> TuckerFactors:
        """The same tensor, with a shared core cast once instead of once per expert."""
        return self if self.U_E is None else self.to(dtype)

    def expand_slice(self, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix of one expert, shape (H, I): U_H (Σ_a U_E[e, a] core_a) U_Iᵀ.

        Args:
            expert: Index of the expert.
            dtype: Type of the computation; None for the dtype of the core.
        """
        dtype = dtype or self.core.dtype
        if self.U_E is None:
            matrix = self.core[expert].to(dtype)
        else:
            matrix = torch.tensordot(self.U_E[expert].to(dtype), self.core.to(dtype), dims=1)
        if self.U_H is not None:
            matrix = self.U_H.to(dtype) @ matrix
        return matrix if self.U_I is None else matrix @ self.U_I.to(dtype).T


def expand(tucker: TuckerFactors) -> Tensor:
    """The dense stack X̂, shape (E, H, I)."""
    return torch.stack(list(tucker.expand_slices()))


def relative_residual(
    stack_EHI: Tensor, tucker: TuckerFactors, kept_EK: Tensor | None = None
) -> float:
    """Relative residual ‖X − X̂‖ / ‖X‖ (unitless) from the explicit difference, expert by expert.

    Args:
        stack_EHI: The stack X, shape (E, H, I), any floating dtype.
        tucker: Its approximation, any floating dtype.
        kept_EK: Rows of each expert that the approximation covers, shape (E, K), the others being
            zero; None for all rows.

    Returns:
        The residual; 0 where X and X̂ are both zero, infinity where only X is.

    Source:
        Kolda & Bader 2009, section 4.1. Not ‖X‖² − ‖core‖², which cancels for small residuals.
    """
    if stack_EHI.dtype == torch.float64:
        # A float64 magnitude can be outside the range of float32.
        return _residual(stack_EHI, tucker, kept_EK, torch.float64)
    residual = _residual(stack_EHI, tucker, kept_EK, torch.float32)
    if residual < _FLOAT32_DIFFERENCE_FLOOR and stack_EHI.dtype == torch.float32:
        residual = _residual(stack_EHI, tucker, kept_EK, torch.float64)
    return residual


def _residual(
    stack_EHI: Tensor, tucker: TuckerFactors, kept_EK: Tensor | None, dtype: torch.dtype
) -> float:
    stack_EHI = on_capable_device(stack_EHI.to(tucker.core.device), dtype)
    tucker = tucker.to(device=stack_EHI.device).ready_to_expand(dtype)
    scale = power_of_two_scale(stack_EHI)

    def squares(expert: int, slice_HI: Tensor) -> tuple[float, float]:
        exact_HI = scaled_slice(slice_HI, dtype, scale)
        expanded_HI = tucker.expand_slice(expert, dtype)
        if kept_EK is not None:
            expanded_HI = with_zero_rows(expanded_HI, kept_EK[expert], len(exact_HI))
        missed_HI = exact_HI - scaled_slice(expanded_HI, dtype, scale)
        return squared_norm(missed_HI), squared_norm(exact_HI)

    with parallel_workers(stack_EHI.device) as workers:
        found = list(workers.map(squares, range(tucker.shape.experts), stack_EHI))
    missed, total = (sum(of_experts) for of_experts in zip(*found, strict=True))
    if total == 0.0:
        return 0.0 if missed == 0.0 else math.inf
    return math.sqrt(missed / total)


def with_zero_rows(matrix_KI: Tensor, kept_K: Tensor, rows: int) -> Tensor:
    """Scatter the kept rows of an expert's matrix to their original indices, shape (rows, I).

    Args:
        matrix_KI: Rows of the kept neurons, shape (K, I).
        kept_K: Their original indices, shape (K,).
        rows: Number of rows of the result; the others are zero.
    """
    matrix_HI = matrix_KI.new_zeros((rows, matrix_KI.shape[1]))
    matrix_HI[kept_K.to(matrix_KI.device)] = matrix_KI
    return matrix_HI


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares, accumulated in float64."""
    tensor = on_capable_device(tensor, torch.float64)
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def on_capable_device(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Move the tensor to the host if its device cannot compute in a dtype.

    An NPU has no float64: it refuses products and sums in it, and its `.double()` gives float32.
    """
    return tensor.cpu() if dtype == torch.float64 and tensor.device.type == "npu" else tensor


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the host if its device has no float64."""
    return on_capable_device(tensor, torch.float64).double()


def orthonormalised(matrix_NR: Tensor) -> tuple[Tensor, Tensor]:
    """QR decomposition: orthonormal basis (N, R) of the columns, and mixing matrix (R, R)."""
    basis_NR, mixing_RR = torch.linalg.qr(on_solver(matrix_NR))
    return basis_NR.to(matrix_NR.device), mixing_RR.to(matrix_NR.device)


def on_solver(matrix: Tensor) -> Tensor:
    """The matrix where LAPACK's routines are: on the host, but for CUDA, which has its own."""
    return matrix if matrix.device.type == "cuda" else matrix.cpu()


def power_of_two_scale(*stacks: Tensor) -> float:
    """Power of two that scales the largest magnitude of the stacks to about 1, if that is needed.

    Multiplying by it is exact and keeps squares within the range of float32. Stacks of ordinary
    magnitude and zero stacks get 1, so that they need not be copied.
    """
    largest = max(largest_magnitude(stack) for stack in stacks)
    exponent = math.frexp(largest)[1]
    if largest == 0.0 or abs(exponent) <= _ORDINARY_EXPONENT:
        return 1.0
    widest = max(torch.finfo(stack.dtype).max for stack in stacks)
    # Subnormal magnitudes would need a scale beyond the work dtype; its largest power suffices.
    return 2.0 ** min(-exponent, 126 if widest <= torch.finfo(torch.float32).max else 1022)


def largest_magnitude(stack: Tensor) -> float:
    """Largest absolute value of a stack; not finite if any entry is not."""
    low, high = torch.aminmax(stack)
    return float(torch.maximum(-low, high))


def scaled_slice(slice_HI: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """A matrix cast to the work dtype and scaled; the argument itself if neither changes it."""
    wide = slice_HI.to(dtype)
    return wide if scale == 1.0 else wide * scale


def mode_name(mode: Mode) -> str:
    """Name of a mode for messages: `hidden mode (I)`."""
    return f"{mode.name.lower()} mode ({'EHI'[mode]})"


def check_no_overflow(tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor that was cast to a dtype, provided that no value overflowed.

    Raises:
        NonFiniteError: A value overflowed.
    """
    if not math.isfinite(largest_magnitude(tensor)):
        raise NonFiniteError(
            f"a core or factor overflows {dtype}", hint="store it as --dtype bfloat16 or float32"
        )
    return tensor
