"""Choice of the cheapest multilinear rank within a relative residual."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.linalg.gram import add_gram, eigenvalues_and_vectors
from tuckerize.linalg.hooi import check_finite, is_reachable
from tuckerize.linalg.threads import Workers, parallel_workers
from tuckerize.linalg.tucker import (
    on_capable_device,
    power_of_two_scale,
    scaled_slice,
    squared_norm,
)
from tuckerize.weight_types import stored_parameters

# float32 Gram matrices resolve relative residuals down to about 3e-4; below 1e-2, use float64.
_FLOAT32_TOLERANCE_FLOOR = 1e-2
# Rounding error of the eigenvalue sum, in units of the work dtype's eps relative to the total
# (measured: at most 2). Subtracted from the allowance, so that the tolerance holds exactly.
_ROUNDINGS = 4


def rank_for_tolerance(stacks: Sequence[Tensor], tolerance: float) -> MultilinearRank:
    """Find the multilinear rank with the fewest stored parameters within a residual tolerance.

    ‖X − X̂‖² of ST-HOSVD is at most the sum over the modes of the discarded eigenvalues of the Gram
    matrix of that mode's unfolding. Of all core sizes that `hooi` accepts and that keep the sum
    within tolerance² ‖X‖², the result stores the fewest parameters (a full mode stores no factor).
    All modes are full if nothing is smaller than the dense stack.

    Args:
        stacks: Coupled expert stacks of one shape (E, H, I), any floating dtype. The
            tolerance holds for each of them.
        tolerance: Relative residual (unitless), above 0 and below 1.

    Raises:
        NonFiniteError: A stack holds NaN or infinity.

    Source:
        Vannieuwenhoven et al. 2012, theorem 6.5; the search over core sizes is our own.
    """
    for stack in stacks:
        check_finite(stack)
    shape = StackShape(*stacks[0].shape)
    dtype = torch.float32 if tolerance >= _FLOAT32_TOLERANCE_FLOOR else torch.float64
    if any(stack.dtype == torch.float64 for stack in stacks):
        dtype = torch.float64
    stacks = [on_capable_device(stack, dtype) for stack in stacks]
    scale = power_of_two_scale(*stacks)
    share = tolerance**2 - _ROUNDINGS * torch.finfo(dtype).eps
    with parallel_workers(stacks[0].device) as workers:
        allowance = share * min(_squared_norm(stack, dtype, scale, workers) for stack in stacks)
        own = [
            [_discarded(_gram([stack], mode, dtype, scale, workers)) for stack in stacks]
            for mode in (Mode.EXPERT, Mode.INTERMEDIATE)
        ]
        shared = _discarded(_gram(stacks, Mode.HIDDEN, dtype, scale, workers))
    tails = [*([sum(of_stacks) for of_stacks in zip(*tail, strict=True)] for tail in own), shared]
    return _cheapest(shape, tails, allowance, coupled=len(stacks))


def _squared_norm(stack_EHI: Tensor, dtype: torch.dtype, scale: float, workers: Workers) -> float:
    return sum(
        workers.map(lambda slice_HI: squared_norm(scaled_slice(slice_HI, dtype, scale)), stack_EHI)
    )


def _gram(
    stacks: Sequence[Tensor], mode: Mode, dtype: torch.dtype, scale: float, workers: Workers
) -> Tensor:
    """Upper triangle of the summed Gram matrices of the mode's unfoldings."""
    size = stacks[0].shape[mode]
    gram = torch.zeros((size, size), dtype=dtype, device=stacks[0].device)

    def of_row(row_EI: Tensor) -> Tensor:
        wide_EI = scaled_slice(row_EI, dtype, scale)
        return wide_EI @ wide_EI.T

    def rows(slice_HI: Tensor) -> Tensor:
        wide_HI = scaled_slice(slice_HI, dtype, scale)
        return wide_HI if mode == Mode.HIDDEN else wide_HI.T

    for stack in stacks:
        if mode == Mode.EXPERT:
            for gram_EE in workers.map(of_row, stack.unbind(1)):
                gram += gram_EE
            continue
        for matrix in workers.map(rows, stack):
            add_gram(gram, matrix, workers)
    return gram


def _discarded(gram_NN: Tensor) -> list[float]:
    """Discarded energy for each core size 1..N (0 for N)."""
    values = eigenvalues_and_vectors(gram_NN)[0].cpu().double()
    tail: list[float] = values.flip(0).cumsum(0).flip(0).tolist()
    return [*tail[1:], 0.0]


def _cheapest(
    shape: StackShape, tails: list[list[float]], allowance: float, *, coupled: int
) -> MultilinearRank:
    best = MultilinearRank(*shape)
    best_parameters = stored_parameters(shape, best, coupled=coupled)
    expert_tail, intermediate_tail, hidden_tail = tails
    for expert in _sizes_within(expert_tail, allowance):
        left_E = allowance - expert_tail[expert - 1]
        for intermediate in _sizes_within(intermediate_tail, left_E):
            left_EH = left_E - intermediate_tail[intermediate - 1]
            smallest = _sizes_within(hidden_tail, left_EH).start
            # A full mode stores no factor, so it can cost less than a smaller core size.
            for hidden in (smallest, shape.hidden):
                rank = MultilinearRank(expert, intermediate, hidden)
                parameters = stored_parameters(shape, rank, coupled=coupled)
                if parameters < best_parameters and is_reachable(rank, shape, coupled=coupled):
                    best, best_parameters = rank, parameters
    return best


def _sizes_within(tail: list[float], allowance: float) -> range:
    """Core sizes whose discarded energy is within the allowance; always includes the full size."""
    smallest = bisect_left(tail, -allowance, key=operator.neg) + 1
    return range(min(smallest, len(tail)), len(tail) + 1)
