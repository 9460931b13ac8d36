from __future__ import annotations

import itertools

import pytest
import torch

from tuckerize.domain import Layout, MultilinearRank, Projection, StackShape
from tuckerize.names import TensorKind, TensorName
from tuckerize.parallel.layouts import (
    INDEX_BYTES,
    Collective,
    ExpertLoad,
    LayerShape,
    Parallelism,
    even_load,
    layer_traffic,
    owned_slice,
    owners_of,
    smallest_split_size,
    split_dimensions,
    width_over_ep,
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
        parts = [owned_slice(size, tp_size, tp_rank) for tp_rank in range(tp_size)]
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
def test_cut_over_tp_of_every_tensor_is_that_of_the_layout(
    layout: Layout,
    projection: Projection,
    rank: MultilinearRank,
    core: int | None,
    U_E: int | None,
    U_H: int | None,
    U_I: int | None,
) -> None:
    expected = {"core": core, "U_E": U_E, "U_H": U_H, "U_I": U_I}
    names = {kind: TensorName(projection, TensorKind(kind)) for kind in expected}
    found = {
        k: split_dimensions(layout, name, {projection: rank}, SHAPE).tp for k, name in names.items()
    }
    assert found == expected


def test_smallest_split_size_counts_the_ranks_that_a_layout_splits() -> None:
    ranks = {GATE: LATENT, UP: MultilinearRank(8, 24, 9), DOWN: MultilinearRank(8, 7, 3)}
    assert smallest_split_size(Layout.INTERMEDIATE, ranks, SHAPE) == 24
    assert smallest_split_size(Layout.RANK, ranks, SHAPE) == 7
    assert smallest_split_size(Layout.RANK, {**ranks, DOWN: FULL}, SHAPE) == 9


def sizes_of(rank: MultilinearRank, *, groups: int = 1, joint: bool = False) -> LayerShape:
    return LayerShape([dict.fromkeys(Projection, rank)] * groups, SHAPE, joint)


def bytes_of(
    layout: Layout, sizes: LayerShape, mesh: Parallelism, *, top_k: int = 3, copies: float = 0.0
) -> dict[Collective, float]:
    """Bytes of collectives that move something, with numbers of one byte."""
    load = ExpertLoad(top_k, [top_k / len(sizes.ranks)] * len(sizes.ranks), copies)
    moved = layer_traffic(layout, sizes, mesh, load, value_bytes=1)
    return {kind: sent for kind, sent in moved.items() if sent}


TP4 = Parallelism(tp=4)


def test_traffic_of_the_intermediate_layout_is_one_all_reduce_of_the_last_rank() -> None:
    # Four processes send 2 * 3/4 of r = 10 numbers a token, against I = 32 of the dense model.
    assert bytes_of(Layout.INTERMEDIATE, sizes_of(LATENT), TP4) == {Collective.ALL_REDUCE: 15}
    assert bytes_of(Layout.INTERMEDIATE, sizes_of(FULL), TP4) == {Collective.ALL_REDUCE: 48}
    # The r_I of four groups are more than I.
    four = sizes_of(LATENT, groups=4)
    assert bytes_of(Layout.INTERMEDIATE, four, TP4) == {Collective.ALL_REDUCE: 48}


def test_traffic_of_the_rank_layout_is_that_of_its_three_collectives() -> None:
    # k = 3: all-reduce of k x 2 r_H = 72 and of r_I = 10, reduce-scatter of k x r_H = 36.
    assert bytes_of(Layout.RANK, sizes_of(TRUNCATED), TP4) == {
        Collective.ALL_REDUCE: (72 + 10) * 1.5,
        Collective.REDUCE_SCATTER: 36 * 0.75,
    }


def test_traffic_of_the_rank_layout_without_truncated_neurons_scatters_gate_and_up() -> None:
    # No U_H: gate and up give k x 2 H = 144 numbers to a reduce-scatter, down needs none.
    assert bytes_of(Layout.RANK, sizes_of(LATENT), TP4) == {
        Collective.ALL_REDUCE: 15,
        Collective.REDUCE_SCATTER: 144 * 0.75,
    }


def test_traffic_of_the_rank_layout_counts_the_zeros_that_make_shares_equal() -> None:
    # r_H = 12 over 5 processes: shares of 3, so 15 numbers for each of k = 3 experts.
    moved = bytes_of(Layout.RANK, sizes_of(TRUNCATED), Parallelism(tp=5))
    assert moved[Collective.REDUCE_SCATTER] == pytest.approx(45 * 0.8)


def test_traffic_of_several_groups_shares_the_experts_of_a_token() -> None:
    assert bytes_of(Layout.RANK, sizes_of(TRUNCATED, groups=2), TP4) == {
        Collective.ALL_REDUCE: (72 + 20) * 1.5,
        Collective.REDUCE_SCATTER: 36 * 0.75,
    }


def test_traffic_of_sequence_parallel_processes_is_a_gather_and_a_scatter() -> None:
    mesh = Parallelism(tp=4, sequence_parallel=True)
    routes = 3 * (1 + INDEX_BYTES)
    assert bytes_of(Layout.INTERMEDIATE, sizes_of(LATENT, joint=True), mesh) == {
        Collective.ALL_GATHER: (10 + routes) * 0.75,
        Collective.REDUCE_SCATTER: 7.5,
    }
    # The rank layout cuts U_I, so that all need the whole token.
    whole = bytes_of(Layout.RANK, sizes_of(LATENT, joint=True), mesh)
    assert whole[Collective.ALL_GATHER] == (32 + routes) * 0.75


def test_traffic_of_expert_parallel_processes_goes_in_core_sizes_where_they_share_factors() -> None:
    mesh, routes = Parallelism(ep=2), 3 * (1 + INDEX_BYTES)

    def sent(sizes: LayerShape) -> float:
        return bytes_of(Layout.INTERMEDIATE, sizes, mesh, copies=0.5)[Collective.ALL_TO_ALL]

    assert sent(sizes_of(LATENT, joint=True)) == (10 + routes + 10) / 2
    assert sent(sizes_of(LATENT)) == (20 + routes + 10) / 2
    assert sent(sizes_of(FULL)) == (32 + routes + 32) / 2
    # Whole groups own their factors.
    assert sent(sizes_of(LATENT, groups=2)) == (32 + routes + 32) / 2


def test_traffic_without_all_to_all_brings_every_token_to_all() -> None:
    mesh, routes = Parallelism(ep=4, all_to_all=False), 3 * (1 + INDEX_BYTES)
    assert bytes_of(Layout.INTERMEDIATE, sizes_of(LATENT, joint=True), mesh) == {
        Collective.ALL_GATHER: 3 * (10 + routes),
        Collective.REDUCE_SCATTER: 30,
    }


def test_traffic_of_the_fused_pair_is_a_row_for_every_expert_elsewhere_and_back() -> None:
    load = ExpertLoad(3, [3.0], copies=0.5, remote=1.25)
    mesh, sizes = Parallelism(ep=2), sizes_of(LATENT, joint=True)
    moved = layer_traffic(Layout.INTERMEDIATE, sizes, mesh, load, value_bytes=2, fused_width=32)
    assert {kind: sent for kind, sent in moved.items() if sent} == {
        Collective.ALL_TO_ALL: 1.25 * 2 * 32 * 2
    }


@pytest.mark.parametrize(
    ("layout", "sizes", "mesh", "expected"),
    [
        (Layout.INTERMEDIATE, sizes_of(LATENT, joint=True), Parallelism(ep=2), 10),
        (Layout.INTERMEDIATE, sizes_of(LATENT), Parallelism(ep=2), 20),
        (Layout.INTERMEDIATE, sizes_of(FULL), Parallelism(ep=2), 32),
        (Layout.INTERMEDIATE, sizes_of(LATENT, groups=2), Parallelism(ep=2), 32),
        (Layout.RANK, sizes_of(LATENT), Parallelism(tp=2, ep=2), 10),
        (Layout.RANK, sizes_of(LATENT), Parallelism(tp=3, ep=2), 10),
        (Layout.RANK, sizes_of(FULL), Parallelism(tp=2, ep=2), 32),
    ],
)
def test_width_over_ep_is_the_widest_of_both_ways(
    layout: Layout, sizes: LayerShape, mesh: Parallelism, expected: int
) -> None:
    assert width_over_ep(layout, sizes, mesh) == expected


def test_even_load_is_that_of_all_choices_of_experts() -> None:
    choices = list(itertools.combinations(range(8), 3))
    # Of a token on process 0 of 4, each with 2 experts.
    copies = [len({expert // 2 for expert in chosen} - {0}) for chosen in choices]
    load = even_load(3, experts=8, groups=2, ep=4)
    assert load.copies == pytest.approx(sum(copies) / len(choices))
    assert load.rows == [1.5, 1.5]
    remote = sum(expert // 2 != 0 for chosen in choices for expert in chosen)
    assert load.remote == pytest.approx(remote / len(choices))


@pytest.mark.parametrize(
    ("name", "rank", "dimension"),
    [
        ("gate_proj.core", LATENT, 0),
        ("gate_proj.core", TRUNCATED, None),
        ("gate_proj.core.2", LATENT, None),
        ("gate_proj.U_E", TRUNCATED, 0),
        ("gate_proj.U_H", TRUNCATED, None),
        ("gate_up_proj.U_I", LATENT, None),
    ],
)
@pytest.mark.parametrize("layout", Layout)
def test_cut_over_experts_is_of_what_has_a_row_for_each(
    layout: Layout, name: str, rank: MultilinearRank, dimension: int | None
) -> None:
    ranks = dict.fromkeys(Projection, rank)
    assert split_dimensions(layout, TensorName.parse(name), ranks, SHAPE).experts == dimension


@pytest.mark.parametrize("projection", Projection)
@pytest.mark.parametrize("layout", Layout)
def test_cut_over_tp_of_one_experts_rows_is_that_of_the_whole_core(
    layout: Layout, projection: Projection
) -> None:
    whole, rows = (
        split_dimensions(
            layout, TensorName.core(projection, expert), {projection: LATENT}, SHAPE
        ).tp
        for expert in (None, 3)
    )
    assert whole is not None
    assert rows == whole - 1


def test_owners_of_groups_are_equally_many_in_order() -> None:
    assert [owners_of(group, groups=4, ep=2) for group in range(4)] == [
        range(1), range(1), range(1, 2), range(1, 2),
    ]  # fmt: skip
    assert owners_of(0, groups=1, ep=4) == range(4)
