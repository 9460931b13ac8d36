"""Refinement: better on the tokens it fits, kept only where held-out tokens say so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.expert_cases import SWIGLU, exact_output, make_group, make_tokens
from tuckerize.calibration.refine import refine, relative_output_error
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.closed_form import closed_form
from tuckerize.compression.factors import GroupFactors
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, GATE_UP, MultilinearRank, StackShape
from tuckerize.runtime.experts import TuckerExperts

SHAPE = StackShape(3, 10, 8)
RANK = MultilinearRank(3, 6, 5)
TOKENS = make_tokens(600, 8, 3)
FIT, HELD_OUT = TOKENS.part(torch.arange(500)), TOKENS.part(torch.arange(500, 600))


@pytest.fixture
def group() -> DenseGroup:
    return make_group(SHAPE)


@pytest.fixture
def module(group: DenseGroup) -> TuckerExperts:
    """The group compressed in closed form."""
    target = CompressionTarget(6, {GATE_UP: RANK, DOWN: RANK})
    step = closed_form(FIT, activation=SWIGLU, max_sweeps=2)
    found = step(GroupFactors.of(0, group, target))
    tensors = {name: tensor.clone() for name, tensor in found.tensors().items()}
    return TuckerExperts([tensors], group_size=3, activation=SWIGLU)


def state_of(module: TuckerExperts) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_steps_lower_the_error_on_tokens_that_are_fitted(
    group: DenseGroup, module: TuckerExperts
) -> None:
    target_TI = exact_output(group, FIT).float()
    before = relative_output_error(module, FIT, target_TI)
    state = state_of(module)
    found = refine(module, FIT, HELD_OUT, lambda t: exact_output(group, t).float(), steps=60)
    assert found.kept
    assert relative_output_error(module, FIT, target_TI) < 0.97 * before
    held_out_TI = exact_output(group, HELD_OUT).float()
    assert found.error_after == relative_output_error(module, HELD_OUT, held_out_TI)
    assert found.error_after < found.error_before
    assert all(not torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_steps_that_do_not_help_held_out_tokens_leave_every_bit(
    group: DenseGroup, module: TuckerExperts
) -> None:
    """Fitted to the opposite of what the held-out tokens are to give."""
    state = state_of(module)

    def dense(part: LayerTokens) -> Tensor:
        sign = 1.0 if len(part.x_TI) == len(HELD_OUT.x_TI) else -1.0
        return sign * exact_output(group, part).float()

    found = refine(module, FIT, HELD_OUT, dense, steps=5)
    assert not found.kept
    assert found.error_after >= found.error_before
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())


def test_same_steps_give_the_same_bits(group: DenseGroup, module: TuckerExperts) -> None:
    start = state_of(module)
    results: list[dict[str, Tensor]] = []
    for _ in range(2):
        module.load_state_dict(start)
        torch.manual_seed(len(results))  # no other generator has a say
        refine(module, FIT, HELD_OUT, lambda t: exact_output(group, t).float(), steps=4)
        results.append(state_of(module))
    assert all(torch.equal(results[0][name], results[1][name]) for name in start)


def test_no_token_is_seen_more_than_25_times(group: DenseGroup, module: TuckerExperts) -> None:
    """500 tokens are one batch: as many steps as passes."""
    start = state_of(module)
    results: list[dict[str, Tensor]] = []
    for steps in (24, 25, 300):
        module.load_state_dict(start)
        refine(module, FIT, HELD_OUT, lambda t: exact_output(group, t).float(), steps=steps)
        results.append(state_of(module))
    assert all(torch.equal(results[1][name], results[2][name]) for name in start)
    assert not all(torch.equal(results[0][name], results[1][name]) for name in start)


def test_without_steps_or_held_out_tokens_nothing_changes(
    group: DenseGroup, module: TuckerExperts
) -> None:
    state = state_of(module)
    none = TOKENS.part(torch.arange(0))
    for held_out, steps in ((HELD_OUT, 0), (none, 3)):
        found = refine(module, FIT, held_out, lambda t: exact_output(group, t).float(), steps=steps)
        assert not found.kept
    assert math.isnan(found.error_before)
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_error_is_relative_to_the_target_and_finite_without_one(module: TuckerExperts) -> None:
    output_TI = module(*FIT)
    assert relative_output_error(module, FIT, output_TI) == 0
    assert relative_output_error(module, FIT, 2 * output_TI) == pytest.approx(0.5)
    none = FIT._replace(weights_Tk=torch.zeros_like(FIT.weights_Tk))
    assert relative_output_error(module, none, torch.zeros_like(output_TI)) == 0
