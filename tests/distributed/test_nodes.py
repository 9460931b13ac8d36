"""Two nodes: two torchruns, each with one process."""

from __future__ import annotations

from pathlib import Path

from tests.running import files_of, run, succeed, torchrun_on_two_nodes

SIZE = ("--rank", "6,16,24", "--max-sweeps", "2", "--output")


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
