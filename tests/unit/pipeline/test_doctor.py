from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tuckerize.cli.app import app
from tuckerize.pipeline.doctor import device_problems, variable_problems, version_problems
from tuckerize.report.machine import DeviceFacts

NPU = DeviceFacts("npu", 8, "Ascend910B3", "cpu:gloo,npu:hccl", "float32", 60, 64)


@pytest.fixture
def _no_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "HCCL_BUFFSIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("torch_version", "torch_npu", "cann", "messages"),
    [
        ("2.9.0", "2.9.0.post2", "9.0.0", []),
        ("2.9.0+cpu", "2.9.0.post2", "9.0.0", []),
        ("2.13.0", None, None, []),
        ("2.13.0", "2.13.0", "9.2.0", []),  # in no row that is known
        (None, None, None, ["torch is not installed"]),
        ("2.13.0", None, "9.1.0", ["CANN 9.1.0 is installed, but torch_npu is not"]),
        (
            "2.13.0",
            "2.9.0.post2",
            "9.0.0",
            ["torch_npu 2.9.0.post2 does not match torch 2.13.0: minor versions must be equal"],
        ),
        (
            "2.9.0",
            "2.9.0.post2",
            "8.5.0",
            ["torch_npu 2.9.0.post2 is for CANN 9.0.0, found 8.5.0"],
        ),
        (
            "2.9.0",
            "2.9.0",
            None,
            [
                "torch_npu is installed, but neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME "
                "points to CANN"
            ],
        ),
    ],
)
def test_version_problems(
    torch_version: str | None, torch_npu: str | None, cann: str | None, messages: list[str]
) -> None:
    versions = {"torch": torch_version, "torch_npu": torch_npu, "CANN": cann}
    assert [problem.message for problem in version_problems(versions)] == messages


def test_version_problem_of_cann_names_the_releases_that_fit_it() -> None:
    versions = {"torch": "2.9.0", "torch_npu": "2.9.0.post2", "CANN": "8.3.RC1"}
    (problem,) = version_problems(versions)
    assert problem.hint.endswith("for your CANN: 2.8.0, 2.7.1, 2.6.0.post3, 2.1.0.post17")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HCCL_BUFFSIZE", "0", "megabytes, at least 1"),
        ("HCCL_BUFFSIZE", "200M", "megabytes, at least 1"),
        ("HCCL_CONNECT_TIMEOUT", "7201", "seconds, 120 to 7200"),
        ("HCCL_CONNECT_TIMEOUT", "119", "seconds, 120 to 7200"),
        ("HCCL_EXEC_TIMEOUT", "-1", "seconds, 0 for no limit"),
        ("HCCL_DETERMINISTIC", "yes", "true, false or strict"),
    ],
)
def test_variable_that_is_not_understood(name: str, value: str, expected: str) -> None:
    (problem,) = variable_problems({name: value})
    assert problem.message == f"{name} is '{value}', expected {expected}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HCCL_BUFFSIZE", "1"),
        ("HCCL_CONNECT_TIMEOUT", "7200"),
        ("HCCL_EXEC_TIMEOUT", "0"),
        ("HCCL_DETERMINISTIC", "STRICT"),
        ("HCCL_SOMETHING", "else"),
    ],
)
def test_variable_that_is_understood(name: str, value: str) -> None:
    assert list(variable_problems({name: value})) == []


def test_device_problems() -> None:
    assert list(device_problems(NPU, npu_expected=True)) == []
    cpu = replace(NPU, kind="cpu", name="x86_64")
    assert list(device_problems(cpu, npu_expected=False)) == []
    (unseen,) = device_problems(cpu, npu_expected=True)
    assert unseen.message == "torch_npu is installed, but torch finds cpu only"
    (coarse,) = device_problems(replace(NPU, float32_products="hf32"), npu_expected=True)
    assert "multiplies float32 matrices in hf32" in coarse.message


@pytest.mark.usefixtures("_no_npu")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_doctor_finds_nothing_wrong_with_a_cpu() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["passed"], report["problems"]) == (True, [])
    assert (report["device"]["kind"], report["device"]["backend"]) == ("cpu", "gloo")
    assert 0 < report["device"]["free_bytes"] < report["device"]["total_bytes"]
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.usefixtures("_no_npu")
def test_doctor_reads_the_version_of_cann_and_exits_1_where_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    information.parent.mkdir()
    information.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V1\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setenv("HCCL_BUFFSIZE", "much")
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "wrong: HCCL_BUFFSIZE is 'much', expected megabytes, at least 1" in result.stdout
    assert "8.5.0" in result.stdout
    assert "nothing is wrong" not in result.stdout
