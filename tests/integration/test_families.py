"""The whole job on families other than DeepSeek-V2, whose models transformers makes and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.running import succeed, torchrun
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module", params=["olmoe", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    return add_tokenizer(make_tiny_family(folder, request.param))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
        IDS
    ).logits
    return found


def test_checkpoint_is_decomposed_sharded_verified_loaded_and_reconstructed(
    model: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    facts = json.loads(succeed("inspect", model, "--json"))
    assert facts["shape"] == [8, 24, 64]
    assert (facts["layers"], facts["top_k"], facts["shared_experts"]) == ([0, 1], 2, 0)
    succeed("decompose", "--model", model, "--rank", "6,16,24", "--output", out)
    succeed("shard", out, "--tp", "2")
    result = torchrun(2, "-m", "tuckerize", "verify", out)
    assert result.returncode == 0, result.stderr
    succeed("reconstruct", out, "--output", dense)
    torch.testing.assert_close(logits(out), logits(dense), rtol=1e-4, atol=1e-4)


def test_full_rank_is_the_dense_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("decompose", "--model", model, "--rank", "full,full,full", "--output", out)
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-4)


def test_calibration_streams_the_family(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, text = tmp_path / "out", write_text(tmp_path / "text.txt", 4000)
    settings = ("--keep", "0.6", "--calibration", text, "--calibration-tokens", "2048")
    succeed("decompose", "--model", model, *settings, "--refine", "5", "--output", out)
    report = json.loads(succeed("verify", out, "--json"))
    assert report["passed"]
    found = json.loads(
        succeed("evaluate", out, "--against", model, "--text", text, "--tokens", "1024", "--json")
    )
    dense, factored = (result["perplexity"] for result in found["results"])
    assert factored == pytest.approx(dense, rel=0.2)
