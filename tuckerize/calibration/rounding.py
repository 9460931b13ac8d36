"""Output error of rounding the experts of a layer, measured on a few of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tuckerize.calibration.moments import neuron_moment
from tuckerize.calibration.spectra import spread
from tuckerize.calibration.tokens import DenseGroup, ExpertTokens, LayerTokens
from tuckerize.domain import GATE_UP, CoreType, Projection
from tuckerize.linalg.gram import gram
from tuckerize.linalg.quantise import quantise
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.runtime.activations import Activation

# Experts of a layer that are rounded; their relative errors hardly differ.
_PROBES = 4
ROUNDED_OUTPUTS = 256
"""Outputs of each of their matrices that are rounded."""


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
    experts = sorted(expert for theirs in sharing.of_all(own) for expert in theirs)
    probed = experts[:: max(1, len(experts) // _PROBES)][:_PROBES]
    places = [(group, expert) for group in groups for expert in group.experts if expert in probed]
    for group, expert in places:
        place, least = expert - group.experts.start, group.enough_tokens
        seen = fit.of_expert(expert, least).thinned(group.profiled_tokens)
        new = held_out.of_expert(expert, least)
        lost, its_energy = _errors_of_expert(group.part(place), seen, new, activation)
        missed += lost
        energy += its_energy
    parts = sharing.of_all((missed, energy))
    total = sum(energy for _, energy in parts)
    whole = np.asarray(sum(missed for missed, _ in parts))
    return whole / max(total, torch.finfo(torch.float32).tiny)


def _errors_of_expert(
    expert: DenseGroup, seen: ExpertTokens, new: ExpertTokens, activation: Activation
) -> tuple[list[float], float]:
    """Squared errors of an expert's outputs for every encoding, and the energy of these outputs.

    Outputs of a matrix are rounded independently of each other: some of them stand for all.

    Args:
        expert: The expert, alone.
        seen: The tokens that it is rounded for.
        new: Those that the error is measured on.
        activation: Between gate and up.
    """
    gate_HI, up_HI, down_HI = (expert.matrix(projection, 0) for projection in Projection)
    neurons, hidden = down_HI.shape
    some_K, some_C = (torch.tensor(spread(size, ROUNDED_OUTPUTS)) for size in (neurons, hidden))
    some_K, some_C = some_K.to(down_HI.device), some_C.to(down_HI.device)
    both_GI = torch.cat([gate_HI[some_K], up_HI[some_K]])
    biases = expert.biases or dict.fromkeys(GATE_UP, down_HI.new_zeros(1, neurons))
    gate_K, up_K = (biases[projection][0, some_K] for projection in GATE_UP)
    down_CH, down_KI = down_HI.T[some_C], down_HI[some_K]
    moment_II = gram(seen.weights_N[:, None] * seen.x_NI)
    moment_HH = neuron_moment(expert, seen, activation)
    exact_NH = new.weights_N[:, None] * activation(*expert.gate_up(0, new.x_NI))
    errors = []
    for core_type in CoreType:
        rounded_GI = quantise(both_GI[None], core_type, [moment_II]).dequantised()[0]
        gate_NK, up_NK = (new.x_NI @ rounded_GI.T).chunk(2, dim=1)
        now_NK = new.weights_N[:, None] * activation(gate_NK + gate_K, up_NK + up_K)
        of_gate_up = ((now_NK - exact_NH[:, some_K]) @ down_KI).square().sum()
        rounded_CH = quantise(down_CH[None], core_type, [moment_HH]).dequantised()[0]
        of_down = (exact_NH @ (rounded_CH - down_CH).T).square().sum()
        errors.append(
            float(of_gate_up) * neurons / len(some_K) + float(of_down) * hidden / len(some_C)
        )
    return errors, float((exact_NH @ down_HI).square().sum())
