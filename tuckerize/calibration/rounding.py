"""Output error of rounding the experts of a layer, measured on a few of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuckerize.calibration.tokens import DenseGroup, ExpertTokens, LayerTokens
from tuckerize.domain import GATE_UP, CoreType, Projection
from tuckerize.linalg.quantise import quantise
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.runtime.activations import Activation

# Experts of a layer that are rounded; their relative errors hardly differ.
_PROBES = 4


def rounding_errors(
    groups: Sequence[DenseGroup],
    tokens: LayerTokens,
    *,
    activation: Activation,
    sharing: Sharing = ALONE,
) -> npt.NDArray[np.float64]:
    """Squared error of the experts' outputs, relative to their energy, for every encoding.

    A few experts are rounded for the tokens to fit, and measured on the validation set.

    Args:
        groups: The dense experts of a layer.
        tokens: Its tokens.
        activation: Between gate and up.
        sharing: The processes that share the layer's experts.

    Returns:
        One value for every member of `CoreType` (unitless).
    """
    fit, held_out = tokens.split()
    held_out = held_out if len(held_out.x_TI) else fit
    missed, energy = np.zeros(len(CoreType)), 0.0
    own = [expert for group in groups for expert in group.experts]
    whole = sorted(expert for theirs in sharing.of_all(own) for expert in theirs)
    probed = whole[:: max(1, len(whole) // _PROBES)][:_PROBES]
    places = [(group, expert) for group in groups for expert in group.experts if expert in probed]
    for group, expert in places:
        place = expert - group.experts.start
        dense = tuple(group.matrix(projection, place) for projection in Projection)
        least = group.enough_tokens
        seen = fit.of_expert(expert, least).thinned(group.profiled_tokens)
        new = held_out.of_expert(expert, least)
        gate_HI, up_HI, down_HI = dense
        biased = _after_biases(group, place, activation)
        exact_NI = _neurons(new, gate_HI, up_HI, biased) @ down_HI
        energy += float(exact_NI.square().sum())
        weighted_NI = seen.weights_N[:, None] * seen.x_NI
        moment_II = weighted_NI.T @ weighted_NI
        for index, core_type in enumerate(CoreType):
            rounded = _rounded(dense, seen, moment_II, core_type, biased)
            output_NI = _neurons(new, rounded[0], rounded[1], biased) @ rounded[2]
            missed[index] += float((output_NI - exact_NI).square().sum())
    parts = sharing.of_all((missed, energy))
    total = sum(energy for _, energy in parts)
    lost = np.asarray(sum(missed for missed, _ in parts))
    return lost / max(total, torch.finfo(torch.float32).tiny)


def _after_biases(group: DenseGroup, place: int, activation: Activation) -> Activation:
    """Activation of an expert, with the biases of its gate and up."""
    if not group.biases:
        return activation
    gate_H, up_H = (group.biases[projection][place] for projection in GATE_UP)
    return lambda gate_NH, up_NH: activation(gate_NH + gate_H, up_NH + up_H)


def _rounded(
    dense: Sequence[Tensor],
    tokens: ExpertTokens,
    moment_II: Tensor,
    core_type: CoreType,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of an expert, rounded for its tokens, as the last step of a compression."""
    # Outputs are rounded independently of each other: those of both at once.
    both_GI = quantise(torch.cat([*dense[:2]])[None], core_type, [moment_II]).dequantised()[0]
    gate_HI, up_HI = both_GI.chunk(2)
    neurons_NH = _neurons(tokens, gate_HI, up_HI, activation)
    down = quantise(dense[2].T[None], core_type, [neurons_NH.T @ neurons_NH])
    return gate_HI, up_HI, down.dequantised()[0].T


def _neurons(
    tokens: ExpertTokens, gate_HI: Tensor, up_HI: Tensor, activation: Activation
) -> Tensor:
    """Neurons times routing weights, shape (N, H)."""
    neurons_NH = activation(tokens.x_NI @ gate_HI.T, tokens.x_NI @ up_HI.T)
    return tokens.weights_N[:, None] * neurons_NH
