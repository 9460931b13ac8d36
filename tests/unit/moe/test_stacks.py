from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import Projection, StackShape
from tuckerize.moe.families import describe_moe
from tuckerize.moe.stacks import group_experts, read_stack, to_stack_orientation


@pytest.mark.parametrize("experts", [range(8), range(2, 5)])
@pytest.mark.parametrize("projection", Projection)
def test_read_stack_then_back_gives_the_weights_on_disk(
    tiny_model: Path, projection: Projection, experts: range
) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    model = describe_moe(checkpoint.config, checkpoint.tensors)
    stack = read_stack(
        checkpoint.read,
        model.family,
        model.shape,
        layer=2,
        experts=experts,
        projection=projection,
        dtype=torch.bfloat16,
    )
    on_disk = load_file(tiny_model / "model.safetensors")
    assert stack.shape == (len(experts), 24, 32)
    for matrix, expert in zip(stack, experts, strict=True):
        weight = on_disk[f"model.layers.2.mlp.experts.{expert}.{projection}.weight"]
        assert torch.equal(to_stack_orientation(matrix, projection), weight)


def test_to_stack_orientation_transposes_down_only() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(to_stack_orientation(weight, Projection.GATE), weight)
    assert torch.equal(to_stack_orientation(weight, Projection.UP), weight)
    assert torch.equal(to_stack_orientation(weight, Projection.DOWN), weight.T)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_group_experts_of_all_groups_are_all_experts_once(size: int) -> None:
    groups = [group_experts(StackShape(8, 1, 1), size, group) for group in range(8 // size)]
    assert [expert for group in groups for expert in group] == list(range(8))
    assert {len(group) for group in groups} == {size}
