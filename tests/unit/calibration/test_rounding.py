"""Predicted errors of rounding a layer, against rounding whole experts as a compression does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.expert_cases import SWIGLU, make_group, make_tokens
from tuckerize.calibration import rounding
from tuckerize.calibration.group_statistics import GroupStatistics
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.domain import GATE_UP, CoreType, Projection, StackShape
from tuckerize.linalg.quantise import quantise

SHAPE = StackShape(4, 96, 64)


def rounded_expert(
    group: DenseGroup, place: int, fit: LayerTokens, new: LayerTokens, core_type: CoreType
) -> tuple[float, float]:
    """Squared error and energy of an expert whose down is rounded for its rounded neurons."""
    seen, held_out = (tokens.of_expert(place, group.enough_tokens) for tokens in (fit, new))
    gate_HI, up_HI, down_HI = (group.matrix(projection, place) for projection in Projection)
    biases = group.biases or dict.fromkeys(GATE_UP, torch.zeros(4, 96))

    def neurons(x_NI: Tensor, weights_N: Tensor, gate_HI: Tensor, up_HI: Tensor) -> Tensor:
        gate_NH = x_NI @ gate_HI.T + biases[Projection.GATE][place]
        up_NH = x_NI @ up_HI.T + biases[Projection.UP][place]
        return weights_N[:, None] * SWIGLU(gate_NH, up_NH)

    weighted_NI = seen.weights_N[:, None] * seen.x_NI
    both = quantise(torch.cat([gate_HI, up_HI])[None], core_type, [weighted_NI.T @ weighted_NI])
    rounded = both.dequantised()[0].chunk(2)
    now_NH = neurons(seen.x_NI, seen.weights_N, *rounded)
    down = quantise(down_HI.T[None], core_type, [now_NH.T @ now_NH]).dequantised()[0].T
    exact_NI = neurons(held_out.x_NI, held_out.weights_N, gate_HI, up_HI) @ down_HI
    found_NI = neurons(held_out.x_NI, held_out.weights_N, *rounded) @ down
    return float((found_NI - exact_NI).square().sum()), float(exact_NI.square().sum())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", [256, 48])
def test_errors_are_those_of_experts_that_are_rounded(
    outputs: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All outputs are rounded, or some of them."""
    monkeypatch.setattr(rounding, "ROUNDED_OUTPUTS", outputs)
    monkeypatch.setattr("tuckerize.calibration.tokens.PART_TOKENS", 100)
    group, tokens = make_group(SHAPE), make_tokens(8192, SHAPE.hidden, SHAPE.experts)
    if biased:
        biases = {projection: torch.randn(4, 96) for projection in GATE_UP}
        group = replace(group, biases={**biases, Projection.DOWN: torch.zeros(4, 64)})
    statistics = GroupStatistics.gather(group, tokens, activation=SWIGLU)
    found = rounding.rounding_errors([statistics], tokens, activation=SWIGLU)
    fit, new = tokens.split()
    energy = float(statistics.moments.output_energy_E.sum())
    for core_type, error in zip(CoreType, found, strict=True):
        parts = [rounded_expert(group, place, fit, new, core_type) for place in range(4)]
        missed, held_out = (sum(values) for values in zip(*parts, strict=True))
        expected = missed / held_out
        assert error / energy == pytest.approx(expected, rel=0.15 if outputs > 96 else 0.25)


def test_experts_that_are_not_rounded_count_by_the_size_of_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few tell what all have, though some are larger, and hear more tokens, than others."""
    shape = StackShape(24, 32, 32)
    group, tokens = make_group(shape), make_tokens(8192, shape.hidden, shape.experts)
    sizes_E11 = torch.logspace(-1, 1, shape.experts)[:, None, None]
    group = replace(
        group, stacks={**group.stacks, Projection.UP: sizes_E11 * group.stacks[Projection.UP]}
    )
    statistics = GroupStatistics.gather(group, tokens, activation=SWIGLU)
    found = {}
    for count in (24, 3):
        monkeypatch.setattr(rounding, "_PROBES", count)
        found[count] = rounding.rounding_errors([statistics], tokens, activation=SWIGLU)
    np.testing.assert_allclose(found[3], found[24], rtol=0.2)
