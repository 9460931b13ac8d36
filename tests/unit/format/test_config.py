from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import CoreType, Joint, MultilinearRank, Projection
from tuckerize.format.config import (
    METHOD,
    GroupShape,
    TuckerQuantization,
    find_quantization,
    with_quantization,
    without_quantization,
)
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"
MODULE = "model.layers.1.mlp.experts"


def on_disk() -> dict[str, Any]:
    return {
        "quant_method": "tuckerize",
        "format_version": 2,
        "group_size": 4,
        "joint": "gate_up",
        "modules": {
            MODULE: [
                {
                    "neurons": [8, 16, 16, 24],
                    "gate_proj": [4, 16, 12],
                    "up_proj": [4, 16, 12],
                    "down_proj": [4, 16, 32],
                },
                {
                    "neurons": 24,
                    "gate_proj": [3, 20, 32],
                    "up_proj": [4, 24, 32],
                    "down_proj": [4, 24, 12],
                },
            ]
        },
    }


def test_parsed_groups_have_widths_and_core_sizes() -> None:
    found = TuckerQuantization.parse(on_disk())
    assert (found.group_size, found.joint) == (4, "gate_up")
    uneven, even = found.modules[MODULE]
    assert (uneven.widths, uneven.equal_widths) == ((8, 16, 16, 24), False)
    assert (even.widths, even.equal_widths) == ((24, 24, 24, 24), True)
    assert uneven.stack_shape(32) == (4, 16, 32)
    assert even.ranks[Projection.GATE] == MultilinearRank(3, 20, 32)
    assert uneven.joint
    assert even.joint


def test_tensor_shapes_are_those_of_the_format() -> None:
    uneven, even = TuckerQuantization.parse(on_disk()).modules[MODULE]
    rows = {
        f"{projection}.core.{expert}": (width, hidden)
        for projection, hidden in (("gate_proj", 12), ("up_proj", 12), ("down_proj", 32))
        for expert, width in enumerate((8, 16, 16, 24))
    }
    assert {str(name): shape for name, shape in uneven.tensor_shapes(32).items()} == {
        **rows,
        "gate_up_proj.U_I": (32, 12),
    }
    assert {str(name): shape for name, shape in even.tensor_shapes(32).items()} == {
        "gate_proj.core": (3, 20, 32),
        "gate_proj.U_E": (4, 3),
        "gate_proj.U_H": (24, 20),
        "up_proj.core": (4, 24, 32),
        "down_proj.core": (4, 24, 12),
        "down_proj.U_I": (32, 12),
    }


def test_gate_and_up_without_joint_have_a_factor_each() -> None:
    group = GroupShape((4, 4), dict.fromkeys(Projection, MultilinearRank(2, 4, 3)), joint=False)
    names = {str(name) for name in group.tensor_shapes(8)}
    assert {"gate_proj.U_I", "up_proj.U_I", "down_proj.U_I"} < names
    assert "gate_up_proj.U_I" not in names


@pytest.mark.parametrize("name", ["calibrated", "data-free", "tucker"])
def test_what_version_0_1_wrote_is_read_and_would_be_written_again(name: str) -> None:
    text = (GOLDEN / name / "config.json").read_text()
    config = json.loads(text)
    parsed = TuckerQuantization.parse(config["quantization_config"])
    again = with_quantization(config, parsed)
    assert json.dumps(again, indent=2, ensure_ascii=False) + "\n" == text
    tucker = TuckerCheckpoint.open(GOLDEN / name)
    assert TuckerQuantization.of(tucker.manifest, tucker.family) == parsed
    headers = Checkpoint.open(GOLDEN / name).tensors
    for module, groups in parsed.modules.items():
        for index, group in enumerate(groups):
            for tensor, shape in group.tensor_shapes(tucker.manifest.shape.hidden).items():
                assert headers[str(tensor.within(index, module))].shape == shape


@st.composite
def quantizations(draw: st.DrawFn) -> TuckerQuantization:
    experts = draw(st.integers(1, 4))
    joint = draw(st.booleans())
    size = st.integers(1, 99)
    ranks = st.fixed_dictionaries(
        dict.fromkeys(Projection, st.builds(MultilinearRank, size, size, size))
    )
    widths = st.lists(size, min_size=experts, max_size=experts).map(tuple)

    def groups(core_type: CoreType | None) -> st.SearchStrategy[tuple[GroupShape, ...]]:
        """The groups of a layer, whose cores have one encoding."""
        group = st.builds(GroupShape, widths, ranks, st.just(joint), st.just(core_type))
        return st.lists(group, min_size=1, max_size=3).map(tuple)

    core_types = st.none() | st.sampled_from(CoreType)
    modules = draw(st.dictionaries(st.text(), core_types.flatmap(groups), max_size=3))
    return TuckerQuantization(experts, Joint.GATE_UP if joint else None, modules)


