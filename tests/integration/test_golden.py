"""Checkpoints and shards of version 0.1: read as ever, and written alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.running import ROOT, files_of, torchrun
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    inspect,
    reconstruct,
    shard,
    verify,
)
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint

GOLDEN = ROOT / "tests" / "golden" / "v0.1"
SOURCE = GOLDEN / "source"
BFLOAT16 = 2**-9  # unit roundoff of the reconstructed weights

checkpoints = pytest.mark.parametrize("name", ["tucker", "data-free", "calibrated"])


def read_json(path: Path) -> Any:  # noqa: ANN401
    return json.loads(path.read_text())


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Logits of a fixed prompt in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Tensor = model(torch.arange(3, 43)[None]).logits
    return found


@checkpoints
def test_tensors_have_the_sizes_of_the_manifest(name: str) -> None:
    tucker = TuckerCheckpoint.open(GOLDEN / name)
    manifest = read_json(GOLDEN / name / "tuckerize.json")
    stored = 0
    for layer in (1, 2):
        for group in range(4 // manifest["group_size"]):
            stored += sum(tensor.numel() for tensor in tucker.read_group(layer, group).values())
    assert stored == manifest["after"]["routed_parameters"]


@checkpoints
def test_inspect_describes_it(name: str) -> None:
    manifest = read_json(GOLDEN / name / "tuckerize.json")
    report = inspect(GOLDEN / name)
    assert report.tucker is not None
    assert asdict(report.size) == manifest["after"]
    assert asdict(report.tucker.before) == manifest["before"]
    assert report.tucker.layers == report.layers == (1, 2)
    folders = {path.name for path in (GOLDEN / name).iterdir() if path.is_dir()}
    assert set(report.tucker.shardings) == folders
    assert report.tucker.carries_loader == (name == "tucker")


@checkpoints
def test_loaded_model_computes_what_its_reconstruction_does(name: str, tmp_path: Path) -> None:
    reconstruct(ReconstructRequest(folder=GOLDEN / name, output=tmp_path / "dense"))
    exact, found = logits(tmp_path / "dense"), logits(GOLDEN / name)
    assert (found - exact).norm() < BFLOAT16 * exact.norm()


def test_loader_of_the_checkpoint_still_imports_what_it_needs() -> None:
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model.model.layers[1].mlp.experts).__name__ == 'TuckerExperts'\n"
    )
    subprocess.run([sys.executable, "-c", script, GOLDEN / "tucker"], check=True)


@checkpoints
def test_whole_checkpoint_passes_verification(name: str, tmp_path: Path) -> None:
    out = shutil.copytree(GOLDEN / name, tmp_path / "out")
    report = verify(VerifyRequest(folder=out, model=SOURCE))
    assert (report.passed, report.layout) == (True, "unsharded")
    for layer in report.layers:
        assert layer.residual_difference is not None
        assert layer.residual_difference < 1e-6


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("tucker", 2),
        pytest.param("data-free", 2, marks=pytest.mark.long),
        ("data-free", 4),
        ("calibrated", 2),
    ],
)
def test_shards_pass_verification(name: str, processes: int, tmp_path: Path) -> None:
    out = shutil.copytree(GOLDEN / name, tmp_path / "out")
    result = torchrun(processes, "-m", "tuckerize", "verify", out, "--model", SOURCE, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["passed"], report["tp_size"] * report["ep_size"]) == (True, processes)


def header(path: Path) -> bytes:
    """The length and the JSON that a safetensors file begins with."""
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def fixed(value: Any) -> Any:  # noqa: ANN401
    """A manifest without its version, what 0.1 did not record, and what rounding decides."""
    if isinstance(value, list):
        return [fixed(item) for item in value]
    if isinstance(value, dict):
        rounded = {"tuckerize_version", "relative_residual", "sweeps", "sha256"}
        decided = rounded | {"other_files", "checksum", "layout"}  # which it did not have
        return {key: fixed(own) for key, own in value.items() if key not in decided}
    return value


def test_decomposition_is_written_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, out = GOLDEN / "tucker", tmp_path / "out"
    monkeypatch.chdir(GOLDEN)
    decompose(DecomposeRequest(model="source", rank="3,16,24", output=out))
    names = {path.name for path in golden.iterdir() if path.is_file()}
    assert {path.name for path in out.iterdir()} == names | {"README.md"}
    for file in ("config.json", "model.safetensors.index.json"):
        assert (out / file).read_text() == (golden / file).read_text()
    for weights in golden.glob("*.safetensors"):
        assert header(out / weights.name) == header(weights)
    manifest = (read_json(folder / "tuckerize.json") for folder in (out, golden))
    assert fixed(next(manifest)) == fixed(next(manifest))


@pytest.mark.parametrize(
    ("name", "folder", "options"),
    [
        ("tucker", "tp2", {"tp": 2, "layout": "rank"}),
        ("data-free", "tp2", {"tp": 2}),
        ("data-free", "tp2-ep2", {"tp": 2, "ep": 2}),
        ("calibrated", "tp2", {"tp": 2}),
    ],
)
def test_shards_are_written_alike(
    name: str, folder: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """A slice is not rounded: all bytes of the weights are the same."""
    out = shutil.copytree(GOLDEN / name, tmp_path / "out")
    shutil.rmtree(out / folder)
    shard(ShardRequest(folder=out, **options))
    found, golden = files_of(out / folder), files_of(GOLDEN / name / folder)
    manifests = [fixed(json.loads(files.pop("tuckerize.json"))) for files in (found, golden)]
    assert manifests[0] == manifests[1]
    assert found == golden
