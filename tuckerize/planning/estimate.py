"""Memory that a plan needs: estimates, from shapes."""

from __future__ import annotations

import math

import torch

from tuckerize.compression.target import LayerPiece
from tuckerize.domain import (
    WEIGHT_TYPES,
    Coupling,
    MultilinearRank,
    Projection,
    StackShape,
    WeightType,
    stored_bytes,
)
from tuckerize.errors import UsageError
from tuckerize.planning.plan import Plan

BASE_BYTES = 450 * 2**20
"""Interpreter, torch and its libraries, measured after the imports of `tuckerize decompose`."""

# Working set of a thread of linalg/threads.py, with what its allocator keeps, in matrices of an
# expert: 90 MiB were measured at 1408 x 2048, with 1 to 8 threads.
_MATRICES_PER_THREAD = 8
# float32, the work type.
_WORK_BYTES = 4


def peak_bytes(plan: Plan, threads: int | None = None, processes: int = 1) -> int:
    """Estimated peak memory of one process, host and device together.

    Args:
        plan: The plan.
        threads: Threads that work side by side; those of torch by default.
        processes: Processes that share the experts of a calibrated layer.
    """
    shape, layer = plan.group_shape, plan.source.moe.shape
    own = layer._replace(experts=layer.experts // shape.experts * -(-shape.experts // processes))
    source = WEIGHT_TYPES[plan.source.moe.dtype]
    pieces = [
        data_free_bytes(shape, piece, source, plan.weights)
        if piece.calibration is None
        else calibrated_bytes(own, tokens=piece.calibration.tokens)
        for piece in plan.layer_pieces
    ]
    threads = threads or torch.get_num_threads()
    return process_bytes(shape, threads) + max(pieces, default=0)


def threads_that_fit(plan: Plan, available: int, processes: int = 1) -> int:
    """Most threads, up to those of torch, with which a plan's estimated peak fits in memory.

    Args:
        plan: The plan.
        available: Bytes that this process may still take.
        processes: Processes that share the experts of a calibrated layer.

    Raises:
        UsageError: One thread does not fit either.
    """
    for threads in range(torch.get_num_threads(), 0, -1):
        needed = peak_bytes(plan, threads, processes) - BASE_BYTES  # which is taken already
        if needed <= available:
            return threads
    raise UsageError(
        f"a process needs about {needed / 2**30:.1f} GiB more, and {available / 2**30:.1f} GiB of "
        "memory are free for it, of the host or of its control group",
        hint="raise the limit, or start fewer processes; less is needed by smaller core sizes, by "
        "--group-size, and by a calibration of fewer tokens (--calibration-tokens)",
    )


def process_bytes(shape: StackShape, threads: int) -> int:
    """Bytes of a process besides the tensors of its piece: libraries, and its threads' matrices.

    Args:
        shape: Sizes (E, H, I) of a stack.
        threads: Threads that work side by side.
    """
    matrix = shape.intermediate * shape.hidden * _WORK_BYTES
    return BASE_BYTES + threads * _MATRICES_PER_THREAD * matrix


def data_free_bytes(
    shape: StackShape, piece: LayerPiece, source: WeightType, stored: WeightType
) -> int:
    """Peak bytes of a data-free piece, beside those of its process.

    Args:
        shape: Sizes (E, H, I) of one group's stack.
        piece: The piece.
        source: Type of the dense experts.
        stored: Type of the cores and factors.
    """
    written = 2 * piece.stored_bytes(shape, stored)  # the tensors, and their copy in the writer
    return max(
        _hooi_bytes(shape, coupling, rank, source, written)
        for target in piece.targets
        for coupling, rank in target.ranks.items()
    )


def _hooi_bytes(
    shape: StackShape, coupling: Coupling, rank: MultilinearRank, source: WeightType, written: int
) -> int:
    """Largest of the tensors alive beside the stacks: projections, cores, or the file's."""
    mixed = projected = 0
    if rank.expert < shape.experts:
        mixed = rank.expert * shape.intermediate * shape.hidden
    if rank.intermediate < shape.intermediate:
        projected = rank.expert * rank.intermediate * shape.hidden
    core, stacks = math.prod(rank), len(coupling)
    grams = 3 * max(shape.intermediate, shape.hidden) ** 2
    alive = max(
        stacks * (mixed + projected) + grams,
        stacks * (projected + core),
        stacks * core + 2 * core,  # the norm of a core is summed in float64
    )
    dense = stored_bytes(shape, shape, source, coupled=stacks)
    return dense + max(alive * _WORK_BYTES, stacks * core * _WORK_BYTES + written)


def calibrated_bytes(shape: StackShape, *, tokens: int) -> int:
    """Peak bytes while a layer is calibrated and compressed, on host and device together.

    The dense layer and the tokens stay in float32; beside them the moments and the weighted least
    squares of gate and up: some fifteen copies of a stack, two of the moments. Refinement needs
    less: parameters, start, gradients and two moments of Adam are at most as much as those copies.

    Args:
        shape: Sizes (E, H, I) of the layer's stacks.
        tokens: Tokens of the calibration set.
    """
    experts, neurons, hidden = shape
    dense = len(Projection) * shape.parameters * _WORK_BYTES
    states = tokens * hidden * _WORK_BYTES
    moments = experts * (hidden**2 + neurons**2) * _WORK_BYTES
    least_squares = experts * (15 * neurons * hidden + 2 * hidden**2) * _WORK_BYTES
    return dense + 5 * states + moments + least_squares
