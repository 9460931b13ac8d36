"""Predicted output error of a layer at every size, from spectra and neuron energies.

All errors are relative squared errors of the layer's combined routed output: shares of E‖y‖², with
tokens relative to the norms of their hidden states (`CalibrationPass.capture`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuckerize.calibration.moments import GroupMoments, refit_moments
from tuckerize.calibration.rounding import rounding_errors
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.domain import CoreType, Projection
from tuckerize.linalg.gram import eigenvalues_and_vectors
from tuckerize.linalg.selection import KeptNeurons, all_neurons, eliminate, refit_down
from tuckerize.linalg.weighted import matrix_roots
from tuckerize.runtime.activations import Activation

Array = npt.NDArray[np.float64]

# Widths, as shares of all neurons, at which the spectrum of gate and up is computed.
_WIDTH_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Core sizes, as shares of the hidden size, at which truncated inputs are tried.
_MEASURED_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """Predicted errors of one layer.

    Attributes:
        layer: Index of the layer.
        sensitivity: KL divergence of the model's prediction, nats per token, at a relative squared
            output error of 1, extrapolated from a small one.
        selection_H: Error at every mean width 0..H, shape (H + 1,).
        equal_selection_H: The same if all experts are equally wide.
        widths_K: Widths of the rows of `gate_up_KI`, descending.
        gate_up_KI: Error of truncating the inputs of gate and up to 0..I, shape (K, I + 1).
        down_I: Error of truncating the combined output to 0..I, shape (I + 1,).
        gate_up_expert_E: Error of core sizes r_E = 0..E of gate and up, all neurons kept.
        gate_up_intermediate_H: Error of core sizes r_H = 0..H of gate and up.
        down_expert_E: Error of core sizes r_E = 0..E of down.
        down_intermediate_H: Error of core sizes r_H = 0..H of down.
        rounding_C: Error of rounding the cores, for every encoding; about the same at every size.
        routed_E: Tokens that the router sent to every expert.
    """

    layer: int
    sensitivity: float
    selection_H: Array
    equal_selection_H: Array
    widths_K: Array
    gate_up_KI: Array
    down_I: Array
    gate_up_expert_E: Array
    gate_up_intermediate_H: Array
    down_expert_E: Array
    down_intermediate_H: Array
    rounding_C: Array
    routed_E: Array

    def rounding_error(self, cores: CoreType | None) -> float:
        """Error of rounding the cores; 0 of those that are not quantised."""
        return 0.0 if cores is None else float(self.rounding_C[list(CoreType).index(cores)])

    def errors(self, widths: Array, gate_up: Array, down: Array) -> Array:
        """Predicted errors at mean widths and core sizes r_I of gate and up, and of down.

        The errors of the three causes are uncorrelated, so that they add up. Returns an
        array of shape (len(widths), len(gate_up), len(down)).
        """
        ascending = self.widths_K[::-1]
        rows = np.stack(
            [np.interp(widths, ascending, self.gate_up_KI[::-1, int(size)]) for size in gate_up],
            axis=1,
        )
        selection = self.selection_H[widths.astype(int)]
        total: Array = (
            selection[:, None, None] + rows[:, :, None] + self.down_I[down.astype(int)][None, None]
        )
        return total


def profile_layer(
    layer: int,
    groups: Sequence[DenseGroup],
    moments: Sequence[GroupMoments],
    tokens: LayerTokens,
    *,
    activation: Activation,
    output_energy: float,
    sensitivity: float,
) -> LayerProfile:
    """Curves of one layer.

    Args:
        layer: Index of the layer.
        groups: Its dense experts.
        moments: Their moments.
        tokens: The tokens that these are of.
        activation: From gate and up to neurons.
        output_energy: ‖y‖² of the combined output of all groups, summed over the tokens.
        sensitivity: See `LayerProfile`.
    """
    eliminations = [
        eliminate(own.neurons_EHH, group.stacks[Projection.DOWN])
        for group, own in zip(groups, moments, strict=True)
    ]
    energy = max(output_energy, 1e-30)
    neurons = groups[0].shape.intermediate
    widths = sorted({max(1, round(share * neurons)) for share in _WIDTH_SHARES}, reverse=True)
    spectra = np.stack(
        [
            sum(
                _gate_up_tail(_gate_up_energy(group, own, found.kept(width)), own)
                for group, own, found in zip(groups, moments, eliminations, strict=True)
            )
            for width in widths
        ]
    )
    spectra *= _measured_over_first_order(groups, moments, tokens, spectra[0], activation)
    # Interpolation between measured ratios must not make a larger core size look worse.
    spectra = np.maximum.accumulate(spectra[:, ::-1], axis=1)[:, ::-1]
    lost = sum(found.errors_H.numpy() for found in eliminations)
    equal = sum(found.equal_errors_H.numpy() for found in eliminations)
    full = [_full_tails(group, own) for group, own in zip(groups, moments, strict=True)]
    tails = [np.asarray(sum(parts)) / energy for parts in zip(*full, strict=True)]
    return LayerProfile(
        layer=layer,
        sensitivity=sensitivity,
        selection_H=np.asarray(lost)[::-1] / energy,
        equal_selection_H=np.asarray(equal)[::-1] / energy,
        widths_K=np.array(widths, dtype=np.float64),
        gate_up_KI=spectra / energy,
        down_I=np.asarray(sum(_tail(own.output_II) for own in moments)) / energy,
        gate_up_expert_E=tails[0],
        gate_up_intermediate_H=tails[1],
        down_expert_E=tails[2],
        down_intermediate_H=tails[3],
        rounding_C=rounding_errors(groups, tokens, activation=activation)
        * sum(map(_output_energy, groups, moments))
        / energy,
        routed_E=np.concatenate([own.routed_E.numpy() for own in moments]).astype(np.float64),
    )


def _output_energy(group: DenseGroup, moments: GroupMoments) -> float:
    """Energy of the experts' outputs, which rounding changes independently of each other."""
    down_EHI = group.stacks[Projection.DOWN]
    return float((down_EHI * (moments.neurons_EHH @ down_EHI)).sum())


