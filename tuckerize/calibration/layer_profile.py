"""Predicted output error of a layer at every size, from spectra and neuron energies.

All errors are relative squared errors of the layer's combined routed output: shares of E‖y‖², with
tokens relative to the norms of their hidden states (`CalibrationPass.capture`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuckerize.calibration.moments import GroupMoments
from tuckerize.calibration.rounding import rounding_errors
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.domain import CoreType, Projection
from tuckerize.linalg.gram import add_gram, eigenvalues, eigenvalues_and_vectors, symmetric
from tuckerize.linalg.selection import KeptNeurons, eliminate, refitted_energy
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.threads import parallel_workers
from tuckerize.linalg.tucker import in_float64
from tuckerize.linalg.weighted import matrix_roots
from tuckerize.progress import Stage, silent
from tuckerize.runtime.activations import Activation

Array = npt.NDArray[np.float64]

# Widths, as shares of all neurons, at which the spectrum of gate and up is computed.
_WIDTH_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Core sizes, as shares of the hidden size, at which truncated inputs are tried.
_MEASURED_SHARES = (0.25, 0.5, 0.75)
# Experts of a group that they are tried with.
_MEASURED_EXPERTS = 16


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
    stage: Stage = silent,
    sharing: Sharing = ALONE,
) -> LayerProfile:
    """Curves of one layer; its sensitivity stays open (NaN).

    Args:
        layer: Index of the layer.
        groups: Its dense experts; this process's.
        moments: Their moments.
        tokens: The tokens that these are of.
        activation: From gate and up to neurons.
        output_energy: ‖y‖² of the combined output of all groups, summed over the tokens.
        stage: Is told what begins, with tenths of a layer's profile.
        sharing: The processes that share the layer's experts; all get the same profile.
    """
    stage("elimination of neurons", 1)
    eliminations = [
        eliminate(own.neurons_EHH, group.stacks[Projection.DOWN], sharing)
        for group, own in zip(groups, moments, strict=True)
    ]
    stage("spectra", 2)
    energy = max(output_energy, 1e-30)
    neurons = groups[0].shape.intermediate
    widths = sorted({max(1, round(share * neurons)) for share in _WIDTH_SHARES}, reverse=True)
    roots = [matrix_roots(own.pooled_II / len(own.routed_E)) for own in moments]
    spectra = np.zeros((len(widths), groups[0].shape.hidden + 1))
    measured = _Measured.of(groups[0].shape.hidden)
    for group, own, found, both in zip(groups, moments, eliminations, roots, strict=True):
        kept = [found.kept(width) for width in widths]
        experts = sharing.own(len(own.routed_E))
        energies = _gate_up_energies(group, own, [one.of_experts(experts) for one in kept])
        energies = [in_float64(sharing.sum(energy_II)) for energy_II in energies]
        white_II = both[0] @ energies[0] @ both[0]
        spectra += np.stack(
            sharing.each([partial(_whitened_tail, own_II, both[0]) for own_II in energies])
        )
        chosen = spread(len(own.routed_E), _MEASURED_EXPERTS)
        places = [e - experts.start for e in chosen if experts.start <= e < experts.stop]
        measured.add(group, places, own, tokens, white_II, both, activation)
    spectra *= measured.of_all(sharing).over_first_order()
    # Interpolation between measured ratios must not make a larger core size look worse.
    spectra = np.maximum.accumulate(spectra[:, ::-1], axis=1)[:, ::-1]
    stage("core sizes", 3)
    lost = sum(found.errors_H.numpy() for found in eliminations)
    equal = sum(found.equal_errors_H.numpy() for found in eliminations)
    full = [
        _full_tails(group, own, both[0], sharing)
        for group, own, both in zip(groups, moments, roots, strict=True)
    ]
    tails = [np.asarray(sum(parts)) / energy for parts in zip(*full, strict=True)]
    return LayerProfile(
        layer=layer,
        sensitivity=math.nan,
        selection_H=np.asarray(lost)[::-1] / energy,
        equal_selection_H=np.asarray(equal)[::-1] / energy,
        widths_K=np.array(widths, dtype=np.float64),
        gate_up_KI=spectra / energy,
        down_I=np.asarray(sum(sharing.each([partial(_tail, own.output_II) for own in moments])))
        / energy,
        gate_up_expert_E=tails[0],
        gate_up_intermediate_H=tails[1],
        down_expert_E=tails[2],
        down_intermediate_H=tails[3],
        rounding_C=rounding_errors(groups, tokens, activation=activation, sharing=sharing)
        * sum(sharing.of_all(sum(map(_output_energy, groups, moments))))
        / energy,
        routed_E=np.concatenate([own.routed_E.numpy() for own in moments]).astype(np.float64),
    )


def _output_energy(group: DenseGroup, moments: GroupMoments) -> float:
    """Energy of the experts' outputs, which rounding changes independently of each other."""
    down_EHI = group.stacks[Projection.DOWN]
    return float((down_EHI * (moments.neurons_EHH @ down_EHI)).sum())


