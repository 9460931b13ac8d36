"""Moments against loops over tokens in float64, with the derivative of silu written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.expert_cases import SWIGLU, exact_output, make_group, make_tokens
from tuckerize.calibration.moments import (
    GroupMoments,
    gather_moments,
    input_moments,
    neuron_moments,
    refit_moments,
)
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.domain import Projection, StackShape

SHAPE = StackShape(3, 4, 5)
FEW = 6  # tokens: experts of two groups of three see fewer than their neurons


def silu_of(value: float) -> float:
    return value / (1 + math.exp(-value))


def silu_slope(value: float) -> float:
    share = 1 / (1 + math.exp(-value))
    return share * (1 + value * (1 - share))


def seen(group: DenseGroup, tokens: LayerTokens) -> list[list[tuple[int, float, float]]]:
    """Places, weights and counts of the tokens of every expert, filled up where they are few."""
    experts = []
    for expert in group.experts:
        own = [
            (token, float(tokens.weights_Tk[token, place]), 1.0)
            for token in range(len(tokens.x_TI))
            for place in range(tokens.experts_Tk.shape[1])
            if int(tokens.experts_Tk[token, place]) == expert
        ]
        count = min(max(0, 4 * max(group.shape[1:]) - len(own)), len(tokens.x_TI))
        weight = 0.3 * float(tokens.weights_Tk.mean())
        own += [(n * len(tokens.x_TI) // count, weight, 0.09) for n in range(count)]
        experts.append(own)
    return experts


def gathered(group: DenseGroup, tokens: LayerTokens) -> tuple[GroupMoments, Tensor]:
    """Moments of a group, and those of the neurons of all its experts."""
    neurons: list[Tensor] = []
    downs: list[Tensor] = []

    def take(moment_HH: Tensor, down_HI: Tensor) -> float:
        neurons.append(moment_HH)
        downs.append(down_HI)
        return 0.0

    everyone = range(len(group.experts))
    found = gather_moments(group, tokens, activation=SWIGLU, neurons=take, whole=everyone)
    assert torch.equal(torch.stack(downs), group.stacks[Projection.DOWN])
    neurons_EHH = torch.stack(neurons)
    again = torch.stack([*neuron_moments(group, tokens, activation=SWIGLU)])
    assert_close(again, neurons_EHH)
    assert torch.equal(found.energy_EH, neurons_EHH.diagonal(dim1=1, dim2=2))
    return found, neurons_EHH


@pytest.mark.parametrize("part", [7, 2048])
@pytest.mark.parametrize("count", [FEW, 40])
@pytest.mark.parametrize("first", [0, 3])
def test_moments_are_the_naive_sums(
    count: int, first: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuckerize.calibration.tokens.PART_TOKENS", part)
    group, tokens = make_group(SHAPE, first=first), make_tokens(count, 5, 6)
    found, neurons_EHH = gathered(group, tokens)
    inputs_EII = input_moments(group, tokens)
    assert_close(found.pooled_II, inputs_EII.sum(0), rtol=1e-4, atol=1e-5)
    for place, own in enumerate(seen(group, tokens)):
        gate_HI, up_HI, down_HI = (group.stacks[p][place].double() for p in Projection)
        hidden_II, neurons_HH = torch.zeros(5, 5).double(), torch.zeros(4, 4).double()
        gate_H, up_H = torch.zeros(4).double(), torch.zeros(4).double()
        total = sum(counted for _, _, counted in own)
        for token, weight, counted in own:
            x_I = tokens.x_TI[token].double()
            gates, ups = (gate_HI @ x_I).tolist(), (up_HI @ x_I).tolist()
            neurons_H = torch.tensor(
                [silu_of(g) * u for g, u in zip(gates, ups, strict=True)]
            ).double()
            hidden_II += weight**2 * torch.outer(x_I, x_I)
            neurons_HH += weight**2 * torch.outer(neurons_H, neurons_H)
            for n in range(4):
                norm = counted / total * float(down_HI[n].square().sum())
                gate_H[n] += (silu_slope(gates[n]) * ups[n]) ** 2 * norm
                up_H[n] += silu_of(gates[n]) ** 2 * norm
        for result, expected in (
            (inputs_EII, hidden_II),
            (neurons_EHH, neurons_HH),
            (found.gate_sensitivity_EH, gate_H),
            (found.up_sensitivity_EH, up_H),
        ):
            assert_close(result[place].double(), expected, rtol=1e-4, atol=1e-5)
        routed = int((tokens.experts_Tk == group.experts[place]).sum())
        assert int(found.routed_E[place]) == routed


@pytest.mark.parametrize("first", [0, 3])
def test_output_moment_is_that_of_the_dense_layer(first: int) -> None:
    """Without what fills rare experts up."""
    group, tokens = make_group(SHAPE, first=first), make_tokens(FEW, 5, 6)
    found, _ = gathered(group, tokens)
    output_TI = exact_output(group, tokens)
    assert_close(found.output_II.double(), output_TI.T @ output_TI, rtol=1e-4, atol=1e-5)


def test_group_without_any_token_has_finite_moments() -> None:
    group, tokens = make_group(SHAPE, first=6), make_tokens(20, 5, 6)
    found, neurons_EHH = gathered(group, tokens)
    assert found.routed_E.tolist() == [0, 0, 0]
    assert not found.output_II.any()
    assert bool(neurons_EHH.isfinite().all())
    assert bool((neurons_EHH.diagonal(dim1=1, dim2=2) > 0).all())


def test_refit_moments_of_the_dense_gate_and_up_are_the_neurons_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tuckerize.calibration.tokens.PART_TOKENS", 7)
    group, tokens = make_group(SHAPE), make_tokens(40, 5, 6)
    _, neurons_EHH = gathered(group, tokens)
    kept_K = torch.tensor([0, 3])

    def dense(place: int, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        gate_NH, up_NH = group.gate_up(place, x_NI)
        return gate_NH[:, kept_K], up_NH[:, kept_K]

    now_EKK, cross_EKH = refit_moments(group, tokens, dense, activation=SWIGLU)
    assert_close(now_EKK, neurons_EHH[:, kept_K][:, :, kept_K])
    assert_close(cross_EKH, neurons_EHH[:, kept_K])


def test_fewer_filled_up_tokens_count_as_much() -> None:
    tokens = make_tokens(400, 5, 6)
    own, few, others = (tokens.of_expert(*args) for args in ((2, 300), (2, 300, 20), (3, 300, 20)))
    assert own.routed == few.routed
    assert len(few.weights_N) - few.routed == 20
    assert not set(few.places_N[few.routed :].tolist()) & set(others.places_N[-20:].tolist())
    for name in ("x_NI", "weights_N", "places_N"):
        assert torch.equal(getattr(own, name)[: own.routed], getattr(few, name)[: own.routed])
    assert_close(own.weights_N.square().sum(), few.weights_N.square().sum())
    assert_close(own.counts_N.sum(), few.counts_N.sum())


def test_experts_whose_neurons_nobody_asks_for_have_the_same_moments_of_fewer_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, tokens = make_group(SHAPE), make_tokens(3000, 5, 30)
    whole, neurons_EHH = gathered(group, tokens)
    for few, tolerance in ((10_000, 1e-4), (10, 0.6)):
        monkeypatch.setattr("tuckerize.calibration.moments._FEW_POOLED_TOKENS", few)
        found = gather_moments(group, tokens, activation=SWIGLU, neurons=lambda *_: -1.0, whole=[1])
        for name in ("energy_EH", "gate_sensitivity_EH", "up_sensitivity_EH"):
            own, others = getattr(found, name), getattr(whole, name)
            assert_close(own[1], others[1])
            assert_close(own, others, rtol=tolerance, atol=1e-6)
        for name in ("output_II", "row_norms_EH", "routed_E"):
            assert_close(getattr(found, name), getattr(whole, name))
        assert_close(found.pooled_II, whole.pooled_II, rtol=tolerance, atol=30 * tolerance)
        down_EHI = group.stacks[Projection.DOWN]
        energies_E = (neurons_EHH * (down_EHI @ down_EHI.mT)).sum((1, 2)).double()
        assert found.output_energy_E[1] == -1
        assert_close(found.output_energy_E[[0, 2]], energies_E[[0, 2]], rtol=tolerance, atol=1e-6)