def _gate_up_energy(group: DenseGroup, moments: GroupMoments, kept: KeptNeurons) -> Tensor:
    """Gram matrix (I, I) of the kept rows of gate and up, weighted by the sensitivity.

    Sensitivity of the output, to first order; see `GroupMoments`.
    """
    hidden = group.shape.hidden
    energy_II = torch.zeros((hidden, hidden), dtype=torch.float64)
    for projection, sensitivities in (
        (Projection.GATE, moments.gate_sensitivity_EH),
        (Projection.UP, moments.up_sensitivity_EH),
    ):
        for expert, (stack_HI, sensitivity_H) in enumerate(
            zip(group.stacks[projection], sensitivities, strict=True)
        ):
            places_K = kept.of_expert(expert).to(stack_HI.device)
            rows_KI = sensitivity_H[places_K].sqrt()[:, None] * stack_HI[places_K]
            energy_II += (rows_KI.T @ rows_KI).cpu().double()
    return energy_II


def _pooled_roots(moments: GroupMoments) -> tuple[Tensor, Tensor]:
    """Roots of the inputs' moment of all experts, as if each saw the mean of them."""
    return matrix_roots(moments.hidden_EII.sum(0) / len(moments.hidden_EII))


def _gate_up_tail(energy_II: Tensor, moments: GroupMoments) -> Array:
    """Squared output error, to first order, of truncating the inputs of gate and up to 0..I."""
    root_II = _pooled_roots(moments)[0]
    return _tail(root_II @ energy_II @ root_II)


