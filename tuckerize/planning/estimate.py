"""Memory that a plan needs: estimates, from shapes."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from tuckerize.compression.target import LayerPiece
from tuckerize.domain import Coupling, MultilinearRank, StackShape
from tuckerize.errors import UsageError
from tuckerize.planning.calibrated_memory import LayerWork, has_parts_of
from tuckerize.planning.plan import Plan
from tuckerize.weight_types import WEIGHT_TYPES, WeightType, stored_bytes

BASE_BYTES = 450 * 2**20
"""Interpreter, torch and its libraries, measured after the imports of `tuckerize decompose`."""

# Working set of a thread of linalg/threads.py, with what its allocator keeps, in matrices of an
# expert: 90 MiB were measured at 1408 x 2048, with 1 to 8 threads.
_MATRICES_PER_THREAD = 8
# float32, the work type.
_WORK_BYTES = 4


class Need(NamedTuple):
    """Peak bytes of a process, and how it comes to need no more.

    Attributes:
        bytes: Host and device together.
        threads: Threads that work side by side.
        profile_held: Whether a layer's dense experts are in memory while it is profiled.
        held: The same while it is compressed.
        states_held: Whether what is as long as the calibration set is in memory, or in files.
    """

    bytes: int
    threads: int
    profile_held: bool = True
    held: bool = True
    states_held: bool = True


def need_within(
    plan: Plan,
    available: int,
    processes: int = 1,
    *,
    profile_of: bool | None = None,
    on_host: bool = True,
) -> Need:
    """The quickest way to carry out a plan in memory: what is held, and the number of threads.

    What is as long as the calibration set is in files where it does not fit with one thread. A
    layer's dense experts are in memory if they fit with that, otherwise they are read whenever they
    are used, in the profile and in the compression each. Then as many threads work as fit, up to
    those of torch. None of this changes the result.

    Args:
        plan: The plan.
        available: Bytes that this process may still take.
        processes: Processes that share the experts of a calibrated layer.
        profile_of: Whether modes may be truncated, where a profile is all that is wanted.
        on_host: Whether it is the host's memory, whose pages can be those of files.

    Raises:
        UsageError: Nothing fits.
    """
    calibrated = plan.recipe.calibration is not None
    ways: list[tuple[bool, bool]] = [(True, True)]
    if profile_of is not None:
        ways.append((False, True))
    elif calibrated:
        ways += [(False, True), *([(True, False), (False, False)] if has_parts_of(plan) else [])]
    states = (True, False) if on_host and calibrated else (True,)
    least = math.inf
    for (profile_held, held), states_held in itertools.product(ways, states):
        for threads in range(torch.get_num_threads(), 0, -1):
            need = peak_need(
                plan,
                threads,
                processes,
                profile_held=profile_held,
                held=held,
                states_held=states_held,
                profile_of=profile_of,
            )
            if need.bytes - BASE_BYTES <= available:  # the base is taken already
                return need
        least = min(least, need.bytes - BASE_BYTES)
    hint = (
        "raise the limit, or start fewer processes; less is needed by smaller core sizes, by "
        "--group-size, and by a calibration of fewer tokens (--calibration-tokens)"
    )
    if profile_of is None and calibrated and not has_parts_of(plan):
        hint += (
            "; --target any-engine with --quantize and --refine 0 goes expert by expert and needs "
            "the least"
        )
    raise UsageError(
        f"a process needs about {least / 2**30:.1f} GiB more, and {available / 2**30:.1f} GiB of "
        "memory are free for it, of the host or of its control group",
        hint=hint,
    )


def peak_need(
    plan: Plan,
    threads: int,
    processes: int,
    *,
    profile_held: bool = True,
    held: bool = True,
    states_held: bool = True,
    profile_of: bool | None = None,
) -> Need:
    """Estimated peak memory of one process.

    Args:
        plan: The plan.
        threads: Threads that work side by side.
        processes: Processes that share the experts of a calibrated layer.
        profile_held: Whether a layer's dense experts are in memory while it is profiled.
        held: The same while it is compressed.
        states_held: Whether what is as long as the calibration set is in memory.
        profile_of: Whether modes may be truncated, where a profile is all that is wanted.
    """
    shape, layer = plan.group_shape, plan.source.moe.shape
    own = layer._replace(experts=layer.experts // shape.experts * -(-shape.experts // processes))
    source = WEIGHT_TYPES[plan.source.moe.dtype]
    process, found = process_bytes(shape, threads), [BASE_BYTES]
    for piece in plan.layer_pieces:
        settings = piece.calibration
        if settings is None:
            found.append(process + data_free_bytes(shape, piece, source, plan.weights))
            continue
        work = LayerWork(
            own,
            settings.tokens,
            settings.window,
            plan.source.moe.routing.top_k,
            layers=len(plan.source.moe.layers),
            states_held=states_held,
        )
        if profile_of is not None or plan.recipe.has_budget:
            spectra = settings.has_factors if profile_of is None else profile_of
            found.append(BASE_BYTES + work.profile_bytes(spectra=spectra, held=profile_held))
        if profile_of is not None:
            continue
        if held:
            found.append(BASE_BYTES + work.compression_bytes(piece))
        else:
            stored = piece.stored_bytes(shape, plan.weights)
            found.append(BASE_BYTES + work.parts_bytes(piece, stored, processes))
    return Need(max(found), threads, profile_held, held, states_held)


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
