from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tuckerize.domain import CoreType, MultilinearRank, Projection, StackShape, Target
from tuckerize.errors import RecipeError
from tuckerize.recipe import Recipe
from tuckerize.recipe_reader import parse_recipe, read_recipe
from tuckerize.recipe_text import resolve_rank, select_layers

SHAPE = StackShape(64, 1408, 2048)


def parse_rule(**rule: object) -> Recipe:
    return parse_recipe({"rules": [rule]}, place="here")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe_with_every_key_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(
            tmp_path,
            """
            schema_version: 1
            rules:
              - {layers: "1-3,7", projections: [down_proj], rank: "full,50%,1024"}
              - {layers: 20-, keep: 0.5}
              - {tolerance: 0.1}
            group_size: 8
            joint: gate_up
            dtype: float16
            max_sweeps: 0
            engine: tensorly
            """,
        )
    )
    assert [recipe.rules[0].rank, recipe.rules[1].keep, recipe.rules[2].tolerance] == [
        "full,50%,1024",
        0.5,
        0.1,
    ]
    assert recipe.rules[0].projections == (Projection.DOWN,)
    assert (recipe.group_size, recipe.joint, recipe.dtype) == (8, "gate_up", "float16")
    assert (recipe.max_sweeps, recipe.engine) == (0, "tensorly")


def test_recipe_with_rules_only_has_the_documented_defaults() -> None:
    recipe = parse_rule(keep=1)
    assert recipe.model_dump(exclude={"rules"}) == {
        "schema_version": 1,
        "group_size": None,
        "joint": None,
        "dtype": None,
        "quantize": None,
        "max_sweeps": 10,
        "engine": "tuckerize",
        "calibration": None,
        "dequantize_rest": None,
        "mtp": None,
    }
    assert recipe.rules[0].projections == tuple(Projection)


def test_rank_as_a_yaml_list_equals_its_text(tmp_path: Path) -> None:
    path = write(tmp_path, "rules:\n  - rank: [full, 50%, 1024]\n")
    assert read_recipe(path) == parse_rule(rank="full, 50% ,1024".replace(" ", ""))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "rules[0]: give exactly one of rank, keep, bits and tolerance"),
        (
            {"rank": "1,1,1", "keep": 0.5},
            "rules[0]: give exactly one of rank, keep, bits and tolerance",
        ),
        (
            {"keep": 0.5, "tolerance": 0.5},
            "rules[0]: give exactly one of rank, keep, bits and tolerance",
        ),
        ({"keep": 0}, "rules[0].keep 0 is not a number above 0 and at most 1"),
        ({"keep": 1.01}, "rules[0].keep 1.01 is not a number above 0 and at most 1"),
        ({"keep": "101%"}, "rules[0].keep 101% is not a number above 0 and at most 1"),
        ({"keep": float("nan")}, "rules[0].keep nan is not a number above 0 and at most 1"),
        ({"keep": "much"}, "rules[0].keep much is not a number above 0 and at most 1"),
        ({"tolerance": 0}, "rules[0].tolerance 0 is not a number above 0 and below 1"),
        ({"tolerance": 1}, "rules[0].tolerance 1 is not a number above 0 and below 1"),
        ({"rank": "8,8"}, "rules[0].rank: '8,8' has 2 sizes, expected three: r_E,r_H,r_I"),
        ({"rank": ""}, "rules[0].rank: '' has 1 sizes, expected three: r_E,r_H,r_I"),
        (
            {"rank": "0,8,8"},
            "rules[0].rank: '0' in '0,8,8' is not a size of 1 or more, a percentage or 'full'",
        ),
        (
            {"rank": "8,-1,8"},
            "rules[0].rank: '-1' in '8,-1,8' is not a size of 1 or more, a percentage or 'full'",
        ),
        (
            {"rank": "8,8,101%"},
            "rules[0].rank: '101%' in '8,8,101%' is not above 0 % and at most 100 %",
        ),
        (
            {"rank": "8,8,0%"},
            "rules[0].rank: '0%' in '8,8,0%' is not above 0 % and at most 100 %",
        ),
        (
            {"rank": "8,1.5,8"},
            "rules[0].rank: '1.5' in '8,1.5,8' is not a size of 1 or more, a percentage or 'full'",
        ),
        ({"rank": 8}, "rules[0].rank 8 is not text"),
        (
            {"keep": 0.5, "layers": "a"},
            "rules[0].layers: 'a' in layers is not a layer or a range like 1-3 or 20-",
        ),
        (
            {"keep": 0.5, "layers": "-"},
            "rules[0].layers: '-' in layers is not a layer or a range like 1-3 or 20-",
        ),
        (
            {"keep": 0.5, "layers": "1,,2"},
            "rules[0].layers: '' in layers is not a layer or a range like 1-3 or 20-",
        ),
        (
            {"keep": 0.5, "layers": "3-1"},
            "rules[0].layers: the range '3-1' in layers ends before it starts",
        ),
        ({"keep": 0.5, "projections": []}, "rules[0]: projections is empty"),
        (
            {"keep": 0.5, "projections": ["gate"]},
            "rules[0].projections[0] gate is not one of: gate_proj, up_proj, down_proj",
        ),
        ({"kep": 0.5}, "rules[0]: 'kep' is not a key"),
    ],
)
def test_rule_that_breaks_the_schema_names_place_and_key(
    rule: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"^here: {re.escape(message)}"):
        parse_rule(**rule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": []}, "rules is empty, expected at least one"),
        ({"rules": [3]}, "rules[0] 3 is not a set of keys and values"),
        ({"rules": None}, "rules (empty) is not a list"),
        ({"rules": {"keep": 0.5}}, "rules (keys and values) is not a list"),
        ({"schema_version": 2}, "schema_version 2 is not 1"),
        ({"group_size": 0}, "group_size 0 is not a whole number of at least 1"),
        ({"group_size": 1.5}, "group_size 1.5 is not a whole number of at least 1"),
        ({"joint": "down"}, "joint down is not 'gate_up'"),
        (
            {"dtype": "int8"},
            "dtype int8 is not one of: bfloat16, float16, float32",
        ),
        ({"max_sweeps": -1}, "max_sweeps -1 is not a whole number of at least 0"),
        ({"engine": "numpy"}, "engine numpy is not one of: tuckerize, tensorly"),
        ({"Rules": []}, "'Rules' is not a key"),
    ],
)
def test_recipe_that_breaks_the_schema_names_place_and_key(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=f"^here: {re.escape(message)}"):
        parse_recipe({"rules": [{"keep": 0.5}], **changes}, place="here")


