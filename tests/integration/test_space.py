"""A disk that is too small is told before the work; one that ends in its middle is told as that."""

from __future__ import annotations

import importlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running import files_of, succeed
from tests.running import run_here as run
from tuckerize.checkpoint.space import require_space
from tuckerize.errors import OutputError
from tuckerize.parallel import memory
from tuckerize.parallel.memory import available_bytes

Mount = Callable[[int], Path]
SIZE = ("--rank", "full,20,24")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a disk of some bytes, or gives the one that is mounted another size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(count: int) -> Path:
        how = ["-o", f"remount,size={count}"] if disk.is_mount() else ["-o", f"size={count}"]
        command = ["mount", "-t", "tmpfs", *how, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount")
        return disk

    yield sized
    subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def test_more_than_the_disk_has_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=r"needs 1152921504\.6 GB more, and its disk has"
    ) as caught:
        require_space(tmp_path / "new" / "folder", 2**60)
    assert "choose an --output on another disk" in caught.value.hint
    require_space(tmp_path, 1)


def test_commands_name_the_space_that_they_need_and_continue_when_it_is_there(
    mount: Mount, tiny_model: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "out"
    succeed("decompose", "--model", tiny_model, *SIZE, "--output", whole)
    disk = mount(40_960)
    commands = [
        ("decompose", "--model", tiny_model, *SIZE, "--output", disk / "out"),
        ("shard", disk / "out", "--tp", "2"),
        ("reconstruct", disk / "out", "--output", disk / "dense"),
    ]
    for command in commands:
        mount(shutil.disk_usage(disk).used + 40_960)
        refused = run(*command)
        assert refused.returncode == 2, refused.stderr
        assert "0.1 MB more, and its disk has 0.0 MB" in refused.stderr
        mount(8 * 2**20)
        succeed(*command)
    assert files_of(whole).items() <= files_of(disk / "out").items()


def test_limit_on_file_sizes_ends_a_run_that_continues_without_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    command = ("decompose", "--model", tiny_model, *SIZE, "--output")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        refused = run(*command, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.returncode == 2, refused.stderr
    assert "error: File too large (" in refused.stderr
    assert "ulimit -f" in refused.stderr
    for output in (tmp_path / "out", tmp_path / "undisturbed"):
        succeed(*command, output)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("command", ["quantize", "reconstruct", "verify", "evaluate", "heal"])
def test_commands_refuse_with_the_figure_what_memory_cannot_hold(
    command: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    succeed("decompose", "--model", model, "--rank", "full,full,50%", "--output", out)
    words: dict[str, tuple[str | Path, ...]] = {
        "quantize": (out, "--output", new),
        "reconstruct": (out, "--output", new),
        "verify": (out, "--model", model),
        "evaluate": (out, "--text", text, "--tokens", "512", "--window", "64"),
        "heal": (out, "--data", text, "--teacher", model, "--output", new, "--tokens", "512",
                 "--window", "32", "--batch", "4"),
    }  # fmt: skip
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    refused = run(command, *words[command])
    assert refused.returncode == 2, refused.stderr
    assert "error: a process holds at least" in refused.stderr
    assert "GiB of memory are free for it" in " ".join(refused.stderr.split())
    assert not new.exists()
    monkeypatch.undo()
    succeed(command, *words[command])


def test_memory_that_does_not_suffice_is_told_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of a control group, as in a container."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 8000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "memory.current").write_text("0\n")
    command = importlib.import_module("tuckerize.pipeline.memory")
    monkeypatch.setattr(command, "available_bytes", lambda: available_bytes(tmp_path))
    out = tmp_path / "out"
    for limit, code in ((1000, 2), (2**30, 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        done = run("decompose", "--model", model, "--rank", "full,full,50%", "--output", out)
        assert done.returncode == code, done.stderr
        assert (code == 0) == (out / "tuckerize.json").exists()
        assert code == 0 or "GiB of memory are free for it" in " ".join(done.stderr.split())


def test_memory_that_a_process_may_take_is_a_choice(model: Path, tmp_path: Path) -> None:
    words = ("decompose", "--model", model, "--rank", "full,full,50%", "--output", tmp_path / "out")
    for size, told in (
        ("400MB", "0.0 GiB of memory are free for it"),
        ("plenty", "--max-memory 'plenty' is not an amount of memory"),
    ):
        refused = run(*words, "--max-memory", size)
        assert refused.returncode == 2
        assert told in " ".join(refused.stderr.split())
        assert not (tmp_path / "out" / "tuckerize.json").exists()
    succeed(*words, "--max-memory", "1.5GiB")
