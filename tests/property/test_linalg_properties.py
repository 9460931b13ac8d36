from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import (
    Case,
    Kind,
    make_stack,
    naive_expansion,
    naive_residual,
    tensorly_residual,
)
from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.linalg.hooi import hooi, is_reachable
from tuckerize.linalg.rank_choice import rank_for_tolerance
from tuckerize.linalg.tucker import relative_residual

stable = settings(derandomize=True, max_examples=40, deadline=None, database=None)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
seeds = st.integers(0, 2**31)
# All kinds but the two whose answer is zero up to rounding, where relative laws say nothing.
ORDINARY = [kind for kind in Kind if kind not in (Kind.ZERO, Kind.DEFICIENT)]


@st.composite
def shapes(draw: st.DrawFn) -> StackShape:
    experts, intermediate, hidden = (draw(st.integers(1, 12)) for _ in range(3))
    return StackShape(experts, intermediate, hidden)


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: tuple[Kind, ...] = tuple(Kind),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """A stack of any kind, with any multilinear rank that a tensor of its shape can have."""
    shape = draw(shapes())
    rank = draw(
        st.builds(MultilinearRank, *(st.integers(1, size) for size in shape)).filter(
            lambda rank: is_reachable(rank, shape)
        )
    )
    return Case(
        draw(st.sampled_from(kinds)), shape, rank, draw(st.sampled_from(dtypes)), draw(seeds)
    )


FLOAT64 = (torch.float64,)


@stable
@given(case=cases())
def test_factors_of_any_stack_have_orthonormal_columns(case: Case) -> None:
    (tucker,) = hooi([case.stack()], case.rank).tensors
    truncated = case.rank.truncated_modes(case.shape)
    assert tuple(m for m, f in enumerate(tucker.factors) if f is not None) == truncated
    for factor in tucker.factors:
        if factor is not None:
            gram = factor.double().T @ factor.double()
            torch.testing.assert_close(gram, torch.eye(len(gram)).double(), atol=1e-5, rtol=0)


@stable
@given(case=cases(), kept=st.integers(0, 2))
def test_full_rank_of_any_stack_reproduces_it(case: Case, kept: int) -> None:
    stack = case.stack()
    (tucker,) = hooi([stack], MultilinearRank(*case.shape)).tensors
    assert tucker.factors == (None, None, None)
    assert relative_residual(stack, tucker) == 0.0
    # A mode that is no wider than its unfolding's rank loses nothing, truncated or not.
    wide = torch.cat([stack, stack], dim=kept)
    exact = MultilinearRank(*case.shape)
    if is_reachable(exact, StackShape(*wide.shape)):
        (tucker,) = hooi([wide], exact).tensors
        assert naive_residual(wide, tucker) < 1e-6


@stable
@given(case=cases(), sweeps=st.integers(1, 5))
def test_residual_of_any_stack_never_grows_and_ends_below_st_hosvd(case: Case, sweeps: int) -> None:
    stack = case.stack()
    start = hooi([stack], case.rank, max_sweeps=0).projected_residuals[-1]
    residuals = hooi([stack], case.rank, max_sweeps=sweeps, tolerance=0).projected_residuals
    rounding = max(case.precision, 1e-7)
    for before, after in itertools.pairwise(residuals):
        assert after <= before + rounding
    assert residuals[-1] <= start + rounding


@stable
@given(case=cases())
def test_projected_residual_of_any_stack_equals_the_explicit_one(case: Case) -> None:
    stack = case.stack()
    result = hooi([stack], case.rank)
    explicit = naive_residual(stack, result.tensors[0])
    # 1 − ‖core‖²/‖X‖² of a float32 core is known to about 2e-7.
    rounding = 1e-7 if result.tensors[0].core.dtype == torch.float64 else 2e-7 / max(explicit, 1e-2)
    np.testing.assert_allclose(result.projected_residuals[-1], explicit, atol=rounding, rtol=1e-6)
    np.testing.assert_allclose(
        relative_residual(stack, result.tensors[0]), explicit, atol=1e-7, rtol=1e-5
    )


@settings(stable, max_examples=200)
@given(case=cases(), sweeps=st.integers(1, 4))
def test_hooi_of_any_stack_is_not_worse_than_tensorly(case: Case, sweeps: int) -> None:
    stack = case.stack()
    (tucker,) = hooi([stack], case.rank, max_sweeps=sweeps, tolerance=0).tensors
    assert naive_residual(stack, tucker) <= tensorly_residual(stack, case.rank, sweeps) + 1e-4


@stable
@given(case=cases((Kind.PLANTED,), FLOAT64), data=st.data())
def test_permuted_experts_give_the_permuted_expansion(case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(case.shape.experts)))
    stack = case.stack()
    (tucker,) = hooi([stack], case.rank, max_sweeps=3, tolerance=-1.0).tensors
    (permuted,) = hooi([stack[order]], case.rank, max_sweeps=3, tolerance=-1.0).tensors
    np.testing.assert_allclose(naive_expansion(permuted), naive_expansion(tucker)[order], atol=1e-7)
    if tucker.U_E is not None and permuted.U_E is not None:
        # Rows follow the experts, columns keep their span: U U^T is permuted on both sides.
        projector = tucker.U_E @ tucker.U_E.T
        torch.testing.assert_close(
            permuted.U_E @ permuted.U_E.T, projector[order][:, order], atol=1e-7, rtol=0
        )


