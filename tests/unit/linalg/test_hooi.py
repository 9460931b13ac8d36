from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.cases import (
    CASES,
    NONZERO_CASES,
    Case,
    Kind,
    make_stack,
    naive_expansion,
    naive_residual,
    singular_values,
    tensorly_residual,
)
from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.errors import MultilinearRankError, NonFiniteError
from tuckerize.linalg import hooi as hooi_module
from tuckerize.linalg.hooi import check_finite, check_rank, hooi, is_reachable
from tuckerize.linalg.rank_choice import rank_for_tolerance
from tuckerize.linalg.tucker import TuckerFactors, relative_residual

SHAPE = StackShape(6, 10, 14)
RANK = MultilinearRank(3, 5, 7)
ONE_TRUNCATED = [case for case in NONZERO_CASES if len(case.rank.truncated_modes(case.shape)) == 1]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def orthonormality_error(tucker: TuckerFactors) -> float:
    factors = [factor.double() for factor in tucker.factors if factor is not None]
    errors = [(f.T @ f - torch.eye(f.shape[1], dtype=torch.float64)).abs().max() for f in factors]
    return max((float(error) for error in errors), default=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hooi_of_any_case_has_orthonormal_factors_of_truncated_modes_only(case: Case) -> None:
    (tucker,) = hooi([case.stack()], case.rank).tensors
    assert tucker.rank == case.rank
    assert tucker.shape == case.shape
    truncated = case.rank.truncated_modes(case.shape)
    assert [factor is not None for factor in tucker.factors] == [m in truncated for m in Mode]
    assert orthonormality_error(tucker) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projected_residual_of_any_case_equals_explicit_difference(case: Case) -> None:
    stack = case.stack()
    result = hooi([stack], case.rank)
    (tucker,) = result.tensors
    explicit = naive_residual(stack, tucker)
    assert math.isfinite(explicit)
    # √(1 − ‖core‖²/‖X‖²) of what is zero to 16 digits is known to 8 of them.
    assert result.projected_residuals[-1] == pytest.approx(explicit, abs=1e-7, rel=1e-5)
    assert relative_residual(stack, tucker) == pytest.approx(explicit, abs=1e-7, rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_core_of_any_case_is_the_stack_projected_on_the_factors(case: Case) -> None:
    stack = case.stack()
    (tucker,) = hooi([stack], case.rank).tensors
    factors = [
        np.eye(size) if factor is None else factor.double().numpy()
        for size, factor in zip(case.shape, tucker.factors, strict=True)
    ]
    expected = np.einsum("ehi,ep,hq,ir->pqr", stack.double().numpy(), *factors)
    scale = float(np.abs(expected).max()) or 1.0
    np.testing.assert_allclose(tucker.core.double().numpy() / scale, expected / scale, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_hooi_of_any_case_is_not_worse_than_tensorly(case: Case, sweeps: int) -> None:
    stack = case.stack()
    (tucker,) = hooi([stack], case.rank, max_sweeps=sweeps, tolerance=0).tensors
    assert naive_residual(stack, tucker) <= tensorly_residual(stack, case.rank, sweeps) + 1e-4


@pytest.mark.parametrize("case", ONE_TRUNCATED, ids=str)
def test_hooi_with_one_truncated_mode_leaves_the_tail_of_singular_values(case: Case) -> None:
    (mode,) = case.rank.truncated_modes(case.shape)
    stack = case.stack()
    result = hooi([stack], case.rank)
    values = singular_values(stack, mode)
    tail = np.linalg.norm(values[case.rank[mode] :]) / np.linalg.norm(values)
    assert result.sweeps == 0
    assert naive_residual(stack, result.tensors[0]) == pytest.approx(tail, abs=case.precision)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hooi_of_any_case_leaves_the_stack_unchanged(case: Case) -> None:
    stack = case.stack()
    hooi([stack], case.rank)
    assert torch.equal(stack, case.stack())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_residuals_over_sweeps_never_grow(case: Case) -> None:
    residuals = hooi([case.stack()], case.rank, tolerance=0).projected_residuals
    rounding = max(case.precision, 1e-7)
    assert all(after <= before + rounding for before, after in itertools.pairwise(residuals))


def test_hooi_without_sweeps_is_st_hosvd_in_the_order_of_the_modes() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64)
    projected = stack.numpy()
    for mode, size in enumerate(RANK):
        unfolding = np.moveaxis(projected, mode, 0).reshape(projected.shape[mode], -1)
        left = np.linalg.svd(unfolding, full_matrices=False)[0][:, :size]
        projected = np.moveaxis(np.tensordot(left.T, projected, ([1], [mode])), 0, mode)
    expected = math.sqrt(1 - (np.linalg.norm(projected) / np.linalg.norm(stack.numpy())) ** 2)
    result = hooi([stack], RANK, max_sweeps=0)
    assert result.sweeps == 0
    assert result.projected_residuals[0] == pytest.approx(expected, rel=1e-10)


def test_hooi_of_flat_stack_improves_on_its_start() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK)
    start = hooi([stack], RANK, max_sweeps=0)
    best = hooi([stack], RANK)
    assert best.sweeps > 1
    assert best.projected_residuals[-1] < start.projected_residuals[-1] - 1e-3


def test_hooi_from_one_start_improves_on_st_hosvd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooi_module, "_TWO_STARTS_VALUES", 0)
    stack = make_stack(Kind.FLAT, SHAPE, RANK)
    start = hooi([stack], RANK, max_sweeps=0)
    best = hooi([stack], RANK, tolerance=0)
    assert best.projected_residuals[0] == start.projected_residuals[0]
    assert best.projected_residuals[-1] < start.projected_residuals[-1] - 1e-3


