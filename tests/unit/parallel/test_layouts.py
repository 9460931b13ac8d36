from __future__ import annotations

import pytest
import torch

from tuckerize.domain import MultilinearRank, Projection, StackShape
from tuckerize.parallel.layouts import (
    Layout,
    Traffic,
    layer_traffic,
    output_width,
    part,
    smallest_split_size,
    split_dimension,
)

SHAPE = StackShape(8, 24, 32)
FULL = MultilinearRank(8, 24, 32)
LATENT = MultilinearRank(8, 24, 10)
TRUNCATED = MultilinearRank(4, 12, 10)
GATE, UP, DOWN = Projection


@pytest.mark.parametrize("tp_size", range(1, 9))
def test_part_of_all_processes_concatenated_is_the_whole(tp_size: int) -> None:
    for size in range(33):
        tensor = torch.arange(size)
        parts = [part(size, tp_size, tp_rank) for tp_rank in range(tp_size)]
        assert torch.equal(torch.cat([tensor[p.start : p.stop] for p in parts]), tensor)
        lengths = [p.length for p in parts]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(
    ("layout", "projection", "rank", "core", "U_E", "U_H", "U_I"),
    [
        (Layout.INTERMEDIATE, GATE, LATENT, 1, None, 0, None),
        (Layout.INTERMEDIATE, DOWN, LATENT, 1, None, 0, None),
        (Layout.INTERMEDIATE, GATE, TRUNCATED, None, None, 0, None),
        (Layout.INTERMEDIATE, DOWN, TRUNCATED, None, None, 0, None),
        (Layout.RANK, GATE, LATENT, 2, None, 0, 1),
        (Layout.RANK, UP, TRUNCATED, 2, None, 0, 1),
        (Layout.RANK, DOWN, LATENT, 1, None, 0, None),
        (Layout.RANK, DOWN, TRUNCATED, 1, None, 0, None),
    ],
)
def test_split_dimension_of_every_tensor_is_that_of_the_layout(
    layout: Layout,
    projection: Projection,
    rank: MultilinearRank,
    core: int | None,
    U_E: int | None,
    U_H: int | None,
    U_I: int | None,
) -> None:
    expected = {"core": core, "U_E": U_E, "U_H": U_H, "U_I": U_I}
    found = {n: split_dimension(layout, projection, n, rank, SHAPE) for n in expected}
    assert found == expected


def test_smallest_split_size_counts_the_ranks_that_a_layout_splits() -> None:
    ranks = {GATE: LATENT, UP: MultilinearRank(8, 24, 9), DOWN: MultilinearRank(8, 7, 3)}
    assert smallest_split_size(Layout.INTERMEDIATE, ranks, SHAPE) == 24
    assert smallest_split_size(Layout.RANK, ranks, SHAPE) == 7
    assert smallest_split_size(Layout.RANK, {**ranks, DOWN: FULL}, SHAPE) == 9


def test_output_width_is_never_above_the_hidden_size() -> None:
    assert output_width([10, 10], 32) == 20
    assert output_width([10, 10, 10, 10], 32) == 32


def same(rank: MultilinearRank) -> dict[Projection, MultilinearRank]:
    return dict.fromkeys(Projection, rank)


def test_traffic_of_the_intermediate_layout_is_one_all_reduce_of_the_last_rank() -> None:
    # r = 10 numbers a token, against I = 32 of the dense model.
    traffic = layer_traffic(Layout.INTERMEDIATE, [same(LATENT)], SHAPE, top_k=3)
    assert traffic == Traffic(10, 0)
    assert layer_traffic(Layout.INTERMEDIATE, [same(FULL)], SHAPE, top_k=3) == Traffic(32, 0)


def test_traffic_of_the_rank_layout_is_that_of_its_three_collectives() -> None:
    # k = 3: all-reduce of k x 2 r_H = 72 and of r_I = 10, reduce-scatter of k x r_H = 36.
    traffic = layer_traffic(Layout.RANK, [same(TRUNCATED)], SHAPE, top_k=3)
    assert traffic == Traffic(72 + 10, 36)


def test_traffic_of_the_rank_layout_without_truncated_neurons_scatters_gate_and_up() -> None:
    # No U_H: gate and up give k x 2 H = 144 numbers to a reduce-scatter, down needs none.
    traffic = layer_traffic(Layout.RANK, [same(LATENT)], SHAPE, top_k=3)
    assert traffic == Traffic(10, 144)


def test_traffic_of_several_groups_shares_the_experts_of_a_token() -> None:
    traffic = layer_traffic(Layout.RANK, [same(TRUNCATED)] * 2, SHAPE, top_k=3)
    assert traffic == Traffic(72 + 20, 36)


def test_sent_numbers_of_ring_algorithms_for_four_processes() -> None:
    # An all-reduce of n numbers sends 2 n 3/4, a reduce-scatter n 3/4.
    assert Traffic(100, 40).sent_numbers(4) == 150 + 30
    assert Traffic(100, 40).sent_numbers(1) == 0
