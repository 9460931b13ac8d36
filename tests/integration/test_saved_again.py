"""A Tucker checkpoint that transformers has saved after training: every command goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.running import run_here as run
from tests.running import succeed
from tests.tiny_models import add_tokenizer
from tuckerize import DecomposeRequest, decompose, inspect
from tuckerize.format.manifest import read_tucker_manifest
from tuckerize.format.saved import is_saved_again, read_or_describe

IDS = torch.arange(3, 43)[None]
HOW: dict[str, dict[str, Any]] = {
    "data-free": {"rank": "4,full,50%", "group_size": 4, "layers": "2"},
    "calibrated": {"keep": 0.6, "calibration": {"tokens": 4096, "refine": 0}},
}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Tensor = loaded(IDS).logits
    return found


@pytest.fixture(scope="module", params=HOW)
def folders(
    request: pytest.FixtureRequest,
    model: Path,
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A Tucker checkpoint, and the same after a step of training."""
    work, how = tmp_path_factory.mktemp("again"), dict(HOW[request.param])
    if "calibration" in how:
        how["calibration"] = {**how["calibration"], "texts": [str(text)]}
    decompose(DecomposeRequest(model=model, output=work / "out", **how))
    trained: Any = AutoModelForCausalLM.from_pretrained(work / "out", dtype="auto")
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "group_" in name:
                value.mul_(1.05)
    trained.save_pretrained(work / "again")
    return work / "out", add_tokenizer(work / "again")


def test_description_is_that_of_the_manifest_but_for_what_is_not_known(
    folders: tuple[Path, Path],
) -> None:
    out, again = folders
    recorded, found = read_tucker_manifest(out), read_or_describe(again)
    assert not is_saved_again(out)
    assert is_saved_again(again)
    known = ("family", "dtype", "shape", "group_size", "joint", "before", "after", "layers")
    assert {key: getattr(found, key) for key in known} == {
        key: getattr(recorded, key) for key in known
    }
    for layer in recorded.layers:
        assert found.ranks(layer) == recorded.ranks(layer)
        for group in range(recorded.groups):
            assert found.widths(layer, group) == recorded.widths(layer, group)
    report = inspect(again)
    assert report.tucker is not None
    assert (report.tucker.source, report.tucker.largest_residual) == (None, None)
    assert "not known: transformers has saved it again" in succeed("inspect", again)


def test_commands_go_on_with_what_was_trained(
    folders: tuple[Path, Path], model: Path, text: Path, tmp_path: Path
) -> None:
    out, again = folders
    trained = logits(again)
    assert float((trained - logits(out)).norm() / trained.norm()) > 1e-3
    size = ("--text", text, "--tokens", "512", "--window", "64", "--json")
    (result,) = json.loads(succeed("evaluate", again, *size))["results"]
    dense = tmp_path / "dense"
    succeed("reconstruct", again, "--output", dense)
    torch.testing.assert_close(logits(dense), trained, rtol=2e-2, atol=2e-2)
    (expanded,) = json.loads(succeed("evaluate", dense, *size))["results"]
    assert result["perplexity"] == pytest.approx(expanded["perplexity"], rel=1e-3)
    assert succeed("generate", again, "--prompt", "3 4", "--tokens", "2").startswith("3 4")
    for command in (("check", again), ("verify", again), ("verify", again, "--model", model)):
        told = run(*command)
        assert told.returncode == 0, told.stdout + told.stderr
        assert "transformers has saved this checkpoint again" in told.stderr
    refused = run("quantize", again, "--cores", "w8", "--output", tmp_path / "out8")
    assert refused.returncode == 2, refused.stderr
    assert "which neurons of the source it kept" in refused.stderr
    succeed("shard", again, "--tp", "2")
    assert run("check", again).returncode == 0
    weights = max(again.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = run("check", again)
    assert changed.returncode == 1
    assert "was cut from another version" in changed.stdout.replace("\n", " ")
