"""Groups of experts, their tokens and their compression, for all tests of calibration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.closed_form import closed_form, group_output
from tuckerize.compression.factors import GroupFactors
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, GATE_UP, Coupling, MultilinearRank, Projection, StackShape
from tuckerize.moe.family import Glu
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.dense import ExpertWeights, dense_output

SWIGLU = activation_of(Glu())
"""Activation of most families."""

SHAPE = StackShape(3, 10, 8)
"""Of one group."""


def normal(generator: torch.Generator, *sizes: int) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(*sizes, generator=generator)


def make_group(shape: StackShape, *, first: int = 0, seed: int = 0) -> DenseGroup:
    """A group of random experts; its first is the layer's expert `first`."""
    generator = torch.Generator().manual_seed(seed)
    stacks = {
        projection: normal(generator, *shape) / math.sqrt(shape.hidden) for projection in Projection
    }
    return DenseGroup(stacks, range(first, first + shape.experts))


def make_tokens(
    count: int,
    hidden: int,
    experts: int,
    *,
    top_k: int = 2,
    rank: int | None = None,
    seed: int = 1,
) -> LayerTokens:
    """Tokens with uneven directions, routed at random; in a subspace of dimension `rank`."""
    generator = torch.Generator().manual_seed(seed)
    inner = rank or hidden
    mixing = normal(generator, inner, hidden) * torch.logspace(0, -1, inner)[:, None]
    x_TI = normal(generator, count, inner) @ mixing
    scores_TE = normal(generator, count, experts).softmax(1)
    weights_Tk, experts_Tk = scores_TE.topk(min(top_k, experts), dim=1)
    return LayerTokens(x_TI, experts_Tk, weights_Tk)


def own_weights(group: DenseGroup, expert: int) -> ExpertWeights:
    """The matrices of one expert of the layer; zeros where it is of another group."""
    gate_HI, up_HI, down_HI = (
        group.stacks[projection][expert - group.experts.start]
        if expert in group.experts
        else torch.zeros(group.shape[1:])
        for projection in Projection
    )
    return ExpertWeights(gate_HI, up_HI, down_HI.T)


def exact_output(group: DenseGroup, tokens: LayerTokens) -> Tensor:
    """Combined routed output of a dense group alone, in float64, shape (T, I)."""
    return dense_output(
        tokens.x_TI.double(),
        tokens.experts_Tk,
        tokens.weights_Tk.double(),
        expert_weights=lambda expert: own_weights(group, expert),
        activation=SWIGLU,
    )


def relative(difference: Tensor, exact: Tensor) -> float:
    """‖difference‖ / ‖exact‖ in float64."""
    return float(difference.double().norm() / exact.double().norm())


def couplings(*, joint: bool) -> list[Coupling]:
    """The stacks that share a U_I."""
    return [GATE_UP, DOWN] if joint else [(projection,) for projection in Projection]


def target_of(
    neurons: int, gate_up: int, down: int, *, joint: bool = True, equal_widths: bool = False
) -> CompressionTarget:
    """A target as a budget gives it: the hidden mode and the width."""
    ranks = {
        coupling: MultilinearRank(SHAPE.experts, neurons, down if coupling == DOWN else gate_up)
        for coupling in couplings(joint=joint)
    }
    return CompressionTarget(neurons, ranks, equal_widths=equal_widths)


def compress(
    group: DenseGroup, tokens: LayerTokens, target: CompressionTarget
) -> tuple[GroupFactors, float]:
    """The compressed group, and its relative output error on the tokens."""
    step = closed_form(tokens, activation=SWIGLU, max_sweeps=5)
    found = step(GroupFactors.of(0, group, target))
    output_TI = group_output(found.tensors(), group.experts, tokens, SWIGLU)
    exact_TI = exact_output(group, tokens)
    return found, relative(output_TI - exact_TI, exact_TI)