def test_hooi_from_one_start_with_expert_unfolding_in_blocks_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64)
    whole = hooi([stack], RANK)
    monkeypatch.setattr(hooi_module, "_EXPERT_BLOCK_VALUES", 100)
    blocks = hooi([stack], RANK)
    assert blocks.projected_residuals == pytest.approx(whole.projected_residuals, rel=1e-9)


def test_hooi_with_a_wide_tolerance_stops_after_one_sweep() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK)
    assert hooi([stack], RANK, tolerance=1.0).sweeps == 1
    assert hooi([stack], RANK, tolerance=-1.0, max_sweeps=7).sweeps == 7


def test_hooi_of_full_rank_returns_the_stack_without_factors() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.bfloat16)
    result = hooi([stack], MultilinearRank(*SHAPE))
    assert result.projected_residuals == (0.0,)
    assert result.tensors[0].factors == (None, None, None)
    assert torch.equal(result.tensors[0].core, stack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hooi_of_planted_rank_with_small_tail_reaches_it(dtype: torch.dtype) -> None:
    stack = make_stack(Kind.TAIL, SHAPE, RANK, dtype=dtype)
    (tucker,) = hooi([stack], RANK).tensors
    assert tucker.core.dtype == torch.float64
    assert relative_residual(stack, tucker) < 1.0e-6
    assert naive_residual(stack, tucker) < 1.0e-6


def test_hooi_of_ordinary_float32_stack_works_in_float32() -> None:
    (tucker,) = hooi([make_stack(Kind.FLAT, SHAPE, RANK)], RANK).tensors
    assert tucker.core.dtype == torch.float32


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-42, torch.float32),
        (1e-20, torch.float32),
        (1e36, torch.float32),
        (1e-38, torch.bfloat16),
        (1e36, torch.bfloat16),
        (1e-7, torch.float16),
        (1e4, torch.float16),
        (1e-310, torch.float64),
        (1e-150, torch.float64),
        (1e150, torch.float64),
    ],
)
@pytest.mark.parametrize("sweeps", [0, 3])
def test_hooi_of_extreme_scale_equals_the_same_stack_at_one(
    scale: float, dtype: torch.dtype, sweeps: int
) -> None:
    stack = (make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64) * scale).to(dtype)
    ordinary = stack.double() / stack.double().abs().max()
    result = hooi([stack], RANK, max_sweeps=sweeps)
    expected = hooi([ordinary], RANK, max_sweeps=sweeps)
    assert result.projected_residuals[-1] == pytest.approx(
        expected.projected_residuals[-1], abs=1e-4
    )
    assert bool(torch.isfinite(result.tensors[0].core).all())


def test_coupled_stacks_share_the_hidden_factor_and_nothing_else() -> None:
    stacks = [make_stack(Kind.FLAT, SHAPE, RANK, seed=seed) for seed in (1, 2)]
    first, second = hooi(stacks, RANK).tensors
    assert first.U_I is second.U_I
    assert first.U_E is not None
    assert first.U_H is not None
    assert second.U_E is not None
    assert second.U_H is not None
    assert not torch.allclose(first.U_E, second.U_E)
    assert not torch.allclose(first.U_H, second.U_H)
    assert orthonormality_error(first) < 1e-5
    assert orthonormality_error(second) < 1e-5


def test_coupled_residual_is_that_of_both_stacks_together() -> None:
    stacks = [make_stack(Kind.FLAT, SHAPE, RANK, seed=seed) * seed for seed in (1, 2)]
    result = hooi(stacks, RANK)
    exact = torch.cat(stacks).double().numpy()
    missed = exact - np.concatenate([naive_expansion(tucker) for tucker in result.tensors])
    expected = np.linalg.norm(missed) / np.linalg.norm(exact)
    assert result.projected_residuals[-1] == pytest.approx(expected, rel=1e-5)


def test_coupled_identical_stacks_give_the_result_of_one() -> None:
    stack = make_stack(Kind.PLANTED, SHAPE, RANK, dtype=torch.float64)
    (alone,) = hooi([stack], RANK, tolerance=0).tensors
    for tucker in hooi([stack, stack.clone()], RANK, tolerance=0).tensors:
        np.testing.assert_allclose(naive_expansion(tucker), naive_expansion(alone), atol=1e-9)


