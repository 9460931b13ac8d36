"""Predicted output error of a layer at every size, from spectra and neuron energies.

All errors are relative squared errors of the layer's combined routed output: shares of E‖y‖², with
tokens relative to the norms of their hidden states (`CalibrationPass.capture`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tuckerize.calibration.group_statistics import GroupStatistics
from tuckerize.calibration.rounding import rounding_errors
from tuckerize.calibration.spectra import Spectra, spectra_of
from tuckerize.calibration.tokens import LayerTokens
from tuckerize.domain import CoreType
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.progress import Stage, silent
from tuckerize.runtime.activations import Activation

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """Predicted errors of one layer.

    Attributes:
        layer: Index of the layer.
        sensitivity: KL divergence of the model's prediction, nats per token, at a relative squared
            output error of 1, extrapolated from that of pruned neurons.
        small_sensitivity: The same, extrapolated from smaller errors, of the part of the divergence
            that grows with the squared error.
        switching: The part that grows with the error itself, at an error of 1: tokens that later
            layers send to other experts.
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
    small_sensitivity: float
    switching: float
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
    statistics: Sequence[GroupStatistics],
    tokens: LayerTokens,
    *,
    activation: Activation,
    output_energy: float,
    spectra: bool = True,
    stage: Stage = silent,
    sharing: Sharing = ALONE,
) -> LayerProfile:
    """Curves of one layer; its sensitivities and switching stay open (NaN).

    Args:
        layer: Index of the layer.
        statistics: Those of its groups.
        tokens: The tokens that these are of.
        activation: From gate and up to neurons.
        output_energy: ‖y‖² of the combined output of all groups, summed over the tokens.
        spectra: Whether modes may be truncated; otherwise the errors of that are infinite.
        stage: Is told what begins, with tenths of a layer's profile.
        sharing: The processes that share the layer's experts; all get the same profile.
    """
    stage("spectra", 1)
    find = partial(spectra_of, activation=activation, sharing=sharing)
    shape = statistics[0].group.shape._replace(experts=len(statistics[0].moments.routed_E))
    found = find(statistics, tokens) if spectra else Spectra.unknown(shape)
    stage("rounding", 4)
    energy = max(output_energy, 1e-30)
    lost = sum(own.elimination.errors_H.numpy() for own in statistics)
    equal = sum(own.elimination.equal_errors_H.numpy() for own in statistics)
    rounded = rounding_errors(statistics, tokens, activation=activation, sharing=sharing)
    return LayerProfile(
        layer=layer,
        sensitivity=math.nan,
        small_sensitivity=math.nan,
        switching=math.nan,
        selection_H=np.asarray(lost)[::-1] / energy,
        equal_selection_H=np.asarray(equal)[::-1] / energy,
        widths_K=found.widths_K,
        gate_up_KI=found.gate_up_KI / energy,
        down_I=found.down_I / energy,
        gate_up_expert_E=found.gate_up_expert_E / energy,
        gate_up_intermediate_H=found.gate_up_intermediate_H / energy,
        down_expert_E=found.down_expert_E / energy,
        down_intermediate_H=found.down_intermediate_H / energy,
        rounding_C=rounded / energy,
        routed_E=np.concatenate([own.moments.routed_E.numpy() for own in statistics]).astype(
            np.float64
        ),
    )


def two_orders(large: tuple[float, float], small: tuple[float, float]) -> tuple[float, float]:
    """The nonnegative a and b of `a e² + b e` through two points, or the nearest.

    Args:
        large: A positive e, and the value there.
        small: The same of a smaller one; the other counts where a or b would be negative.
    """
    (e2, value2), (e1, value1) = large, small
    second = (value2 / e2 - value1 / e1) / (e2 - e1)
    if second < 0:
        return 0.0, value2 / e2
    first = value2 / e2 - second * e2
    return (value2 / e2**2, 0.0) if first < 0 else (second, first)
