from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.expert_cases import SWIGLU
from tuckerize.domain import CoreType, MultilinearRank, Projection
from tuckerize.engines.slices import WorkerGroup
from tuckerize.format.config import GroupShape
from tuckerize.format.cores import part_dtype
from tuckerize.names import CorePart, TensorName
from tuckerize.runtime.experts import TuckerExperts

EXPERTS, HIDDEN = 6, 12

GROUPS = {
    "hidden mode": GroupShape(
        (9,) * 6, dict.fromkeys(Projection, MultilinearRank(6, 9, 5)), joint=True
    ),
    "all modes": GroupShape(
        (9,) * 6, dict.fromkeys(Projection, MultilinearRank(4, 7, 5)), joint=False
    ),
    "one mode each": GroupShape(
        (9,) * 6,
        {
            Projection.GATE: MultilinearRank(4, 9, 12),
            Projection.UP: MultilinearRank(6, 7, 12),
            Projection.DOWN: MultilinearRank(6, 9, 5),
        },
        joint=False,
    ),
    "widths": GroupShape(
        (3, 9, 6, 4, 8, 6), dict.fromkeys(Projection, MultilinearRank(6, 6, 5)), joint=True
    ),
    "w8, all modes": GroupShape(
        (9,) * 6, dict.fromkeys(Projection, MultilinearRank(4, 7, 5)), False, CoreType.W8
    ),
    "fp8": GroupShape(
        (9,) * 6, dict.fromkeys(Projection, MultilinearRank(6, 9, 5)), True, CoreType.FP8
    ),
    "w8, widths": GroupShape(
        (3, 9, 6, 4, 8, 6), dict.fromkeys(Projection, MultilinearRank(6, 6, 5)), True, CoreType.W8
    ),
    "w4": GroupShape(
        (72,) * 6, dict.fromkeys(Projection, MultilinearRank(6, 72, 8)), True, CoreType.W4
    ),
    "w4, all modes": GroupShape(
        (72,) * 6,
        {
            **dict.fromkeys(Projection, MultilinearRank(6, 72, 8)),
            Projection.UP: MultilinearRank(4, 64, 8),
        },
        False,
        CoreType.W4,
    ),
    "w4, widths": GroupShape(
        (72, 96, 80, 72, 88, 96),
        dict.fromkeys(Projection, MultilinearRank(6, 84, 8)),
        True,
        CoreType.W4,
    ),
    "w3, widths": GroupShape(
        (72, 96, 80, 72, 88, 96),
        dict.fromkeys(Projection, MultilinearRank(6, 84, 8)),
        True,
        CoreType.W3,
    ),
}


def tensors_of(shape: GroupShape) -> dict[TensorName, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def values(part: CorePart | None, sizes: tuple[int, ...]) -> Tensor:
        dtype = part_dtype(part, shape.core_type, torch.float32)
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator).to(dtype)
        bounds = torch.iinfo(dtype)
        return torch.randint(bounds.min, bounds.max, sizes, generator=generator, dtype=dtype)

    shapes = shape.tensor_shapes(HIDDEN)
    return {name: values(name.part, sizes) for name, sizes in shapes.items()}


def output_of(tensors: dict[TensorName, Tensor], experts_Tk: Tensor, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(40, HIDDEN, generator=generator)
    weights_Tk = torch.rand(40, 2, generator=generator)
    module = TuckerExperts([tensors], group_size=size, activation=SWIGLU)
    found: Tensor = module(x_TI, experts_Tk, weights_Tk)
    return found


@pytest.mark.parametrize("owned", [[6], [3, 3], [2, 2, 2], [4, 2]], ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("kind", GROUPS)
def test_outputs_of_all_workers_add_up_to_that_of_the_group(
    kind: str, tp_size: int, owned: list[int]
) -> None:
    tensors = tensors_of(GROUPS[kind])
    experts_Tk = torch.rand(40, 6, generator=torch.Generator().manual_seed(2)).topk(2).indices
    total_TI = torch.zeros(40, HIDDEN)
    stops = list(itertools.accumulate(owned))
    for tp_rank, (stop, count) in itertools.product(range(tp_size), zip(stops, owned, strict=True)):
        own = list(range(stop - count, stop))[::-1]  # in any order
        worker = WorkerGroup(GROUPS[kind], HIDDEN, own, tp_size, tp_rank)
        assert worker.names == list(tensors)
        cut = {
            worker.own_name(name): worker.cut(name, tensor)
            for name, tensor in tensors.items()
            if worker.owns(name)
        }
        empty = worker.empty(torch.float32)
        assert {n: t.shape for n, t in empty.items()} == {n: t.shape for n, t in cut.items()}
        place_of = torch.full((EXPERTS,), -1)
        place_of[own] = torch.arange(count)
        total_TI += output_of(cut, place_of[experts_Tk], count)
    expected_TI = output_of(tensors, experts_Tk, EXPERTS)
    assert float((total_TI - expected_TI).norm() / expected_TI.norm()) < 1e-5


@pytest.mark.parametrize("kind", GROUPS)
def test_workers_store_their_share_and_little_more(kind: str) -> None:
    whole = sum(t.numel() for t in tensors_of(GROUPS[kind]).values())
    worker = WorkerGroup(GROUPS[kind], HIDDEN, range(3))
    own = worker.empty(torch.bfloat16)
    assert sum(t.numel() for t in own.values()) < whole  # a shared core is on every worker
    types = {name: part_dtype(name.part, worker.shape.core_type, torch.bfloat16) for name in own}
    assert {name: tensor.dtype for name, tensor in own.items()} == types
