"""What a plan will cost: work, memory, time. Estimates, from shapes and a short measurement."""

from __future__ import annotations

import math
import time

import torch

from tuckerize.domain import MultilinearRank, Projection
from tuckerize.planning.plan import CopyPiece, LayerPiece, Piece, Plan, TuckerPiece

# A symmetric product costs little more than half of a full one, see linalg/gram.py.
_GRAM_SHARE = 0.55
# Interpreter, torch and its libraries, measured after the imports of `tuckerize decompose`.
_BASE_BYTES = 450 * 2**20
# Sweeps that a run is likely to make; HOOI has usually converged after a few.
_LIKELY_SWEEPS = 3
# Copying and hashing, a cautious figure for one core and one disk.
_COPY_BYTES_PER_SECOND = 3e8
# What a thread of linalg/threads.py has at once and what its allocator keeps, in matrices of an
# expert: 90 MiB were measured at 1408 x 2048, with 1 to 8 threads.
_MATRICES_A_THREAD = 8
# float32, the work type.
_WORK_BYTES = 4


def work(plan: Plan, piece: Piece) -> float:
    """Floating-point operations of a piece, roughly; copies count as little as they take."""
    if isinstance(piece, CopyPiece):
        ranges = plan.source.checkpoint.files[piece.source_file].tensors.values()
        return float(sum(place.header.bytes for place in ranges))
    if isinstance(piece, LayerPiece):
        return _layer_work(plan, piece)
    experts, rows, columns = plan.group_shape
    total = 0.0
    for target in piece.targets:
        # Where a tolerance decides, all three modes may be truncated.
        rank = target.rank or MultilinearRank(max(1, experts // 2), rows // 2, columns // 2)
        truncated = rank.truncated_modes(plan.group_shape)
        per_number = 2.0
        if rank.expert < experts:
            per_number += 2 * (experts * _GRAM_SHARE + rank.expert)
        if rank.intermediate < rows:
            per_number += 2 * (rows * _GRAM_SHARE + rank.intermediate)
        if rank.hidden < columns:
            per_number += 2 * (columns * _GRAM_SHARE + rank.hidden)
        sweeps = 1 + (min(_LIKELY_SWEEPS, plan.recipe.max_sweeps) if len(truncated) > 1 else 0)
        # The explicit residual multiplies once more.
        per_number = per_number * sweeps + 2 * (rank.hidden + rank.intermediate)
        total += per_number * plan.group_shape.parameters * len(piece.coupling)
    return total


def _layer_work(plan: Plan, piece: LayerPiece) -> float:
    """Operations that calibrating and compressing a layer takes, roughly."""
    settings = plan.recipe.calibration
    if settings is None:
        return 0.0
    experts, neurons, hidden = plan.source.moe.shape
    rows = settings.tokens * plan.source.moe.routing.top_k
    layer = 2.0 * 3 * neurons * hidden
    # Moments and their refit, the dense layer forward some four times, and the profile.
    total = rows * (2.0 * (hidden**2 + 3 * neurons**2) + 6 * layer)
    # Elimination in float64, half as fast: the inverse, and a product for every round.
    total += 2 * experts * (4.0 * neurons**3 + 2 * neurons**2 * hidden)
    if piece.sizes.ranks[Projection.GATE].hidden < hidden:
        sweep = experts * 30 * 4.0 * hidden**2 * piece.sizes.ranks[Projection.GATE].hidden
        total += min(_LIKELY_SWEEPS, plan.recipe.max_sweeps) * sweep
    # Forward and backward of a batch a step.
    batch = min(2048, settings.tokens)
    return total + settings.refine * batch * plan.source.moe.routing.top_k * 3 * layer


def peak_bytes(plan: Plan) -> int:
    """Estimated peak memory of one process."""
    pieces = [_piece_bytes(plan, piece) for piece in plan.tucker_pieces]
    layers = [_layer_bytes(plan, piece) for piece in plan.layer_pieces]
    matrix = plan.group_shape.intermediate * plan.group_shape.hidden * _WORK_BYTES
    threads = torch.get_num_threads() * _MATRICES_A_THREAD * matrix
    return _BASE_BYTES + threads + max([*pieces, *layers], default=0)


def _layer_bytes(plan: Plan, piece: LayerPiece) -> int:
    """Largest sum of what lives at once while a layer is calibrated, on host and device together.

    The dense layer and the tokens stay in float32; beside them the moments and the weighted least
    squares of gate and up (some fifteen copies of a stack, two of the moments), or the refinement's
    parameters, start, gradients and two moments of Adam. At DeepSeek-V2-Lite's width and 8,192
    tokens all is 16.6 GiB; 16.8 were measured: benchmarks/results/full_width_calibrated.json.
    """
    settings = plan.recipe.calibration
    if settings is None:
        return 0
    experts, neurons, hidden = plan.source.moe.shape
    dense = len(Projection) * plan.source.moe.shape.parameters * _WORK_BYTES
    states = settings.tokens * hidden * _WORK_BYTES
    moments = experts * (hidden**2 + neurons**2) * _WORK_BYTES
    least_squares = experts * (15 * neurons * hidden + 2 * hidden**2) * _WORK_BYTES
    refinement = 5 * plan.stored_parameters(piece) * _WORK_BYTES
    return dense + 5 * states + max(moments + least_squares, refinement)


def seconds(plan: Plan) -> float:
    """Estimated time of one process, from the rate of one matrix product on this machine."""
    rate = _product_rate()
    copied = plan.source.checkpoint.bytes / _COPY_BYTES_PER_SECOND
    pieces: list[Piece] = [*plan.tucker_pieces, *plan.layer_pieces]
    return copied + sum(work(plan, piece) for piece in pieces) / rate


def _piece_bytes(plan: Plan, piece: TuckerPiece) -> int:
    """Largest sum of what lives at once: stacks, projections, cores, the file's tensors."""
    shape = plan.group_shape
    stack = shape.parameters * plan.source.dtype.itemsize
    stored = plan.stored_parameters(piece) * plan.dtype_bytes
    working = 0
    for target in piece.targets:
        rank = target.rank or MultilinearRank(*shape)
        mixed = projected = 0
        if rank.expert < shape.experts:
            mixed = rank.expert * shape.intermediate * shape.hidden
        if rank.intermediate < shape.intermediate:
            projected = rank.expert * rank.intermediate * shape.hidden
        core = math.prod(rank)
        grams = 3 * max(shape.intermediate, shape.hidden) ** 2
        working = max(working, max(mixed, core) + projected + grams)
    return len(piece.coupling) * (stack + working * _WORK_BYTES) + 2 * stored


def _product_rate() -> float:
    """Operations per second of a float32 product of 1024 x 1024 matrices, the best of three."""
    matrix = torch.ones(1024, 1024)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024.0**3 / best
