"""`evaluate` against transformers' own forward on the same windows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.running import run_here, succeed
from tests.tiny_models import write_text
from tuckerize import DecomposeRequest, EvaluateRequest, decompose, evaluate
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.errors import CheckpointError, TuckerizeError
from tuckerize.report import EvaluateReport

SIZE = ("--tokens", "1024", "--window", "64")


def measured(model: Path, text: str | Path, against: Path | None = None) -> EvaluateReport:
    """Evaluate on windows of the size of `SIZE`."""
    return evaluate(
        EvaluateRequest(model=model, text=text, against=against, tokens=1024, window=64)
    )


@torch.no_grad()
def nats_by_transformers(folder: Path, text: Path, tokenizer: Path) -> float:
    """Mean negative log-likelihood over the windows, the whole model in memory."""
    windows = read_windows([parse_source(str(text))], tokenizer, tokens=1024, window=64, seed=0)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [loaded(row[None], labels=row[None]).loss for row in windows.tokens_SL]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.6},
        {"rank": "3,8,20", "group_size": 4},
        {"keep": 0.6, "layers": "2"},
    ],
    ids=str,
)
def test_perplexity_is_that_of_the_whole_model(
    options: dict[str, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=model, output=out, **options))
    found = measured(out, text, against=model)
    assert found.tokens == 16 * 63
    dense, factored = found.results
    assert (dense.folder, factored.folder) == (str(model), str(out))
    assert dense.size.routed_parameters > factored.size.routed_parameters
    for result, folder in ((dense, model), (factored, out)):
        expected = nats_by_transformers(folder, text, model)
        assert result.nats == pytest.approx(expected, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert dense.nats != pytest.approx(factored.nats, rel=1e-4)


def test_table_compares_with_the_other_checkpoint(model: Path, text: Path) -> None:
    shown = succeed("evaluate", model, "--text", text, "--against", model, *SIZE)
    assert shown.count("x 1.0000") == 2
    words = " ".join(shown.split())
    assert f"on 1,008 tokens, evenly spread over {text}, in windows of 64; not compar" in words
    assert "x 1" not in succeed("evaluate", model, "--text", text, *SIZE)


def test_short_text_is_said(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "short.txt", 200)
    (note,) = measured(model, text).notes
    assert "gives 192 tokens of its share of 1024" in note


@pytest.mark.parametrize(
    ("text", "message"),
    [("missing.txt", r"missing\.txt is missing"), ("missing.txt:0", "positive weight")],
)
def test_what_cannot_be_evaluated_is_refused(text: str, message: str, model: Path) -> None:
    with pytest.raises(TuckerizeError, match=message):
        evaluate(EvaluateRequest(model=model, text=text))


def test_text_must_be_given(model: Path) -> None:
    result = run_here("evaluate", model)
    assert result.returncode == 2
    assert "--text" in result.stderr
    assert "Traceback" not in result.stderr


def test_model_of_another_vocabulary_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    with pytest.raises(TuckerizeError, match="has a vocabulary of 99 tokens"):
        evaluate(EvaluateRequest(model=other, against=model, text=text))


def test_folder_without_a_model_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        evaluate(EvaluateRequest(model=tmp_path, text=text))