@given(quantizations())
def test_parsing_is_the_inverse_of_writing(quantization: TuckerQuantization) -> None:
    text = json.dumps(quantization.to_json())
    assert TuckerQuantization.parse(json.loads(text)) == quantization


def changed(*path: str | int, value: object = None) -> dict[str, Any]:
    """What is on disk with another value, or without a key."""
    root = copy.deepcopy(on_disk())
    place: Any = root
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return root


GROUP = ("modules", MODULE, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (changed("group_size"), "group_size: Field required"),
        (changed("group_size", value=0), "group_size: Input should be greater than or equal to 1"),
        (changed("group_size", value="4"), "group_size: Input should be a valid integer"),
        (changed("joint", value="all"), "joint: Input should be 'gate_up'"),
        (changed("modules", value=[]), "modules: Input should be a valid dictionary"),
        (changed("modules", MODULE, value=[]), f"modules.{MODULE}: Tuple should have at least 1"),
        (changed(*GROUP, "neurons"), f"modules.{MODULE}.0.neurons: Field required"),
        (changed(*GROUP, "neurons", value="8"), f"modules.{MODULE}.0.neurons: Input should be"),
        (changed(*GROUP, "neurons", 2, value=-1), f"modules.{MODULE}.0.neurons.2: Input should be"),
        (
            changed(*GROUP, "neurons", value=[8, 16]),
            f"modules.{MODULE}.0.neurons: 2 widths are not those of 4 experts",
        ),
        (changed(*GROUP, "up_proj"), f"modules.{MODULE}.0.up_proj: Field required"),
        (changed(*GROUP, "up_proj", 2), f"modules.{MODULE}.0.up_proj.2: Field required"),
    ],
)
def test_malformed_contents_are_refused_by_their_key(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="quantization_config") as caught:
        TuckerQuantization.parse(value)
    assert str(caught.value).startswith(f"quantization_config.{message}")


@pytest.mark.parametrize(
    "value", [changed("format_version"), changed("format_version", value=4), {}]
)
def test_another_format_version_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this tuckerize reads 2 and 3: use the release that"):
        TuckerQuantization.parse(value)


@pytest.mark.parametrize("core_type", CoreType)
def test_quantised_cores_are_described_in_the_words_of_compressed_tensors(
    core_type: CoreType,
) -> None:
    plain = TuckerQuantization.parse(on_disk())
    modules = {
        module: tuple(replace(group, core_type=core_type) for group in groups)
        for module, groups in plain.modules.items()
    }
    value = replace(plain, modules=modules).to_json()
    assert value["format_version"] == 3
    weights = value["cores"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["type"], weights["symmetric"]) == (
        core_type.bits,
        "float" if core_type == CoreType.FP8 else "int",
        True,
    )
    found = TuckerQuantization.parse(value)
    assert {g.core_type for groups in found.modules.values() for g in groups} == {core_type}
    weights["group_size"] = 16
    with pytest.raises(ValueError, match=r"quantization_config\.cores: it is not a scheme that"):
        TuckerQuantization.parse(value)


def test_keys_of_others_are_left_alone() -> None:
    value = on_disk() | {"ignored_layers": ["lm_head"]}
    assert TuckerQuantization.parse(value) == TuckerQuantization.parse(on_disk())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (on_disk(), True),
        ({"quant_method": METHOD}, True),
        ({"quant_method": "fp8"}, False),
        ({}, False),
        (None, False),
        (METHOD, False),
        ([METHOD], False),
    ],
)
def test_a_configuration_is_of_a_tucker_checkpoint_by_its_method(
    value: object, expected: bool
) -> None:
    found = find_quantization({"quantization_config": value})
    assert found == (value if expected else None)
    assert find_quantization({}) is None


def test_configuration_keeps_everything_else() -> None:
    config = with_quantization({"hidden_size": 32}, TuckerQuantization.parse(on_disk()))
    assert config == {"hidden_size": 32, "quantization_config": on_disk()}
    assert without_quantization(config) == {"hidden_size": 32}
