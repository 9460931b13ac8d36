from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensorly import backend_context
from tensorly.tucker_tensor import tucker_to_tensor

from tests.cases import (
    CASES,
    NONZERO_CASES,
    Case,
    Kind,
    make_stack,
    naive_expansion,
    naive_residual,
)
from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.linalg.tucker import (
    TuckerFactors,
    expand,
    largest_magnitude,
    mode_name,
    power_of_two_scale,
    relative_residual,
    squared_norm,
    with_zero_rows,
)

SHAPE = StackShape(4, 5, 6)
RANK = MultilinearRank(2, 3, 4)


def random_tucker(shape: StackShape, rank: MultilinearRank, dtype: torch.dtype) -> TuckerFactors:
    """Factors that are not orthonormal: expansion must not rely on it."""
    generator = torch.Generator().manual_seed(1)
    core = torch.randn(rank, dtype=torch.float64, generator=generator)
    factors = [
        torch.randn((shape[mode], rank[mode]), dtype=torch.float64, generator=generator)
        if mode in rank.truncated_modes(shape)
        else None
        for mode in Mode
    ]
    return TuckerFactors(core, *factors).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expand_of_any_rank_equals_einsum(case: Case) -> None:
    tucker = random_tucker(case.shape, case.rank, torch.float64)
    np.testing.assert_allclose(expand(tucker).numpy(), naive_expansion(tucker), atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expand_of_any_rank_equals_tensorly(case: Case) -> None:
    tucker = random_tucker(case.shape, case.rank, torch.float64)
    factors = [
        torch.eye(size, dtype=torch.float64) if factor is None else factor
        for size, factor in zip(case.shape, tucker.factors, strict=True)
    ]
    with backend_context("pytorch"):
        expected = tucker_to_tensor((tucker.core, factors))
    torch.testing.assert_close(expand(tucker), expected, atol=1e-10, rtol=1e-10)


def test_expand_slice_of_every_expert_equals_slice_of_expansion() -> None:
    tucker = random_tucker(SHAPE, RANK, torch.float64)
    dense = naive_expansion(tucker)
    for expert, slice_HI in enumerate(tucker.expand_slices()):
        np.testing.assert_allclose(slice_HI.numpy(), dense[expert], atol=1e-12)
        assert torch.equal(slice_HI, tucker.expand_slice(expert))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shape_and_rank_of_any_case_are_those_it_was_made_with(case: Case) -> None:
    tucker = random_tucker(case.shape, case.rank, torch.float32)
    assert tucker.shape == case.shape
    assert tucker.rank == case.rank


def test_to_dtype_with_a_missing_factor_rounds_the_others() -> None:
    tucker = random_tucker(SHAPE, MultilinearRank(2, 5, 4), torch.float64).to(torch.bfloat16)
    assert tucker.core.dtype == torch.bfloat16
    assert tucker.U_H is None
    assert tucker.U_E is not None
    assert tucker.U_I is not None
    assert tucker.U_E.dtype == tucker.U_I.dtype == torch.bfloat16


@pytest.mark.parametrize("case", NONZERO_CASES, ids=str)
def test_relative_residual_of_a_perturbed_stack_equals_explicit_difference(case: Case) -> None:
    stack = case.stack()
    rough = TuckerFactors(stack.double() * 1.25)
    assert relative_residual(stack, rough) == pytest.approx(0.25, rel=1e-5)
    other = TuckerFactors(stack.double().flip(0).flip(2))
    assert relative_residual(stack, other) == pytest.approx(naive_residual(stack, other), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_residual_below_single_precision_is_resolved(dtype: torch.dtype) -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=dtype)
    assert relative_residual(stack, TuckerFactors(stack.double() * (1 + 1e-9))) == pytest.approx(
        1e-9, rel=1e-5
    )


@pytest.mark.parametrize("scale", [1e-150, 1e-60, 1e60, 1e150])
def test_relative_residual_of_float64_outside_float32_is_exact(scale: float) -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64) * scale
    assert relative_residual(stack, TuckerFactors(stack * 0.5)) == pytest.approx(0.5)