@pytest.mark.parametrize("value", [[], "text", 3])
def test_recipe_that_is_no_mapping_is_refused(value: object) -> None:
    with pytest.raises(RecipeError, match=r"^here holds .*, expected keys and values$"):
        parse_recipe(value, place="here")


def test_recipe_that_is_empty_says_so_with_an_example() -> None:
    with pytest.raises(RecipeError, match=r"^here is empty$") as caught:
        parse_recipe(None, place="here")
    shown = caught.value.hint.removeprefix("write, for example:\n")
    assert parse_recipe(yaml.safe_load(shown), place="shown") == parse_rule(keep=0.75)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"rules": [{"keep": 75}]}, "did you mean 0.75 (75 %)?"),
        ({"rules": [{"keep": "75"}]}, "did you mean 0.75 (75 %)?"),
        ({"rules": [{"keep": 750}]}, ""),
        ({"rules": [{"tolerance": 5}]}, "did you mean 0.05 (5 %)?"),
        (
            {"rules": [{"kep": 0.75}]},
            "did you mean 'keep'? the keys are: layers, projections, rank, keep, bits, tolerance",
        ),
        ({"keep": 0.75}, "it belongs to rules:\nrules:\n  - keep: ..."),
        ({"rules": [{"keep": 0.5}], "tokens": 9}, "it belongs to calibration:\ncalibration:\n"),
        ({"rules": [{"keep": 0.5}], "Dtype": "float16"}, "did you mean 'dtype'? the keys are: "),
        ({"rules": [{"keep": 0.5, "projections": ["gate"]}]}, "did you mean 'gate_proj'?"),
        ({"rules": [{"keep": 0.5}], "dtype": "bf16"}, "did you mean 'bfloat16'?"),
        ({"rules": [{"keep": 0.5, "layers": 3}]}, "write it in quotes: '3'"),
        ({}, "write, for example:\nrules:\n  - keep: 0.75"),
    ],
)
def test_recipe_that_breaks_the_schema_says_what_to_change(
    value: dict[str, object], hint: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(value, place="here")
    assert caught.value.hint.startswith(hint)
    assert bool(caught.value.hint) == bool(hint)


def test_recipe_without_rules_says_that_they_are_missing() -> None:
    with pytest.raises(RecipeError, match=r"^here: rules is missing$"):
        parse_recipe({"joint": "gate_up"}, place="here")


@pytest.mark.parametrize("text", ["75%", " 75% ", "75.0%", "0.75"])
def test_keep_as_a_percentage_is_the_share(text: str) -> None:
    assert parse_rule(keep=text) == parse_rule(keep=0.75)


def test_recipe_file_with_a_wrong_key_is_named_with_the_key(tmp_path: Path) -> None:
    path = write(tmp_path, "rules: [{keep: 0.5}]\nranks: 3\n")
    with pytest.raises(RecipeError, match=f"^{re.escape(str(path))}: 'ranks' is not a key"):
        read_recipe(path)


def test_recipe_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml cannot be read: No such file or directory$"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "content",
    [b"rules: [", b"\xff\xfe\x00", b"a: !!python/object:os.system {}", b"? [1]\n: 2", b"\x00"],
)
def test_recipe_file_that_is_not_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"^the recipe {re.escape(str(path))} is not YAML: "):
        read_recipe(path)


