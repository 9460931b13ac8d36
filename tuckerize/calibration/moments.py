"""Second moments of the inputs, neurons and outputs of a group of experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.tokens import DenseGroup, ExpertTokens, LayerTokens
from tuckerize.domain import GATE_UP, Projection
from tuckerize.linalg.gram import gram
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.progress import Stage, silent, told
from tuckerize.runtime.activations import Activation


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Sums over the tokens of a group's experts; routing weights count squared.

    E experts are those of this process, where several share the group; sums are over all.

    Attributes:
        pooled_II: Second moment of the inputs of all experts together, shape (I, I).
        energy_EH: Second moment of every neuron (activated gate times up) by itself.
        row_norms_EH: Squared norm of every neuron's row of down.
        gate_sensitivity_EH: Change of the squared output with a neuron's gate, to first order:
            the mean over tokens of (g ∂h/∂gate)² times the squared norm of its row of down.
        up_sensitivity_EH: The same for up.
        output_II: Second moment of the group's combined output, shape (I, I).
        output_energy_E: Squared norm of the outputs of every expert by itself.
        unit_error_E: Squared output error of every expert, to first order, if all of its weights
            had errors of their own size, independent of each other.
        routed_E: Tokens that the router sent to every expert of the group.
    """

    pooled_II: Tensor
    energy_EH: Tensor
    row_norms_EH: Tensor
    gate_sensitivity_EH: Tensor
    up_sensitivity_EH: Tensor
    output_II: Tensor
    output_energy_E: Tensor
    unit_error_E: Tensor
    routed_E: Tensor


NeuronMoment = Callable[[Tensor, Tensor], float]
"""Takes the second moment (H, H) of the neurons of the next expert, and its down (H, I); gives the
squared norm of the expert's outputs."""

# Tokens that the router did not send to an expert, where diagonals of moments alone are needed.
_FEW_POOLED_TOKENS = 256


class _Neurons(NamedTuple):
    """One expert's neurons on its tokens, and their derivatives, each of shape (N, H)."""

    h_NH: Tensor
    by_gate_NH: Tensor
    by_up_NH: Tensor


def gather_moments(
    group: DenseGroup,
    tokens: LayerTokens,
    *,
    activation: Activation,
    neurons: NeuronMoment,
    whole: Collection[int],
    stage: Stage = silent,
    sharing: Sharing = ALONE,
) -> GroupMoments:
    """Second moments of a group of experts on a layer's tokens.

    Those of the neurons, which together are large, go to the caller one by one.

    Experts with few tokens get others of the layer as well, see `LayerTokens.of_expert`.

    Args:
        group: The dense experts, in float32.
        tokens: Tokens of the layer.
        activation: From gate and up to neurons.
        neurons: Takes the second moments of neurons.
        whole: Places of the experts of which it takes them; of the others, the moments above are of
            fewer of the tokens that fill them up.
        stage: Is told the experts, with shares of all of them as efforts.
        sharing: The processes that share the group.
    """
    squared_T = tokens.x_TI.new_zeros(len(tokens.x_TI))
    energies, row_norms, gates, ups, routed = [], [], [], [], []
    outputs, unit_errors = [], []
    output_TI = tokens.x_TI.new_zeros(tokens.x_TI.shape)
    experts = told(group.experts, len(group.experts), stage, "moments and elimination")
    for place, expert in enumerate(experts):
        pooled = None if place in whole else _FEW_POOLED_TOKENS
        own = tokens.of_expert(expert, group.enough_tokens, pooled)
        squared_T.index_add_(0, own.places_N, own.weights_N.square())
        dense = group.part(place)
        down_HI = dense.matrix(Projection.DOWN, 0)
        moment_HH = down_HI.new_zeros(len(down_HI), len(down_HI)) if place in whole else None
        energy_H, gate_H, up_H = down_HI.new_zeros(3, len(down_HI))
        output_energy = 0.0
        for part in own.parts():
            found = _neurons(*dense.gate_up(0, part.x_NI), activation)
            weighted_NH = part.weights_N[:, None] * found.h_NH
            # The moments hold the weights already; sensitivities are means without them.
            gate_H += part.counts_N @ found.by_gate_NH.square()
            up_H += part.counts_N @ found.by_up_NH.square()
            if moment_HH is None:
                energy_H += weighted_NH.square().sum(0)
                result_NI = weighted_NH @ down_HI
                output_energy += float(result_NI.square().sum())
            else:
                moment_HH += gram(weighted_NH)
                result_NI = weighted_NH[: part.routed] @ down_HI
            routed_N = part.places_N[: part.routed]
            output_TI.index_add_(0, routed_N, result_NI[: part.routed])
        if moment_HH is not None:
            energy_H = moment_HH.diagonal().clone()
            output_energy = neurons(moment_HH, down_HI)
        energies.append(energy_H)
        outputs.append(output_energy)
        row_norms_H = down_HI.square().sum(1)
        row_norms.append(row_norms_H)
        shares_H = row_norms_H / own.counts_N.sum()
        gates.append(gate_H * shares_H)
        ups.append(up_H * shares_H)
        inputs_I = own.weights_N.square() @ own.x_NI.square()
        missed_H = energy_H * row_norms_H
        for projection, sensitivity_H in zip(GATE_UP, (gates[-1], ups[-1]), strict=True):
            missed_H += sensitivity_H * (dense.matrix(projection, 0).square() @ inputs_I)
        unit_errors.append(float(missed_H.sum()))
        routed.append(own.routed)
    share = sharing.own(len(tokens.x_TI))
    x_TI, squared_T = tokens.x_TI[share], sharing.sum(squared_T)[share]
    return GroupMoments(
        pooled_II=sharing.sum(x_TI.T @ (squared_T[:, None] * x_TI)),
        energy_EH=torch.stack(energies),
        row_norms_EH=torch.stack(row_norms),
        gate_sensitivity_EH=torch.stack(gates),
        up_sensitivity_EH=torch.stack(ups),
        output_II=second_moment(output_TI, sharing),
        output_energy_E=torch.tensor(outputs, dtype=torch.float64),
        unit_error_E=torch.tensor(unit_errors, dtype=torch.float64),
        routed_E=sharing.gather(torch.tensor(routed)),
    )


