"""More of the program on a stand-in for an NPU: `make test-npu`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import run, run_module, succeed, torchrun, torchrun_on_two_nodes
from tests.tiny_models import add_tokenizer, make_tiny_family, make_tiny_model, write_text

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]

ON_NPU = ("--device", "npu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 9000)


@pytest.fixture(scope="module", params=["deepseek_v2", "olmoe", "qwen3_moe"])
def calibrated(
    request: pytest.FixtureRequest,
    text: Path,
    standin_path: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Path]]:
    """A dense model, and what decompose makes of it with a text, on the device."""
    folder = tmp_path_factory.mktemp(request.param)
    model = add_tokenizer(make_tiny_family(folder / "model", request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", standin_path)
        patch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        size = ("--keep", "0.6", "--multiple", "2", "--refine", "5", "--calibration", text)
        tokens = ("--calibration-tokens", "8192", "--output", folder / "out")
        result = run("decompose", "--model", model, *size, *tokens, *ON_NPU)
        assert result.returncode == 0, result.stderr
        yield model, folder / "out"


def test_calibrated_checkpoint_of_the_device_verifies_and_predicts(
    calibrated: tuple[Path, Path], text: Path
) -> None:
    model, out = calibrated
    result = run("verify", out, *ON_NPU, "--json")
    assert result.returncode == 0, result.stderr
    options = ("--text", text, "--against", model, "--tokens", "1024", "--window", "64", "--json")
    on_npu = run("evaluate", out, *options, *ON_NPU)
    assert on_npu.returncode == 0, on_npu.stderr
    on_cpu = json.loads(succeed("evaluate", out, *options, "--device", "cpu"))["results"]
    for found, expected in zip(json.loads(on_npu.stdout)["results"], on_cpu, strict=True):
        assert found["nats"] == pytest.approx(expected["nats"], rel=1e-4)
    generate = ("generate", out, "--prompt", "3 4 5 6", "--tokens", "8")
    result = run(*generate, *ON_NPU)
    assert result.returncode == 0, result.stderr
    assert result.stdout == succeed(*generate, "--device", "cpu")


@pytest.mark.parametrize("layout", ["intermediate", "rank"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_verify_on_devices(layout: str, processes: int, tiny_model: Path, tmp_path: Path) -> None:
    size = ("--rank", "6,18,26", "--group-size", "8", "--output", tmp_path / "out")
    result = torchrun(
        processes, "-m", "tuckerize", "decompose", "--model", tiny_model, *size, *ON_NPU
    )
    assert result.returncode == 0, result.stderr
    succeed("shard", tmp_path / "out", "--tp", str(processes), "--layout", layout)
    result = torchrun(processes, "-m", "tuckerize", "verify", tmp_path / "out", *ON_NPU, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["passed"], report["device"], report["layout"]) == (True, "npu", layout)
    assert "warm-up, in which the device compiles its kernels" in result.stderr


def test_decompose_and_verify_on_two_nodes(tiny_model: Path, tmp_path: Path) -> None:
    nodes = (tmp_path, tmp_path)
    size = ("--rank", "6,18,26", "--output", "out")
    decompose = ("-m", "tuckerize", "decompose", "--model", tiny_model, *size, *ON_NPU)
    both = torchrun_on_two_nodes(nodes, *decompose)
    assert [result.returncode for result in both] == [0, 0], both[0].stderr + both[1].stderr
    succeed("shard", tmp_path / "out", "--tp", "2", "--layout", "rank")
    both = torchrun_on_two_nodes(nodes, "-m", "tuckerize", "verify", "out", *ON_NPU)
    assert [result.returncode for result in both] == [0, 0], both[0].stderr + both[1].stderr
    assert "passed: out (tp 2, rank, npu" in both[0].stdout
    assert both[1].stdout == ""


def test_more_processes_than_devices_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPU_STANDIN_DEVICES", "1")
    size = ("--rank", "full,full,16", "--output", tmp_path / "out")
    command = ("-m", "tuckerize", "decompose", "--model", tiny_model, *size, *ON_NPU)
    result = torchrun(2, *command)
    assert result.returncode != 0
    assert "process 1 of this host has no npu device: there are 1" in result.stderr


def test_auto_takes_the_device_and_doctor_describes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "cann" / "ascend_toolkit_install.info"
    information.parent.mkdir()
    information.write_text("version=9.1.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["device"] == {
        "kind": "npu",
        "count": 8,
        "name": "Ascend910B3",
        "backend": "cpu:gloo,npu:hccl",
        "float32_products": "float32",
        "free_bytes": 60 * 2**30,
        "total_bytes": 64 * 2**30,
        "generation": "A2",
    }
    model = make_tiny_model(tmp_path / "model")
    succeed("decompose", "--model", model, "--keep", "0.7", "--output", tmp_path / "out")
    result = run("verify", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["device"] == "npu", result.stderr


@pytest.mark.parametrize("processes", [2, 4])
def test_fused_pair_gives_the_naive_sum(processes: int) -> None:
    result = torchrun(processes, Path(__file__).parent / "scripts" / "fused_pair.py")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    # Results are rounded to bfloat16, by 2^-9 at most.
    assert all(0 < error < 2**-8 for error in found["errors"].values()), found
    assert "belongs to the fused operators" in found["refused"]


@pytest.mark.parametrize(("processes", "tp"), [(2, 1), (4, 1), (4, 2)])
def test_layers_with_the_fused_pair_give_what_the_plain_collectives_give(
    processes: int, tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TP", str(tp))
    result = torchrun(processes, Path(__file__).parent / "scripts" / "fused_layer.py")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    for found in (case for own in report["found"] for case in own.values()):
        # Either is rounded to bfloat16 in some places; sums of the pair in fewer.
        assert 0 < found["fused"]["error"] < 1.5 * found["plain"]["error"] < 0.02, found
        assert found["plain"]["waits"] > 0
    called, refused = report["called"]
    assert called == "inference"
    assert "tokens for the fused dispatch, expected 1 to" in refused
    for name, found in report["found"][0].items():
        waits = [own[name]["fused"]["waits"] for own in report["found"]]
        assert waits == [0] * processes
        sent = [own[name]["fused"]["sent"] for own in report["found"]]
        assert sum(sent) / processes == pytest.approx(found["predicted"])


@pytest.mark.parametrize(
    ("options", "dispatch", "unmet"),
    [
        (("--dtype", "bfloat16"), "fused", None),
        ((), "plain", "dtype is torch.float32, allowed float16 or bfloat16"),
        (
            ("--dtype", "bfloat16", "--tokens", "514"),
            "plain",
            "tokens per process is 257, allowed 1 to 256",
        ),
    ],
)
def test_verify_uses_the_fused_pair_where_its_constraints_hold_and_says_what_does_not(
    options: tuple[str, ...], dispatch: str, unmet: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    size = ("--rank", "full,full,26", "--joint", "gate_up", "--output", tmp_path / "out")
    succeed("decompose", "--model", tiny_model, *size, "--device", "cpu")
    succeed("shard", tmp_path / "out", "--tp", "1", "--ep", "2")
    verify = ("-m", "tuckerize", "verify", tmp_path / "out", "--tp", "1", "--ep", "2")
    result = torchrun(2, *verify, *options, *ON_NPU, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["dispatch"], report["fused_unmet"]) == (dispatch, unmet)
    (traffic,) = report["traffic"]
    assert traffic["counted"] == pytest.approx(traffic["predicted"])


def test_forward_does_not_wait_for_the_host_and_is_exact() -> None:
    result = run_module("tests.npu.scripts.strict_forward")
    assert result.returncode == 0, result.stderr
    cases = json.loads(result.stdout)
    assert {name: case["waits"] for name, case in cases.items()} == {
        "all modes": {},
        "hidden mode": {},
        "unequal widths": {},
    }
    assert all(0 < case["output"] < 1e-5 for case in cases.values()), cases
    assert all(0 < case["gradients"] < 1e-5 for case in cases.values()), cases