def test_relative_residual_of_zero_stack_and_zero_tucker_is_zero() -> None:
    assert relative_residual(torch.zeros(SHAPE), TuckerFactors(torch.zeros(SHAPE))) == 0.0


def test_relative_residual_of_zero_stack_and_other_tucker_is_infinite() -> None:
    assert relative_residual(torch.zeros(SHAPE), TuckerFactors(torch.ones(SHAPE))) == math.inf


def test_relative_residual_of_a_missing_expert_raises() -> None:
    with pytest.raises(ValueError, match="longer"):
        relative_residual(torch.zeros(SHAPE), TuckerFactors(torch.zeros(3, 5, 6)))


def test_squared_norm_of_many_float32_numbers_is_summed_in_float64() -> None:
    numbers = torch.full((3_000_001,), 0.1)
    assert squared_norm(numbers) == pytest.approx(3_000_001 * float(numbers[0]) ** 2, rel=1e-9)


@pytest.mark.parametrize(
    ("magnitude", "dtype", "scale"),
    [
        (0.0, torch.float32, 1.0),
        (1.0, torch.float32, 1.0),
        (2.0**19, torch.float32, 1.0),
        (2.0**20, torch.float32, 2.0**-21),
        (2.0**-21, torch.float32, 1.0),
        (2.0**-22, torch.float32, 2.0**21),
        (2.0**-149, torch.float32, 2.0**126),
        (2.0**-300, torch.float64, 2.0**299),
        (2.0**-1074, torch.float64, 2.0**1022),
    ],
)
def test_unit_of_a_magnitude_is_the_power_that_brings_it_near_one(
    magnitude: float, dtype: torch.dtype, scale: float
) -> None:
    stack = torch.tensor([[[magnitude, -magnitude]]], dtype=dtype)
    assert power_of_two_scale(stack) == scale
    assert power_of_two_scale(torch.zeros(1, 1, 2), stack) == scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_largest_magnitude_of_a_negative_entry_is_positive(dtype: torch.dtype) -> None:
    assert largest_magnitude(torch.tensor([[[1.0, -3.0, 2.0]]], dtype=dtype)) == 3.0
    assert math.isnan(largest_magnitude(torch.tensor([[[1.0, math.nan]]], dtype=dtype)))
    assert largest_magnitude(torch.tensor([[[1.0, -math.inf]]], dtype=dtype)) == math.inf


def test_mode_name_of_each_mode_gives_word_and_letter() -> None:
    assert [mode_name(mode) for mode in Mode] == [
        "expert mode (E)",
        "intermediate mode (H)",
        "hidden mode (I)",
    ]


KEPT = torch.tensor([[0, 3, 4], [1, 2, 4], [0, 1, 2], [2, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_residual_with_kept_rows_counts_the_others_as_zeros(dtype: torch.dtype) -> None:
    slim = StackShape(4, 3, 6)
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=dtype)
    tucker = random_tucker(slim, MultilinearRank(2, 3, 4), dtype)
    approximation = np.zeros(SHAPE)
    for expert, kept_K in enumerate(KEPT.tolist()):
        approximation[expert, kept_K] = naive_expansion(tucker)[expert]
    exact = stack.double().numpy()
    expected = np.linalg.norm(exact - approximation) / np.linalg.norm(exact)
    assert relative_residual(stack, tucker, KEPT) == pytest.approx(expected, rel=1e-5)


def test_residual_of_the_kept_rows_themselves_is_what_the_others_weigh() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64)
    rows = stack.gather(1, KEPT[:, :, None].expand(-1, -1, 6))
    expected = math.sqrt(1 - float(rows.square().sum() / stack.square().sum()))
    assert relative_residual(stack, TuckerFactors(rows), KEPT) == pytest.approx(expected)
    everything = torch.arange(5).expand(4, -1)
    assert relative_residual(stack, TuckerFactors(stack), everything) == 0


def test_rows_stand_in_their_places_among_zeros() -> None:
    matrix_KI = torch.arange(1.0, 7.0).reshape(2, 3)
    expected = torch.zeros(4, 3)
    expected[1], expected[3] = matrix_KI[0], matrix_KI[1]
    assert torch.equal(with_zero_rows(matrix_KI, torch.tensor([1, 3]), 4), expected)
