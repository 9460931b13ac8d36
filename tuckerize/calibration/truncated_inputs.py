"""Error of truncating the inputs of gate and up, measured on some experts of every group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuckerize.calibration.group_statistics import GroupStatistics, spread
from tuckerize.calibration.tokens import LayerTokens
from tuckerize.domain import Projection
from tuckerize.linalg.gram import eigenvalues_and_vectors, gram
from tuckerize.linalg.selection import refitted_energy
from tuckerize.linalg.sharing import Sharing
from tuckerize.linalg.tucker import in_float64
from tuckerize.runtime.activations import Activation

Array = npt.NDArray[np.float64]

# Outputs of an expert that its error is measured on.
_OUTPUTS = 512
# Core sizes, as shares of the hidden size, at which truncated inputs are tried.
_MEASURED_SHARES = (0.25, 0.5, 0.75)


@dataclass(slots=True)
class MeasuredInputs:
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
        places: Sequence[int],
        statistics: GroupStatistics,
        tokens: LayerTokens,
        whitened_II: Tensor,
        roots: tuple[Tensor, Tensor],
        activation: Activation,
    ) -> None:
        """Measure some experts of a group.

        Args:
            places: The experts that are measured.
            statistics: Statistics of the group.
            tokens: Tokens of the layer.
            whitened_II: Whitened Gram matrix of the rows of gate and up.
            roots: The root that whitens, and its inverse.
            activation: Between gate and up.
        """
        vectors_IR = eigenvalues_and_vectors(whitened_II)[1][:, : self.sizes[-1]]
        group, moments = statistics.group, statistics.moments
        basis_IR, onto_IR = ((root_II @ vectors_IR).to(tokens.x_TI) for root_II in roots)
        for place in places:
            rows_KI = torch.cat(
                [
                    sensitivity_EH[place].sqrt()[:, None] * group.matrix(projection, place)
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
                place, statistics, tokens, (basis_IR, onto_IR), self.sizes, activation
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
    place: int,
    statistics: GroupStatistics,
    tokens: LayerTokens,
    bases: tuple[Tensor, Tensor],
    sizes: Sequence[int],
    activation: Activation,
) -> list[float]:
    """Squared output errors of an expert with truncated gate and up, and down refitted to them.

    Core sizes are nested: what a larger one adds is added to the neurons of the one before. Shares
    of the energy are measured, on some outputs, and on some tokens where there are many.
    """
    group, (basis_IR, onto_IR) = statistics.group, bases
    own = tokens.of_expert(group.experts[place], least=group.enough_for_down)
    own = own.thinned(group.profiled_tokens)
    dense = group.part(place)
    gate_HI, up_HI, down_HI = (dense.matrix(p, 0) for p in Projection)
    gate_HR, up_HR = gate_HI @ basis_IR, up_HI @ basis_IR
    neurons, hidden = down_HI.shape
    down_HC = down_HI[:, spread(hidden, _OUTPUTS)]
    now_SHH = down_HI.new_zeros(len(sizes), neurons, neurons)
    outputs_SHC = down_HC.new_zeros(len(sizes), *down_HC.shape)
    energy = torch.finfo(torch.float32).tiny
    for part in own.parts():
        weight_N1 = part.weights_N[:, None]
        exact_NH = weight_N1 * activation(*dense.gate_up(0, part.x_NI))
        exact_NC = exact_NH @ down_HC
        energy += float(exact_NC.square().sum())
        low_NR = part.x_NI @ onto_IR
        gate_NH, up_NH = torch.zeros_like(exact_NH), torch.zeros_like(exact_NH)
        if dense.biases:
            gate_NH += dense.biases[Projection.GATE][0]
            up_NH += dense.biases[Projection.UP][0]
        for index, (start, stop) in enumerate(itertools.pairwise([0, *sizes])):
            gate_NH.addmm_(low_NR[:, start:stop], gate_HR[:, start:stop].T)
            up_NH.addmm_(low_NR[:, start:stop], up_HR[:, start:stop].T)
            now_NH = weight_N1 * activation(gate_NH, up_NH)
            now_SHH[index] += gram(now_NH)
            outputs_SHC[index].addmm_(now_NH.T, exact_NC)
    return [
        float(statistics.moments.output_energy_E[place])
        * (1 - refitted_energy(now_HH, outputs_HC, down_HC) / energy)
        for now_HH, outputs_HC in zip(now_SHH, outputs_SHC, strict=True)
    ]
