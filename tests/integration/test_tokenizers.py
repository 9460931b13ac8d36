"""Tokenizers and prompts that do not fit a model: refused by name, never a bug of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.running import run_here as run
from tests.running import succeed
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text

CALIBRATED = ("--calibration-tokens", "512", "--refine", "0", "--keep", "0.7")


@pytest.fixture(scope="module")
def out(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    model = add_tokenizer(shutil.copytree(tiny_model, folder / "model"))
    succeed("decompose", "--model", model, "--keep", "0.7", "--output", folder / "out")
    return folder / "out"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_generate_takes_tokenizers_that_return_more_than_tokens(out: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    edit(folder / "tokenizer_config.json", lambda own: own.update(model_input_names=inputs))
    plain = succeed("generate", out, "--prompt", "3 4 5", "--tokens", "4")
    assert succeed("generate", folder, "--prompt", "3 4 5", "--tokens", "4") == plain
    assert plain.startswith("3 4 5 ")


def test_empty_prompt_begins_with_the_begin_token_or_is_refused(out: Path, tmp_path: Path) -> None:
    for prompt in ("", "  ", "\ud800"[:0]):
        result = run("generate", out, "--prompt", prompt, "--tokens", "2")
        assert result.returncode == 2
        assert "has no tokens, and the tokenizer has no begin token" in result.stderr
    folder = shutil.copytree(out, tmp_path / "out")
    edit(folder / "tokenizer_config.json", lambda own: own.update(bos_token="3"))
    begun = succeed("generate", folder, "--prompt", "", "--tokens", "3")
    assert begun == succeed("generate", out, "--prompt", "3", "--tokens", "3").removeprefix("3 ")


def newer(own: dict[str, Any]) -> None:
    own["model"]["type"] = "WordLevelOfTheFuture"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", newer, "pip install --upgrade tokenizers transformers"),
        ("tokenizer.json", None, "tokenizer"),
        (
            "tokenizer.json",
            lambda own: own["model"].update(vocab={"?": 0}),
            "has no tokenizer files",
        ),
    ],
)
def test_tokenizer_that_cannot_be_loaded_is_named(
    name: str,
    change: Callable[[dict[str, Any]], object] | None,
    message: str,
    out: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(out, tmp_path / "out")
    if change is None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        edit(folder / name, change)
    text = write_text(tmp_path / "text.txt", 300)
    for command in (
        ("generate", folder, "--prompt", "3"),
        ("evaluate", folder, "--text", text, "--tokens", "64", "--window", "32"),
    ):
        result = run(*command)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr


def test_tokens_beyond_the_embeddings_are_told_before_the_work(out: Path, tmp_path: Path) -> None:
    model = shutil.copytree(out.parent / "model", tmp_path / "model")
    edit(model / "tokenizer.json", lambda own: own["model"]["vocab"].update(many=99))
    text, strange = write_text(tmp_path / "text.txt", 3000), tmp_path / "strange.txt"
    strange.write_text(text.read_text() + " many" * 3000)
    options = ("--model", model, *CALIBRATED, "--output", tmp_path / "out")
    result = run("decompose", *options, "--calibration", strange)
    assert result.returncode == 2
    assert "makes the token 99 of the text, and the model has 64 embeddings" in result.stderr
    result = run("generate", shutil.copytree(out, tmp_path / "all"), "--prompt", "3")
    assert result.returncode == 0
    shutil.copy(model / "tokenizer.json", tmp_path / "all")
    assert run("generate", tmp_path / "all", "--prompt", "many").returncode == 2
    # Random tokens are those of the model, so a text without the surplus ones is enough.
    succeed("decompose", *options, "--calibration", text)


def test_family_for_which_transformers_makes_an_empty_tokenizer(tmp_path: Path) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3_moe")
    text = write_text(tmp_path / "text.txt", 300)
    result = run("evaluate", model, "--text", text, "--tokens", "64", "--window", "32")
    assert result.returncode == 2
    assert "has no tokenizer" in result.stderr
    assert "fetch the model's tokenizer files" in result.stderr
