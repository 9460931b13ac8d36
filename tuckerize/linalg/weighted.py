"""Activation-aware Tucker decomposition: minimises the error of the outputs, not of the weights.

With the second moment Σ_e = Σ_t g_t² x_t x_tᵀ of the inputs of expert e (tokens x_t, routing
weights g_t), the squared error of its products is ‖(W_e − Ŵ_e) Σ_e^{1/2}‖². HOOI on the stack
whitened by the pooled moment minimises it as if all experts had the same inputs; weighted
alternating least squares then uses each expert's own moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.linalg.gram import (
    add_gram,
    eigenvalues_and_vectors,
    leading_eigenvectors,
    symmetric,
)
from tuckerize.linalg.hooi import check_finite, check_rank, hooi
from tuckerize.linalg.least_squares import conjugate_gradients, least_squares, solve
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.threads import parallel_workers
from tuckerize.linalg.tucker import (
    TuckerFactors,
    in_float64,
    largest_magnitude,
    orthonormalised,
    power_of_two_scale,
)
from tuckerize.progress import Stage, silent

EIGENVALUE_FLOOR = 1e-6
"""Eigenvalues of a second moment below this share of the largest are raised to it."""

# U_I is preconditioned: further steps gain nothing before the next sweep.
_HIDDEN_FACTOR_STEPS = 2


@dataclass(frozen=True, slots=True)
class WeightedDecomposition:
    """Result of the weighted least squares.

    Attributes:
        tensors: One Tucker tensor per stack; coupled stacks share the object U_I. Factors have
            orthonormal columns.
        errors: Relative weighted error (unitless) of all stacks together, after the whitened HOOI
            and after each sweep; decreasing.
    """

    tensors: tuple[TuckerFactors, ...]
    errors: tuple[float, ...]

    @property
    def sweeps(self) -> int:
        """Sweeps of weighted least squares after the whitened HOOI."""
        return len(self.errors) - 1


def matrix_roots(moment_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Σ^{1/2} and Σ^{-1/2} of a second moment with floored eigenvalues, in float64.

    A zero moment is replaced by the identity: without data all directions are equal.
    """
    values, vectors = eigenvalues_and_vectors(in_float64(moment_NN))
    if values[0] <= 0:
        identity = torch.eye(len(values), dtype=values.dtype, device=values.device)
        return identity, identity
    roots = values.clamp_min(EIGENVALUE_FLOOR * float(values[0])).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def floored(moments_ENN: Tensor) -> Tensor:
    """Second moments with the floor added to the diagonal, so that they can be inverted.

    Experts without data get the identity.
    """
    result = moments_ENN.clone()
    _add_floor(result)
    return result


def _add_floor(moments_ENN: Tensor) -> None:
    diagonal_EN = moments_ENN.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal_EN.mean(-1)
    added_E = torch.where(mean_E > 0, EIGENVALUE_FLOOR * mean_E, torch.ones_like(mean_E))
    diagonal_EN.add_(added_E[:, None])


@contextmanager
def _floor_in_place(moments_ENN: Tensor) -> Iterator[None]:
    """Floor second moments for a while: they are the largest tensor, and a copy is another one."""
    diagonal_EN = moments_ENN.diagonal(dim1=-2, dim2=-1)
    before_EN = diagonal_EN.clone()
    _add_floor(moments_ENN)
    try:
        yield
    finally:
        diagonal_EN.copy_(before_EN)


