"""Output error of rounding the experts of a layer, measured on a few of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tuckerize.calibration.group_statistics import GroupStatistics, spread
from tuckerize.calibration.moments import neuron_moment
from tuckerize.calibration.tokens import DenseGroup, ExpertTokens, LayerTokens
from tuckerize.domain import GATE_UP, CoreType, Projection
from tuckerize.linalg.gram import gram
from tuckerize.linalg.quantise import Inputs
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.runtime.activations import Activation

# Experts of a layer that are rounded: errors are nearly proportional to their unit errors.
_PROBES = 2
ROUNDED_OUTPUTS = 256
"""Outputs of each of their matrices that are rounded."""


def rounding_errors(
    statistics: Sequence[GroupStatistics],
    tokens: LayerTokens,
    *,
    activation: Activation,
    sharing: Sharing = ALONE,
) -> npt.NDArray[np.float64]:
    """Squared error of the experts' outputs, summed over experts and tokens, for every encoding.

    A few experts are rounded for the tokens to fit, and measured on the validation set.

    Args:
        statistics: Those of the groups of a layer.
        tokens: The tokens that these are of.
        activation: Between gate and up.
        sharing: The processes that share the layer's experts.

    Returns:
        One value for every member of `CoreType`.
    """
    fit, held_out = tokens.split()
    held_out = held_out if len(held_out.x_TI) else fit
    unit_errors = {
        expert: float(error)
        for part in statistics
        for expert, error in zip(part.group.experts, part.moments.unit_error_E, strict=True)
    }
    everyone = {expert: e for theirs in sharing.of_all(unit_errors) for expert, e in theirs.items()}
    experts = sorted(everyone)
    probed = [experts[place] for place in spread(len(experts), _PROBES)]
    missed = np.zeros(len(CoreType))
    for group in (part.group for part in statistics):
        for expert in (expert for expert in group.experts if expert in probed):
            place, least = expert - group.experts.start, group.enough_tokens
            seen = fit.of_expert(expert, least).thinned(group.profiled_tokens)
            new = held_out.of_expert(expert, least)
            all_N, new_N = tokens.of_expert(expert, least).weights_N, new.weights_N
            scale = float(all_N.square().sum() / new_N.square().sum())
            missed += scale * _errors_of_expert(group.part(place), seen, new, activation)
    of_probed = np.asarray(sum(sharing.of_all(missed)))
    known = max(sum(everyone[expert] for expert in probed), torch.finfo(torch.float32).tiny)
    found: npt.NDArray[np.float64] = of_probed * (sum(everyone.values()) / known)
    return found


def _errors_of_expert(
    expert: DenseGroup, seen: ExpertTokens, new: ExpertTokens, activation: Activation
) -> npt.NDArray[np.float64]:
    """Squared errors of an expert's outputs for every encoding.

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
    inputs_I = Inputs.of(gram(seen.weights_N[:, None] * seen.x_NI))
    inputs_H = Inputs.of(neuron_moment(expert, seen, activation))
    exact_NH = new.weights_N[:, None] * activation(*expert.gate_up(0, new.x_NI))
    errors = []
    for core_type in CoreType:
        rounded_GI = inputs_I.quantise(both_GI, core_type).dequantised()
        gate_NK, up_NK = (new.x_NI @ rounded_GI.T).chunk(2, dim=1)
        now_NK = new.weights_N[:, None] * activation(gate_NK + gate_K, up_NK + up_K)
        of_gate_up = ((now_NK - exact_NH[:, some_K]) @ down_KI).square().sum()
        rounded_CH = inputs_H.quantise(down_CH, core_type).dequantised()
        of_down = (exact_NH @ (rounded_CH - down_CH).T).square().sum()
        errors.append(
            float(of_gate_up) * neurons / len(some_K) + float(of_down) * hidden / len(some_C)
        )
    return np.array(errors)
