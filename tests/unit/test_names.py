from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tuckerize.domain import GATE_UP, Mode, Projection
from tuckerize.names import CorePart, TensorKind, TensorName, expert_rows, group_module


def test_core_name_is_that_of_the_format() -> None:
    assert str(TensorName.core(Projection.GATE)) == "gate_proj.core"
    assert str(TensorName.core(Projection.DOWN, 5)) == "down_proj.core.5"


def test_parts_of_a_quantised_core_are_named_below_it() -> None:
    core = TensorName.core(Projection.DOWN, 5)
    codes = replace(core, part=CorePart.PACKED_CODES)
    assert str(codes.within(0)) == "group_0.down_proj.core.5.weight_packed"
    assert codes.core_name == core
    assert TensorName.parse("gate_proj.core.weight_scale").part == CorePart.SCALES


@pytest.mark.parametrize("projection", Projection)
def test_factor_of_a_coupling_is_shared_in_the_hidden_mode_only(projection: Projection) -> None:
    own = [str(TensorName.factor(mode, projection)) for mode in Mode]
    assert own == [f"{projection}.{kind}" for kind in ("U_E", "U_H", "U_I")]
    alone = [str(TensorName.factor(mode, projection, (projection,))) for mode in Mode]
    assert alone == own
    joint = [str(TensorName.factor(mode, projection, GATE_UP)) for mode in Mode]
    assert joint == [*own[:2], "gate_up_proj.U_I"]


def test_name_within_a_checkpoint_has_its_module() -> None:
    name = TensorName.core(Projection.UP, 2).within(10, "model.layers.3.mlp.experts")
    assert str(name) == "model.layers.3.mlp.experts.group_10.up_proj.core.2"
    assert name.module == group_module(10, "model.layers.3.mlp.experts")
    assert name.within_owner == "core.2"
    assert name.within_group == TensorName.core(Projection.UP, 2)
    assert name.within_group.module == ""


def test_shared_factor_belongs_to_gate() -> None:
    assert TensorName.parse("gate_up_proj.U_I").projection == Projection.GATE
    assert TensorName.parse("group_0.down_proj.U_H").projection == Projection.DOWN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "core",
        "gate_proj",
        "gate_proj.weight",
        "gate_proj.core.",
        "gate_proj.core.-1",
        "gate_proj.core.01",
        "gate_proj.core.٣",
        "gate_proj.core.1.2",
        "gate_proj.U_H.1",
        "gate_proj.U_X",
        "gate_up_proj.core",
        "gate_up_proj.U_H",
        "gate_proj.core\n",
        "experts.gate_proj.core",
        "group_.gate_proj.core",
        "group_00.gate_proj.core",
        ".group_0.gate_proj.core",
        "model.layers.1.mlp.experts.5.gate_proj.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.core",
        "model.layers.1.mlp.experts.group_0.gate_proj.core.scale",
        "gate_proj.core.weight.5",
        "gate_proj.U_I.weight_scale",
    ],
)
def test_name_of_another_tensor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a tensor of factored experts"):
        TensorName.parse(text)
    assert TensorName.find(text) is None


@pytest.mark.parametrize(
    ("owner", "kind", "expert", "experts"),
    [
        ("gate_proj", TensorKind.U_I, 0, None),
        ("gate_up_proj", TensorKind.CORE, None, None),
        ("gate_proj", TensorKind.CORE, None, "experts"),
    ],
)
def test_name_that_no_tensor_has_cannot_be_made(
    owner: str, kind: TensorKind, expert: int | None, experts: str | None
) -> None:
    with pytest.raises(ValueError, match="is not the name of a tensor of factored experts"):
        TensorName(owner, kind, expert, None, experts)


def test_expert_rows_are_in_the_order_of_the_experts() -> None:
    rows = [TensorName.core(Projection.UP, expert) for expert in range(12)]
    others = [TensorName.core(Projection.UP), TensorName.factor(Mode.HIDDEN, Projection.UP)]
    by_text = sorted([*rows, *others], key=str)
    assert by_text != [*others, *rows]
    assert expert_rows(by_text) == rows
    assert expert_rows(others) == []


def test_names_of_different_tensors_differ() -> None:
    names = [
        TensorName.core(projection, expert).within(group)
        for projection, expert, group in itertools.product(Projection, (None, 0, 1), (0, 1))
    ]
    assert len({str(name) for name in names}) == len(set(names)) == 18