@stable
@given(case=cases(tuple(ORDINARY)), exponent=st.integers(-30, 30), negative=st.booleans())
def test_scaled_stack_scales_the_core_and_leaves_the_residual(
    case: Case, exponent: int, *, negative: bool
) -> None:
    factor = (-1.0 if negative else 1.0) * 2.0**exponent
    stack = case.stack()
    plain, scaled = hooi([stack], case.rank), hooi([stack * factor], case.rank)
    assert np.isclose(
        plain.projected_residuals[-1], scaled.projected_residuals[-1], atol=1e-7, rtol=1e-6
    )
    size = float(plain.tensors[0].core.double().norm())
    scaled_size = float(scaled.tensors[0].core.double().norm())
    np.testing.assert_allclose(scaled_size, abs(factor) * size, rtol=1e-5)
    np.testing.assert_allclose(
        naive_residual(stack * factor, scaled.tensors[0]),
        naive_residual(stack, plain.tensors[0]),
        atol=1e-6,
    )


tolerances = st.floats(-6, np.log10(0.5)).map(lambda exponent: 10.0**exponent)


@settings(stable, max_examples=100)
@given(
    case=cases((Kind.DECAYING, Kind.PLANTED, Kind.FLAT, Kind.TAIL)),
    tolerance=tolerances,
    sweeps=st.integers(0, 2),
)
def test_rank_for_tolerance_of_any_stack_keeps_hooi_within_it(
    case: Case, tolerance: float, sweeps: int
) -> None:
    stack = case.stack()
    rank = rank_for_tolerance([stack], tolerance)
    (tucker,) = hooi([stack], rank, max_sweeps=sweeps).tensors
    assert naive_residual(stack, tucker) <= tolerance


@stable
@given(case=cases((Kind.DECAYING,)), tolerance=tolerances, ratio=st.floats(0.1, 10.0))
def test_rank_for_tolerance_of_coupled_stacks_keeps_each_within_it(
    case: Case, tolerance: float, ratio: float
) -> None:
    stacks = _pair(case)
    stacks[1] = stacks[1] * ratio
    rank = rank_for_tolerance(stacks, tolerance)
    for stack, tucker in zip(stacks, hooi(stacks, rank).tensors, strict=True):
        assert naive_residual(stack, tucker) <= tolerance


@stable
@given(case=cases(tuple(ORDINARY)))
def test_coupled_stacks_share_one_hidden_factor_and_are_not_better_than_alone(case: Case) -> None:
    """Sharing U_I is a constraint: without it each ST-HOSVD keeps at least as much energy."""
    stacks = _pair(case)
    rank = MultilinearRank(*case.shape[:2], case.rank.hidden)
    coupled = hooi(stacks, rank)
    first, second = coupled.tensors
    assert first.U_I is second.U_I
    unit = max(float(stack.double().norm()) for stack in stacks)
    missed = alone = 0.0
    for stack, tucker in zip(stacks, coupled.tensors, strict=True):
        energy = float((stack.double() / unit).norm()) ** 2
        missed += energy * naive_residual(stack, tucker) ** 2
        alone += energy * naive_residual(stack, hooi([stack], rank).tensors[0]) ** 2
    assert missed >= alone * (1 - 1e-5) - 1e-12


@stable
@given(case=cases(tuple(ORDINARY), FLOAT64))
def test_coupled_hidden_factor_with_other_modes_full_is_that_of_the_concatenation(
    case: Case,
) -> None:
    stacks = _pair(case)
    hidden = case.rank.hidden
    coupled = hooi(stacks, MultilinearRank(*case.shape[:2], hidden))
    joined_rank = MultilinearRank(2 * case.shape.experts, case.shape.intermediate, hidden)
    joined = hooi([torch.cat(stacks)], joined_rank)
    np.testing.assert_allclose(
        coupled.projected_residuals[-1], joined.projected_residuals[-1], atol=1e-7
    )


@stable
@given(case=cases(tuple(ORDINARY), FLOAT64))
def test_coupled_copies_of_one_stack_give_its_own_residual(case: Case) -> None:
    stack = case.stack()
    alone = hooi([stack], case.rank, max_sweeps=3, tolerance=-1.0)
    coupled = hooi([stack, stack.clone()], case.rank, max_sweeps=3, tolerance=-1.0)
    np.testing.assert_allclose(
        coupled.projected_residuals[-1], alone.projected_residuals[-1], atol=2e-7
    )


def _pair(case: Case) -> list[Tensor]:
    return [
        make_stack(case.kind, case.shape, case.rank, dtype=case.dtype, seed=case.seed + other)
        for other in range(2)
    ]