def test_recipe_file_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not YAML: "):
        read_recipe(write(tmp_path, "[" * 1500))


def test_rule_index_of_several_matching_rules_is_the_first() -> None:
    recipe = parse_recipe(
        {
            "rules": [
                {"layers": "2", "projections": ["down_proj"], "keep": 0.1},
                {"layers": "2-3", "keep": 0.2},
                {"projections": ["down_proj"], "keep": 0.3},
            ]
        },
        place="here",
    )
    assert recipe.rule_index(2, Projection.DOWN) == 0
    assert recipe.rule_index(2, Projection.UP) == 1
    assert recipe.rule_index(3, Projection.DOWN) == 1
    assert recipe.rule_index(4, Projection.DOWN) == 2
    assert recipe.rule_index(4, Projection.GATE) is None


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("full,full,full", (64, 1408, 2048)),
        ("1,2,3", (1, 2, 3)),
        ("50%,25%,100%", (32, 352, 2048)),
        ("0.1%,0.1%,0.1%", (1, 1, 2)),
        ("12.5%,full,75%", (8, 1408, 1536)),
        ("65,1,1", (65, 1, 1)),
    ],
)
def test_resolve_rank_of_valid_text_gives_core_sizes(text: str, rank: tuple[int, ...]) -> None:
    assert resolve_rank(text, SHAPE) == MultilinearRank(*rank)


def test_rank_of_absurdly_many_digits_is_refused() -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        parse_rule(rank="1" + "0" * 5000 + ",1,1")


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        (None, (1, 2, 3, 5, 8)),
        ("2", (2,)),
        ("2-", (2, 3, 5, 8)),
        ("-2", (1, 2)),
        ("0-3", (1, 2, 3)),
        ("8,1-2", (1, 2, 8)),
        (" 1 , 2 - 3 ", (1, 2, 3)),
        ("1-1000", (1, 2, 3, 5, 8)),
    ],
)
def test_select_layers_of_valid_text_gives_those_present(
    text: str | None, selected: tuple[int, ...]
) -> None:
    assert select_layers(text, (1, 2, 3, 5, 8)) == selected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "layers '4' names layer 4 without routed experts"),
        ("1,9", "layers '1,9' names layer 9 without routed experts"),
        ("9-", "layers '9-' names a range without routed experts"),
        ("x", "'x' in layers is not a layer or a range like 1-3 or 20-"),
    ],
)
def test_select_layers_that_are_absent_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        select_layers(text, (1, 2, 3, 5, 8))
    assert caught.value.message == message


def test_select_layers_refused_hints_at_the_layers_that_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        select_layers("4", (1, 2, 3, 5, 8))
    assert caught.value.hint == "the layers with routed experts are 1 to 8"


