"""Quantised cores: the last step before writing.

With calibration tokens, each expert's matrix is quantised for the inputs that it sees: gate and up
for its tokens in the latent space, down for its neurons as the quantised gate and up give them. A
matrix that experts share sees the inputs of all, weighted by the squares of their coefficients.
Without tokens, values are rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.refine import relative_output_error
from tuckerize.calibration.tokens import LayerTokens
from tuckerize.checkpoint.reader import TORCH_DTYPES
from tuckerize.compression.factors import (
    GroupFactors,
    GroupStep,
    LayerFactors,
    Step,
    for_each_group,
)
from tuckerize.domain import DOWN, GATE_UP, CoreType, Coupling, Projection
from tuckerize.linalg.quantise import quantise
from tuckerize.linalg.sharing import Sharing
from tuckerize.linalg.tucker import check_no_overflow
from tuckerize.runtime.activations import Activation
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.weight_types import WeightType

Inputs = Callable[[int], Tensor]
"""Inputs of one expert of a group, one per row, times the weights of its tokens."""


def round_cores(weights: WeightType, core_type: CoreType) -> Step:
    """The step that rounds cores to nearest.

    Args:
        weights: Type of the scales.
        core_type: Encoding of the cores.
    """

    def treat(group: GroupFactors) -> GroupFactors:
        for projection in group.factors:
            group = _quantised(group, (projection,), weights, core_type, None)
        return group

    return for_each_group(treat)


@dataclass(frozen=True, slots=True)
class QuantiseForTokens:
    """Step that quantises cores for the inputs that a layer's experts see.

    Attributes:
        weights: Type of the scales.
        core_type: Encoding of the cores.
        fit: Tokens of the layer.
        held_out: Validation set, on which the output error is measured again.
        dense: The dense experts of the layer.
        calibration: The model and its calibration set.
    """

    weights: WeightType
    core_type: CoreType
    fit: LayerTokens
    held_out: LayerTokens
    dense: TuckerExperts
    calibration: CalibrationPass

    @torch.no_grad()
    def __call__(self, layer: LayerFactors) -> LayerFactors:
        """Quantise all cores of a layer."""
        return self.measured(for_each_group(self.of_group(layer.layer))(layer))

    def of_group(self, layer: int) -> GroupStep:
        """The step for a group of a layer."""
        return partial(self._quantise, self.calibration.activation(layer))

    def measured(self, layer: LayerFactors) -> LayerFactors:
        """A layer with its output error on the validation set."""
        run = self.calibration
        module = run.module(layer.layer, [group.tensors() for group in layer.groups])
        target_TI = run.output(self.dense, self.held_out)
        error = relative_output_error(module, self.held_out, target_TI, run.sharing)
        return replace(layer, output_error=None if math.isnan(error) else error)

    def _quantise(self, activation: Activation, group: GroupFactors) -> GroupFactors:
        for projections in _of_same_inputs(group):
            down = projections == DOWN
            inputs = self._neurons(group, activation) if down else self._tokens(group)
            moments = _moments(group, projections[0], inputs, self.calibration.sharing)
            group = _quantised(group, projections, self.weights, self.core_type, moments)
        return group

    def _tokens(self, group: GroupFactors) -> Inputs:
        def of_expert(place: int) -> Tensor:
            own = self.fit.of_expert(group.dense.experts[place], group.dense.shape.intermediate)
            return own.weights_N[:, None] * own.x_NI

        return of_expert

    def _neurons(self, group: GroupFactors, activation: Activation) -> Inputs:
        def of_expert(place: int) -> Tensor:
            own = self.fit.of_expert(group.dense.experts[place], group.dense.shape.intermediate)
            return own.weights_N[:, None] * activation(*group.gate_up(place, own.x_NI))

        return of_expert


def _of_same_inputs(group: GroupFactors) -> list[Coupling]:
    """Projections whose matrices see the same inputs, in the order in which they are quantised."""
    gate, up = (group.factors[projection] for projection in GATE_UP)
    if gate.U_E is None and up.U_E is None and _are_same(gate.U_I, up.U_I):
        return [GATE_UP, DOWN]
    return [(projection,) for projection in Projection]


def _are_same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _moments(
    group: GroupFactors, projection: Projection, inputs: Inputs, sharing: Sharing
) -> Iterator[Tensor]:
    """Second moment of the inputs of every matrix of a core, after U_I or U_H."""
    factors = group.factors[projection]
    factor = factors.U_I if projection in GATE_UP else factors.U_H
    experts = range(factors.shape.experts)

    def of_expert(place: int) -> Tensor:
        rows = inputs(place)
        if factor is not None:
            rows = rows @ factor
        return rows.T @ rows

    if factors.U_E is None:
        yield from map(of_expert, experts)
        return
    shared = [(of_expert(place), factors.U_E[place].square()) for place in experts]
    for index in range(factors.rank.expert):
        own = sum((share_P[index] * moment for moment, share_P in shared), torch.tensor(0.0))
        yield sharing.sum(own)


def _quantised(
    group: GroupFactors,
    projections: Coupling,
    weights: WeightType,
    core_type: CoreType,
    moments: Iterable[Tensor] | None,
) -> GroupFactors:
    """A group with some cores quantised, and replaced by the values that they stand for.

    Args:
        group: The group.
        projections: Whose cores, of the same inputs; all matrices of one expert at once.
        weights: Type of the scales.
        core_type: Encoding of the cores.
        moments: Second moments of the inputs.
    """
    down = projections == DOWN
    cores = [group.factors[projection].core for projection in projections]
    matrices = torch.cat([core.mT if down else core for core in cores], dim=1)
    whole = quantise(matrices, core_type, moments, scale_dtype=TORCH_DTYPES[weights.name])
    check_no_overflow(whole.scales, weights.name)
    factors, quantised = dict(group.factors), dict(group.quantised)
    for projection, found in zip(projections, whole.split(len(projections)), strict=True):
        values = found.dequantised()
        core = values.mT.contiguous() if down else values
        factors[projection] = replace(factors[projection], core=core)
        quantised[projection] = found
    return replace(group, factors=factors, quantised=quantised)
