"""HOOI on expert stacks, started from ST-HOSVD (and, where that is cheap, from HOSVD as well).

A sweep updates every truncated factor once, in the order E, H, I, each from the stack projected on
the other factors. A sweep that starts from identities is exactly ST-HOSVD, so one function serves
as the start and as the iteration. Stacks stay in their own dtype and are cast to the work dtype
expert by expert; no unfolding is copied. On a host the bits of the result do not depend on the
number of threads, see `threads`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.errors import MultilinearRankError, NonFiniteError
from tuckerize.linalg.gram import add_gram, leading_eigenvectors
from tuckerize.linalg.threads import Workers, parallel_workers
from tuckerize.linalg.tucker import (
    TuckerFactors,
    largest_magnitude,
    mode_name,
    on_capable_device,
    power_of_two_scale,
    scaled_slice,
    squared_norm,
)

# A float32 Gram matrix perturbs the captured energy by about 1e-6 of the total. Below a relative
# residual of 1e-2 (1e-4 of the energy discarded) that is not negligible: work in float64.
_FLOAT32_RESIDUAL_FLOOR = 1e-2
# Values of the expert unfolding that a thread casts at a time (16 MiB in float32).
_EXPERT_BLOCK_VALUES = 4 * 2**20
# HOOI converges to a local optimum. On small stacks with flat spectra the residual reached from
# ST-HOSVD can be worse by 1e-2 than from HOSVD; the gap falls with size, to about 1e-4 at a million
# values. Up to this size both starts are tried, which takes a second at most.
_TWO_STARTS_VALUES = 2**22


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Result of HOOI.

    Attributes:
        tensors: One Tucker tensor per stack, in the work dtype (float32, or float64, then on the
            host for stacks on an NPU); coupled stacks share the object U_I.
        projected_residuals: Relative projected residual (unitless) of all stacks together, after
            the ST-HOSVD start and after each sweep.
    """

    tensors: tuple[TuckerFactors, ...]
    projected_residuals: tuple[float, ...]

    @property
    def sweeps(self) -> int:
        """HOOI sweeps after the ST-HOSVD start."""
        return len(self.projected_residuals) - 1


def hooi(
    stacks: Sequence[Tensor],
    rank: MultilinearRank,
    *,
    max_sweeps: int = 10,
    tolerance: float = 1e-5,
) -> Decomposition:
    """Approximate expert stacks by Tucker tensors of given multilinear rank.

    Starts from ST-HOSVD and improves one factor at a time, so the residual never grows. Several
    stacks are coupled: each has its own U_E, U_H and core, and all share one U_I.

    Args:
        stacks: Expert stacks of one shape (E, H, I), any floating dtype, any device. Not modified.
        rank: Core sizes, each between 1 and the size of its mode; a full mode gets no factor.
        max_sweeps: Maximum number of sweeps; one sweep updates every factor once. There are none
            where ST-HOSVD is already optimal, that is with at most one truncated mode.
        tolerance: Stop when a sweep reduces the projected residual (unitless) by less.

    Returns:
        Factors with orthonormal columns, cores, and the projected residual after each sweep.

    Raises:
        MultilinearRankError: A core size is below 1 or above its mode.
        NonFiniteError: A stack holds NaN or infinity; the message gives the first index.

    Source:
        De Lathauwer et al. 2000 (HOOI); start: Vannieuwenhoven et al. 2012 (ST-HOSVD).
    """
    shape = StackShape(*stacks[0].shape)
    check_rank(rank, shape, coupled=len(stacks))
    for stack in stacks:
        check_finite(stack)
    truncated = rank.truncated_modes(shape)
    if not truncated:
        return Decomposition(tuple(TuckerFactors(stack) for stack in stacks), (0.0,))
    sweeps = max_sweeps if len(truncated) > 1 else 0
    if all(stack.dtype != torch.float64 for stack in stacks):
        result = _best_start(stacks, rank, sweeps, tolerance, torch.float32)
        if result.projected_residuals[-1] >= _FLOAT32_RESIDUAL_FLOOR:
            return result
    return _best_start(stacks, rank, sweeps, tolerance, torch.float64)


