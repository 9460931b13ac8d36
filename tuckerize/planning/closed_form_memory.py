"""Values that are alive at the peaks of the closed form of a group, beside its dense experts.

Counted from the steps of `compression/closed_form.py` and `linalg/weighted.py`.
"""

from __future__ import annotations

import math

from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, Mode, MultilinearRank, StackShape

# Tensors like the solution in conjugate gradients, which solve for cores that experts share.
_GRADIENT_VECTORS = 7


def closed_form_values(shape: StackShape, target: CompressionTarget, rows: int) -> int:
    """Values of float32 while a group is compressed: neurons, gate and up, and down, in turn.

    Args:
        shape: Sizes (E, H, I) of its dense stacks.
        target: What it is compressed to; experts are taken as equally wide.
        rows: Values of the rows of tokens, of an expert or of the compressed group.
    """
    slim = shape._replace(intermediate=target.neurons)
    stack = slim.parameters
    pruned = stack if target.neurons < shape.intermediate else 0  # each stack of kept neurons
    peak, factored, is_refitted = 4 * pruned, 0, pruned > 0
    for coupling, rank in target.ranks.items():
        if coupling == DOWN:
            continue
        if not rank.truncated_modes(slim):
            factored += len(coupling) * pruned
            continue
        moments = shape.experts * shape.hidden**2
        sweep = least_squares_values(slim, rank, len(coupling))
        peak = max(peak, 3 * pruned + factored + moments + sweep)
        factored += len(coupling) * math.prod(rank)
        is_refitted = True
    down = pruned + (stack if is_refitted else 0)
    rank = target.ranks[DOWN]
    truncated = rank.truncated_modes(slim)
    if not truncated or truncated == (Mode.HIDDEN,):
        down += max(rows, math.prod(rank) if truncated else 0)
    else:
        flipped = StackShape(slim.experts, slim.hidden, slim.intermediate)
        sweep = least_squares_values(
            flipped, MultilinearRank(rank.expert, rank.hidden, rank.intermediate), 1
        )
        down += stack + slim.experts * slim.intermediate**2 + sweep
    return max(peak, factored + down)


def least_squares_values(shape: StackShape, rank: MultilinearRank, coupled: int) -> int:
    """Values while coupled stacks are factored, beside the stacks and the moments of their inputs.

    Args:
        shape: Sizes (E, H, I) of a stack; the inputs are of the last mode.
        rank: Core sizes.
        coupled: Number of stacks.
    """
    experts, rows, columns = shape
    weighted = coupled * shape.parameters  # with the moments; whitened, before there are sweeps
    core, of_experts = math.prod(rank), experts * rank.intermediate * rank.hidden
    mixed = of_experts if rank.expert < experts else 0
    projected = of_experts if rank.intermediate < rows else 0
    targets = small = 0
    if rank.hidden < columns:
        targets, small = coupled * experts * rows * rank.hidden, experts * rank.hidden**2
    start = 0
    if rank.truncated_modes(shape) != (Mode.HIDDEN,):
        start = coupled * rank.expert * (rows + rank.intermediate) * columns
    # The best cores so far and those of the sweep; the last stack's are being solved for.
    update = targets + small + projected
    if mixed:
        update += (_GRADIENT_VECTORS - 1) * core + 2 * mixed
    hidden = small + mixed
    if projected:
        update = max(update, targets + small + mixed + experts * rows * rank.hidden + of_experts)
        hidden += experts * rank.intermediate * columns
    measured = targets + small + mixed + projected
    pooled = 2 * columns**2  # inverse in float64
    return weighted + pooled + max(start, 2 * coupled * core + max(update, hidden, measured))
