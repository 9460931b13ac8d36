"""shard and verify under torchrun on real checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.running import files_of, run_here, succeed, torchrun
from tuckerize.checkpoint.files import sha256_of
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.format.manifest import checksum

VERIFY = ("-m", "tuckerize", "verify")


@pytest.fixture(scope="module")
def tucker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Tucker checkpoint with every mode truncated, sharded for 2, 4 and 2 x 2 processes."""
    out = tmp_path_factory.mktemp("verify") / "out"
    succeed("decompose", "--model", tiny_model, "--rank", "6,18,26", "--output", out)
    succeed("shard", out, "--tp", "2", "--layout", "rank")
    succeed("shard", out, "--tp", "4", "--layout", "intermediate")
    succeed("shard", out, "--tp", "2", "--ep", "2", "--layout", "rank")
    return out


def report_of(out: Path, tp_size: int) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / f"tp{tp_size}" / "verify.json").read_text())
    return value


@pytest.mark.parametrize("processes", [2, 4])
def test_verify_untouched_shards_passes(processes: int, tucker: Path) -> None:
    result = torchrun(processes, *VERIFY, tucker, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == report_of(tucker, processes)
    assert report["passed"] is True
    assert [layer["layer"] for layer in report["layers"]] == [1, 2]
    for layer in report["layers"]:
        assert 0 < layer["sharding_error"] < 1e-5
        assert 0 < layer["output_error"] < 1.5
        assert layer["residual_difference"] < 1e-6
    stages = [line.partition(" s: ")[2] for line in result.stderr.splitlines() if " s: " in line]
    steps = [f"layer 1: {step}" for step in ("reference", "load", "shards")]
    assert stages[:4] == ["files: sizes and hashes", *steps]


def test_verify_on_a_mesh_passes_and_counts_what_was_predicted(tucker: Path) -> None:
    mesh = ("--tp", "2", "--ep", "2", "--sequence-parallel")
    result = torchrun(4, *VERIFY, tucker, *mesh, "--tokens", "61", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["tp_size"], report["ep_size"], report["cp_size"]) == (2, 2, 1)
    assert report["sequence_parallel"] is True
    assert (report["dispatch"], report["fused_unmet"]) == ("plain", None)
    assert all(0 < layer["sharding_error"] < 1e-5 for layer in report["layers"])
    traffic = {entry.pop("kind"): entry for entry in report["traffic"]}
    assert list(traffic) == ["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
    for entry in traffic.values():
        assert entry["counted"] == pytest.approx(entry["predicted"], rel=1e-12)


def test_verify_in_two_bytes_allows_their_rounding_and_says_so(tucker: Path) -> None:
    result = torchrun(2, *VERIFY, tucker, "--tp", "2", "--dtype", "bfloat16", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["dtype"], report["tolerance"]) == ("bfloat16", 0.04)
    assert all(1e-3 < layer["sharding_error"] < 0.02 for layer in report["layers"])
    assert (report["dispatch"], report["float32_products"]) == (None, "float32")


def test_verify_deterministic_twice_gives_the_same_bytes(tucker: Path, tmp_path: Path) -> None:
    shutil.copytree(tucker, tmp_path / "copy")
    succeed("shard", tmp_path / "copy", "--tp", "1")
    reports = []
    for _ in range(2):
        result = torchrun(
            2, *VERIFY, tmp_path / "copy", "--tp", "1", "--cp", "2", "--deterministic"
        )
        assert result.returncode == 0, result.stderr
        assert "passed" in result.stdout
        reports.append((tmp_path / "copy" / "tp1" / "verify.json").read_bytes())
    assert reports[0] == reports[1]


def test_verify_alone_passes_and_says_it_is_unsharded(tucker: Path) -> None:
    assert "passed" in (output := succeed("verify", tucker))
    assert "unsharded" in output


def test_verify_alone_beside_shards_names_what_was_not_verified(tucker: Path) -> None:
    result = run_here("verify", tucker)
    assert "note: the shards were not verified: tp2, tp2-ep2, tp4; run: torchrun" in result.stderr
    assert f"--nproc-per-node 2 -m tuckerize verify {tucker}" in result.stderr


def test_verify_other_world_size_gives_the_commands(tucker: Path) -> None:
    result = torchrun(3, *VERIFY, tucker)
    assert result.returncode != 0
    assert f"error: {tucker} has no shards for 3 processes, only tp2, tp2-ep2, tp4" in result.stderr
    assert f"torchrun --nproc-per-node 4 -m tuckerize verify {tucker}" in result.stderr
    assert f"tuckerize shard {tucker} --tp 3" in result.stderr
    # The box that torchrun ends with has the message as well.
    box = result.stderr.rpartition("Root Cause")[2]
    assert f"error: {tucker} has no shards for 3 processes" in box


def test_verify_output_error_above_the_bound_fails(tucker: Path) -> None:
    result = torchrun(2, *VERIFY, tucker, "--max-output-error", "0.001", "--layers", "2")
    assert result.returncode == 1
    assert "is above 0.001" in result.stdout


def copy_with_one_number_changed(tucker: Path, copy: Path, *, rehash: bool) -> None:
    """Change the largest number of a core in one shard; optionally fix the manifest's hash."""
    shutil.copytree(tucker, copy)
    path = copy / "tp2" / "layer-00002-group-0000-rank-00001-of-00002.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    core = tensors["model.layers.2.mlp.experts.group_0.up_proj.core"]
    place = core.abs().argmax()
    core.view(-1)[place] = -core.view(-1)[place]
    save_file(tensors, path, metadata=metadata)
    if rehash:
        manifest = json.loads((copy / "tp2" / MANIFEST).read_text())
        for shard in manifest["shards"]:
            if shard["file"]["name"] == path.name:
                shard["file"]["sha256"] = sha256_of(path)
        manifest["checksum"] = checksum(manifest)
        (copy / "tp2" / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("rehash", "message"),
    [(False, "was changed: its SHA-256"), (True, "sharded output differs from unsharded by")],
)
def test_verify_one_number_changed_in_one_shard_fails(
    tucker: Path, tmp_path: Path, *, rehash: bool, message: str
) -> None:
    copy_with_one_number_changed(tucker, tmp_path / "copy", rehash=rehash)
    result = torchrun(2, *VERIFY, tmp_path / "copy")
    assert result.returncode == 1
    assert message in " ".join(result.stdout.split())
    report = report_of(tmp_path / "copy", 2)
    assert [bool(layer["failures"]) for layer in report["layers"]] == [False, True]


def test_verify_missing_and_truncated_shards_fail_without_hanging(
    tucker: Path, tmp_path: Path
) -> None:
    shutil.copytree(tucker, tmp_path / "copy")
    shards = sorted((tmp_path / "copy" / "tp2").glob("*.safetensors"))
    shards[0].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:1000])
    result = torchrun(2, *VERIFY, tmp_path / "copy")
    assert result.returncode == 1
    assert f"{shards[0].name} is missing" in result.stdout.replace("\n", " ")
    assert f"{shards[3].name} has another size" in result.stdout.replace("\n", " ")


