"""Spectra of the experts of a layer: the error of truncating each mode, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuckerize.calibration.group_statistics import GroupStatistics, spread
from tuckerize.calibration.moments import GroupMoments
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.calibration.truncated_inputs import MeasuredInputs
from tuckerize.domain import Projection, StackShape
from tuckerize.linalg.gram import add_gram, eigenvalues, symmetric
from tuckerize.linalg.selection import KeptNeurons
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.threads import parallel_workers
from tuckerize.linalg.tucker import in_float64
from tuckerize.linalg.weighted import matrix_roots
from tuckerize.runtime.activations import Activation

Array = npt.NDArray[np.float64]

# Widths, as shares of all neurons, at which the spectrum of gate and up is computed.
_WIDTH_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Experts of a group that truncated inputs are tried with.
_MEASURED_EXPERTS = 8
# The spectra of the expert and the intermediate mode are of so many times as many columns as the
# mode has rows, or of all.
_COLUMNS_PER_ROW = 16
ROW_VALUES = 2**29
"""Values of the rows of all experts that are multiplied with each other at once (2 GiB)."""


class Spectra(NamedTuple):
    """Squared output errors of truncated modes; see the attributes of `LayerProfile`."""

    widths_K: Array
    gate_up_KI: Array
    down_I: Array
    gate_up_expert_E: Array
    gate_up_intermediate_H: Array
    down_expert_E: Array
    down_intermediate_H: Array

    @classmethod
    def unknown(cls, shape: StackShape) -> Self:
        """Those of a layer of which no mode may be truncated."""

        def full_only(size: int) -> Array:
            errors = np.full(size + 1, np.inf)
            errors[size] = 0.0
            return errors

        experts, neurons, hidden = map(full_only, shape)
        widths_K = np.array([shape.intermediate], dtype=np.float64)
        return cls(widths_K, hidden[None], hidden, experts, neurons, experts, neurons)


def spectra_of(
    statistics: Sequence[GroupStatistics],
    tokens: LayerTokens,
    *,
    activation: Activation,
    sharing: Sharing = ALONE,
) -> Spectra:
    """Spectra of a layer, those of gate and up corrected by what some experts lose.

    Args:
        statistics: Those of its groups.
        tokens: The tokens that these are of.
        activation: From gate and up to neurons.
        sharing: The processes that share the layer's experts; all get the same spectra.
    """
    _, neurons, hidden = statistics[0].group.shape
    widths = sorted({max(1, round(share * neurons)) for share in _WIDTH_SHARES}, reverse=True)
    gate_up_KI = np.zeros((len(widths), hidden + 1))
    measured = MeasuredInputs.of(hidden)
    full = []
    for part in statistics:
        group, own, found = part.group, part.moments, part.elimination
        roots = matrix_roots(own.pooled_II / len(own.routed_E))
        kept = [found.kept(width) for width in widths]
        experts = sharing.own(len(own.routed_E))
        energies = _gate_up_energies(group, own, [one.of_experts(experts) for one in kept])
        energies = [sharing.sum(energy_II) for energy_II in energies]
        gate_up_KI += np.stack(
            sharing.each([partial(_whitened_tail, own_II, roots[0]) for own_II in energies])
        )
        white_II = _whitened(energies[0], roots[0])
        del energies
        chosen = spread(len(own.routed_E), _MEASURED_EXPERTS)
        places = [e - experts.start for e in chosen if experts.start <= e < experts.stop]
        measured.add(places, part, tokens, white_II, roots, activation)
        full.append(_full_tails(group, own, roots[0], sharing))
    gate_up_KI *= measured.of_all(sharing).over_first_order()
    # Interpolation between measured ratios must not make a larger core size look worse.
    gate_up_KI = np.maximum.accumulate(gate_up_KI[:, ::-1], axis=1)[:, ::-1]
    down = sharing.each([partial(_tail, own.moments.output_II) for own in statistics])
    return Spectra(
        np.array(widths, dtype=np.float64),
        gate_up_KI,
        np.asarray(sum(down)),
        *(np.asarray(sum(parts)) for parts in zip(*full, strict=True)),
    )


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
    del energies[0]
    for place, energy_II in enumerate(energies):  # one by one: they are large
        energies[place] = symmetric(energy_II)
    return energies[::-1]


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
                rows_KI = group.matrix(projection, expert)[own_K]
                add_gram(energy_II, weights_K1 * rows_KI, workers)


def _full_tails(
    group: DenseGroup, moments: GroupMoments, root_II: Tensor, sharing: Sharing
) -> tuple[Array, Array, Array, Array]:
    """Squared output errors of truncating the expert and the intermediate mode.

    Of gate and up, whitened and with rows weighted as in `_gate_up_energies`; of down with its rows
    weighted by the energy of their neurons. Each mode by itself, as HOSVD bounds it.
    """
    root_II = root_II.to(moments.energy_EH)
    gate, up = (
        _mode_tails(group, projection, sensitivity_EH.sqrt(), sharing, root_II)
        for projection, sensitivity_EH in (
            (Projection.GATE, moments.gate_sensitivity_EH),
            (Projection.UP, moments.up_sensitivity_EH),
        )
    )
    down = _mode_tails(group, Projection.DOWN, moments.energy_EH.sqrt(), sharing)
    return gate[0] + up[0], gate[1] + up[1], *down


def _mode_tails(
    group: DenseGroup,
    projection: Projection,
    weights_EH: Tensor,
    sharing: Sharing,
    root_II: Tensor | None = None,
) -> tuple[Array, Array]:
    """Energy outside of the leading directions of the expert and the intermediate mode.

    From every n-th of the columns, where all experts have many together.

    Args:
        group: The dense experts.
        projection: Which of their matrices.
        weights_EH: Weights of their rows.
        sharing: The processes that share the group.
        root_II: What the rows are multiplied by.
    """
    experts, neurons, hidden = group.shape
    all_experts = sharing.total(experts)
    step = column_step(StackShape(all_experts, neurons, hidden))
    columns = len(range(0, hidden, step))
    root_IC = None if root_II is None else root_II[:, ::step].contiguous()

    def rows(place: int, some: slice) -> Tensor:
        weights_K1, own_KI = weights_EH[place, some, None], group.matrix(projection, place)[some]
        return weights_K1 * own_KI[:, ::step] if root_IC is None else weights_K1 * own_KI @ root_IC

    count = max(1, ROW_VALUES // (all_experts * columns))
    grams = []
    for first in range(0, neurons, count):
        rows_EKC = weights_EH.new_empty(experts, min(count, neurons - first), columns)
        for place in range(experts):
            rows_EKC[place] = rows(place, slice(first, first + count))
        grams.append(sharing.gram(rows_EKC.flatten(1)))
    neurons_HH = weights_EH.new_zeros(neurons, neurons)
    with parallel_workers(neurons_HH.device) as workers:
        for place in range(experts):
            own_HC = rows_EKC[place] if count >= neurons else rows(place, slice(None))
            add_gram(neurons_HH, own_HC.T, workers)
    scale = hidden / columns
    return scale * _tail(torch.stack(grams).sum(0)), scale * _tail(sharing.sum(neurons_HH))


def column_step(shape: StackShape) -> int:
    """Distance of the columns of experts that the spectra of these two modes are of."""
    experts, neurons, hidden = shape
    enough = min(experts * hidden // neurons, neurons * hidden // experts) // _COLUMNS_PER_ROW
    return max(1, enough)


def _tail(moment_NN: Tensor) -> Array:
    """Energy outside of the leading n eigenvectors, for n = 0..N; reads the upper triangle."""
    values = eigenvalues(in_float64(moment_NN))
    tail: Array = values.flip(0).cumsum(0).flip(0).cpu().numpy()
    return np.append(tail, 0.0)


def _whitened_tail(energy_II: Tensor, root_II: Tensor) -> Array:
    return _tail(_whitened(energy_II, root_II))


def _whitened(energy_II: Tensor, root_II: Tensor) -> Tensor:
    return root_II @ in_float64(energy_II) @ root_II
