"""The whole job on families other than DeepSeek-V2, whose models transformers makes and runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.running import torchrun
from tests.tiny_families import EVERY_VERSION
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    evaluate,
    inspect,
    reconstruct,
    shard,
    verify,
)
from tuckerize.domain import StackShape

IDS = torch.arange(3, 43)[None]
FULL = "full,full,full"


@pytest.fixture(scope="module", params=EVERY_VERSION)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    return add_tokenizer(make_tiny_family(folder, request.param))


def decompose_calibrated(model: Path, text: Path, output: Path) -> None:
    """Decompose to 60 % with few tokens and steps."""
    calibration = {"texts": [str(text)], "tokens": 2048, "refine": 5}
    decompose(DecomposeRequest(model=model, keep=0.6, calibration=calibration, output=output))


def perplexities(model: Path, tucker: Path, text: Path) -> tuple[float, ...]:
    """Of the dense model, and of the Tucker checkpoint."""
    request = EvaluateRequest(model=tucker, against=model, text=text, tokens=1024)
    return tuple(result.perplexity for result in evaluate(request).results)


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
    facts = inspect(model)
    assert facts.shape == StackShape(8, 24, 64)
    assert (facts.layers, facts.top_k, facts.shared_experts) == ((0, 1), 2, 0)
    decompose(DecomposeRequest(model=model, rank="6,16,24", output=out))
    shard(ShardRequest(folder=out, tp=2))
    result = torchrun(2, "-m", "tuckerize", "verify", out)
    assert result.returncode == 0, result.stderr
    reconstruct(ReconstructRequest(folder=out, output=dense))
    torch.testing.assert_close(logits(out), logits(dense), rtol=1e-4, atol=1e-4)


def test_full_rank_is_the_dense_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-4)


def test_calibration_streams_the_family(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, text = tmp_path / "out", write_text(tmp_path / "text.txt", 4000)
    decompose_calibrated(model, text, out)
    assert verify(VerifyRequest(folder=out)).passed
    dense, factored = perplexities(model, out, text)
    assert factored == pytest.approx(dense, rel=0.2)