def test_verify_shards_of_another_version_are_refused(tucker: Path, tmp_path: Path) -> None:
    shutil.copytree(tucker, tmp_path / "copy")
    manifest = tmp_path / "copy" / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    result = torchrun(2, *VERIFY, tmp_path / "copy")
    assert result.returncode == 1
    message = "tp2/tuckerize.json was cut from another version of"
    assert message in " ".join(result.stdout.split())


@pytest.mark.parametrize("bug", ["columns", "no-last-sum"])
def test_verify_published_sharding_bug_planted_in_the_layer_fails(bug: str, tucker: Path) -> None:
    script = Path(__file__).parent / "seed_layer.py"
    result = torchrun(2, script, bug, "verify", tucker)
    assert result.returncode == 1, result.stderr
    report = report_of(tucker, 2)
    for layer in report["layers"]:
        assert layer["sharding_error"] > 0.1


def test_verify_with_a_killed_process_ends_and_says_that_it_was_killed(tucker: Path) -> None:
    script = Path(__file__).parent / "lost_process.py"
    result = torchrun(2, script, "killed", "verify", tucker)
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr.rpartition("Root Cause")[2]
    assert "bug in tuckerize" not in result.stderr


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((2, 1), id="whole run", marks=pytest.mark.long),
        pytest.param((2, 2), id="groups of a mesh"),
    ],
)
def test_verify_with_a_process_that_hangs_ends_after_the_time_out(
    mesh: tuple[int, int], tucker: Path
) -> None:
    tp, ep = mesh
    script = Path(__file__).parent / "lost_process.py"
    sizes = ("--tp", str(tp), "--ep", str(ep), "--collective-timeout", "10")
    result = torchrun(tp * ep, script, "hangs", "verify", tucker, *sizes)
    assert result.returncode != 0
    assert "error: the other processes have not answered for 0:00:10" in result.stderr
    assert (
        "hint: find the process that hangs, or wait longer with --collective-timeout"
        in result.stderr
    )


def test_shard_again_without_overwrite_is_refused_and_keeps_the_files(tucker: Path) -> None:
    before = files_of(tucker / "tp2")
    result = run_here("shard", tucker, "--tp", "2", "--layout", "intermediate")
    assert result.returncode == 2
    assert "already holds a finished result" in result.stderr
    assert files_of(tucker / "tp2") == before


def test_shard_files_are_read_and_resharded_by_torch_distributed_checkpoint(
    tucker: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parent / "reshard_with_dcp.py"
    result = torchrun(4, script, tucker / "tp2-ep2", tmp_path / "tp4")
    assert result.returncode == 0, result.stderr
    whole = {
        name: tensor
        for path in tucker.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".experts." in name
    }
    for name, tensor in whole.items():
        parts = [torch.load(tmp_path / "tp4" / f"{rank}.pt")[name] for rank in range(4)]
        assert torch.equal(torch.cat(parts), tensor), name
