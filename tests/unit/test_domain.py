from __future__ import annotations

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

SHAPE = StackShape(4, 3, 5)


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
