"""Steps are carried out in their order, for every group, and their errors say where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.expert_cases import make_group
from tuckerize.compression.factors import (
    GroupFactors,
    GroupStep,
    LayerFactors,
    compress,
    for_each_group,
    rounding,
)
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, GATE_UP, Coupling, MultilinearRank, Projection, StackShape
from tuckerize.errors import NonFiniteError
from tuckerize.names import TensorName
from tuckerize.weight_types import WEIGHT_TYPES

SHAPE = StackShape(3, 10, 8)
RANK = MultilinearRank(*SHAPE)


def layer_of(*couplings: Coupling, groups: int = 1) -> LayerFactors:
    target = CompressionTarget(SHAPE.intermediate, dict.fromkeys(couplings, RANK))
    return LayerFactors(
        7,
        tuple(
            GroupFactors.of(index, make_group(SHAPE, first=3 * index, seed=index), target)
            for index in range(groups)
        ),
    )


def test_group_before_any_step_is_its_dense_stacks() -> None:
    (group,) = layer_of(GATE_UP, DOWN).groups
    tensors = group.tensors()
    assert tensors.keys() == {TensorName.core(projection) for projection in Projection}
    for projection in Projection:
        assert tensors[TensorName.core(projection)] is group.dense.stacks[projection]
        assert group.rank(projection) == RANK
    assert group.widths is None


def test_steps_follow_each_other_and_leave_their_argument_alone() -> None:
    layer = layer_of(GATE_UP, DOWN, groups=2)
    seen: list[str] = []

    def noting(name: str) -> GroupStep:
        def step(group: GroupFactors) -> GroupFactors:
            seen.append(f"{name} {group.index}")
            return replace(group, sweeps=dict.fromkeys(group.sweeps, len(seen)))

        return step

    found = compress(layer, [for_each_group(noting(name)) for name in ("a", "b")])
    assert seen == ["a 0", "a 1", "b 0", "b 1"]
    assert [set(group.sweeps.values()) for group in found.groups] == [{3}, {4}]
    assert [set(group.sweeps.values()) for group in layer.groups] == [{0}, {0}]


@pytest.mark.parametrize(
    ("couplings", "place"),
    [((GATE_UP, DOWN), "layer 7, group 1"), ((DOWN,), "layer 7, group 1, down_proj")],
)
def test_errors_of_a_step_say_in_which_group(couplings: tuple[Coupling, ...], place: str) -> None:
    def failing(group: GroupFactors) -> GroupFactors:
        if group.index:
            raise NonFiniteError("the stack holds nan", hint="repair it")
        return group

    with pytest.raises(NonFiniteError) as caught:
        compress(layer_of(*couplings, groups=2), [for_each_group(failing)])
    assert caught.value.message == f"{place}: the stack holds nan"
    assert caught.value.hint == "repair it"


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_gives_the_nearest_values_of_the_type(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(GATE_UP, DOWN)
    (group,) = compress(layer, [rounding(WEIGHT_TYPES[name])]).groups
    for projection, stack in group.dense.stacks.items():
        assert torch.equal(group.factors[projection].core, stack.to(dtype))
        assert stack.dtype == torch.float32


def test_rounding_to_a_type_that_overflows_is_refused() -> None:
    layer = layer_of(DOWN).with_factors(lambda factors: replace(factors, core=factors.core * 1e6))
    with pytest.raises(NonFiniteError, match="a core or factor overflows F16"):
        compress(layer, [rounding(WEIGHT_TYPES["F16"])])
    compress(layer, [rounding(WEIGHT_TYPES["BF16"])])
