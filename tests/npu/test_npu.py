"""The main job on a stand-in for an NPU; `make test-npu` runs more of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.running import run, run_module, succeed, torchrun

pytestmark = pytest.mark.usefixtures("npu")


def test_standin_refuses_and_counts_what_an_npu_does() -> None:
    result = run_module("tests.npu.scripts.refusals")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {name: text.partition(":")[2].strip() for name, text in list(found.items())[:8]} == {
        "float64 tensor": "a float64 tensor reaches the device",
        "float64 moved": "a float64 tensor reaches the device",
        "inv": "linalg_inv_ex has no NPU kernel, and falling back to the CPU is disabled",
        "eigh": "_linalg_eigh has no NPU kernel, and falling back to the CPU is disabled",
        "grouped": "_grouped_mm has no NPU kernel, and falling back to the CPU is disabled",
        "nonzero": "the shape of the result of nonzero depends on data",
        "mask": "the shape of the result of nonzero depends on data",
        "set by mask": "the shape of the result of _index_put_impl depends on data",
    }
    assert found["nonzero outside"] == ""
    assert found["double"] == "torch.float32"
    assert "Device do not support double dtype now" in result.stderr
    assert found["waits for an item"] == {"_local_scalar_dense": 1}
    assert found["waits for a copy"] == {"copy to the host": 1}
    assert found["waits for nothing"] == {}


def test_decompositions_on_the_device_give_what_the_cpu_gives() -> None:
    result = run_module("tests.npu.scripts.linalg_cases")
    assert result.returncode == 0, result.stderr
    differences = json.loads(result.stdout)
    assert len(differences) == 10
    assert {name: value for name, value in differences.items() if not value < 1e-5} == {}


def test_decompose_shard_and_verify_on_the_device(tiny_model: Path, tmp_path: Path) -> None:
    size = ("--rank", "6,18,26", "--max-sweeps", "2", "--output")
    result = run("decompose", "--model", tiny_model, *size, tmp_path / "npu", "--device", "npu")
    assert result.returncode == 0, result.stderr
    succeed("decompose", "--model", tiny_model, *size, tmp_path / "cpu", "--device", "cpu")
    for on_npu, on_cpu in zip(
        *(_residuals(tmp_path / name) for name in ("npu", "cpu")), strict=True
    ):
        assert on_npu == pytest.approx(on_cpu, rel=1e-5)
    succeed("shard", tmp_path / "npu", "--tp", "2", "--layout", "rank")
    verify = ("-m", "tuckerize", "verify", tmp_path / "npu", "--device", "npu", "--json")
    result = torchrun(2, *verify)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["passed"], report["device"], report["tp_size"]) == (True, "npu", 2)
    assert all(0 < layer["sharding_error"] < 1e-5 for layer in report["layers"])


def _residuals(folder: Path) -> list[float]:
    stacks = json.loads((folder / "tuckerize.json").read_text())["stacks"]
    return [stack["relative_residual"] for stack in stacks]
