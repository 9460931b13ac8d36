"""TensorLy's Tucker decomposition with the signature of `hooi`: the slow reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensorly import backend_context
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import UsageError
from tuckerize.linalg.hooi import Decomposition, check_finite, check_rank
from tuckerize.linalg.tucker import TuckerFactors, power_of_two_scale, scaled_slice, squared_norm


def tensorly_tucker(
    stacks: Sequence[Tensor],
    rank: MultilinearRank,
    *,
    max_sweeps: int = 10,
    tolerance: float = 1e-5,
) -> Decomposition:
    """Approximate one stack with `tensorly.decomposition.partial_tucker` over its truncated modes.

    Args:
        stacks: A single expert stack, shape (E, H, I), any floating dtype. Not modified.
        rank: Core sizes, each between 1 and the size of its mode.
        max_sweeps: TensorLy's `n_iter_max`, at least 1.
        tolerance: TensorLy's `tol`.

    Returns:
        As `hooi`; the projected residuals are that of the HOSVD start and the errors that TensorLy
        reports, one per sweep.

    Raises:
        UsageError: More than one stack, or no sweep; TensorLy supports neither.
        MultilinearRankError: A core size is below 1 or above its mode.
        NonFiniteError: The stack holds NaN or infinity.
    """
    if len(stacks) > 1:
        raise UsageError(
            "TensorLy cannot decompose projections that share one U_I",
            hint="drop --joint, or use --engine tuckerize",
        )
    if max_sweeps < 1:
        raise UsageError("TensorLy makes at least one sweep", hint="use --max-sweeps 1 or more")
    (stack_EHI,) = stacks
    check_rank(rank, StackShape(*stack_EHI.shape))
    check_finite(stack_EHI)
    modes = rank.truncated_modes(StackShape(*stack_EHI.shape))
    if not modes:
        return Decomposition((TuckerFactors(stack_EHI),), (0.0,))
    scale = power_of_two_scale(stack_EHI)
    dtype = torch.promote_types(stack_EHI.dtype, torch.float32)
    scaled_EHI = scaled_slice(stack_EHI, dtype, scale)
    options: dict[str, Any] = {
        "rank": [rank[mode] for mode in modes],
        "modes": [int(mode) for mode in modes],
        "tol": tolerance,
    }
    with backend_context("pytorch"):
        start, _ = partial_tucker(scaled_EHI, n_iter_max=0, **options)
        (core, factors), errors = partial_tucker(
            scaled_EHI, n_iter_max=max_sweeps, init=start, **options
        )
    named = {mode.factor_name: f for mode, f in zip(modes, factors, strict=True)}
    return Decomposition(
        (TuckerFactors(core / scale, **named),),
        (_start_residual(scaled_EHI, start[0]), *(_finite(error) for error in errors)),
    )


def _start_residual(stack_EHI: Tensor, core_PQR: Tensor) -> float:
    total = squared_norm(stack_EHI)
    return math.sqrt(max(0.0, 1.0 - squared_norm(core_PQR) / total)) if total else 0.0


def _finite(error: Tensor | float) -> float:
    """TensorLy's error; 0 for the 0 / 0 of a zero stack."""
    return 0.0 if math.isnan(error) else float(error)