def check_rank(rank: MultilinearRank, shape: StackShape, *, coupled: int = 1) -> None:
    """Raise MultilinearRankError unless stacks of a shape can have a multilinear rank.

    That is, 1 <= r_n <= n for every mode, and for truncated modes r_n at most the product of the
    other two core sizes, times the number of coupled stacks for r_I, which they share.
    """
    for mode in Mode:
        if not 1 <= rank[mode] <= shape[mode]:
            raise MultilinearRankError(
                f"core size {rank[mode]} of the {mode_name(mode)} is not between 1 and "
                f"{shape[mode]}",
                hint=f"choose a size up to {shape[mode]}, or 'full' to leave the mode untruncated",
            )
    for mode in rank.truncated_modes(shape):
        reachable = _reachable(rank, mode, coupled)
        if rank[mode] > reachable:
            raise MultilinearRankError(
                f"core size {rank[mode]} of the {mode_name(mode)} is above {reachable}, the "
                f"product of the other two, so no core of {rank} can use it",
                hint=f"choose at most {reachable} for this mode",
            )


def is_reachable(rank: MultilinearRank, shape: StackShape, *, coupled: int = 1) -> bool:
    """Whether cores can use the size of every truncated mode, see `check_rank`."""
    truncated = rank.truncated_modes(shape)
    return all(rank[mode] <= _reachable(rank, mode, coupled) for mode in truncated)


def _reachable(rank: MultilinearRank, mode: Mode, coupled: int) -> int:
    return math.prod(rank) // rank[mode] * (coupled if mode == Mode.HIDDEN else 1)


