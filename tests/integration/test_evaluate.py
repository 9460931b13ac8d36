"""`evaluate` against transformers' own forward on the same windows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.running import run_here, succeed
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    ReconstructRequest,
    decompose,
    evaluate,
    reconstruct,
)
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.errors import CheckpointError, TuckerizeError
from tuckerize.report.evaluation import Divergence, Estimate, EvaluateReport

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


class _Whole(NamedTuple):
    """What a whole model in float64 makes of all windows."""

    logs_SLV: Tensor
    chosen_SLk: list[Tensor]


@torch.no_grad()
def by_transformers(folder: Path, windows_SL: Tensor) -> _Whole:
    """Log-probabilities and every layer's sets of experts, from transformers in float64."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    routers = [m for name, m in loaded.named_modules() if name.endswith("mlp.gate")]
    chosen: list[list[Tensor]] = [[] for _ in routers]
    for router, own in zip(routers, chosen, strict=True):
        router.register_forward_hook(lambda _m, _i, output, own=own: own.append(output[2]))
    logs = [torch.log_softmax(loaded(row[None]).logits[0], -1) for row in windows_SL]
    return _Whole(torch.stack(logs), [torch.stack(own).sort(-1).values for own in chosen if own])


def mean_and_error(values_S: Tensor) -> tuple[float, float]:
    """Mean over windows and its standard error."""
    return float(values_S.mean()), float(values_S.std() / len(values_S) ** 0.5)


def test_divergence_is_that_of_whole_models_in_float64(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=model, output=out, keep=0.6))
    reconstruct(ReconstructRequest(folder=out, output=dense))
    windows = read_windows([parse_source(str(text))], model, tokens=1024, window=64, seed=0)
    tokens_SL = windows.tokens_SL
    first, other = by_transformers(model, tokens_SL), by_transformers(dense, tokens_SL)
    before_SLV, after_SLV = first.logs_SLV[:, :-1], other.logs_SLV[:, :-1]
    next_SL1 = tokens_SL[:, 1:, None]
    rise_SL = (before_SLV - after_SLV).gather(-1, next_SL1)[..., 0]
    kl_SL = (before_SLV.exp() * (before_SLV - after_SLV)).sum(-1)
    same_SL = (before_SLV.argmax(-1) == after_SLV.argmax(-1)).double()
    changed_SL = torch.zeros_like(tokens_SL, dtype=torch.bool)
    for one, two in zip(first.chosen_SLk, other.chosen_SLk, strict=True):
        changed_SL |= (one != two).any(-1)
    assert changed_SL.any()

    found = measured(dense, text, against=model).divergence
    assert found is not None
    assert found.experts_changed is not None
    rise, rise_error = mean_and_error(rise_SL.mean(1))
    assert found.perplexity_ratio.value == pytest.approx(math.exp(rise), rel=1e-5)
    assert found.perplexity_ratio.error == pytest.approx(math.exp(rise) * rise_error, rel=1e-3)
    for estimate, expected_SL, tolerance in (
        (found.kl, kl_SL, 1e-4),
        # a token whose best two are as good as equal may turn in float32
        (found.same_top, same_SL, 5e-3),
        (found.experts_changed, changed_SL[:, :-1].double(), 5e-3),
    ):
        value, error = mean_and_error(expected_SL.mean(1))
        assert estimate.value == pytest.approx(value, rel=tolerance)
        assert estimate.error == pytest.approx(error, rel=20 * tolerance)


def test_model_diverges_in_nothing_from_itself(model: Path, text: Path) -> None:
    found = measured(model, text, against=model).divergence
    assert found == Divergence(
        Estimate(1.0, 0.0), Estimate(0.0, 0.0), Estimate(1.0, 0.0), Estimate(0.0, 0.0)
    )
    assert measured(model, text).divergence is None


def test_other_numbers_of_experts_are_not_compared(model: Path, text: Path, tmp_path: Path) -> None:
    other = add_tokenizer(make_tiny_model(tmp_path / "other", experts=4))
    found = measured(other, text, against=model).divergence
    assert found is not None
    assert found.experts_changed is None
    assert found.kl.value > 0


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
    assert shown.count("x 1.0000") == 3
    assert "KL divergence    0.00000 ± 0.00000 nats per token" in shown
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


def test_a_single_window_has_no_standard_error(model: Path, text: Path) -> None:
    request = EvaluateRequest(model=model, text=text, against=model, tokens=64, window=64)
    report = evaluate(request)
    assert report.results[0].perplexity_error is None
    assert report.divergence is not None
    assert report.divergence.kl == Estimate(0.0, None)


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