def _gate_up_energies(
    group: DenseGroup, moments: GroupMoments, kept: Sequence[KeptNeurons]
) -> list[Tensor]:
    """Gram matrices (I, I) of the kept rows of gate and up, weighted by the sensitivity.

    Sensitivity of the output, to first order; see `GroupMoments`.

    Args:
        group: The dense experts.
        moments: Their moments.
        kept: Kept neurons at descending widths, each a part of those before: every row is
            multiplied once.
    """
    masks_KEH = torch.stack([own.mask(group.shape.intermediate) for own in kept])
    widest_first = list(masks_KEH ^ torch.cat([masks_KEH[1:], torch.zeros_like(masks_KEH[:1])]))
    hidden = group.shape.hidden
    energies = [moments.pooled_II.new_zeros(hidden, hidden)]
    for rows_EH in reversed(widest_first):
        energy_II = energies[-1].clone()
        _add_rows(energy_II, group, moments, rows_EH)
        energies.append(energy_II)
    return [symmetric(energy_II) for energy_II in reversed(energies[1:])]


def _add_rows(energy_II: Tensor, group: DenseGroup, moments: GroupMoments, rows_EH: Tensor) -> None:
    """Add the products of some rows of gate and up to the upper triangle of their Gram matrix."""
    device = energy_II.device
    with parallel_workers(device) as workers:
        for expert, places_K in enumerate(rows_EH):
            own_K = places_K.nonzero()[:, 0].to(device)
            for projection, sensitivity_EH in (
                (Projection.GATE, moments.gate_sensitivity_EH),
                (Projection.UP, moments.up_sensitivity_EH),
            ):
                weights_K1 = sensitivity_EH[expert, own_K].sqrt()[:, None]
                add_gram(energy_II, weights_K1 * group.stacks[projection][expert, own_K], workers)


@dataclass(slots=True)
class _Measured:
    """Error of truncated inputs of some experts, measured and to first order.

    The neurons of an expert lose the same directions of their inputs, so that their errors add up;
    refitting down recovers a part. Both are measured at a few core sizes, on a few experts of
    every group.

    Attributes:
        sizes: The core sizes, ascending; the hidden size.
        hidden: Size of the mode.
        missed: Squared output errors at these sizes.
        predicted: The same to first order.
        most: First-order error of truncating everything.
    """

    sizes: list[int]
    hidden: int
    missed: Array
    predicted: Array
    most: float = 0.0

    @classmethod
    def of(cls, hidden: int) -> Self:
        """Nothing measured yet."""
        sizes = sorted({max(1, round(part * hidden)) for part in _MEASURED_SHARES})
        return cls(sizes, hidden, np.zeros(len(sizes)), np.zeros(len(sizes)))

    def of_all(self, sharing: Sharing) -> Self:
        """Everything that the processes have measured, each with its own experts."""
        parts = sharing.of_all(self)
        missed, predicted = (
            np.asarray(sum(getattr(part, name) for part in parts))
            for name in ("missed", "predicted")
        )
        most = sum(part.most for part in parts)
        return type(self)(self.sizes, self.hidden, missed, predicted, most)

    def add(
        self,
        group: DenseGroup,
        places: Sequence[int],
        moments: GroupMoments,
        tokens: LayerTokens,
        whitened_II: Tensor,
        roots: tuple[Tensor, Tensor],
        activation: Activation,
    ) -> None:
        """Measure some experts of a group.

        Args:
            group: The dense experts.
            places: Those that are measured.
            moments: Their moments.
            tokens: Tokens of the layer.
            whitened_II: Whitened Gram matrix of the rows of gate and up.
            roots: The root that whitens, and its inverse.
            activation: Between gate and up.
        """
        vectors_IR = eigenvalues_and_vectors(whitened_II)[1][:, : self.sizes[-1]]
        down_EHI = group.stacks[Projection.DOWN]
        basis_IR = (roots[0] @ vectors_IR).to(down_EHI)
        onto_IR = (roots[1] @ vectors_IR).to(down_EHI)
        for place in places:
            rows_KI = torch.cat(
                [
                    sensitivity_EH[place].sqrt()[:, None] * group.stacks[projection][place]
                    for projection, sensitivity_EH in (
                        (Projection.GATE, moments.gate_sensitivity_EH),
                        (Projection.UP, moments.up_sensitivity_EH),
                    )
                ]
            )
            energy_R = in_float64((rows_KI @ basis_IR).square().sum(0)).cumsum(0)
            total = float((rows_KI @ roots[0].to(rows_KI)).square().sum())
            self.most += total
            kept = energy_R[[size - 1 for size in self.sizes]].cpu().numpy()
            self.predicted += np.maximum(total - kept, 0.0)
            self.missed += _refitted_errors(
                group, place, moments, tokens, (basis_IR, onto_IR), self.sizes, activation
            )

    def over_first_order(self) -> Array:
        """Ratio of the measured error to its first order for 0..I, shape (I + 1,).

        Interpolated between the sizes that were measured.
        """
        predicted = np.maximum(self.predicted, 1e-30 + 1e-12 * self.most)
        ratios = np.maximum(self.missed, 0) / predicted
        everywhere: Array = np.interp(
            np.arange(self.hidden + 1), [*self.sizes, self.hidden], [*ratios, ratios[-1]]
        )
        return everywhere


