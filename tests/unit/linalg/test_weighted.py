"""Weighted Tucker: the objective it claims, falling, exact where theory knows the answer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import Kind, make_stack, naive_expansion
from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.errors import MultilinearRankError, NonFiniteError
from tuckerize.linalg.hooi import hooi, is_reachable
from tuckerize.linalg.tucker import TuckerFactors
from tuckerize.linalg.weighted import (
    EIGENVALUE_FLOOR,
    WeightedDecomposition,
    _Problem,
    floored,
    matrix_roots,
    weighted_tucker,
)

SHAPE = StackShape(5, 6, 8)
SMALL = MultilinearRank(3, 4, 5)
RANKS = [
    MultilinearRank(*sizes)
    for sizes in itertools.product(*zip(SHAPE, SMALL, strict=True))
    if sizes != SHAPE
]
F64 = torch.float64


def make_moments(
    experts: int,
    size: int,
    *,
    tokens: int = 40,
    seed: int = 0,
    dtype: torch.dtype = F64,
    decay: float = 2.0,
) -> Tensor:
    """Second moments of tokens with uneven directions, other ones for every expert."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -decay, size, dtype=F64)
    moments = []
    for _ in range(experts):
        mixing, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))
        x_NI = torch.randn(tokens, size, generator=generator, dtype=F64) @ (scales * mixing).T
        moments.append(x_NI.T @ x_NI)
    return torch.stack(moments).to(dtype)


def make_stacks(count: int, shape: StackShape = SHAPE, dtype: torch.dtype = F64) -> list[Tensor]:
    return [make_stack(Kind.FLAT, shape, SMALL, dtype=dtype, seed=seed) for seed in range(count)]


def naive_error(stacks: list[Tensor], found: WeightedDecomposition, moments_EII: Tensor) -> float:
    """The relative weighted error, one expert and one row at a time in float64."""
    missed = total = 0.0
    moments = floored(moments_EII.double())
    for stack, tucker in zip(stacks, found.tensors, strict=True):
        difference_EHI = stack.double() - torch.from_numpy(naive_expansion(tucker))
        for expert, moment_II in enumerate(moments):
            for row_I, exact_I in zip(difference_EHI[expert], stack[expert].double(), strict=True):
                missed += float(row_I @ moment_II @ row_I)
                total += float(exact_I @ moment_II @ exact_I)
    return math.sqrt(missed / total) if total else 0.0


def check_laws(
    stacks: list[Tensor], found: WeightedDecomposition, rank: MultilinearRank, precision: float
) -> None:
    """Sizes, factors of truncated modes only, orthonormal columns, errors that never rise."""
    shape = StackShape(*stacks[0].shape)
    for tucker in found.tensors:
        assert tucker.rank == rank
        assert tucker.shape == shape
        assert tuple(m for m in Mode if tucker.factors[m] is not None) == rank.truncated_modes(
            shape
        )
        for factor in tucker.factors:
            if factor is not None:
                gram = factor.double().T @ factor.double()
                torch.testing.assert_close(
                    gram, torch.eye(len(gram), dtype=F64), atol=precision, rtol=0
                )
        assert all(t is None or bool(t.isfinite().all()) for t in (tucker.core, *tucker.factors))
        assert tucker.U_I is found.tensors[0].U_I
    assert found.sweeps == len(found.errors) - 1
    assert all(math.isfinite(error) for error in found.errors)
    assert all(after < before for before, after in itertools.pairwise(found.errors))


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("coupled", [1, 2])
def test_error_falls_with_every_sweep_and_is_the_naive_one(
    rank: MultilinearRank, coupled: int
) -> None:
    stacks, moments = make_stacks(coupled), make_moments(5, 8)
    found = weighted_tucker(stacks, moments, rank, tolerance=0)
    check_laws(stacks, found, rank, precision=1e-10)
    assert found.errors[-1] == pytest.approx(naive_error(stacks, found, moments), rel=1e-8)
    start = weighted_tucker(stacks, moments, rank, max_sweeps=0)
    assert start.errors == found.errors[:1]
    assert start.errors[0] == pytest.approx(naive_error(stacks, start, moments), rel=1e-8)


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("coupled", [1, 2])
def test_error_is_not_above_that_of_the_unwhitened_hooi(
    rank: MultilinearRank, coupled: int
) -> None:
    stacks, moments = make_stacks(coupled), make_moments(5, 8)
    plain = WeightedDecomposition(hooi(stacks, rank).tensors, (math.nan,))
    found = weighted_tucker(stacks, moments, rank)
    assert found.errors[-1] <= naive_error(stacks, plain, moments)