def weighted_tucker(
    stacks: list[Tensor],
    moments_EII: Tensor,
    rank: MultilinearRank,
    *,
    max_sweeps: int = 10,
    tolerance: float = 5e-3,
    stage: Stage = silent,
    sharing: Sharing = ALONE,
) -> WeightedDecomposition:
    """Approximate expert stacks with the smallest error of their products with the inputs.

    Minimises Σ_e ‖(X_e − U_H C_e U_Iᵀ) Σ_e^{1/2}‖² with C_e = Σ_a U_E[e, a] core_a. One sweep
    solves for the cores, U_E, U_H (closed forms; conjugate gradients for shared cores) and U_I
    (conjugate gradients) in turn. No step increases the error.

    Args:
        stacks: Coupled stacks of one shape (E, H, I); they share one U_I.
        moments_EII: Second moment of each expert's inputs, shape (E, I, I), any scale. Their
            diagonals have the floor added while this runs.
        rank: Core sizes; a full mode gets no factor.
        max_sweeps: Maximum number of sweeps of weighted least squares.
        tolerance: Stop when a sweep reduces the relative error by less than this fraction.
        stage: Is told the sweeps.
        sharing: Processes of which each has some experts of the stacks, their moments and, in the
            end, cores or rows of U_E.

    Raises:
        MultilinearRankError: A core size is below 1 or above the largest that its mode can use.
        NonFiniteError: A stack holds NaN or infinity.

    Source:
        Start: HOOI on the whitened stack, De Lathauwer et al. 2000; weighted least squares as
        Srebro & Jaakkola 2003 for matrices, extended to the three modes.
    """
    shape = StackShape(sharing.total(len(stacks[0])), *stacks[0].shape[1:])
    check_rank(rank, shape, coupled=len(stacks))
    if rank == MultilinearRank(*shape):
        return WeightedDecomposition(tuple(TuckerFactors(stack) for stack in stacks), (0.0,))
    magnitudes = torch.tensor([largest_magnitude(own) for own in stacks], dtype=stacks[0].dtype)
    scale = power_of_two_scale(sharing.gather(magnitudes))
    if scale != 1.0:
        stacks = [stack * scale for stack in stacks]
    moments_EII = moments_EII.to(stacks[0].dtype)
    pooled_II = sharing.sum(moments_EII.sum(0))
    truncated = rank.truncated_modes(shape)
    start = _whitened_hooi if truncated != (Mode.HIDDEN,) else _best_hidden_factor
    tensors = start(stacks, pooled_II, rank, sharing)
    with _floor_in_place(moments_EII):
        problem = _Problem(stacks, moments_EII, sharing)
        errors = [problem.measure(tensors)]
        for sweep in range(max_sweeps):
            stage(f"sweep {sweep + 1} of at most {max_sweeps}")
            better = problem.sweep(tensors)
            error = problem.measure(better)
            if not error < errors[-1]:
                break
            tensors = better
            errors.append(error)
            if errors[-2] - errors[-1] < tolerance * errors[-2]:
                break
    if scale != 1.0:
        tensors = [TuckerFactors(factors.core / scale, *factors.factors) for factors in tensors]
    return WeightedDecomposition(tuple(tensors), tuple(errors))


def _best_hidden_factor(
    stacks: list[Tensor], pooled_II: Tensor, rank: MultilinearRank, sharing: Sharing
) -> list[TuckerFactors]:
    """The optimum if all experts had the same inputs, with a truncated hidden mode alone.

    It is that of one Gram matrix; nothing is whitened.
    """
    for stack in stacks:
        check_finite(stack)
    root_II, inverse_II = matrix_roots(pooled_II)
    gram_II = stacks[0].new_zeros(pooled_II.shape)
    with parallel_workers(gram_II.device) as workers:
        for stack in stacks:
            for matrix_HI in stack:
                add_gram(gram_II, matrix_HI, workers)
    white_II = root_II @ sharing.sum(symmetric(gram_II)).to(root_II) @ root_II
    whitened_IR = leading_eigenvectors(white_II, rank.hidden)
    shared_IR, mixing_RR = (
        part.to(stacks[0]) for part in orthonormalised(inverse_II @ whitened_IR)
    )
    onto_IR = (root_II @ whitened_IR).to(stacks[0]) @ mixing_RR.T
    return [TuckerFactors(stack @ onto_IR, U_I=shared_IR) for stack in stacks]


def _whitened_hooi(
    stacks: list[Tensor], pooled_II: Tensor, rank: MultilinearRank, sharing: Sharing
) -> list[TuckerFactors]:
    """HOOI on the whitened stacks, which assumes the same input moment for all experts.

    Every process has all of them while it lasts.
    """
    root_II, inverse_II = (root.to(stacks[0]) for root in matrix_roots(pooled_II))
    # HOOI switches to float64 where the residual is tiny.
    whitened = [
        _of_own_experts(factors.to(stacks[0].dtype, stacks[0].device), sharing)
        for factors in hooi([sharing.gather(stack @ root_II) for stack in stacks], rank).tensors
    ]
    whitened_IR = whitened[0].U_I
    if whitened_IR is None:
        return [
            TuckerFactors(factors.core @ inverse_II, factors.U_E, factors.U_H)
            for factors in whitened
        ]
    # Map the factor of the whitened stack back to the original inputs and orthonormalise it.
    shared_IR, mixing_RR = orthonormalised(inverse_II @ whitened_IR)
    return [
        TuckerFactors(factors.core @ mixing_RR.T, factors.U_E, factors.U_H, shared_IR)
        for factors in whitened
    ]


