"""`check` and `verify` against damage: every file is hashed, and the damaged one is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.running import ROOT, run_here, succeed
from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    check,
    decompose,
    reconstruct,
    shard,
    verify,
)
from tuckerize.checkpoint.output import RECONSTRUCTED
from tuckerize.errors import CheckpointError, UsageError
from tuckerize.report.checkpoint import CheckReport

GOLDEN = ROOT / "tests" / "golden" / "v0.1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = add_tokenizer(make_tiny_model(tmp_path_factory.mktemp("check") / "model", shards=True))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    return folder


@pytest.fixture(scope="module")
def tucker(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Tucker checkpoint, sharded for 2 and for 1 process."""
    out = tmp_path_factory.mktemp("check") / "out"
    decompose(DecomposeRequest(model=source, rank="6,18,26", output=out))
    for tp in (1, 2):
        shard(ShardRequest(folder=out, tp=tp))
    return out


@pytest.fixture
def copy(tucker: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tucker, tmp_path / "out"))


def names_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_check_passes_what_was_just_written(tucker: Path) -> None:
    report = check(tucker)
    assert (report.passed, report.notes) == (True, ())
    names = names_of(tucker)
    assert report.files == len(names) - 3  # without the three manifests
    assert report.bytes == sum(
        (tucker / name).stat().st_size for name in names if not name.endswith("tuckerize.json")
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_check_names_the_file_of_any_bit_that_was_flipped(
    tucker: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(names_of(tucker)))
    path = tucker / name
    before = path.read_bytes()
    flip(path, data.draw(st.integers(0, 8 * len(before) - 1)))
    try:
        same = name.endswith("tuckerize.json") and same_values(before, path.read_bytes())
        report = check(tucker)
        if name.startswith("README"):
            assert report.passed
            assert name in report.notes[0]
        else:
            faults = [fault.name for fault in report.faults]
            assert same or name in faults or (name == "tuckerize.json" and faults)
    finally:
        path.write_bytes(before)


def same_values(one: bytes, other: bytes) -> bool:
    """Whether two texts are the same JSON: 1e-05 is 1E-05."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-*",
        "model-00007-*",
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "tuckerize_modeling.py",
        "tuckerize.json",
    ],
)
@pytest.mark.parametrize("place", [3, -9], ids=["header", "data"])
def test_verify_answers_no_and_names_the_damaged_file(
    copy: Path, source: Path, name: str, place: int
) -> None:
    name = next(copy.glob(name)).name
    flip(copy / name, 8 * place)
    result = run_here("verify", copy, "--model", source)
    assert result.returncode == 1, result.stderr
    assert f"{name} was changed" in result.stdout or f"{name} is damaged" in result.stdout
    assert f"FAILED: {copy}" in result.stdout.replace("\n", "")
    report = json.loads((copy / "verify.json").read_text())
    assert report["passed"] is False
    assert [fault["name"] for fault in report["damaged"]] == [name]
    # The layers are computed where they are known.
    assert bool(report["layers"]) == name.startswith(("tokenizer", "generation", "tuckerize_"))


def test_verify_finds_a_config_that_computes_something_else(copy: Path, source: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["routed_scaling_factor"] = 2.5
    (copy / "config.json").write_text(json.dumps(config))
    report = verify(VerifyRequest(folder=copy, model=source))
    assert [fault.name for fault in report.damaged] == ["config.json"]


def test_weight_file_that_a_loader_would_prefer_is_a_fault(copy: Path, source: Path) -> None:
    shutil.copy(next(source.glob("*.safetensors")), copy / "model.safetensors")
    (copy / "notes.txt").write_text("mine")
    report = check(copy)
    assert [fault.name for fault in report.faults] == ["model.safetensors"]
    assert report.notes == ("not checked, the manifest does not record them: notes.txt",)


def edit_shards(folder: Path, key: str, value: int) -> None:
    path = folder / "tp2" / "tuckerize.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1][key] = value
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["tp_rank", "layer", "ep_rank", "group"])
@pytest.mark.parametrize("early", [False, True])
def test_shard_manifest_with_another_place_is_a_fault(copy: Path, key: str, early: bool) -> None:
    edit_shards(copy, key, 7)
    path = copy / "tp2" / "tuckerize.json"
    if early:  # as versions without checksums wrote it
        manifest = json.loads(path.read_text())
        del manifest["checksum"]
        path.write_text(json.dumps(manifest))
    faults = check(copy).faults
    assert {fault.name for fault in faults} == {"tp2/tuckerize.json"}
    assert any("rank-00001-of-00002.safetensors to layer" in fault.problem for fault in faults)


def test_check_prints_the_damaged_shard_and_exits_with_1(copy: Path) -> None:
    shards = sorted((copy / "tp2").glob("*.safetensors"))
    shutil.copy(shards[2], shards[0])  # another layer's
    shards[1].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:1000])
    result = run_here("check", copy)
    assert result.returncode == 1
    text = " ".join(result.stdout.split())
    assert f"tp2/{shards[0].name} was changed: its SHA-256 is not the manifest's" in text
    assert f"tp2/{shards[1].name} is missing" in text
    assert f"tp2/{shards[3].name} has another size: 1000 bytes" in text


def test_verify_of_one_process_says_which_shards_it_did_not_look_at(tucker: Path) -> None:
    report = verify(VerifyRequest(folder=tucker))
    assert (report.passed, report.not_verified) == (True, ("tp1", "tp2"))
    last = " ".join(succeed("verify", tucker).split())
    assert "NOT verified: the shards tp1, tp2" in last


def test_verdict_of_a_source_does_not_travel(tucker: Path, tmp_path: Path) -> None:
    verify(VerifyRequest(folder=tucker))
    assert (tucker / "verify.json").exists()
    assert check(tucker).notes == ()
    reconstruct(ReconstructRequest(folder=tucker, output=tmp_path / "dense"))
    assert not (tmp_path / "dense" / "verify.json").exists()
    shutil.copy(tucker / "verify.json", tmp_path / "dense")
    out = tmp_path / "again"
    decompose(DecomposeRequest(model=tmp_path / "dense", rank="full,full,50%", output=out))
    assert not (out / "verify.json").exists()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_check_names_the_damaged_file_of_a_reconstruction(dense: Path, data: st.DataObject) -> None:
    assert check(dense) == CheckReport(str(dense), len(names_of(dense)) - 1, sizes(dense), (), ())
    name = data.draw(st.sampled_from(names_of(dense)))
    before = (dense / name).read_bytes()
    flip(dense / name, data.draw(st.integers(0, 8 * len(before) - 1)))
    try:
        if name == RECONSTRUCTED and same_values(before, (dense / name).read_bytes()):
            return
        report = check(dense)
        faults = [fault.name for fault in report.faults]
        assert name in faults or (name == "README.md" and name in report.notes[0])
    finally:
        (dense / name).write_bytes(before)


@pytest.fixture(scope="module")
def dense(tucker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check") / "dense"
    reconstruct(ReconstructRequest(folder=tucker, output=folder))
    return folder


def sizes(folder: Path) -> int:
    return sum((folder / n).stat().st_size for n in names_of(folder) if n != RECONSTRUCTED)


def test_reconstruction_whose_hashes_were_not_recorded_is_not_passed(
    dense: Path, tmp_path: Path
) -> None:
    early = Path(shutil.copytree(dense, tmp_path / "dense"))
    (early / RECONSTRUCTED).write_text('{"tuckerize_version": "0.1.0"}')
    with pytest.raises(UsageError, match=r"reconstructed by tuckerize 0\.1\.0, which recorded no"):
        check(early)


@pytest.mark.parametrize("name", ["tucker", "data-free", "calibrated"])
def test_checkpoint_of_an_early_version_passes_and_says_what_it_cannot_know(name: str) -> None:
    report = check(GOLDEN / name)
    assert report.passed
    [note] = report.notes
    assert note.startswith("not checked, tuckerize 0.1.0 did not record their hashes: ")
    assert "config.json" in note


def test_check_of_what_is_no_tucker_checkpoint_is_refused(source: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a finished Tucker checkpoint"):
        check(source)


def test_check_imports_no_torch() -> None:
    script = (
        "import sys, tuckerize\n"
        "assert tuckerize.check(sys.argv[1]).passed\n"
        "print(sorted({'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, str(GOLDEN / "tucker")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
