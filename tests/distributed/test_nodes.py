"""Two nodes: two torchruns, each with one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.calibrated_runs import same
from tests.running import files_of, run, succeed, torchrun_on_two_nodes
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text

SIZE = ("--rank", "6,16,24", "--max-sweeps", "2", "--output")


@pytest.mark.long
def test_decompose_on_two_nodes_writes_the_bytes_of_one(tiny_model: Path, tmp_path: Path) -> None:
    command = ("decompose", "--model", tiny_model, *SIZE)
    first, second = torchrun_on_two_nodes(
        (tmp_path, tmp_path), "-m", "tuckerize", *command, tmp_path / "two"
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "relative residual" in first.stdout
    assert second.stdout == ""
    # In a process of its own, which loads the libraries as torchrun's do.
    assert run(*command, tmp_path / "one").returncode == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_calibrated_decompose_on_two_nodes_is_that_of_one_process(tmp_path: Path) -> None:
    """Without a validation set: nothing is gathered of it."""
    model = add_tokenizer(make_tiny_model(tmp_path / "model", experts=6, dtype=torch.float32))
    text = write_text(tmp_path / "text.txt", 1100)
    command: list[str | Path] = ["decompose", "--model", model, "--calibration", text]
    command += ["--calibration-tokens", "1024", "--keep", "0.5", "--output"]
    first, second = torchrun_on_two_nodes(
        (tmp_path, tmp_path), "-m", "tuckerize", *command, tmp_path / "two"
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    succeed(*command, tmp_path / "one")
    same(tmp_path / "two", tmp_path / "one")


def test_verify_shards_that_only_one_node_sees_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    succeed("decompose", "--model", tiny_model, *SIZE, tmp_path / "out")
    succeed("shard", tmp_path / "out", "--tp", "2")
    (tmp_path / "elsewhere").mkdir()
    folders = (tmp_path, tmp_path / "elsewhere")
    first, second = torchrun_on_two_nodes(folders, "-m", "tuckerize", "verify", "out")
    assert second.returncode != 0
    assert f"in {tmp_path / 'elsewhere'}: there is no folder out" in second.stderr
    assert "must be on storage that all nodes see under the same path" in second.stderr
    assert first.returncode != 0
    assert "error: another process of the run has ended" in first.stderr