def test_coupled_stacks_with_only_the_hidden_mode_truncated_equal_their_concatenation() -> None:
    stacks = [make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64, seed=s) for s in (1, 2)]
    coupled = hooi(stacks, MultilinearRank(6, 10, 7))
    (joined,) = hooi([torch.cat(stacks)], MultilinearRank(12, 10, 7)).tensors
    expansion = np.concatenate([naive_expansion(tucker) for tucker in coupled.tensors])
    np.testing.assert_allclose(expansion, naive_expansion(joined), atol=1e-9)


def test_coupled_stacks_with_the_hidden_mode_full_equal_each_alone() -> None:
    stacks = [make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64, seed=s) for s in (1, 2)]
    rank = MultilinearRank(3, 5, 14)
    coupled = hooi(stacks, rank, max_sweeps=0)
    for stack, tucker in zip(stacks, coupled.tensors, strict=True):
        (alone,) = hooi([stack], rank, max_sweeps=0).tensors
        np.testing.assert_allclose(naive_expansion(tucker), naive_expansion(alone), atol=1e-9)


def test_coupled_stacks_of_different_precision_are_worked_on_in_float64() -> None:
    stacks = [make_stack(Kind.FLAT, SHAPE, RANK, dtype=d) for d in (torch.float32, torch.float64)]
    assert {tucker.core.dtype for tucker in hooi(stacks, RANK).tensors} == {torch.float64}


# Small; tall in the expert mode; with row blocks; thin.
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((4, 20, 30), (2, 10, 15)),
        ((24, 48, 64), (12, 24, 32)),
        ((3, 40, 520), (2, 20, 30)),
        ((6, 384, 1024), (5, 10, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_threads_gives_identical_bits(
    shape: tuple[int, int, int], rank: tuple[int, int, int], dtype: torch.dtype
) -> None:
    stack = make_stack(Kind.FLAT, StackShape(*shape), MultilinearRank(*rank), dtype=dtype)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        (tucker,) = hooi([stack], MultilinearRank(*rank), max_sweeps=1).tensors
        residual = relative_residual(stack, tucker)
        tensors = [tucker.core, *(factor for factor in tucker.factors if factor is not None)]
        found.append((residual, rank_for_tolerance([stack], residual), tensors))
        assert torch.get_num_threads() == number
    residual, cheapest, tensors = found[0]
    for other in found[1:]:
        assert other[:2] == (residual, cheapest)
        for tensor, same in zip(tensors, other[2], strict=True):
            assert torch.equal(tensor, same)


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hooi_of_non_finite_stack_names_the_first_index(
    value: float, shown: str, dtype: torch.dtype
) -> None:
    good = make_stack(Kind.FLAT, SHAPE, RANK, dtype=dtype)
    stack = good.clone()
    stack[2, 3, 4] = value
    stack[2, 5, 0] = math.nan
    stack[4, 0, 0] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        hooi([good, stack], RANK)
    assert caught.value.message == (
        f"the stack holds {shown} at expert 2, intermediate 3, hidden 4"
    )
    assert caught.value.hint == "repair or replace the source checkpoint"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_finite_of_any_finite_case_passes(case: Case) -> None:
    check_finite(case.stack())


@pytest.mark.parametrize(
    ("rank", "message", "hint"),
    [
        (
            (0, 5, 7),
            "core size 0 of the expert mode (E) is not between 1 and 6",
            "choose a size up to 6, or 'full' to leave the mode untruncated",
        ),
        (
            (3, 11, 7),
            "core size 11 of the intermediate mode (H) is not between 1 and 10",
            "choose a size up to 10, or 'full' to leave the mode untruncated",
        ),
        (
            (3, 5, -1),
            "core size -1 of the hidden mode (I) is not between 1 and 14",
            "choose a size up to 14, or 'full' to leave the mode untruncated",
        ),
        (
            (2, 3, 7),
            "core size 7 of the hidden mode (I) is above 6, the product of the other two, "
            "so no core of 2,3,7 can use it",
            "choose at most 6 for this mode",
        ),
        (
            (5, 2, 2),
            "core size 5 of the expert mode (E) is above 4, the product of the other two, "
            "so no core of 5,2,2 can use it",
            "choose at most 4 for this mode",
        ),
    ],
)
def test_hooi_with_a_bad_rank_says_which_size_and_what_to_choose(
    rank: tuple[int, int, int], message: str, hint: str
) -> None:
    with pytest.raises(MultilinearRankError) as caught:
        hooi([make_stack(Kind.FLAT, SHAPE, RANK)], MultilinearRank(*rank))
    assert caught.value.message == message
    assert caught.value.hint == hint


@pytest.mark.parametrize("rank", [(1, 1, 1), (2, 3, 6), (6, 1, 1), (1, 10, 1), (6, 10, 14)])
def test_check_rank_of_largest_reachable_sizes_passes(rank: tuple[int, int, int]) -> None:
    check_rank(MultilinearRank(*rank), SHAPE)
    assert is_reachable(MultilinearRank(*rank), SHAPE)
