"""Surroundings that are not as they should be: the command works, or says what is missing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability.killing import make_thread_pool
from tests.running import ROOT, files_of, run_here
from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize import DecomposeRequest, decompose
from tuckerize.cli.boundary import USER_ERROR

SIZE = ("--rank", "full,20,24")
NOBODY = 65534


def run_where(
    prepare: Callable[[], object], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run `tuckerize` in a forked child that first changes something of itself."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        answer = ""
        try:
            make_thread_pool()
            prepare()
            ran = run_here(*arguments)
            answer = json.dumps([ran.returncode, ran.stdout, ran.stderr])
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return subprocess.CompletedProcess(arguments, *json.loads(text))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user may enter, with a model and its decomposition."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        model = add_tokenizer(make_tiny_model(Path(name) / "model", shards=True))
        decompose(DecomposeRequest(model=model, rank=SIZE[1], output=Path(name) / "whole"))
        for path in [model, *model.iterdir()]:
            path.chmod(0o755)
        yield Path(name)


def decompose_where(prepare: Callable[[], object], folder: Path, output: Path) -> None:
    command = ("decompose", "--model", folder / "model", *SIZE, "--output", output)
    done = run_where(prepare, *command)
    assert done.returncode == 0, done.stderr
    assert files_of(output) == files_of(folder / "whole")


def test_few_open_files_are_enough(folder: Path, tmp_path: Path) -> None:
    def limit() -> None:
        most = max(int(name) for name in os.listdir("/proc/self/fd")) + 10  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    decompose_where(limit, folder, tmp_path / "out")


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_umask_decides_who_may_read_every_file(umask: int, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose_where(lambda: os.umask(umask), folder, out)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


LIMITED = """
import resource, sys
from pathlib import Path

import torch

from tests.running import run_here

torch.set_num_threads(1)
codes = set()
for mebibytes in (4096, 0, 1, 4, 16, 1024):  # first one without a limit, which imports all
    size = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    done = run_here("decompose", *sys.argv[1:], "--overwrite")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert done.returncode == 0 or "memory" in done.stderr, done.stderr
    codes.add(done.returncode)
print(sorted(codes), done.returncode)
"""


@pytest.mark.kill
def test_memory_that_is_limited_is_enough_or_told_as_that(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: where torch has threads, a fork of it may wait for them for ever."""
    command = ("--model", folder / "model", *SIZE, "--output", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.strip() == f"[0, {USER_ERROR}] 0", done.stderr


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@needs_root
@pytest.mark.parametrize("name", ["model-00001-of-*", "config.json"])
def test_file_that_may_not_be_read_is_named_with_the_cause(
    name: str, folder: Path, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        model = shutil.copytree(folder / "model", Path(place) / "model")
        path = next(model.glob(name))
        path.chmod(0)
        command = ("decompose", "--model", model, *SIZE, "--output", Path(place) / "out")
        done = run_where(lambda: os.setuid(NOBODY), *command)
        assert done.returncode == USER_ERROR
        assert "Permission denied" in done.stderr
        assert path.name in done.stderr
        assert "fetch" not in done.stderr


@needs_root
def test_verify_of_a_folder_that_may_not_be_written_gives_its_report(folder: Path) -> None:
    """All its work is done when the report is written."""
    done = run_where(
        lambda: os.setuid(NOBODY), "verify", folder / "whole", "--model", folder / "model"
    )
    assert done.returncode == 0, done.stderr
    assert "passed: " in done.stdout
    assert "note: the report was not kept: Permission denied" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux has it")
def test_text_that_cannot_be_read_is_named_with_the_fault(folder: Path, tmp_path: Path) -> None:
    """A file that opens, and gives an I/O error when it is read."""
    text = tmp_path / "text.txt"
    text.symlink_to("/proc/self/mem")
    done = run_here("decompose", "--model", folder / "model", "--keep", "0.5", "--output",
                    tmp_path / "out", "--calibration", text)  # fmt: skip
    assert done.returncode == USER_ERROR
    assert "Input/output error" in done.stderr
    assert "text.txt" in done.stderr


def test_locale_without_letters_prints_every_path(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "model", tmp_path / "модель")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tuckerize", "inspect", model],
        capture_output=True,
        env={**os.environ, **locale, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"deepseek_v2" in done.stdout


def test_standard_error_that_is_closed_is_done_without(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("-m", "tuckerize", "decompose", "--model", folder / "model", *SIZE, "--output", out)
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0
    assert files_of(out) == files_of(folder / "whole")
