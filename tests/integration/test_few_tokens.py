"""Calibrations with too little text, and caches that cannot be used."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.running import files_of, run_here
from tests.tiny_models import write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    PlanRequest,
    VerifyRequest,
    decompose,
    evaluate,
    inspect,
    plan,
    preview,
    verify,
)
from tuckerize.calibration import tokens as tokens_module
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.errors import CheckpointError, UsageError
from tuckerize.format.manifest import read_tucker_manifest
from tuckerize.report.plans import PlanReport


@pytest.fixture
def short(tmp_path: Path) -> Path:
    return write_text(tmp_path / "short.txt", 3)


def asked(model: Path, text: Path, tokens: int | None, out: Path | None = None) -> DecomposeRequest:
    settings: dict[str, Any] = {"texts": [str(text)], "refine": 0}
    if tokens is not None:
        settings["tokens"] = tokens
    return DecomposeRequest(model=model, output=out, keep=0.5, calibration=settings)


def test_text_of_three_tokens_is_refused(model: Path, short: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the calibration texts give 6 tokens") as caught:
        decompose(asked(model, short, None, tmp_path / "out"))
    assert "at least 7681 are needed" in caught.value.message
    assert "--calibration-tokens 1024" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_few_tokens_that_were_asked_for_predict_nothing_and_warn_everywhere(
    model: Path, short: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("decompose", "--model", model, "--calibration", short, "--keep", "0.5")
    result = run_here(*command, "--calibration-tokens", "1024", "--output", out)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "predicted KL" not in text
    _, table, last = text.partition("warning: no error was measured and nothing predicted")
    assert table
    assert f"wrote {out}" in last
    facts = inspect(out).tucker
    assert facts is not None
    assert "too few tokens for a validation set" in facts.warnings[0]
    assert f"> **Warning:** {facts.warnings[0]}" in (out / "README.md").read_text()
    with pytest.raises(UsageError, match="leave none for validation"):
        plan(PlanRequest(model=model, calibration={"texts": [str(short)], "tokens": 1024}))


def test_layer_that_is_worse_than_nothing_is_never_ok(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """Half of every mode of random weights."""
    settings = {"texts": [str(text)], "tokens": 1024, "refine": 0}
    out = tmp_path / "out"
    request = DecomposeRequest(model=model, output=out, rank="50%,50%,50%", calibration=settings)
    report = decompose(request)
    assert report is not None
    worse = {s.layer for s in report.stacks if s.relative_residual > 1}
    assert worse
    for layer in worse:
        assert any(warning.startswith(f"layer {layer}: ") for warning in report.warnings)
    verified = verify(VerifyRequest(folder=out))
    assert worse <= {layer.layer for layer in verified.layers if layer.warnings}
    result = run_here("verify", out)
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert all(row[-1] == "warning" for row in rows if int(row[0]) in worse)


@pytest.mark.parametrize("words", [2000, 5000, 40_000])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_random_windows_are_the_documented_share_of_those_that_there_are(
    words: int, part: float, model: Path, tmp_path: Path
) -> None:
    source = parse_source(str(write_text(tmp_path / "text.txt", words)))
    found = read_windows([source], model, tokens=65536, window=512, seed=0, random_share=part)
    count = len(found.tokens_SL)
    assert abs((count - found.text) - part * count) <= 1 / (1 - part)


@pytest.fixture
def cached(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[PlanReport, Path]:
    """A plan, and the folder of its cached profile."""
    monkeypatch.setattr(tokens_module, "HELD_OUT_BLOCK", 64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = preview(asked(model, text, 1024))
    assert found is not None
    return found, next((tmp_path / "cache" / "tuckerize").iterdir())


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "misplaced", "deleted"])
def test_cached_profile_that_is_damaged_or_misplaced_is_made_again(
    damage: str, cached: tuple[PlanReport, Path], model: Path, text: Path
) -> None:
    first, folder = cached
    before = files_of(folder)
    path, other = sorted(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-20] ^= 16
    match damage:
        case "deleted":
            path.unlink()
        case "misplaced":
            shutil.copy(other, path)
        case _:
            bad = {"emptied": bytearray(), "cut": data[:-8], "flipped": data}
            path.write_bytes(bad[damage])
    again = preview(asked(model, text, 1024))
    assert again is not None
    assert again.stacks == first.stacks
    assert files_of(folder) == before


@pytest.mark.parametrize("home", ["none", "a file", "read-only"])
def test_cache_that_cannot_be_written_is_a_note(
    home: str,
    cached: tuple[PlanReport, Path],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "none":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
    elif home == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        # Root may write to folders that are read-only.
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/tuckerize")
    command = ("decompose", "--model", model, "--calibration", text, "--calibration-tokens", "1024")
    result = run_here(*command, "--keep", "0.5", "--refine", "0", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "note: the profile of the model cannot be kept for other budgets (" in result.stderr
    assert "set XDG_CACHE_HOME to a folder that can be written" in result.stderr
    assert os.path.exists(tmp_path / "out" / "tuckerize.json")  # noqa: PTH110


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.weight", "lm_head.weight"])
def test_evaluate_of_a_model_with_nan_fails(
    name: str, model: Path, text: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights[name].view(-1)[5] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"hold NaN or infinity$"):
        evaluate(EvaluateRequest(model=broken, text=str(text), tokens=1024))


def test_stock_experts_that_nothing_is_predicted_of_need_no_profile(
    model: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their width is known from the budget."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings: dict[str, Any] = {"texts": [str(short)], "refine": 0, "tokens": 1024}
    for target, is_profiled in ("any-engine", False), ("free", True):
        request = asked(model, short, 1024, tmp_path / target)
        decompose(replace(request, calibration={**settings, "target": target}))
        assert (tmp_path / "cache").exists() == is_profiled
    assert set(read_tucker_manifest(tmp_path / "any-engine").widths(0, 0)) == {24}
