"""A group compressed for its outputs: exact at full and at planted sizes, better with more."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.expert_cases import (
    SHAPE,
    SWIGLU,
    compress,
    couplings,
    exact_output,
    make_group,
    make_tokens,
    relative,
    target_of,
)
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.closed_form import closed_form, group_output
from tuckerize.compression.factors import GroupFactors
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, GATE_UP, MultilinearRank, Projection, StackShape
from tuckerize.linalg.tucker import with_zero_rows
from tuckerize.names import TensorName
from tuckerize.runtime.dense import ExpertWeights, dense_output


def expanded_output(
    found: GroupFactors, experts: range, tokens: LayerTokens, neurons: int
) -> Tensor:
    """The output of dense experts made of the expanded stacks, zeros for neurons not kept."""

    def weights(expert: int) -> ExpertWeights:
        place = expert - experts.start
        if expert not in experts:
            return ExpertWeights(*(torch.zeros(1, SHAPE.hidden),) * 2, torch.zeros(SHAPE.hidden, 1))
        matrices = [found.factors[p].expand_slice(place, torch.float64) for p in Projection]
        if found.kept is not None:
            places_K = found.kept.places_EK[place]
            matrices = [with_zero_rows(m, places_K, neurons) for m in matrices]
        return ExpertWeights(matrices[0], matrices[1], matrices[2].T)

    return dense_output(
        tokens.x_TI.double(),
        tokens.experts_Tk,
        tokens.weights_Tk.double(),
        expert_weights=weights,
        activation=SWIGLU,
    )


@pytest.mark.parametrize("each", [24, 40])
def test_few_tokens_of_each_expert_are_not_interpolated(each: int) -> None:
    """Cores of size 40 for as many tokens lose little for others; by themselves they lose half."""
    group, tokens = make_group(StackShape(8, 8, 48)), make_tokens(2400, 48, 8)
    fit, others = tokens.part(torch.arange(4 * each)), tokens.part(torch.arange(1600, 2400))
    rank = MultilinearRank(8, 8, 40)
    target = CompressionTarget(8, {GATE_UP: rank, DOWN: rank._replace(hidden=48)})
    found = closed_form(fit, activation=SWIGLU, max_sweeps=10)(GroupFactors.of(0, group, target))
    output_TI = group_output(found.tensors(), group.experts, others, SWIGLU)
    exact_TI = exact_output(group, others)
    assert relative(output_TI - exact_TI, exact_TI) < 0.1


@pytest.mark.parametrize("joint", [True, False])
def test_full_sizes_give_the_stacks_bit_for_bit(joint: bool) -> None:
    group, tokens = make_group(SHAPE), make_tokens(60, 8, 3)
    found, error = compress(group, tokens, target_of(10, 8, 8, joint=joint))
    assert found.kept is None
    assert error < 1e-5
    for projection in Projection:
        assert found.factors[projection].factors == (None, None, None)
        assert torch.equal(found.factors[projection].core, group.stacks[projection])
    assert found.tensors().keys() == group.as_tensors().keys()


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("sizes", [(10, 5, 8), (10, 8, 5), (6, 8, 8), (6, 5, 6)])
def test_factored_output_is_that_of_the_expanded_experts(
    sizes: tuple[int, int, int], first: int
) -> None:
    group, tokens = make_group(SHAPE, first=first), make_tokens(80, 8, 6)
    found, _ = compress(group, tokens, target_of(*sizes))
    output_TI = group_output(found.tensors(), group.experts, tokens, SWIGLU)
    expected_TI = expanded_output(found, group.experts, tokens, SHAPE.intermediate)
    assert_close(output_TI.double(), expected_TI, rtol=1e-3, atol=1e-4)
    if sizes[0] < SHAPE.intermediate:
        assert found.kept is not None
        assert sum(found.kept.widths) == SHAPE.experts * sizes[0]
        apart = TensorName.core(Projection.DOWN, 2) in found.tensors()
        assert apart == (len(set(found.kept.widths)) > 1)


def test_tokens_that_run_in_several_batches_have_the_outputs_of_the_dense_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tuckerize.compression.closed_form.TOKENS_AT_ONCE", 7)
    group, tokens = make_group(SHAPE), make_tokens(30, SHAPE.hidden, SHAPE.experts)
    for count in (30, 28, 0):
        part = tokens.part(slice(0, count))
        output_TI = group_output(group.as_tensors(), group.experts, part, SWIGLU)
        assert_close(output_TI.double(), exact_output(group, part), rtol=1e-4, atol=1e-5)


def test_experts_that_matter_more_keep_more_neurons() -> None:
    group, tokens = make_group(SHAPE), make_tokens(80, 8, 6)
    group.stacks[Projection.DOWN][1] *= 10
    found, error = compress(group, tokens, target_of(6, 5, 6))
    assert found.kept is not None
    assert found.kept.widths == (4, 10, 4)
    assert found.tensors()[TensorName.core(Projection.GATE, 0)].shape == (4, 5)
    assert found.tensors()[TensorName.core(Projection.DOWN, 1)].shape == (10, 6)
    expected_TI = expanded_output(found, group.experts, tokens, SHAPE.intermediate)
    output_TI = group_output(found.tensors(), group.experts, tokens, SWIGLU)
    assert_close(output_TI.double(), expected_TI, rtol=1e-3, atol=1e-3)
    assert error < 0.5


RANKS = [
    MultilinearRank(*sizes)
    for sizes in itertools.product((2, 3), (7, 10), (5, 8))
    if sizes != (3, 10, 8)
]


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("joint", [True, False])
def test_any_multilinear_rank_is_compressed_to_what_it_says(
    rank: MultilinearRank, joint: bool
) -> None:
    group, tokens = make_group(SHAPE), make_tokens(120, 8, 3)
    ranks = dict.fromkeys(couplings(joint=joint), rank)
    found, error = compress(group, tokens, CompressionTarget(SHAPE.intermediate, ranks))
    assert all(found.factors[projection].rank == rank for projection in Projection)
    assert (found.factors[Projection.GATE].U_I is found.factors[Projection.UP].U_I) == (
        joint or rank.hidden == SHAPE.hidden
    )
    assert 1e-3 < error < 1
    expected_TI = expanded_output(found, group.experts, tokens, SHAPE.intermediate)
    output_TI = group_output(found.tensors(), group.experts, tokens, SWIGLU)
    assert_close(output_TI.double(), expected_TI, rtol=1e-3, atol=1e-4)


def test_inputs_of_planted_dimension_are_enough_at_that_size() -> None:
    """Tokens in a subspace: gate and up lose nothing when only it is kept."""
    group, tokens = make_group(SHAPE), make_tokens(200, 8, 3, rank=4)
    assert compress(group, tokens, target_of(10, 4, 8))[1] < 1e-2
    assert compress(group, tokens, target_of(10, 3, 8))[1] > 3e-2


def test_outputs_of_planted_dimension_are_enough_at_that_size() -> None:
    group, tokens = make_group(SHAPE), make_tokens(200, 8, 3)
    basis_IR = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(5)))[0]
    down_EHI = group.stacks[Projection.DOWN] @ basis_IR @ basis_IR.T
    group = DenseGroup({**group.stacks, Projection.DOWN: down_EHI}, group.experts)
    assert compress(group, tokens, target_of(10, 8, 3))[1] < 1e-4
    assert compress(group, tokens, target_of(10, 8, 2))[1] > 3e-2


def test_repeated_neurons_are_dropped_without_loss() -> None:
    """gate and up rows twice: one of each pair is enough, with both rows of down."""
    group, tokens = make_group(SHAPE), make_tokens(200, 8, 3)
    stacks = dict(group.stacks)
    for projection in (Projection.GATE, Projection.UP):
        stacks[projection] = stacks[projection][:, :5].repeat(1, 2, 1)
    group = DenseGroup(stacks, group.experts)
    found, error = compress(group, tokens, target_of(5, 8, 8))
    assert error < 5e-3
    assert found.kept is not None
    for expert in range(3):
        assert sorted(n % 5 for n in found.kept.of_expert(expert).tolist()) == list(range(5))
    assert compress(group, tokens, target_of(4, 8, 8))[1] > 3e-2


def test_output_error_falls_as_sizes_grow() -> None:
    group, tokens = make_group(SHAPE), make_tokens(300, 8, 3)
    for grow in (
        [(width, 8, 8) for width in (2, 5, 8, 10)],
        [(10, size, 8) for size in (1, 3, 6, 8)],
        [(10, 8, size) for size in (1, 3, 6, 8)],
        [(4, 3, 3), (7, 5, 5), (10, 8, 8)],
    ):
        errors = [compress(group, tokens, target_of(*sizes))[1] for sizes in grow]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-5
        assert 0.05 < errors[0] < 1


def test_group_without_any_token_is_compressed() -> None:
    group, tokens = make_group(SHAPE, first=6), make_tokens(30, 8, 6)
    found, _ = compress(group, tokens, target_of(6, 5, 5))
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors().values())
