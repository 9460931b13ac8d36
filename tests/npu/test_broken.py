"""A torch_npu without CANN, which torch and transformers import all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.npu.installing import installed
from tests.running import run
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text

MISSING = "libhccl.so: cannot open shared object file: No such file or directory"
MESSAGE = (
    "error: torch_npu is installed but cannot be loaded, which breaks what imports it: "
    f"{MISSING}\n\nhint: source CANN's set_env.sh first, or uninstall torch_npu"
)
ONE_MORE = (
    ", or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 for commands that run on the CPU without "
    "transformers\n"
)


@pytest.fixture(autouse=True)
def _without_cann(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = f"raise ImportError({MISSING!r})\n"
    monkeypatch.setenv("PYTHONPATH", installed(tmp_path / "path", code=code))


def test_command_says_it_in_a_sentence_with_three_remedies(tmp_path: Path) -> None:
    result = run("shard", tmp_path, "--tp", "2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == MESSAGE + ONE_MORE


def test_doctor_works_without_torch() -> None:
    result = run("doctor", "--json")
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout)
    assert report["device"] is None
    assert report["problems"][-1] == {
        "message": MESSAGE.partition("\n")[0].removeprefix("error: "),
        "hint": (MESSAGE + ONE_MORE).partition("hint: ")[2].strip(),
    }


def test_command_without_autoload_works_where_transformers_is_not_needed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    size = ("--rank", "full,full,16", "--output", tmp_path / "out")
    result = run("decompose", "--model", tiny_model, *size)
    assert result.returncode == 0, result.stderr
    result = run("decompose", "--model", tiny_model, *size, "--overwrite", "--device", "npu")
    assert (result.returncode, result.stderr) == (2, f"{MESSAGE}\n")


def test_calibration_without_autoload_fails_in_transformers_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    model = add_tokenizer(make_tiny_model(tmp_path / "model"))
    text = write_text(tmp_path / "text.txt", 1000)
    options = ("--keep", "0.7", "--calibration", text, "--output", tmp_path / "out")
    result = run("decompose", "--model", model, *options)
    assert (result.returncode, result.stderr) == (2, f"{MESSAGE}\n")
