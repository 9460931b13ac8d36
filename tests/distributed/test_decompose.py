"""decompose under torchrun, interrupted, killed: always the same bytes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from tests.running import files_of, run, run_here, start, torchrun
from tests.tiny_models import make_tiny_model
from tuckerize.format.manifest import read_tucker_manifest


def succeed(*arguments: str | Path) -> None:
    """Run `tuckerize` in a process of its own, which loads the libraries as torchrun's do."""
    result = run(*arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_decompose_with_processes_writes_the_bytes_of_one(processes: int, tmp_path: Path) -> None:
    # In float32 and in these sizes products of one thread and of two differ in their last bits.
    model = make_tiny_model(
        tmp_path / "model", experts=16, intermediate=90, hidden=136, dtype=torch.float32
    )
    sizes = ("--rank", "10,50,90", "--joint", "gate_up", "--max-sweeps", "3")
    options = ("decompose", "--model", model, *sizes)
    succeed(*options, "--output", tmp_path / "one")
    result = torchrun(processes, "-m", "tuckerize", *options, "--output", tmp_path / "many")
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_decompose_with_processes_bad_option_is_reported_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    result = torchrun(
        2, "-m", "tuckerize", "decompose", "--model", tiny_model, "--rank", "99,1,1",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode != 0
    before, _, box = result.stderr.partition("Root Cause")
    assert before.count("error: core size 99 of the expert mode (E)") == 1
    assert box.count("error: core size 99 of the expert mode (E)") == 1
    assert not (tmp_path / "out").exists()


def test_several_calls_by_the_same_processes_do_all_their_work(
    tiny_model: Path, tmp_path: Path
) -> None:
    result = torchrun(2, "-m", "tests.distributed.several_calls", tiny_model, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused: these processes have a process group already") == 2
    for rank in ("4,16,16", "2,8,8"):
        assert len(read_tucker_manifest(tmp_path / rank).layers) == 2


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_decompose_stopped_anywhere_continues_to_identical_bytes(
    how: signal.Signals, tmp_path: Path
) -> None:
    model = make_tiny_model(
        tmp_path / "model", experts=16, intermediate=96, hidden=128, layers=5, shards=True
    )
    options = ("decompose", "--model", model, "--rank", "12,64,96", "--max-sweeps", "1")
    succeed(*options, "--output", tmp_path / "whole")
    for _ in range(3):
        before = _records(tmp_path / "stopped")
        process = start(*options, "--output", tmp_path / "stopped")
        while process.poll() is None and _records(tmp_path / "stopped") <= max(before, 1):
            time.sleep(0.005)
        process.send_signal(how)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -how), stderr
        # What vLLM and transformers look for is not there before the end.
        assert not (tmp_path / "stopped" / "model.safetensors.index.json").exists()
        assert _records(tmp_path / "stopped") > before
    succeed(*options, "--output", tmp_path / "stopped")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def _records(folder: Path) -> int:
    return len(list(folder.glob(".tuckerize/*.json")))


def test_decompose_stopped_then_other_options_is_refused_and_keeps_the_state(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeed("decompose", "--model", tiny_model, "--keep", "0.7", "--output", out)
    (out / ".tuckerize").mkdir()
    (out / ".tuckerize" / "plan.json").write_text('{"recipe": "another"}')
    (out / "tuckerize.json").unlink()
    before = files_of(out)
    result = run_here("decompose", "--model", tiny_model, "--keep", "0.6", "--output", out)
    assert result.returncode == 2
    assert "already holds another unfinished run" in result.stderr
    assert files_of(out) == before