def _refitted_errors(
    group: DenseGroup,
    place: int,
    moments: GroupMoments,
    tokens: LayerTokens,
    bases: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    activation: Activation,
) -> list[float]:
    """Squared output errors of an expert with truncated gate and up, and down refitted to them.

    Core sizes are nested: what a larger one adds is added to the neurons of the one before.
    """
    basis_IR, onto_IR = bases
    own = tokens.of_expert(group.experts[place], least=group.enough_tokens)
    gate_HI, up_HI, down_HI = (group.stacks[p][place] for p in Projection)
    weight_N1 = own.weights_N[:, None]
    exact_NH = weight_N1 * activation(*group.gate_up(place, own.x_NI))
    low_NR = own.x_NI @ onto_IR
    gate_HR, up_HR = gate_HI @ basis_IR, up_HI @ basis_IR
    gate_NH, up_NH = torch.zeros_like(exact_NH), torch.zeros_like(exact_NH)
    if group.biases:
        gate_NH += group.biases[Projection.GATE][place]
        up_NH += group.biases[Projection.UP][place]
    dense = float((down_HI * (moments.neurons_EHH[place] @ down_HI)).sum())
    errors = []
    for start, stop in itertools.pairwise([0, *sizes]):
        gate_NH.addmm_(low_NR[:, start:stop], gate_HR[:, start:stop].T)
        up_NH.addmm_(low_NR[:, start:stop], up_HR[:, start:stop].T)
        now_NH = weight_N1 * activation(gate_NH, up_NH)
        recovered = refitted_energy(now_NH.T @ now_NH, now_NH.T @ exact_NH, down_HI)
        errors.append(dense - recovered)
    return errors


def _full_tails(
    group: DenseGroup, moments: GroupMoments, root_II: Tensor, sharing: Sharing
) -> tuple[Array, Array, Array, Array]:
    """Squared output errors of truncating the expert and the intermediate mode.

    Of gate and up, whitened and with rows weighted as in `_gate_up_energies`; of down with its rows
    weighted by the energy of their neurons. Each mode by itself, as HOSVD bounds it.
    """
    root_II = root_II.to(group.stacks[Projection.GATE])
    gate_up = [
        _mode_tails(sensitivity_EH.sqrt()[:, :, None] * group.stacks[projection] @ root_II, sharing)
        for projection, sensitivity_EH in (
            (Projection.GATE, moments.gate_sensitivity_EH),
            (Projection.UP, moments.up_sensitivity_EH),
        )
    ]
    energy_EH = moments.neurons_EHH.diagonal(dim1=1, dim2=2)
    down = _mode_tails(energy_EH.sqrt()[:, :, None] * group.stacks[Projection.DOWN], sharing)
    return gate_up[0][0] + gate_up[1][0], gate_up[0][1] + gate_up[1][1], *down


def _mode_tails(stack_EHI: Tensor, sharing: Sharing) -> tuple[Array, Array]:
    """Energy outside of the leading directions of the expert and the intermediate mode."""
    experts_EE = sharing.gram(stack_EHI.flatten(1))
    neurons_HH = stack_EHI.new_zeros((stack_EHI.shape[1],) * 2)
    with parallel_workers(stack_EHI.device) as workers:
        for slice_HI in stack_EHI:
            add_gram(neurons_HH, slice_HI.T, workers)
    return _tail(experts_EE), _tail(sharing.sum(neurons_HH))


def _tail(moment_NN: Tensor) -> Array:
    """Energy outside of the leading n eigenvectors, for n = 0..N; reads the upper triangle."""
    values = eigenvalues(in_float64(moment_NN))
    tail: Array = values.flip(0).cumsum(0).flip(0).cpu().numpy()
    return np.append(tail, 0.0)


def _whitened_tail(energy_II: Tensor, root_II: Tensor) -> Array:
    return _tail(root_II @ energy_II @ root_II)


def spread(length: int, count: int) -> list[int]:
    """Middles of `count` equal parts of a range, or all indices of a shorter one."""
    count = min(count, length)
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]
