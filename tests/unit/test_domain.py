from __future__ import annotations

import itertools
import math

import pytest

from tuckerize.domain import (
    GATE_UP,
    Mode,
    MultilinearRank,
    Projection,
    StackShape,
    TensorHeader,
    coupling_name,
    group_experts,
)
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


@pytest.mark.parametrize(
    ("rank", "modes"),
    [
        ((4, 3, 5), ()),
        ((3, 3, 5), (Mode.EXPERT,)),
        ((4, 2, 5), (Mode.INTERMEDIATE,)),
        ((4, 3, 1), (Mode.HIDDEN,)),
        ((1, 1, 1), (Mode.EXPERT, Mode.INTERMEDIATE, Mode.HIDDEN)),
    ],
)
def test_truncated_modes_are_those_below_their_size(
    rank: tuple[int, int, int], modes: tuple[Mode, ...]
) -> None:
    assert MultilinearRank(*rank).truncated_modes(SHAPE) == modes


def test_multilinear_rank_as_text_reads_like_the_option() -> None:
    assert str(MultilinearRank(64, 704, 1024)) == "64,704,1024"


def test_factor_names_follow_the_modes() -> None:
    assert [mode.factor_name for mode in Mode] == ["U_E", "U_H", "U_I"]


def test_coupling_name_of_two_projections_is_the_shared_module() -> None:
    assert coupling_name(GATE_UP) == "gate_up_proj"
    assert coupling_name((Projection.DOWN,)) == "down_proj"


def test_tensor_header_counts_numbers_also_of_a_scalar() -> None:
    assert TensorHeader("F32", (3, 4), 48).parameters == 12
    assert TensorHeader("F32", (), 4).parameters == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_group_experts_of_all_groups_are_all_experts_once(size: int) -> None:
    groups = [group_experts(StackShape(8, 1, 1), size, group) for group in range(8 // size)]
    assert [expert for group in groups for expert in group] == list(range(8))
    assert {len(group) for group in groups} == {size}