def check_finite(stack_EHI: Tensor, first: int = 0) -> None:
    """Raise NonFiniteError with the first index if a stack holds NaN or infinity.

    Args:
        stack_EHI: The stack.
        first: Index of its first expert.
    """
    if math.isfinite(largest_magnitude(stack_EHI)):
        return
    for expert, slice_HI in enumerate(stack_EHI, first):
        bad = (~torch.isfinite(slice_HI)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFiniteError(
                f"the stack holds {float(slice_HI[row, column])} at expert {expert}, "
                f"intermediate {row}, hidden {column}",
                hint="repair or replace the source checkpoint",
            )


_Start = Callable[[list["_Block"], MultilinearRank], Tensor | None]


class _Block:
    """One stack during the iteration: its source, its own factors, and its projection on them."""

    def __init__(
        self, source_EHI: Tensor, dtype: torch.dtype, scale: float, workers: Workers
    ) -> None:
        self.workers = workers
        self.source_EHI = source_EHI
        self.dtype = dtype
        self.scale = scale
        self.U_E: Tensor | None = None
        self.U_H: Tensor | None = None
        self.projected_PQI: Tensor | None = None
        self.squared_norm = sum(
            workers.map(lambda slice_HI: squared_norm(self._cast_source(slice_HI)), source_EHI)
        )

    def start_independently(self, rank: MultilinearRank) -> None:
        """Compute U_E and U_H by HOSVD, each from the stack itself, and project it on both."""
        experts, rows, _ = self.source_EHI.shape
        if rank.expert < experts:
            self.U_E = leading_eigenvectors(self._expert_gram(None), rank.expert)
        if rank.intermediate < rows:
            self.U_H = leading_eigenvectors(self._intermediate_gram(None), rank.intermediate)
        self._project_experts()
        self._project_intermediate()

    def update(self, rank: MultilinearRank, U_I: Tensor | None) -> None:
        """Update U_E and U_H where truncated, in turn, and project the stack on both."""
        experts, rows, _ = self.source_EHI.shape
        self.projected_PQI = None
        if rank.expert < experts:
            self.U_E = leading_eigenvectors(self._expert_gram(U_I), rank.expert)
            self._project_experts()
        if rank.intermediate < rows:
            self.U_H = leading_eigenvectors(self._intermediate_gram(U_I), rank.intermediate)
            self._project_intermediate()

    def core(self, rank: MultilinearRank, U_I: Tensor | None) -> Tensor:
        """The stack projected on all three factors, shape (r_E, r_H, r_I)."""
        core_PQR = self.source_EHI.new_empty(tuple(rank), dtype=self.dtype)

        def project(matrix_QI: Tensor, out_QR: Tensor) -> None:
            if U_I is None:
                out_QR.copy_(self._cast(matrix_QI))
            else:
                torch.mm(self._cast(matrix_QI), U_I, out=out_QR)

        self.workers.do(project, self._matrices(), core_PQR)
        self.projected_PQI = None
        return core_PQR

    def add_hidden_gram(self, gram_II: Tensor) -> None:
        """Add the hidden mode's Gram matrix of the stack projected on the current U_E and U_H."""
        for matrix_QI in self.workers.map(self._cast, self._matrices()):
            add_gram(gram_II, matrix_QI, self.workers)

    def _project_experts(self) -> None:
        if self.U_E is None:
            return
        U_E = self.U_E
        flat_EM = self.source_EHI.flatten(1)
        projected_PQI = self.source_EHI.new_empty(
            (U_E.shape[1], *self.source_EHI.shape[1:]), dtype=self.dtype
        )
        flat_PM = projected_PQI.flatten(1)

        def project(part: slice) -> None:
            torch.mm(U_E.T, self._cast_source(flat_EM[:, part]), out=flat_PM[:, part])

        self.workers.do(project, _column_parts(flat_EM))
        self.projected_PQI = projected_PQI

    def _project_intermediate(self) -> None:
        if self.U_H is None:
            return
        U_H = self.U_H
        matrices = self._matrices()
        projected_PQI = self.source_EHI.new_empty(
            (len(matrices), U_H.shape[1], matrices.shape[2]), dtype=self.dtype
        )

        def project(matrix_HI: Tensor, out_QI: Tensor) -> None:
            torch.mm(U_H.T, self._cast(matrix_HI), out=out_QI)

        self.workers.do(project, matrices, projected_PQI)
        self.projected_PQI = projected_PQI

    def _expert_gram(self, U_I: Tensor | None) -> Tensor:
        """Gram matrix of the expert mode of the source projected on U_H and U_I."""
        if self.U_H is None and U_I is None:
            flat_EM = self.source_EHI.flatten(1)
            return self._tall_gram(flat_EM, lambda part: self._cast_source(flat_EM[:, part]))
        U_H = self.U_H

        def project(slice_HI: Tensor) -> Tensor:
            wide_HI = self._cast_source(slice_HI)
            projected = wide_HI if U_H is None else U_H.T @ wide_HI
            return (projected if U_I is None else projected @ U_I).flatten()

        projected_EM = torch.stack(list(self.workers.map(project, self.source_EHI)))
        return self._tall_gram(projected_EM, lambda part: projected_EM[:, part])

    def _tall_gram(self, flat_EM: Tensor, wide: Callable[[slice], Tensor]) -> Tensor:
        """Gram matrix of a matrix's rows, summed over its column blocks in order."""

        def gram(part: slice) -> Tensor:
            part_EM = wide(part)
            return part_EM @ part_EM.T

        result = flat_EM.new_zeros((len(flat_EM), len(flat_EM)), dtype=self.dtype)
        for gram_EE in self.workers.map(gram, _column_parts(flat_EM)):
            result += gram_EE
        return result

    def _intermediate_gram(self, U_I: Tensor | None) -> Tensor:
        """Intermediate mode's Gram matrix of the stack projected on the current U_E and U_I."""
        rows = self.source_EHI.shape[1]
        gram = self.source_EHI.new_zeros((rows, rows), dtype=self.dtype)

        def project(matrix_HI: Tensor) -> Tensor:
            wide_HI = self._cast(matrix_HI)
            return wide_HI if U_I is None else wide_HI @ U_I

        for projected in self.workers.map(project, self._matrices()):
            add_gram(gram, projected.T, self.workers)
        return gram

    def _matrices(self) -> Tensor:
        """The stack projected on the current U_E and U_H, shape (r_E or E, r_H or H, I)."""
        return self.source_EHI if self.projected_PQI is None else self.projected_PQI

    def _cast(self, matrix: Tensor) -> Tensor:
        """One of `_matrices`, cast and scaled."""
        return self._cast_source(matrix) if self.projected_PQI is None else matrix

    def _cast_source(self, part: Tensor) -> Tensor:
        """A part of the source, cast and scaled."""
        return scaled_slice(part, self.dtype, self.scale)


def _column_parts(flat_EM: Tensor) -> Iterator[slice]:
    """Column blocks of an expert unfolding, which depend on its shape alone."""
    experts, columns = flat_EM.shape
    width = max(1, _EXPERT_BLOCK_VALUES // experts)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def _best_start(
    stacks: Sequence[Tensor],
    rank: MultilinearRank,
    max_sweeps: int,
    tolerance: float,
    dtype: torch.dtype,
) -> Decomposition:
    starts: list[_Start] = [_sweep_from_identity]
    if max_sweeps > 0 and sum(stack.numel() for stack in stacks) <= _TWO_STARTS_VALUES:
        starts.append(_hosvd)
    stacks = [on_capable_device(stack, dtype) for stack in stacks]
    scale = power_of_two_scale(*stacks)
    results = []
    with parallel_workers(stacks[0].device) as workers:
        for start in starts:
            blocks = [_Block(stack, dtype, scale, workers) for stack in stacks]
            results.append(_iterate(blocks, rank, start, max_sweeps, tolerance))
    return min(results, key=lambda result: result.projected_residuals[-1])


def _iterate(
    blocks: list[_Block],
    rank: MultilinearRank,
    start: _Start,
    max_sweeps: int,
    tolerance: float,
) -> Decomposition:
    total = sum(block.squared_norm for block in blocks)
    U_I = start(blocks, rank)
    cores = [block.core(rank, U_I) for block in blocks]
    residuals = [_projected_residual(cores, total)]
    while len(residuals) <= max_sweeps:
        del cores
        U_I = _sweep(blocks, rank, U_I)
        cores = [block.core(rank, U_I) for block in blocks]
        residuals.append(_projected_residual(cores, total))
        if residuals[-2] - residuals[-1] < tolerance:
            break
    return Decomposition(
        tuple(
            TuckerFactors(core.div_(block.scale), block.U_E, block.U_H, U_I)
            for block, core in zip(blocks, cores, strict=True)
        ),
        tuple(residuals),
    )


def _sweep_from_identity(blocks: list[_Block], rank: MultilinearRank) -> Tensor | None:
    """ST-HOSVD: one sweep from identity factors; returns the shared U_I."""
    return _sweep(blocks, rank, None)


def _hosvd(blocks: list[_Block], rank: MultilinearRank) -> Tensor | None:
    """HOSVD: compute each factor from the stacks themselves; returns the shared U_I."""
    U_I = _hidden_factor(blocks, rank)
    for block in blocks:
        block.start_independently(rank)
    return U_I


def _sweep(blocks: list[_Block], rank: MultilinearRank, U_I: Tensor | None) -> Tensor | None:
    """Update every truncated factor once; returns the shared U_I."""
    for block in blocks:
        block.update(rank, U_I)
    return _hidden_factor(blocks, rank)


def _hidden_factor(blocks: list[_Block], rank: MultilinearRank) -> Tensor | None:
    """U_I from the current projections of the stacks; None if the hidden mode is full."""
    columns = blocks[0].source_EHI.shape[2]
    if rank.hidden == columns:
        return None
    gram = blocks[0].source_EHI.new_zeros((columns, columns), dtype=blocks[0].dtype)
    for block in blocks:
        block.add_hidden_gram(gram)
    return leading_eigenvectors(gram, rank.hidden)


def _projected_residual(cores: list[Tensor], total: float) -> float:
    """√(‖X‖² − ‖core‖²) / ‖X‖: exact for orthonormal factors, up to cancellation."""
    if total == 0.0:
        return 0.0
    return math.sqrt(max(0.0, 1.0 - sum(squared_norm(core) for core in cores) / total))
