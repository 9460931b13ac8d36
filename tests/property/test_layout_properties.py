"""Layouts: nothing is lost or doubled, and traffic grows with what is exchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.domain import Layout, MultilinearRank, Projection, StackShape
from tuckerize.names import TensorName
from tuckerize.parallel.layouts import (
    Collective,
    LayerShape,
    Parallelism,
    even_load,
    layer_traffic,
    owned_slice,
    smallest_split_size,
    split_dimensions,
)

SHAPE = StackShape(8, 24, 32)
ranks = st.builds(MultilinearRank, st.integers(1, 8), st.integers(1, 24), st.integers(1, 32))
by_projection = st.fixed_dictionaries(dict.fromkeys(Projection, ranks))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 12), st.data())
def test_slices_of_all_processes_concatenated_are_the_tensor(
    sizes: list[int], tp_size: int, data: st.DataObject
) -> None:
    tensor = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    dimension = data.draw(st.integers(0, len(sizes) - 1))
    slices = [
        tensor.narrow(dimension, *owned_slice(sizes[dimension], tp_size, tp_rank))
        for tp_rank in range(tp_size)
    ]
    assert torch.equal(torch.cat(slices, dim=dimension), tensor)


@given(st.integers(0, 500), st.integers(1, 12), st.sampled_from([4, 32]))
def test_parts_end_between_units(size: int, tp_size: int, unit: int) -> None:
    parts = [owned_slice(size, tp_size, tp_rank, unit) for tp_rank in range(tp_size)]
    assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
    assert parts[-1].stop == size
    assert all(p.start % unit == 0 or p.length == 0 for p in parts)
    units = [-(-p.length // unit) for p in parts]
    assert max(units) - min(units) <= 1


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_parts_are_even_and_in_order(size: int, tp_size: int) -> None:
    parts = [owned_slice(size, tp_size, tp_rank) for tp_rank in range(tp_size)]
    assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
    assert parts[-1].stop == size
    assert max(p.length for p in parts) == -(-size // tp_size)
    assert min(p.length for p in parts) == size // tp_size


@given(st.sampled_from(Layout), by_projection)
def test_split_dimensions_are_never_below_the_smallest_split_size(
    layout: Layout, chosen: dict[Projection, MultilinearRank]
) -> None:
    smallest = smallest_split_size(layout, chosen, SHAPE)
    for projection, rank in chosen.items():
        sizes = {TensorName.core(projection): tuple(rank)}
        for mode in rank.truncated_modes(SHAPE):
            sizes[TensorName.factor(mode, projection)] = (SHAPE[mode], rank[mode])
        for name, shape in sizes.items():
            dimension = split_dimensions(layout, name, chosen, SHAPE).tp
            assert dimension is None or shape[dimension] >= smallest


@given(by_projection, st.integers(1, 4), st.integers(1, 8))
def test_traffic_equals_a_count_of_the_collectives(
    chosen: dict[Projection, MultilinearRank], groups: int, top_k: int
) -> None:
    gate, up, down = (chosen[projection] for projection in Projection)
    # Of a payload 4 processes send 2 x 3/4 in an all-reduce, 3/4 in a reduce-scatter.
    all_reduce, reduce_scatter = float(min(groups * down.hidden, SHAPE.hidden)), 0.0
    for rank in (gate, up):
        if rank.intermediate < SHAPE.intermediate:
            all_reduce += top_k * rank.intermediate
        else:
            reduce_scatter += top_k * rank.intermediate
    if down.intermediate < SHAPE.intermediate:
        reduce_scatter += top_k * -(-down.intermediate // 4) * 4
    sizes = LayerShape([chosen] * groups, SHAPE, joint=False)
    load = even_load(top_k, experts=sizes.experts, groups=groups, ep=1)
    mesh = Parallelism(tp=4)
    moved = layer_traffic(Layout.RANK, sizes, mesh, load, value_bytes=2)
    assert moved[Collective.ALL_REDUCE] == pytest.approx(all_reduce * 3)
    assert moved[Collective.REDUCE_SCATTER] == pytest.approx(reduce_scatter * 1.5)
    megatron = layer_traffic(Layout.INTERMEDIATE, sizes, mesh, load, value_bytes=2)
    assert sum(megatron.values()) == 3 * min(groups * down.hidden, SHAPE.hidden)
    alone = layer_traffic(Layout.RANK, sizes, Parallelism(), load, value_bytes=2)
    assert sum(alone.values()) == 0


@given(by_projection, st.sampled_from((1, 4)), st.booleans(), st.booleans())
def test_tokens_never_travel_as_more_numbers_than_they_have(
    chosen: dict[Projection, MultilinearRank], groups: int, joint: bool, rank: bool
) -> None:
    layout = Layout.RANK if rank else Layout.INTERMEDIATE
    if joint:
        chosen = {**chosen, Projection.UP: chosen[Projection.GATE]}
    sizes = LayerShape([chosen] * groups, SHAPE, joint)
    dense = LayerShape([dict.fromkeys(Projection, MultilinearRank(*SHAPE))], SHAPE, joint=False)
    for ep in (1, 4):
        mesh = Parallelism(ep=ep)
        load = even_load(2, experts=8, groups=groups, ep=ep)
        moved = layer_traffic(layout, sizes, mesh, load, value_bytes=2)
        most = layer_traffic(
            Layout.INTERMEDIATE, dense, mesh, replace(load, rows=[2]), value_bytes=2
        )
        assert sum(moved.values()) <= sum(most.values())
