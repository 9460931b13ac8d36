"""Low rank, expert by expert: SVD, SVD with activation whitening, and D²-MoE's base and deltas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.quality.budget import TILTS, equal_sizes, pooled_sizes, projection_shares
from benchmarks.quality.layer import (
    Compressed,
    Layer,
    Stacks,
    best_of,
    layer_by_layer,
    roots,
    triple,
)


@dataclass(frozen=True)
class Spectrum:
    """Singular value decompositions W_e R_e = A diag(s) Bᵀ R_e of the matrices of one stack.

    Attributes:
        left_EMQ: A, orthonormal columns, (E, M, Q).
        values_EQ: Singular values of W_e R_e, (E, Q).
        right_EQN: Rows of Bᵀ = Vᵀ R_e⁻¹, (E, Q, N).
    """

    left_EMQ: Tensor
    values_EQ: Tensor
    right_EQN: Tensor

    def truncate(self, ranks: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The best matrices of given ranks (E, M, N) and the factors that have to be stored."""
        parts, matrices = [], []
        for expert, rank in enumerate(ranks):
            left_MR = self.left_EMQ[expert, :, :rank] * self.values_EQ[expert, :rank]
            right_RN = self.right_EQN[expert, :rank]
            parts += [left_MR.float(), right_RN.float()]
            matrices.append(left_MR @ right_RN)
        return torch.stack(matrices).float(), parts


def spectrum(stack_EMN: Tensor, moments_ENN: Tensor | None = None) -> Spectrum:
    """Singular value decompositions, with R_e the root of a second moment or the identity.

    ‖(W_e − Ŵ_e) R_e‖² is the summed squared error of W_e's output on the inputs with the moment
    R_e R_eᵀ, and truncating the decomposition of W_e R_e makes it least.

    Args:
        stack_EMN: Matrices that multiply columns from the left, (E, M, N).
        moments_ENN: Second moments of their inputs, (E, N, N).
    """
    stack_EMN = stack_EMN.double()
    if moments_ENN is None:
        left, values, right = torch.linalg.svd(stack_EMN, full_matrices=False)
        return Spectrum(left, values, right)
    root_ENN, inverse_ENN = roots(moments_ENN)
    left, values, right = torch.linalg.svd(stack_EMN @ root_ENN, full_matrices=False)
    return Spectrum(left, values, right @ inverse_ENN)


@layer_by_layer
def svd(layer: Layer, keep: float) -> Compressed:
    """Per-expert SVD, data-free: W_e ≈ A_e B_e, the Eckart–Young optimum of every matrix.

    Equal ranks, what rounding leaves goes to the largest next singular values. The share of gate
    and up against down is tuned.
    """
    spectra = [spectrum(stack) for stack in _as_linear(layer.stacks)]
    return best_of(layer, (_truncated(layer, spectra, keep, tilt) for tilt in TILTS))


@layer_by_layer
def whitened_svd(layer: Layer, keep: float) -> Compressed:
    """Per-expert SVD with activation whitening (SVD-LLM, ICLR 2025; MoE-SVD, ICML 2025).

    W_e ≈ trunc(W_e R_e) R_e⁻¹ with R_e R_eᵀ the second moment of the expert's own inputs: tokens
    for gate and up, intermediate activations for down. (Their Cholesky factor and our symmetric
    root give the same product.) Tuned: tokens alike or by the square of their routing weight; ranks
    alike or by the experts' singular values (SVD-LLM V2); the share of gate and up against down.
    """

    def candidates() -> Iterator[Compressed]:
        for weighted in (False, True):
            spectra = _whitened(layer, layer.stacks, weighted=weighted)
            for tilt, pooled in product(TILTS, (False, True)):
                yield _truncated(layer, spectra, keep, tilt, pooled=pooled)

    return best_of(layer, candidates())


@layer_by_layer
def d2_moe(layer: Layer, keep: float) -> Compressed:
    """D²-MoE (ICML 2025): one base matrix per projection and low-rank deltas of the experts.

    W_e ≈ W_b + A_e B_e. The base is the mean weighted by Fisher information and usage,
    W_b = Σ f_e F_e ⊙ W_e / Σ f_e F_e, or by usage, or plain; the delta is truncated after whitening
    with the expert's own second moment. The base stays whole: its pruning is for ratios that this
    benchmark does not reach. Tuned: the three bases; ranks alike or by singular values; the share
    of gate and up against down.
    """

    def candidates() -> Iterator[Compressed]:
        for bases in _bases(layer):
            deltas = triple(stack - base for stack, base in zip(layer.stacks, bases, strict=True))
            spectra = _whitened(layer, deltas, weighted=False)
            for tilt, pooled in product(TILTS, (False, True)):
                yield _truncated(layer, spectra, keep, tilt, bases, pooled=pooled)

    return best_of(layer, candidates())


def _bases(layer: Layer) -> Iterator[list[Tensor]]:
    """Base matrices (H, I) of gate, up and down, for every way to weigh the experts."""
    used_E11 = torch.tensor([float(len(x_NI)) for x_NI, _ in layer.tokens])[:, None, None]
    weights = [[torch.ones_like(used_E11)] * 3, [used_E11] * 3]
    if layer.sensitivity is not None:
        weights.append([used_E11 * (f / f.mean() + 1e-6) for f in layer.sensitivity.fisher])
    for of_stacks in weights:
        yield [
            (stack * weight).sum(0) / weight.expand_as(stack).sum(0)
            for stack, weight in zip(layer.stacks, of_stacks, strict=True)
        ]


def _as_linear(stacks: Stacks) -> Stacks:
    """Gate (E, H, I), up (E, H, I) and down (E, I, H), which multiply columns; and back."""
    gate_EHI, up_EHI, down_EHI = stacks
    return gate_EHI, up_EHI, down_EHI.mT


def _whitened(layer: Layer, stacks: Stacks, *, weighted: bool) -> list[Spectrum]:
    inputs_EII = layer.input_moments(weighted=weighted)
    activations_EHH = layer.activation_moments(weighted=weighted)
    moments = (inputs_EII, inputs_EII, activations_EHH)
    return [spectrum(*pair) for pair in zip(_as_linear(stacks), moments, strict=True)]


def _truncated(
    layer: Layer,
    spectra: list[Spectrum],
    keep: float,
    tilt: float,
    bases: list[Tensor] | None = None,
    *,
    pooled: bool = False,
) -> Compressed:
    _, intermediate, hidden = layer.shape
    budget = int(keep * layer.dense)
    parts: list[Tensor] = list(bases or ())
    stacks = []
    spent = sum(base.numel() for base in parts)
    shares = projection_shares((budget - spent) / layer.dense, tilt)
    # A projection may spend what the ones before it left, so that nothing is lost by rounding.
    allowed = float(spent)
    cost = intermediate + hidden
    most = intermediate * hidden // cost  # from here on the matrix itself would be smaller
    deal = pooled_sizes if pooled else equal_sizes
    for spectrum_, share in zip(spectra, shares, strict=True):
        allowed += share * layer.dense / 3
        gains = list(spectrum_.values_EQ[:, :most].square())
        stack, factors = spectrum_.truncate(deal(round(allowed) - spent, cost, gains))
        spent += sum(factor.numel() for factor in factors)
        parts += factors
        stacks.append(stack)
    effective = _as_linear(triple(stacks))
    if bases is not None:
        effective = triple(stack + base for stack, base in zip(effective, bases, strict=True))
    return Compressed(effective, tuple(parts))
