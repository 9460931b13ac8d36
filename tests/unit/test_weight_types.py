from __future__ import annotations

import itertools
import math

import pytest

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.weight_types import stored_parameters

SHAPE = StackShape(4, 3, 5)
RANKS = [
    MultilinearRank(*sizes)
    for sizes in itertools.product((1, 2, 4), (1, 2, 3), (1, 4, 5))
]  # fmt: skip


def stored_shapes(shape: StackShape, rank: MultilinearRank, coupled: int) -> list[tuple[int, ...]]:
    """Shapes of all tensors that are stored, written out one by one."""
    shapes: list[tuple[int, ...]] = []
    for _ in range(coupled):
        shapes.append((rank.expert, rank.intermediate, rank.hidden))
        if rank.expert != shape.experts:
            shapes.append((shape.experts, rank.expert))
        if rank.intermediate != shape.intermediate:
            shapes.append((shape.intermediate, rank.intermediate))
    if rank.hidden != shape.hidden:
        shapes.append((shape.hidden, rank.hidden))
    return shapes


@pytest.mark.parametrize("coupled", [1, 2])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_stored_parameters_of_any_rank_count_every_tensor(
    rank: MultilinearRank, coupled: int
) -> None:
    expected = sum(math.prod(sizes) for sizes in stored_shapes(SHAPE, rank, coupled))
    assert stored_parameters(SHAPE, rank, coupled=coupled) == expected


def test_stored_parameters_of_full_rank_are_the_dense_ones() -> None:
    assert stored_parameters(SHAPE, MultilinearRank(*SHAPE)) == SHAPE.parameters == 60
