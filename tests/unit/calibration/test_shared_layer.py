"""Layers that processes share are those of one process, in every shape.

Weights are compared in float64: where spectra are flat, U_I is sensitive to the last bits of sums.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.expert_cases import SWIGLU, make_group, make_tokens
from tests.shared_in_threads import in_threads
from tuckerize.calibration.group_statistics import GroupStatistics
from tuckerize.calibration.layer_profile import LayerProfile, profile_layer
from tuckerize.calibration.refine import blocks_of
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.closed_form import closed_form
from tuckerize.compression.factors import GroupFactors, LayerFactors, for_each_group
from tuckerize.compression.gather import gathered
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, GATE_UP, MultilinearRank, Projection, StackShape
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.tucker import expand
from tuckerize.names import TensorKind, TensorName
from tuckerize.runtime.experts import TuckerExperts

SHAPE = StackShape(5, 12, 10)  # three threads have 2, 2 and 1 experts
THREADS = 3


def of_double(tokens: LayerTokens) -> LayerTokens:
    return LayerTokens(tokens.x_TI.double(), tokens.experts_Tk, tokens.weights_Tk.double())


TOKENS = make_tokens(301, SHAPE.hidden, SHAPE.experts)


def own_group(sharing: Sharing, dtype: torch.dtype) -> DenseGroup:
    """The experts of one of those that share a group."""
    group = make_group(SHAPE)
    own = sharing.own(SHAPE.experts)
    stacks = {projection: stack[own].to(dtype) for projection, stack in group.stacks.items()}
    return DenseGroup(stacks, group.experts[own])


def compressed(target: CompressionTarget, sharing: Sharing) -> GroupFactors:
    step = closed_form(of_double(TOKENS), activation=SWIGLU, max_sweeps=3, sharing=sharing)
    group = GroupFactors.of(0, own_group(sharing, torch.float64), target)
    layer = for_each_group(step)(LayerFactors(1, (group,)))
    return gathered(layer, sharing).groups[0]


@pytest.mark.parametrize(
    ("gate_up", "down", "neurons", "equal"),
    [
        ((5, 8, 6), (5, 8, 7), 8, False),
        ((5, 8, 10), (5, 8, 7), 8, True),
        ((3, 7, 6), (3, 7, 5), 12, False),
        ((3, 12, 10), (5, 9, 10), 12, False),
    ],
)
def test_closed_form_is_that_of_one_process(
    gate_up: tuple[int, int, int], down: tuple[int, int, int], neurons: int, *, equal: bool
) -> None:
    ranks = {GATE_UP: MultilinearRank(*gate_up), DOWN: MultilinearRank(*down)}
    target = CompressionTarget(neurons, ranks, equal_widths=equal)
    expected = compressed(target, ALONE)
    for found in in_threads(THREADS, lambda sharing: compressed(target, sharing)):
        assert found.sweeps == expected.sweeps
        if expected.kept is not None:
            assert found.kept is not None
            assert found.kept.widths == expected.kept.widths
            assert torch.equal(found.kept.places_EK, expected.kept.places_EK)
        for projection in Projection:
            assert found.rank(projection) == expected.rank(projection)
            assert found.residual(projection) == pytest.approx(expected.residual(projection))
            parts = (group.factors[projection] for group in (found, expected))
            torch.testing.assert_close(*map(expand, parts), rtol=1e-8, atol=1e-8)


def profiled(sharing: Sharing) -> LayerProfile:
    group = own_group(sharing, torch.float32)
    moments = GroupStatistics.gather(group, TOKENS, activation=SWIGLU, sharing=sharing)
    return profile_layer(
        1, [moments], TOKENS, activation=SWIGLU, output_energy=9.0, sharing=sharing
    )


@pytest.mark.parametrize("eliminated", [2, 8])
def test_profile_is_that_of_one_process(eliminated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process has none of the experts whose neurons are eliminated."""
    monkeypatch.setattr("tuckerize.calibration.group_statistics.ELIMINATED_EXPERTS", eliminated)
    expected = replace(profiled(ALONE), sensitivity=1.0, small_sensitivity=1.0, switching=1.0)
    for found in in_threads(THREADS, profiled):
        for name in LayerProfile.__slots__:
            if name not in ("layer", "sensitivity", "small_sensitivity", "switching"):
                np.testing.assert_allclose(
                    getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_steps_of_refinement_are_those_of_one_process(*, uneven: bool, mixed: bool) -> None:
    """Their sizes and the ridge follow from all experts, whichever a process has."""
    generator = torch.Generator().manual_seed(0)
    U_E, U_I = (torch.randn(size, 4, generator=generator) for size in (5, 10))
    core = torch.randn(4 if mixed else 5, 6, 4, generator=generator)

    def sizes(sharing: Sharing) -> dict[bool, set[tuple[float, float]]]:
        own = sharing.own(SHAPE.experts)
        tensors = {TensorName("gate_up_proj", TensorKind.U_I): U_I}
        for projection in Projection:
            if mixed:
                tensors[TensorName(projection, TensorKind.U_E)] = U_E[own]
                tensors[TensorName.core(projection)] = core
            elif uneven:
                for place, matrix in enumerate(core[own]):
                    tensors[TensorName.core(projection, place)] = matrix[: 3 + (own.start + place)]
            else:
                tensors[TensorName.core(projection)] = core[own]
        module = TuckerExperts([tensors], group_size=len(core[own]), activation=SWIGLU)
        found: dict[bool, set[tuple[float, float]]] = {}
        for block in blocks_of(module, sharing):
            size = round(block.root_mean_square, 5), round(block.pull, 7)
            found.setdefault(block.is_common, set()).add(size)
        return found

    assert in_threads(THREADS, sizes) == [sizes(ALONE)] * THREADS