@pytest.mark.parametrize("rank", [SMALL, MultilinearRank(5, 6, 5)], ids=str)
def test_moments_are_afterwards_what_they_were(rank: MultilinearRank) -> None:
    stacks, moments = make_stacks(1), make_moments(5, 8)
    before = moments.clone()
    weighted_tucker(stacks, moments, rank)
    assert torch.equal(moments, before)


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_identity_moments_give_what_hooi_gives(rank: MultilinearRank) -> None:
    stacks = make_stacks(1)
    identity = torch.eye(8, dtype=F64).repeat(5, 1, 1)
    residual = hooi(stacks, rank, tolerance=0, max_sweeps=60).projected_residuals[-1]
    found = weighted_tucker(stacks, identity, rank, tolerance=0, max_sweeps=60)
    assert found.errors[-1] == pytest.approx(residual, rel=1e-3)
    assert found.errors[-1] <= hooi(stacks, rank).projected_residuals[-1] * (1 + 1e-9)


def test_full_rank_gives_the_stacks_themselves() -> None:
    stacks = make_stacks(2, dtype=torch.float32)
    found = weighted_tucker(stacks, make_moments(5, 8), MultilinearRank(*SHAPE))
    assert found.errors == (0.0,)
    for stack, tucker in zip(stacks, found.tensors, strict=True):
        assert tucker.factors == (None, None, None)
        assert torch.equal(tucker.core, stack)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("coupled", [1, 2])
def test_one_expert_with_truncated_hidden_mode_reaches_eckart_young(
    size: int, coupled: int
) -> None:
    """All rows see one moment: the optimum is the truncated SVD of W Σ^{1/2}."""
    stacks = make_stacks(coupled, StackShape(1, 6, 8))
    moments = make_moments(1, 8)
    found = weighted_tucker(stacks, moments, MultilinearRank(1, 6, size))
    values, vectors = torch.linalg.eigh(floored(moments)[0])
    root_II = vectors * values.clamp_min(0).sqrt() @ vectors.T
    rows_MI = torch.cat([stack[0] for stack in stacks]) @ root_II
    singular = torch.linalg.svdvals(rows_MI)
    optimum = float(singular[size:].norm() / singular.norm())
    assert found.errors[-1] == pytest.approx(optimum, rel=1e-4, abs=1e-9)
    assert found.errors[-1] >= optimum - 1e-12


def test_tucker_tensor_is_recovered_from_what_its_experts_see() -> None:
    stack = make_stack(Kind.PLANTED, SHAPE, SMALL, dtype=F64)
    planted = hooi([stack], SMALL).tensors[0]
    exact = torch.from_numpy(naive_expansion(planted))
    found = weighted_tucker([exact], make_moments(5, 8), SMALL)
    assert found.errors[-1] < 1e-6


def test_truncated_directions_that_no_expert_sees_cost_nothing() -> None:
    """Inputs in a subspace: the stack is right for them at the subspace's dimension."""
    generator = torch.Generator().manual_seed(3)
    basis_RI = torch.randn(3, 8, generator=generator, dtype=F64)
    x_ENI = torch.randn(5, 30, 3, generator=generator, dtype=F64) @ basis_RI
    stacks = make_stacks(2)
    found = weighted_tucker(stacks, x_ENI.mT @ x_ENI, MultilinearRank(5, 6, 3))
    for stack, tucker in zip(stacks, found.tensors, strict=True):
        expanded = torch.from_numpy(naive_expansion(tucker))
        missed = (stack - expanded) @ x_ENI.mT
        # The floor is a share of the variance: where it counts, its root is what can be lost.
        assert float(missed.norm() / (stack @ x_ENI.mT).norm()) < 3 * EIGENVALUE_FLOOR**0.5


