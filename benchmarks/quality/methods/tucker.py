"""Tucker forms: TensorLy's own, TD-MoE, and MoLAE's latent experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.quality.budget import TILTS, projection_shares
from benchmarks.quality.layer import (
    Compressed,
    Layer,
    best_of,
    layer_by_layer,
    output_error,
    roots,
    triple,
)
from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.linalg.gram import leading_eigenvectors
from tuckerize.linalg.hooi import hooi, is_reachable
from tuckerize.linalg.tensorly_engine import tensorly_tucker
from tuckerize.linalg.tucker import TuckerFactors, expand
from tuckerize.weight_types import stored_parameters


@layer_by_layer
def tensorly(layer: Layer, keep: float) -> Compressed:
    """Tucker of every projection's stack with TensorLy's HOOI, data-free.

    X ≈ core ×_E U_E ×_H U_H ×_I U_I. Tuned: all experts in the core or three quarters of them; how
    much of the cut is on the hidden mode and how much on the intermediate one, from all to nothing.
    """
    choices = []
    for expert_share, hidden_share in product((1.0, 0.75), (0.0, 0.5, 0.75, 1.0)):
        ranks = [
            _rank_along(StackShape(*s.shape), int(keep * s.numel()), expert_share, hidden_share)
            for s in layer.stacks
        ]
        # Which ranks are best can be seen from our own quick start of the same iteration.
        quick = [
            hooi([s], rank, max_sweeps=0).tensors[0]
            for s, rank in zip(layer.stacks, ranks, strict=True)
        ]
        choices.append((output_error(layer.few_tokens, _expanded(quick)), ranks))
    _, ranks = min(choices)
    found = [
        tensorly_tucker([s], rank).tensors[0] for s, rank in zip(layer.stacks, ranks, strict=True)
    ]
    return _expanded(found)


@layer_by_layer
def td_moe(layer: Layer, keep: float) -> Compressed:
    """TD-MoE (ICLR 2026): whitened HOSVD of every projection's stack with all experts in the core.

    T_w = T ×_in Σ^{1/2} with Σ the second moment of the projection's inputs over all experts, one
    pass of HOSVD, and the factor of the input mode multiplied by Σ^{-1/2}. Output whitening is left
    out: as published it is inverted. Ranks: the pair whose count is nearest to the target; of all
    pairs within 1 % of it this takes the one that captures most, which the paper does not.
    """
    inputs_EII, activations_EHH = layer.input_moments(), layer.activation_moments()
    gate_EHI, up_EHI, down_EHI = layer.stacks
    gate = _white_on_hidden(gate_EHI, inputs_EII, keep)
    up = _white_on_hidden(up_EHI, inputs_EII, keep)
    down = _white_on_hidden(down_EHI.mT, activations_EHH, keep)
    return _expanded((gate, up, TuckerFactors(down.core.mT, None, down.U_I, down.U_H)))


@layer_by_layer
def molae(layer: Layer, keep: float) -> Compressed:
    """MoLAE (arXiv 2503.23100): one latent space for the hidden side of all experts, data-free.

    gate_e ≈ A_e U_Iᵀ and down_e ≈ A_e U_Iᵀ (in the stack's orientation), with U_I the leading
    eigenvectors of Σ_e W_eᵀ W_e, which is the optimum. Tuned: a space of its own for gate and up or
    one for both; the share of gate and up against down.
    """

    def candidates() -> Iterator[Compressed]:
        for couplings, tilt in product((((0,), (1,), (2,)), ((0, 1), (2,))), TILTS):
            yield _latent(layer, keep, couplings, projection_shares(keep, tilt))

    return best_of(layer, candidates())


def _latent(
    layer: Layer,
    keep: float,
    couplings: Sequence[Sequence[int]],
    shares: tuple[float, float, float],
) -> Compressed:
    """Truncate the hidden mode only; stacks of a coupling share the factor."""
    experts, intermediate, hidden = layer.shape
    budget = int(keep * layer.dense)
    costs = [len(coupling) * experts * intermediate + hidden for coupling in couplings]
    wanted = [
        sum(shares[member] for member in coupling) * layer.dense / 3 for coupling in couplings
    ]
    sizes = [min(int(w / cost), hidden) for w, cost in zip(wanted, costs, strict=True)]
    # What rounding left: another step where it fits, last coupling first.
    for index in reversed(range(len(couplings))):
        left = budget - sum(size * cost for size, cost in zip(sizes, costs, strict=True))
        if left >= costs[index] and sizes[index] < hidden:
            sizes[index] += 1
    found: list[TuckerFactors] = []
    for coupling, size in zip(couplings, sizes, strict=True):
        stacks = [layer.stacks[member] for member in coupling]
        found += hooi(stacks, MultilinearRank(experts, intermediate, size)).tensors
    return _expanded(found)


def _expanded(tensors: Sequence[TuckerFactors]) -> Compressed:
    """Gate, up and down from their Tucker tensors; a factor that two of them share counts once."""
    parts = [tucker.core for tucker in tensors]
    for tucker in tensors:
        for factor in tucker.factors:
            if factor is not None and not any(factor is part for part in parts):
                parts.append(factor)
    return Compressed(triple(expand(tucker).float() for tucker in tensors), tuple(parts))


def _rank_along(
    shape: StackShape, budget: int, expert_share: float, hidden_share: float
) -> MultilinearRank:
    """Core sizes with (r_H/H, r_I/I) near (c^{1−s}, c^s) for some c, as large as the budget allows.

    Args:
        shape: Sizes (E, H, I) of the stack.
        budget: Numbers that may be stored.
        expert_share: r_E / E.
        hidden_share: The share s of the cut, in logarithms, that is on the hidden mode.
    """
    experts = max(1, round(expert_share * shape.experts))

    def unlike(rank: MultilinearRank) -> float:
        cut_H, cut_I = (math.log(rank[mode] / shape[mode]) for mode in (1, 2))
        return abs((1 - hidden_share) * cut_I - hidden_share * cut_H)

    fitting = list(_fitting_ranks(shape, budget, experts))
    near = min(unlike(rank) for rank in fitting)
    most = max(stored_parameters(shape, r) for r in fitting)
    # Two steps off the ray are allowed where they fill the budget better.
    close = [r for r in fitting if unlike(r) <= near + 0.02]
    filled = [r for r in close if stored_parameters(shape, r) >= 0.99 * min(most, budget)]
    return min(filled or close, key=unlike)


def _fitting_ranks(shape: StackShape, budget: int, experts: int) -> Iterator[MultilinearRank]:
    """For every r_H the largest r_I within the budget, where there is one."""
    for intermediate in range(1, shape.intermediate + 1):
        full = MultilinearRank(experts, intermediate, shape.hidden)
        if stored_parameters(shape, full) <= budget:
            yield full
            continue
        fixed = stored_parameters(shape, MultilinearRank(experts, intermediate, 1))
        step = experts * intermediate + shape.hidden
        rank = full._replace(hidden=1 + (budget - fixed) // step)
        if 1 <= rank.hidden < shape.hidden and is_reachable(rank, shape):
            yield rank


def _white_on_hidden(stack_EHI: Tensor, moments_EII: Tensor, keep: float) -> TuckerFactors:
    """HOSVD of a stack whose last mode is whitened, with the whitening undone in the result."""
    root_1II, inverse_1II = roots(moments_EII.sum(0, keepdim=True))
    white_EHI = stack_EHI.double() @ root_1II[0]
    shape = StackShape(*stack_EHI.shape)
    U_H = leading_eigenvectors(
        torch.einsum("ehi,egi->hg", white_EHI, white_EHI), shape.intermediate
    )
    U_I = leading_eigenvectors(torch.einsum("ehi,ehj->ij", white_EHI, white_EHI), shape.hidden)
    core_EHI = U_H.T @ white_EHI @ U_I
    captured_HI = core_EHI.square().sum(0).cumsum(0).cumsum(1)
    budget = int(keep * stack_EHI.numel())
    ranks = list(_fitting_ranks(shape, budget, shape.experts))
    most = max(stored_parameters(shape, rank) for rank in ranks)
    nearest = [rank for rank in ranks if stored_parameters(shape, rank) >= 0.99 * most]
    rank = max(nearest, key=lambda r: float(captured_HI[r.intermediate - 1, r.hidden - 1]))
    core_EQR = core_EHI[:, : rank.intermediate, : rank.hidden]
    back_IR = inverse_1II[0] @ U_I[:, : rank.hidden]
    if rank.intermediate == shape.intermediate:  # a full mode needs no factor
        core_EQR, factor_H = U_H @ core_EQR, None
    else:
        factor_H = U_H[:, : rank.intermediate].float()
    if rank.hidden == shape.hidden:
        return TuckerFactors((core_EQR @ back_IR.T).float(), None, factor_H, None)
    return TuckerFactors(core_EQR.float(), None, factor_H, back_IR.float())