def calibrated(rule: dict[str, object] | None = None, **settings: object) -> Recipe:
    """A recipe with calibration; settings that are of the recipe itself stand there."""
    own: dict[str, object] = {
        key: settings.pop(key) for key in ("engine", "joint") if key in settings
    }
    calibration: dict[str, object] = {"texts": ["a.txt", "b.jsonl:0.5"], **settings}
    rules: list[dict[str, object]] = [rule or {"keep": 0.5}]
    value: dict[str, object] = {"rules": rules, "calibration": calibration, **own}
    return parse_recipe(value, place="here")


def test_calibration_has_the_documented_defaults() -> None:
    settings = calibrated().calibration
    assert settings is not None
    assert settings.model_dump() == {
        "texts": ("a.txt", "b.jsonl:0.5"),
        "tokens": 65536,
        "window": 512,
        "random_share": 0.5,
        "chat_template": True,
        "sequential": True,
        "target": "free",
        "shape": "auto",
        "allocate": "error",
        "multiple": None,
        "equal_widths": False,
        "refine": 300,
    }
    assert [settings.multiple_for(size) for size in (96, 1023, 1024, 2048)] == [8, 8, 128, 128]
    fused = calibrated(target="fused-kernels").calibration
    assert fused is not None
    assert [fused.multiple_for(size) for size in (96, 2048)] == [32, 128]
    exact = calibrated(multiple=3).calibration
    assert exact is not None
    assert exact.multiple_for(2048) == 3


def test_experts_for_any_engine_are_groups_that_every_quantiser_takes() -> None:
    stock = calibrated(target="any-engine").calibration
    assert stock is not None
    assert [stock.multiple_for(size) for size in (96, 256, 768, 1408)] == [8, 32, 32, 128]
    assert stock.multiple_for(96, CoreType.W4) == 32


@pytest.mark.parametrize("target", Target)
def test_what_a_target_implies_is_recorded_and_read_again(target: Target) -> None:
    settings = calibrated(target=target).calibration
    assert settings is not None
    implied = {
        Target.FREE: ("auto", "error", False),
        Target.FUSED_KERNELS: ("narrow-latent", "error", True),
        Target.ANY_ENGINE: ("neurons", "uniform", True),
    }
    assert (settings.shape, settings.allocate, settings.equal_widths) == implied[target]
    assert type(settings).model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (None, {"texts": []}, "calibration.texts is empty, expected at least one"),
        (None, {"tokens": 0}, "calibration.tokens 0 is not a whole number of at least 1"),
        (None, {"window": 1}, "calibration.window 1 is not a whole number of at least 2"),
        (None, {"multiple": 0}, "calibration.multiple 0 is not a whole number of at least 1"),
        (None, {"refine": -1}, "calibration.refine -1 is not a whole number of at least 0"),
        (
            None,
            {"shape": "wide"},
            "calibration.shape wide is not one of: auto, latent, neurons, narrow-latent, full",
        ),
        (None, {"allocate": "best"}, "calibration.allocate best is not one of: error, uniform"),
        (
            None,
            {"target": "any-engine", "allocate": "error"},
            "the target any-engine implies allocate: uniform, not error",
        ),
        (
            {"keep": 0.5, "layers": "1-2"},
            {"target": "any-engine"},
            "any-engine takes one keep or bits for all layers: experts are equally wide",
        ),
        (
            {"rank": "full,full,4"},
            {"target": "any-engine"},
            "any-engine takes one keep or bits for all layers: experts are equally wide",
        ),
        (None, {"steps": 3}, "calibration: 'steps' is not a key"),
        (None, {"engine": "tensorly"}, "the engine tensorly is data-free: it takes no calibration"),
        ({"tolerance": 0.1}, {}, "a tolerance is of weights, calibration is of outputs: give keep"),
        (
            {"keep": 0.5, "projections": ["up_proj"]},
            {},
            "with calibration all three projections follow one rule",
        ),
    ],
)
def test_calibration_that_cannot_be_is_refused(
    rule: dict[str, object] | None, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        calibrated(rule, **settings)
    assert message in caught.value.message


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{one}: &{one} [{','.join([f'*{other}'] * 9)}]\n" for other, one in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "rules: *i\n", "more than 10000 values"),
        ("rules:\n  - rank: &r [full, *r]\n", "more than 10000 values"),
        (f"rules:\n  - keep: 0x{'f' * 5000}\n", "a number of 20000 bits"),
        ('rules:\n  - rank: "\\ud800"\n', "half a character"),
    ],
)
def test_recipe_that_would_cost_memory_or_cannot_be_printed_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)
