"""Shipped recipes: planned against published configurations, and taken by decompose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.published import MODELS, planned, published, recipes_of
from tests.running import run_here, succeed
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize.domain import CoreType, Target
from tuckerize.errors import RecipeError, UsageError
from tuckerize.recipe import Recipe
from tuckerize.recipe_files import shipped_recipes
from tuckerize.recipe_reader import recipe_of_options


@pytest.mark.parametrize("name", MODELS)
def test_plan_of_the_published_configuration_is_the_recorded(name: str) -> None:
    own = published(name)
    found = planned(name)
    assert found == own["plan"], "run: python -m tests.published"
    # The configuration is that of the release: it has the parameters that the release is known by,
    # of GLM-5.3-Flash with those of a layer that predicts further tokens.
    assert found["parameters"] == pytest.approx(own["published_parameters"], rel=0.025)
    for recipe, after in zip(recipes_of(name), found["after"].values(), strict=True):
        bits = 16 if recipe.quantize is None else 4.5
        assert 0.75 * bits - 0.05 <= after["bits_per_weight"] < 0.75 * bits + 0.25
        assert after["routed_bytes"] < found["before"]["routed_bytes"]


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_of_a_file_is_for_a_target_of_its_own(name: str) -> None:
    targets = [own.calibration and own.calibration.target for own in recipes_of(name)]
    assert len(set(targets)) == len(targets)


def test_list_names_every_recipe_and_show_prints_it() -> None:
    shown = succeed("recipes", "list")
    assert all(name in shown for name in MODELS)
    for name, path in shipped_recipes().items():
        assert succeed("recipes", "show", name) == path.read_text(encoding="utf-8")
    result = run_here("recipes", "show", "qwen")
    assert result.returncode == 2
    assert "no shipped recipe of that name" in result.stderr


def recipe(value: Any, calibration: Any = None) -> Recipe:  # noqa: ANN401
    return recipe_of_options(value, sizes={}, where={}, how={"calibration": calibration})


def test_target_and_text_complete_a_recipe(tmp_path: Path) -> None:
    by_target = {
        target: recipe("qwen3-30b-a3b", {"texts": ["a.txt"], "target": target}) for target in Target
    }
    assert {own.calibration and own.calibration.target for own in by_target.values()} == {*Target}
    assert {own.quantize for own in by_target.values()} == {CoreType.W4}
    assert recipe("qwen3-30b-a3b", "a.txt") == by_target[Target.FUSED_KERNELS]
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump({"rules": [{"keep": 0.5}]}))
    given = {"texts": ["a.txt", "b.txt:0.5"], "tokens": 9, "target": "any-engine"}
    settings = recipe(plain, given).calibration
    assert settings is not None
    assert (settings.texts, settings.tokens) == (("a.txt", "b.txt:0.5"), 9)
    assert settings.target == Target.ANY_ENGINE


@pytest.mark.parametrize(
    ("name", "calibration", "error", "message", "hint"),
    [
        ("deepseek-v3", None, RecipeError, "leaves the text to you", "--calibration FILE"),
        (
            "deepseek-v3",
            {"texts": ["a.txt"], "target": "any-engine"},
            RecipeError,
            "has no recipe for the target any-engine",
            "choose one of: fused-kernels, free",
        ),
        (
            "kimi-k2",
            {"texts": ["a.txt"], "tokens": 9},
            UsageError,
            "--calibration-tokens and --recipe exclude each other",
            "change tokens in the calibration of",
        ),
        (
            {"rules": [{"keep": 0.5}], "calibration": {"texts": ["a.txt"]}},
            "b.txt",
            UsageError,
            "--calibration and --recipe exclude each other",
            "change texts in the calibration of the recipe",
        ),
    ],
)
def test_what_a_recipe_says_or_lacks_is_not_guessed(
    name: Any,  # noqa: ANN401
    calibration: Any,  # noqa: ANN401
    error: type[RecipeError | UsageError],
    message: str,
    hint: str,
) -> None:
    with pytest.raises(error) as caught:
        recipe(name, calibration)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_decompose_takes_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_tiny_model(tmp_path / "model", hidden=64, intermediate=64))
    text = write_text(tmp_path / "text.txt", 8000)
    words = ("decompose", "--model", model, "--dry-run", "--recipe")
    for target in ("fused-kernels", "any-engine"):
        options = ("--calibration", text, "--calibration-tokens", "4096", "--target", target)
        assert "bits per weight" in succeed(*words, "deepseek-v2-lite", *options)
