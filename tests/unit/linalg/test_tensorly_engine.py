from __future__ import annotations

import math

import pytest
import torch
from tensorly import backend_context
from tensorly.decomposition import partial_tucker
from tensorly.tucker_tensor import tucker_to_tensor

from tests.cases import CASES, Case, Kind, make_stack, naive_expansion, naive_residual
from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import MultilinearRankError, NonFiniteError, UsageError
from tuckerize.linalg.tensorly_engine import tensorly_tucker

SHAPE = StackShape(6, 10, 14)
RANK = MultilinearRank(3, 5, 7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensorly_of_any_case_reports_the_residual_of_its_result(case: Case) -> None:
    stack = case.stack()
    result = tensorly_tucker([stack], case.rank, max_sweeps=2)
    (tucker,) = result.tensors
    assert tucker.rank == case.rank
    assert tucker.shape == case.shape
    # Not √(1 − ‖core‖²/‖X‖²) in float64, so a residual of zero is known to 1e-3 in float32.
    rounding = 1e-7 if case.dtype == torch.float64 else 1e-3
    assert result.projected_residuals[-1] == pytest.approx(
        naive_residual(stack, tucker), abs=rounding
    )


def test_tensorly_without_unit_equals_a_direct_call() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64)
    (tucker,) = tensorly_tucker([stack], RANK, max_sweeps=3, tolerance=0.0).tensors
    with backend_context("pytorch"):
        direct, _ = partial_tucker(stack, rank=list(RANK), n_iter_max=3, tol=0)
        expected = tucker_to_tensor(direct)
    torch.testing.assert_close(torch.from_numpy(naive_expansion(tucker)), expected)


def test_tensorly_residuals_are_the_start_and_one_a_sweep() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK, dtype=torch.float64)
    result = tensorly_tucker([stack], RANK, max_sweeps=3, tolerance=0.0)
    assert result.sweeps == 3
    start, *_, end = result.projected_residuals
    with backend_context("pytorch"):
        (core, _), _ = partial_tucker(stack, rank=list(RANK), n_iter_max=0)
    assert start == pytest.approx(math.sqrt(1 - float(core.norm() / stack.norm()) ** 2))
    assert end < start


def test_tensorly_of_full_rank_returns_the_stack_without_factors() -> None:
    stack = make_stack(Kind.FLAT, SHAPE, RANK)
    result = tensorly_tucker([stack], MultilinearRank(*SHAPE))
    assert result.projected_residuals == (0.0,)
    assert torch.equal(result.tensors[0].core, stack)


def test_tensorly_of_coupled_stacks_is_refused() -> None:
    stack = torch.ones(SHAPE)
    with pytest.raises(UsageError) as caught:
        tensorly_tucker([stack, stack], RANK)
    assert caught.value.message == "TensorLy cannot decompose projections that share one U_I"
    assert caught.value.hint == "drop --joint, or use --engine tuckerize"


def test_tensorly_without_sweeps_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        tensorly_tucker([torch.ones(SHAPE)], RANK, max_sweeps=0)
    assert caught.value.message == "TensorLy makes at least one sweep"
    assert caught.value.hint == "use --max-sweeps 1 or more"


def test_tensorly_of_bad_arguments_raises_as_hooi_does() -> None:
    with pytest.raises(MultilinearRankError, match="core size 7 of the expert mode"):
        tensorly_tucker([torch.ones(SHAPE)], MultilinearRank(7, 5, 7))
    with pytest.raises(NonFiniteError, match="nan at expert 0, intermediate 0, hidden 0"):
        tensorly_tucker([torch.full(SHAPE, math.nan)], RANK)