def _of_own_experts(factors: TuckerFactors, sharing: Sharing) -> TuckerFactors:
    """The part of a Tucker tensor that is of this process's experts."""
    own = sharing.own(factors.shape.experts)
    if factors.U_E is None:
        return replace(factors, core=factors.core[own])
    return replace(factors, U_E=factors.U_E[own])


class _Problem:
    """One weighted least-squares problem, and what its next sweep needs of the tensors so far.

    Attributes:
        weighted: X_e Σ_e of each stack.
        targets: X_e Σ_e U_I of each stack, shape (E, H, r_I), with the U_I last measured.
        small_ERR: U_Iᵀ Σ_e U_I, with the same.
    """

    targets: list[Tensor]
    small_ERR: Tensor

    def __init__(self, stacks: list[Tensor], moments_EII: Tensor, sharing: Sharing = ALONE) -> None:
        self.moments_EII = moments_EII
        self.sharing = sharing
        pooled_II = sharing.sum(moments_EII.sum(0))
        self.pooled_inverse_II: Tensor = torch.linalg.inv(in_float64(pooled_II))
        self.weighted = [stack @ moments_EII for stack in stacks]
        self.own_total = sum(map(_inner, stacks, self.weighted))
        self.total = self._sum(self.own_total)

    def measure(self, tensors: list[TuckerFactors]) -> float:
        """Relative weighted error √(Σ_e ‖(X_e − X̂_e) Σ_e^{1/2}‖² / Σ_e ‖X_e Σ_e^{1/2}‖²)."""
        U_I = tensors[0].U_I
        small_ERR = self.moments_EII
        if U_I is not None:
            # Expert by expert: the intermediate products of all experts would take much memory.
            small_ERR = U_I.new_empty(len(self.moments_EII), *[U_I.shape[1]] * 2)
            for small_RR, moment_II in zip(small_ERR, self.moments_EII, strict=True):
                torch.mm(U_I.T, moment_II @ U_I, out=small_RR)
        self.small_ERR = small_ERR
        self.targets = [
            weighted_EHI if U_I is None else weighted_EHI @ U_I for weighted_EHI in self.weighted
        ]
        missed = self.own_total
        for target_EHR, factors in zip(self.targets, tensors, strict=True):
            projected = target_EHR if factors.U_H is None else factors.U_H.T @ target_EHR
            cores_EQR = _expert_cores(factors)
            missed -= 2 * _inner(projected, cores_EQR)
            missed += _inner(map(torch.mm, cores_EQR, small_ERR), cores_EQR)
        missed = self._sum(missed)
        return (max(0.0, missed) / self.total) ** 0.5 if self.total > 0 else 0.0

    def sweep(self, tensors: list[TuckerFactors]) -> list[TuckerFactors]:
        """Update the cores, U_E and U_H of each stack once, then the shared U_I.

        Args:
            tensors: Those that were measured last.
        """
        updated = [
            _update_stack(factors, target_EHR, self.small_ERR, self.sharing)
            for factors, target_EHR in zip(tensors, self.targets, strict=True)
        ]
        del self.targets, self.small_ERR  # of tensors that are replaced
        U_I = updated[0].U_I
        if U_I is not None:
            shared_IR, mixing_RR = orthonormalised(self._hidden_factor(updated, U_I))
            for place, factors in enumerate(updated):  # one core at a time
                core = factors.core @ mixing_RR.T
                updated[place] = TuckerFactors(core, factors.U_E, factors.U_H, shared_IR)
        return updated

    def _hidden_factor(self, tensors: list[TuckerFactors], start_IR: Tensor) -> Tensor:
        """Solve Σ_e Σ_e U (C_eᵀ C_e) = Σ_e Σ_e X_eᵀ U_H C_e for U_I by conjugate gradients.

        The preconditioner is the exact solution for equal moments of all experts.
        """
        right_IR = torch.zeros_like(start_IR)
        grams_ERR = start_IR.new_zeros((len(self.moments_EII), *[start_IR.shape[1]] * 2))
        for weighted_EHI, factors in zip(self.weighted, tensors, strict=True):
            cores_EQR = _expert_cores(factors)
            U_H = factors.U_H
            projected_EQI = weighted_EHI if U_H is None else U_H.T @ weighted_EHI
            right_IR += torch.einsum("eqi,eqr->ir", projected_EQI, cores_EQR)
            grams_ERR.baddbmm_(cores_EQR.mT, cores_EQR)

        def normal(U_IR: Tensor) -> Tensor:
            result = torch.zeros_like(U_IR)
            for moment_II, gram_RR in zip(self.moments_EII, grams_ERR, strict=True):
                result += moment_II @ U_IR @ gram_RR
            return self.sharing.sum(result)

        pooled_RR = in_float64(floored(self.sharing.sum(grams_ERR.sum(0))[None])[0])
        inverse_RR: Tensor = torch.linalg.inv(pooled_RR)

        def precondition(residual_IR: Tensor) -> Tensor:
            solved_IR = self.pooled_inverse_II @ in_float64(residual_IR) @ inverse_RR
            return solved_IR.to(residual_IR)

        right_IR = self.sharing.sum(right_IR)
        return conjugate_gradients(
            normal, right_IR, start_IR, steps=_HIDDEN_FACTOR_STEPS, precondition=precondition
        )

    def _sum(self, value: float) -> float:
        return float(self.sharing.sum(torch.tensor(value, dtype=torch.float64)))


