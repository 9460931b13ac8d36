"""The whole calibrated job on every family: compress, shard, verify, evaluate, reconstruct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_families import CALIBRATED, CALIBRATED_OFTEN, auto_class, make_family
from tests.tiny_models import add_tokenizer, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    evaluate,
    reconstruct,
    shard,
    verify,
)
from tuckerize.calibration import tokens

IDS = torch.arange(3, 43)[None]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = auto_class(folder).from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    "name",
    [
        name if name in CALIBRATED_OFTEN else pytest.param(name, marks=pytest.mark.families)
        for name in CALIBRATED
    ],
)
def test_calibrated_family_shards_verifies_and_reconstructs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "HELD_OUT_BLOCK", 16)  # some are left for validation
    model = add_tokenizer(make_family(tmp_path / "model", name))
    out, text = tmp_path / "out", write_text(tmp_path / "text.txt", 3000)
    calibration = {"texts": [str(text)], "tokens": 512, "window": 64, "refine": 2}
    decompose(DecomposeRequest(model=model, keep=0.75, calibration=calibration, output=out))
    shard(ShardRequest(folder=out, tp=2))
    report = verify(VerifyRequest(folder=out))
    assert report.passed
    for layer in report.layers:
        assert layer.residual_difference is not None
        assert layer.residual_difference < 1e-4
    request = EvaluateRequest(model=out, against=model, text=text, tokens=512, window=64)
    dense, factored = (result.perplexity for result in evaluate(request).results)
    assert factored == pytest.approx(dense, rel=0.1)  # of random weights
    again = tmp_path / "again"
    reconstruct(ReconstructRequest(folder=out, output=again))
    torch.testing.assert_close(logits(again), logits(out), rtol=1e-3, atol=1e-4)
