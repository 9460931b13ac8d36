"""Predicted errors of a layer, against those of its compression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.expert_cases import (
    SHAPE,
    SWIGLU,
    compress,
    exact_output,
    make_group,
    make_tokens,
    target_of,
)
from tuckerize.calibration import spectra
from tuckerize.calibration import tokens as tokens_module
from tuckerize.calibration.group_statistics import GroupStatistics
from tuckerize.calibration.layer_profile import LayerProfile, profile_layer
from tuckerize.calibration.spectra import _gate_up_energies, column_step
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.domain import Projection, StackShape


def profile_of(group: DenseGroup, tokens: LayerTokens) -> LayerProfile:
    moments = GroupStatistics.gather(group, tokens, activation=SWIGLU)
    energy = float(exact_output(group, tokens).square().sum())
    return profile_layer(3, [moments], tokens, activation=SWIGLU, output_energy=energy)


def test_profile_is_zero_at_full_size_and_falls_with_core_sizes() -> None:
    group, tokens = make_group(SHAPE), make_tokens(200, 8, 3)
    profile = profile_of(group, tokens)
    assert profile.layer == 3
    assert math.isnan(profile.sensitivity)
    assert math.isnan(profile.small_sensitivity)
    assert math.isnan(profile.switching)
    assert profile.routed_E.sum() == 400
    widths, hidden = np.arange(11.0), np.arange(9.0)
    errors = profile.errors(widths, hidden, hidden)
    assert errors.shape == (11, 9, 9)
    assert errors[10, 8, 8] == pytest.approx(0, abs=1e-12)
    assert (errors >= 0).all()
    assert (np.diff(errors, axis=1) <= 1e-12).all()
    assert (np.diff(errors, axis=2) <= 1e-12).all()
    # With nothing else truncated a larger width is better; the spectrum of gate and up can only
    # grow with the neurons that it is of.
    assert (np.diff(errors[:, 8, 8]) <= 0).all()
    assert (np.diff(profile.gate_up_KI, axis=0) <= 1e-12).all()
    assert (np.diff(profile.widths_K) < 0).all()


def test_profile_of_down_is_exact_and_of_selection_nearly() -> None:
    group, tokens = make_group(SHAPE), make_tokens(400, 8, 3, top_k=1)
    profile = profile_of(group, tokens)
    for size in (2, 5, 7):
        error = compress(group, tokens, target_of(10, 8, size))[1]
        assert profile.down_I[size] == pytest.approx(error**2, rel=1e-3)
    for width in (4, 7, 9):
        # With one expert a token nothing is shared: the predicted error is the real one.
        error = compress(group, tokens, target_of(width, 8, 8))[1]
        assert profile.selection_H[width] == pytest.approx(error**2, rel=0.05)
        equal = compress(group, tokens, target_of(width, 8, 8, equal_widths=True))[1]
        assert profile.equal_selection_H[width] == pytest.approx(equal**2, rel=0.05)
    # Truncated inputs are measured at a quarter, a half and three quarters of the hidden size,
    # with a projection that is not fitted to gate and up as that of the compression is. A third
    # of a squared error is a sixth of an error, less than one core size makes.
    for size in (2, 4, 6):
        error = compress(group, tokens, target_of(10, size, 8))[1]
        assert profile.gate_up_KI[0, size] == pytest.approx(error**2, rel=1 / 3)
        next_error = compress(group, tokens, target_of(10, size + 1, 8))[1]
        assert next_error < 5 / 6 * error


def test_some_of_many_tokens_tell_what_truncated_inputs_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, tokens = make_group(SHAPE), make_tokens(6000, 8, 3)
    some = profile_of(group, tokens)
    monkeypatch.setattr(tokens_module, "_PROFILED_TOKENS_PER_UNKNOWN", 6000)
    every = profile_of(group, tokens)
    assert not np.array_equal(some.gate_up_KI, every.gate_up_KI)
    np.testing.assert_allclose(some.gate_up_KI, every.gate_up_KI, rtol=0.25, atol=1e-9)


def test_some_columns_of_many_experts_tell_the_spectra_of_two_modes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = StackShape(32, 24, 96)
    group, tokens = make_group(shape), make_tokens(2000, shape.hidden, shape.experts)
    assert column_step(shape) == 4
    assert column_step(StackShape(4, 64, 48)) == 1
    some = profile_of(group, tokens)
    monkeypatch.setattr(spectra, "_COLUMNS_PER_ROW", 1000)
    every = profile_of(group, tokens)
    for name in (
        "gate_up_expert_E", "gate_up_intermediate_H", "down_expert_E", "down_intermediate_H",
    ):  # fmt: skip
        found, expected = getattr(some, name), getattr(every, name)
        assert not np.array_equal(found, expected)
        # Few columns have a few directions of more energy than all have.
        np.testing.assert_allclose(found[:-2], expected[:-2], rtol=0.35, atol=1e-9)


def test_first_order_energies_of_nested_widths_are_those_of_their_rows() -> None:
    group, tokens = make_group(SHAPE), make_tokens(200, 8, 3)
    statistics = GroupStatistics.gather(group, tokens, activation=SWIGLU)
    moments = statistics.moments
    kept = [statistics.elimination.kept(width) for width in (10, 7, 7, 2)]
    for own, energy_II in zip(kept, _gate_up_energies(group, moments, kept), strict=True):
        expected_II = torch.zeros(8, 8).double()
        for projection, sensitivity_EH in (
            (Projection.GATE, moments.gate_sensitivity_EH),
            (Projection.UP, moments.up_sensitivity_EH),
        ):
            for expert in range(3):
                for place in own.of_expert(expert).tolist():
                    row_I = group.stacks[projection][expert, place].double()
                    expected_II += float(sensitivity_EH[expert, place]) * torch.outer(row_I, row_I)
        torch.testing.assert_close(energy_II.double(), expected_II, rtol=1e-4, atol=1e-6)


def test_profile_of_groups_is_of_their_common_output() -> None:
    tokens = make_tokens(200, 8, 6)
    groups = [make_group(SHAPE), make_group(SHAPE, first=3, seed=9)]
    moments = [GroupStatistics.gather(g, tokens, activation=SWIGLU) for g in groups]
    energy = float(sum(exact_output(g, tokens) for g in groups).square().sum())  # type: ignore[union-attr]
    both = profile_layer(1, moments, tokens, activation=SWIGLU, output_energy=energy)
    alone = [
        profile_layer(1, [m], tokens, activation=SWIGLU, output_energy=energy) for m in moments
    ]
    # What truncated inputs cost beyond first order is measured over all groups together.
    for name, tolerance in (("equal_selection_H", 1e-9), ("gate_up_KI", 0.3), ("down_I", 1e-9)):
        total = sum(getattr(profile, name) for profile in alone)
        np.testing.assert_allclose(getattr(both, name), total, rtol=tolerance, atol=1e-9)
    assert both.routed_E.tolist() == [*alone[0].routed_E, *alone[1].routed_E]


def test_layer_without_any_token_has_finite_errors() -> None:
    group, tokens = make_group(SHAPE, first=6), make_tokens(30, 8, 6)
    moments = GroupStatistics.gather(group, tokens, activation=SWIGLU)
    profile = profile_layer(1, [moments], tokens, activation=SWIGLU, output_energy=0.0)
    assert np.isfinite(profile.errors(np.arange(11.0), np.arange(9.0), np.arange(9.0))).all()
