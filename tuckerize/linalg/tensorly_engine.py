"""TensorLy's own Tucker decomposition behind the signature of `hooi`: the slow reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorly import backend_context
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import UsageError
from tuckerize.linalg.hooi import Decomposition, check_finite, check_rank
from tuckerize.linalg.tucker import TuckerFactors


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
        The same result as `hooi`; the projected residuals are the errors that TensorLy reports.

    Raises:
        UsageError: More than one stack, or no sweep: TensorLy knows neither.
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
    dtype = torch.promote_types(stack_EHI.dtype, torch.float32)
    with backend_context("pytorch"):
        (core, factors), errors = partial_tucker(
            stack_EHI.to(dtype),
            rank=[rank[mode] for mode in modes],
            modes=[int(mode) for mode in modes],
            n_iter_max=max_sweeps,
            tol=tolerance,
        )
    named = {mode.factor_name: f for mode, f in zip(modes, factors, strict=True)}
    return Decomposition(
        (TuckerFactors(core, **named),), tuple(float(error) for error in errors) or (float("nan"),)
    )