def neuron_moments(
    group: DenseGroup, tokens: LayerTokens, *, activation: Activation
) -> Iterator[Tensor]:
    """Second moment of the neurons of one expert after another, shape (H, H).

    Args:
        group: The dense experts.
        tokens: Tokens of the layer.
        activation: From gate and up to neurons.
    """
    for place, expert in enumerate(group.experts):
        own = tokens.of_expert(expert, least=group.enough_tokens)
        yield neuron_moment(group.part(place), own, activation)


def neuron_moment(dense: DenseGroup, own: ExpertTokens, activation: Activation) -> Tensor:
    """Second moment of the neurons of one expert, shape (H, H).

    Args:
        dense: The expert, alone.
        own: Its tokens.
        activation: From gate and up to neurons.
    """
    neurons = dense.shape.intermediate
    moment_HH = own.x_NI.new_zeros(neurons, neurons)
    for part in own.parts():
        weighted_NH = part.weights_N[:, None] * activation(*dense.gate_up(0, part.x_NI))
        moment_HH += gram(weighted_NH)
    return moment_HH


def second_moment(partial_TI: Tensor, sharing: Sharing) -> Tensor:
    """Second moment of the sum of every process's outputs of all tokens, shape (I, I)."""
    part = sharing.own(len(partial_TI))
    output_TI = sharing.sum(partial_TI)[part]
    return sharing.sum(output_TI.T @ output_TI)


def input_moments(group: DenseGroup, tokens: LayerTokens) -> Tensor:
    """Second moment of every expert's inputs, shape (E, I, I); their sum is `pooled_II`.

    Args:
        group: The dense experts.
        tokens: Tokens of the layer.
    """
    experts, _, hidden = group.shape
    hidden_EII = tokens.x_TI.new_empty(experts, hidden, hidden)
    for own_II, expert in zip(hidden_EII, group.experts, strict=True):
        own = tokens.of_expert(expert, least=group.enough_tokens)
        weighted_NI = own.weights_N[:, None] * own.x_NI
        torch.mm(weighted_NI.T, weighted_NI, out=own_II)
    return hidden_EII


def refit_moments(
    group: DenseGroup,
    tokens: LayerTokens,
    compressed: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    *,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Moments that refitting down needs, with compressed gate and up.

    Args:
        group: The dense experts.
        tokens: Tokens of the layer.
        compressed: Gate and up of tokens in one expert of the group as they are now, each (N, K).
        activation: From gate and up to neurons.

    Returns:
        Second moment of the neurons as they are now (E, K, K), and with the dense ones (E, K, H).
    """
    now, cross = [], []
    for place, expert in enumerate(group.experts):
        own, dense = tokens.of_expert(expert, least=group.enough_tokens), group.part(place)
        found: Sequence[Tensor] = ()
        for part in own.parts():
            weight_N1 = part.weights_N[:, None]
            dense_NH = weight_N1 * activation(*dense.gate_up(0, part.x_NI))
            now_NK = weight_N1 * activation(*compressed(place, part.x_NI))
            more = gram(now_NK), now_NK.T @ dense_NH
            found = [one.add_(its) for one, its in zip(found, more, strict=True)] if found else more
        now.append(found[0])
        cross.append(found[1])
    return torch.stack(now), torch.stack(cross)


def _neurons(gate_NH: Tensor, up_NH: Tensor, activation: Activation) -> _Neurons:
    with torch.enable_grad():
        gate_NH, up_NH = (
            value_NH.detach().requires_grad_(True)  # noqa: FBT003
            for value_NH in (gate_NH, up_NH)
        )
        h_NH = activation(gate_NH, up_NH)
        by_gate_NH, by_up_NH = torch.autograd.grad(h_NH.sum(), (gate_NH, up_NH))
    return _Neurons(h_NH.detach(), by_gate_NH, by_up_NH)
