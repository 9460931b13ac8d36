from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cases import NONZERO_CASES, Case, Kind, make_stack, naive_residual, singular_values
from tuckerize.domain import Mode, MultilinearRank, StackShape
from tuckerize.errors import NonFiniteError
from tuckerize.linalg.hooi import hooi, is_reachable
from tuckerize.linalg.rank_choice import _cheapest, rank_for_tolerance
from tuckerize.weight_types import stored_parameters

SMALL_SHAPES = [(4, 5, 6), (2, 7, 5), (9, 2, 3), (1, 6, 5), (5, 3, 8)]
TOLERANCES = [0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 1e-3, 1e-5]


def _ranks(shape: StackShape) -> Iterator[MultilinearRank]:
    sizes = itertools.product(*(range(1, size + 1) for size in shape))
    return (MultilinearRank(*rank) for rank in sizes)


def brute_force_parameters(stacks: list[Tensor], tolerance: float) -> int:
    """Fewest stored parameters of all reachable ranks within the HOSVD bound, by trying all."""
    shape = StackShape(*stacks[0].shape)
    # U_E and U_H are each stack's own, U_I is that of the unfoldings side by side.
    energies = [
        np.sum([singular_values(stack, mode) ** 2 for stack in stacks], axis=0)
        for mode in (Mode.EXPERT, Mode.INTERMEDIATE)
    ]
    joined = torch.cat([stack.movedim(Mode.HIDDEN, 0).flatten(1) for stack in stacks], dim=1)
    energies.append(singular_values(joined[:, :, None], 0) ** 2)
    allowance = tolerance**2 * min(float((stack.double() ** 2).sum()) for stack in stacks)
    return min(
        stored_parameters(shape, rank, coupled=len(stacks))
        for rank in _ranks(shape)
        if is_reachable(rank, shape, coupled=len(stacks))
        and sum(float(e[size:].sum()) for e, size in zip(energies, rank, strict=True)) <= allowance
    )


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("shape", SMALL_SHAPES)
@pytest.mark.parametrize("kind", [Kind.FLAT, Kind.DECAYING, Kind.PLANTED, Kind.DEFICIENT])
def test_rank_for_tolerance_of_small_stack_stores_as_little_as_brute_force(
    kind: Kind, shape: tuple[int, int, int], tolerance: float
) -> None:
    planted = MultilinearRank(min(2, shape[0]), 2, 2)
    stack = make_stack(kind, StackShape(*shape), planted, dtype=torch.float64)
    rank = rank_for_tolerance([stack], tolerance)
    stored = stored_parameters(StackShape(*shape), rank)
    assert stored == min(brute_force_parameters([stack], tolerance), stack.numel())


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_rank_for_tolerance_of_coupled_stacks_stores_as_little_as_brute_force(
    shape: tuple[int, int, int], tolerance: float
) -> None:
    planted = MultilinearRank(1, 2, 2)
    stacks = [
        make_stack(kind, StackShape(*shape), planted, dtype=torch.float64, seed=5)
        for kind in (Kind.PLANTED, Kind.DECAYING)
    ]
    stacks = [stack / stack.norm() * norm for stack, norm in zip(stacks, (1, 3), strict=True)]
    rank = rank_for_tolerance(stacks, tolerance)
    stored = stored_parameters(StackShape(*shape), rank, coupled=2)
    assert stored == min(brute_force_parameters(stacks, tolerance), 2 * stacks[0].numel())


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.parametrize("coupled", [1, 2])
def test_cheapest_of_random_tails_stores_as_little_as_brute_force(seed: int, coupled: int) -> None:
    """Tails that no small stack has: bounds at which sizes would fit that hooi refuses."""
    numbers = random.Random(seed)
    shape = StackShape(*(numbers.randint(1, largest) for largest in (4, 6, 24)))
    tails = [
        [*sorted((numbers.random() ** 3 for _ in range(size - 1)), reverse=True), 0.0]
        for size in shape
    ]
    allowance = 1.5 * numbers.random()
    fewest = min(
        stored_parameters(shape, rank, coupled=coupled)
        for rank in _ranks(shape)
        if is_reachable(rank, shape, coupled=coupled)
        and sum(tail[size - 1] for tail, size in zip(tails, rank, strict=True)) <= allowance
    )
    rank = _cheapest(shape, tails, allowance, coupled=coupled)
    assert is_reachable(rank, shape, coupled=coupled)
    assert stored_parameters(shape, rank, coupled=coupled) == min(
        fewest, coupled * shape.parameters
    )


@pytest.mark.parametrize("case", NONZERO_CASES, ids=str)
@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-6])
def test_rank_for_tolerance_of_any_case_keeps_hooi_within_it(case: Case, tolerance: float) -> None:
    stack = case.stack()
    rank = rank_for_tolerance([stack], tolerance)
    (tucker,) = hooi([stack], rank, max_sweeps=0).tensors
    assert naive_residual(stack, tucker) <= tolerance


@pytest.mark.parametrize("short_of", [1e-4, 1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", list(Mode))
def test_rank_for_tolerance_just_below_a_tail_never_chooses_that_tail(
    mode: Mode, dtype: torch.dtype, short_of: float
) -> None:
    sizes = [40, 40, 40]
    sizes[mode] = 10
    shape = StackShape(*sizes)
    decay = torch.logspace(0, -6, 10, dtype=torch.float64).reshape(
        [-1 if other == mode else 1 for other in range(3)]
    )
    flat = make_stack(Kind.FLAT, shape, MultilinearRank(1, 1, 1), dtype=torch.float64)
    stack = (flat * decay).to(dtype)
    values = singular_values(stack, mode)
    for size in range(1, 10):
        tail = float(np.linalg.norm(values[size:]) / np.linalg.norm(values))
        chosen = rank_for_tolerance([stack], tail * (1 - short_of))
        if chosen.truncated_modes(shape) == (mode,):
            assert chosen[mode] > size


def test_rank_for_tolerance_of_planted_stack_finds_its_rank() -> None:
    rank = MultilinearRank(3, 5, 7)
    stack = make_stack(Kind.TAIL, StackShape(6, 10, 14), rank)
    assert rank_for_tolerance([stack], 1e-5) == rank


def test_rank_for_tolerance_of_flat_stack_within_little_is_full() -> None:
    stack = make_stack(Kind.FLAT, StackShape(6, 10, 14), MultilinearRank(1, 1, 1))
    assert rank_for_tolerance([stack], 1e-3) == tuple(stack.shape)


def test_rank_for_tolerance_of_zero_stack_is_as_small_as_can_be() -> None:
    shape = StackShape(4, 5, 6)
    rank = rank_for_tolerance([torch.zeros(shape)], 1e-3)
    assert stored_parameters(shape, rank) == 4 + 5 + 6  # one mode full, without a factor


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_rank_for_tolerance_of_scaled_stack_is_the_same(scale: float) -> None:
    stack = make_stack(Kind.DECAYING, StackShape(6, 10, 14), MultilinearRank(1, 1, 1))
    expected = rank_for_tolerance([stack], 0.1)
    assert rank_for_tolerance([stack * scale], 0.1) == expected
    assert expected != tuple(stack.shape)
    assert rank_for_tolerance([stack.double() * scale**6], 0.1) == expected


def test_rank_for_tolerance_of_non_finite_stack_names_the_index() -> None:
    stack = torch.ones(2, 3, 4)
    stack[1, 2, 3] = math.nan
    with pytest.raises(NonFiniteError, match="nan at expert 1, intermediate 2, hidden 3"):
        rank_for_tolerance([torch.ones(2, 3, 4), stack], 0.1)