def _update_stack(
    factors: TuckerFactors, target_EHR: Tensor, small_ERR: Tensor, sharing: Sharing
) -> TuckerFactors:
    """Update the cores, U_E and U_H of one stack for a fixed U_I.

    Args:
        factors: The current Tucker tensor.
        target_EHR: X_e Σ_e U_I.
        small_ERR: U_Iᵀ Σ_e U_I.
        sharing: The processes that share its experts.
    """
    U_E, U_H, core_PQR = factors.U_E, factors.U_H, factors.core
    projected_EQR = target_EHR if U_H is None else U_H.T @ target_EHR
    if U_E is None:
        core_PQR = solve(small_ERR, projected_EQR.mT).mT
    else:
        core_PQR = _shared_cores(U_E, core_PQR, projected_EQR, small_ERR, sharing)
        rows_EP = sharing.gather(_expert_factor(core_PQR, projected_EQR, small_ERR))
        U_E, mixing_PP = orthonormalised(rows_EP)
        U_E = U_E[sharing.own(len(rows_EP))]
        core_PQR = torch.tensordot(mixing_PP, core_PQR, dims=1)
    if U_H is not None:
        cores_EQR = _expert_cores(TuckerFactors(core_PQR, U_E))
        right_HQ = sharing.sum(torch.einsum("ehr,eqr->hq", target_EHR, cores_EQR))
        gram_QQ = sharing.sum(torch.einsum("eqr,ers,ets->qt", cores_EQR, small_ERR, cores_EQR))
        U_H, mixing_QQ = orthonormalised(least_squares(gram_QQ, right_HQ.T).T)
        core_PQR = mixing_QQ @ core_PQR
    return TuckerFactors(core_PQR, U_E, U_H, factors.U_I)


def _inner(one: Iterable[Tensor], other: Tensor) -> float:
    """Inner product, accumulated in float64 over experts."""
    pairs = zip(one, other, strict=True)
    return float(sum(in_float64((own * its).sum()) for own, its in pairs))


def _expert_cores(factors: TuckerFactors) -> Tensor:
    """C_e of each expert, shape (E, r_H, r_I)."""
    if factors.U_E is None:
        return factors.core
    mixed: Tensor = torch.tensordot(factors.U_E, factors.core, dims=1)
    return mixed


def _shared_cores(
    U_E: Tensor, start_PQR: Tensor, projected_EQR: Tensor, small_ERR: Tensor, sharing: Sharing
) -> Tensor:
    """Solve for shared cores by conjugate gradients."""
    right_PQR = sharing.sum(torch.tensordot(U_E.T, projected_EQR, dims=1))

    def normal(core_PQR: Tensor) -> Tensor:
        cores_EQR = torch.tensordot(U_E, core_PQR, dims=1)
        return sharing.sum(torch.tensordot(U_E.T, cores_EQR @ small_ERR, dims=1))

    return conjugate_gradients(normal, right_PQR, start_PQR)


def _expert_factor(core_PQR: Tensor, projected_EQR: Tensor, small_ERR: Tensor) -> Tensor:
    """Solve for U_E by one small least-squares problem per expert, shape (E, r_E)."""
    flat_PM = core_PQR.flatten(1)
    rows = []
    for projected_QR, small_RR in zip(projected_EQR, small_ERR, strict=True):
        gram_PP = (core_PQR @ small_RR).flatten(1) @ flat_PM.T
        rows.append(least_squares(gram_PP, (flat_PM @ projected_QR.flatten())[:, None]))
    return torch.cat(rows, dim=1).T