def _measured_over_first_order(
    groups: Sequence[DenseGroup],
    moments: Sequence[GroupMoments],
    tokens: LayerTokens,
    first_order_I: Array,
    activation: Activation,
) -> Array:
    """Ratio of the error of truncated inputs to its first order, for 0..I, shape (I + 1,).

    The neurons of an expert lose the same directions of their inputs, so that their errors add up;
    refitting down recovers a part. Both are measured at a few core sizes; in between the
    ratio is interpolated.
    """
    hidden = groups[0].shape.hidden
    sizes = sorted({max(1, round(part * hidden)) for part in _MEASURED_SHARES})
    missed = np.zeros(len(sizes))
    for group, own in zip(groups, moments, strict=True):
        root_II, inverse_II = _pooled_roots(own)
        energy_II = root_II @ _gate_up_energy(group, own, all_neurons(group.shape)) @ root_II
        vectors_II = eigenvalues_and_vectors(energy_II)[1]
        for index, size in enumerate(sizes):
            leading_IR = vectors_II[:, :size]
            projection_II = (root_II @ leading_IR) @ (leading_IR.T @ inverse_II)
            missed[index] += _refitted_error(group, own, tokens, projection_II, activation)
    predicted = np.maximum(first_order_I[sizes], 1e-30 + 1e-12 * first_order_I[0])
    ratios = np.maximum(missed, 0) / predicted
    everywhere: Array = np.interp(np.arange(hidden + 1), [*sizes, hidden], [*ratios, ratios[-1]])
    return everywhere


def _refitted_error(
    group: DenseGroup,
    moments: GroupMoments,
    tokens: LayerTokens,
    projection_II: Tensor,
    activation: Activation,
) -> float:
    """Squared output error of a group with truncated gate and up, and down refitted to them."""
    down_EHI = group.stacks[Projection.DOWN]
    gate_up = [
        group.stacks[p] @ projection_II.to(down_EHI) for p in (Projection.GATE, Projection.UP)
    ]
    now_EHH, cross_EHH = refit_moments(
        group, tokens, lambda place: (gate_up[0][place], gate_up[1][place]), activation=activation
    )
    refitted_EHI = refit_down(now_EHH, cross_EHH, down_EHI, all_neurons(group.shape))
    dense = _output_energy(group, moments)
    mixed = (refitted_EHI * (cross_EHH @ down_EHI)).sum()
    now = (refitted_EHI * (now_EHH @ refitted_EHI)).sum()
    return dense - 2 * float(mixed) + float(now)


def _full_tails(group: DenseGroup, moments: GroupMoments) -> tuple[Array, Array, Array, Array]:
    """Squared output errors of truncating the expert and the intermediate mode.

    Of gate and up, whitened and with rows weighted as in `_gate_up_tail`; of down with its rows
    weighted by the energy of their neurons. Each mode by itself, as HOSVD bounds it.
    """
    root_II = _pooled_roots(moments)[0].to(group.stacks[Projection.GATE])
    gate_up = [
        _mode_tails(sensitivity_EH.sqrt()[:, :, None] * group.stacks[projection] @ root_II)
        for projection, sensitivity_EH in (
            (Projection.GATE, moments.gate_sensitivity_EH),
            (Projection.UP, moments.up_sensitivity_EH),
        )
    ]
    energy_EH = moments.neurons_EHH.diagonal(dim1=1, dim2=2)
    down = _mode_tails(energy_EH.sqrt()[:, :, None] * group.stacks[Projection.DOWN])
    return gate_up[0][0] + gate_up[1][0], gate_up[0][1] + gate_up[1][1], *down


def _mode_tails(stack_EHI: Tensor) -> tuple[Array, Array]:
    """Energy outside of the leading directions of the expert and the intermediate mode."""
    flat_EM = stack_EHI.flatten(1)
    experts_EE = flat_EM @ flat_EM.T
    neurons_HH = stack_EHI.new_zeros((stack_EHI.shape[1],) * 2)
    for slice_HI in stack_EHI:
        neurons_HH += slice_HI @ slice_HI.T
    return _tail(experts_EE), _tail(neurons_HH)


def _tail(moment_NN: Tensor) -> Array:
    """Energy outside of the leading n eigenvectors, for n = 0..N."""
    values = eigenvalues_and_vectors(moment_NN.cpu().double())[0]
    tail: Array = values.flip(0).cumsum(0).flip(0).numpy()
    return np.append(tail, 0.0)