SINGULAR = {
    "two tokens": make_moments(5, 8, tokens=2),
    "one token": make_moments(5, 8, tokens=1),
    "zero": torch.zeros(5, 8, 8, dtype=F64),
    "one expert without tokens": make_moments(5, 8)
    * torch.tensor([1, 1, 0, 1, 1.0])[:, None, None],
    "one expert with tokens": make_moments(5, 8) * torch.tensor([0, 0, 1.0, 0, 0])[:, None, None],
    "uneven experts": make_moments(5, 8) * torch.logspace(-9, 9, 5)[:, None, None],
    "decay of 1e-12": make_moments(5, 8, decay=6),
    "huge": make_moments(5, 8) * 1e25,
    "tiny": make_moments(5, 8) * 1e-25,
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("rank", [MultilinearRank(5, 6, 5), SMALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_singular_moments_are_the_common_case(
    name: str, rank: MultilinearRank, dtype: torch.dtype
) -> None:
    stacks = make_stacks(2, dtype=dtype)
    moments = SINGULAR[name].to(dtype)
    found = weighted_tucker(stacks, moments, rank, tolerance=0)
    check_laws(stacks, found, rank, precision=1e-4 if dtype == torch.float32 else 1e-8)
    assert 0 <= found.errors[-1] < 1.5
    assert naive_error(stacks, found, moments) == pytest.approx(
        found.errors[-1], rel=1e-2 if dtype == torch.float32 else 1e-5, abs=1e-3
    )


# Powers of two: with others the scaled stacks are rounded, and least squares that end in a local
# optimum end elsewhere.
@pytest.mark.parametrize("scale", [2.0**-66, 2.0**66])
@pytest.mark.parametrize("rank", [MultilinearRank(5, 6, 5), SMALL], ids=str)
def test_magnitude_of_the_stacks_does_not_matter(scale: float, rank: MultilinearRank) -> None:
    stacks, moments = make_stacks(2, dtype=torch.float32), make_moments(5, 8, dtype=torch.float32)
    expected = weighted_tucker(stacks, moments, rank)
    scaled = [stack * scale for stack in stacks]
    found = weighted_tucker(scaled, moments, rank)
    check_laws(scaled, found, rank, precision=1e-4)
    assert found.errors[-1] == pytest.approx(expected.errors[-1], rel=1e-3)
    assert naive_error(scaled, found, moments) == pytest.approx(found.errors[-1], rel=1e-3)


def test_zero_stack_has_no_error() -> None:
    stack = torch.zeros(SHAPE)
    found = weighted_tucker([stack], make_moments(5, 8, dtype=torch.float32), SMALL)
    assert found.errors == (0.0,)
    assert not naive_expansion(found.tensors[0]).any()


def test_stack_with_nan_and_impossible_rank_are_refused() -> None:
    stacks = make_stacks(1)
    with pytest.raises(MultilinearRankError, match="core size 9 of the hidden mode"):
        weighted_tucker(stacks, make_moments(5, 8), MultilinearRank(5, 6, 9))
    stacks[0][1, 2, 3] = math.nan
    with pytest.raises(NonFiniteError):
        weighted_tucker(stacks, make_moments(5, 8), SMALL)


@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_hidden_factor_is_nearly_the_solution_of_its_normal_equations(decay: float) -> None:
    """The oracle writes them down as one large system."""
    stacks, moments = make_stacks(2), floored(make_moments(5, 8, decay=decay))
    start = weighted_tucker(stacks, moments, MultilinearRank(5, 6, 3), max_sweeps=0).tensors
    problem, U_I = _Problem(stacks, moments), start[0].U_I
    assert U_I is not None
    system, right = torch.zeros(24, 24, dtype=F64), torch.zeros(24, dtype=F64)
    for stack, factors in zip(stacks, start, strict=True):
        for slice_HI, core_HR, moment_II in zip(stack, factors.core, moments, strict=True):
            system += torch.kron(moment_II, core_HR.T @ core_HR)
            right += (moment_II @ slice_HI.T @ core_HR).flatten()
    exact_IR = torch.linalg.solve(system, right).view(8, 3)

    def squared_error(own_IR: Tensor) -> float:
        tensors = [TuckerFactors(factors.core, U_I=own_IR) for factors in start]
        return problem.measure(tensors) ** 2

    found = squared_error(problem._hidden_factor(list(start), U_I))
    least = squared_error(exact_IR)
    assert found - least <= 0.05 * (squared_error(U_I) - least)


def test_roots_of_a_moment_multiply_to_it_and_to_the_identity() -> None:
    moment_NN = make_moments(1, 8)[0]
    root_NN, inverse_NN = matrix_roots(moment_NN)
    identity = torch.eye(8, dtype=F64)
    torch.testing.assert_close(root_NN @ inverse_NN, identity, rtol=0, atol=1e-9)
    scale = float(moment_NN.abs().max())
    torch.testing.assert_close(root_NN @ root_NN / scale, moment_NN / scale, rtol=0, atol=1e-5)
    for root in matrix_roots(torch.zeros(3, 3)):
        assert torch.equal(root, torch.eye(3, dtype=F64))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, MultilinearRank]:
    shape = StackShape(draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 7)))
    coupled = draw(st.integers(1, 2))
    rank = draw(
        st.builds(MultilinearRank, *(st.integers(1, size) for size in shape)).filter(
            lambda rank: is_reachable(rank, shape, coupled=coupled)
        )
    )
    dtype = draw(st.sampled_from([torch.float32, F64]))
    seed = draw(st.integers(0, 1000))
    kind = draw(st.sampled_from([Kind.FLAT, Kind.DECAYING, Kind.DEFICIENT, Kind.ZERO]))
    stacks = [make_stack(kind, shape, rank, dtype=dtype, seed=seed + n) for n in range(coupled)]
    tokens = draw(st.integers(0, 2 * shape.hidden))
    moments = make_moments(
        shape.experts,
        shape.hidden,
        tokens=tokens,
        seed=seed,
        dtype=dtype,
        decay=draw(st.sampled_from([0.0, 2.0, 5.0])),
    )
    return stacks, moments, rank


@settings(derandomize=True, max_examples=40, deadline=None, database=None)
@given(problem=problems())
def test_any_problem_has_falling_errors_and_orthonormal_factors(
    problem: tuple[list[Tensor], Tensor, MultilinearRank],
) -> None:
    stacks, moments, rank = problem
    found = weighted_tucker(stacks, moments, rank, max_sweeps=4, tolerance=0)
    check_laws(stacks, found, rank, precision=1e-4)
    exact = naive_error(stacks, found, moments)
    assert found.errors[-1] == pytest.approx(exact, rel=1e-2, abs=2e-3)
