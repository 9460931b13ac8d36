"""One of several processes is killed: the others end, and the same command continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.distributed.calibrated_runs import same
from tests.running import ROOT, files_of, succeed
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.healing.result import LOG

TRIALS = int(os.environ.get("RELIABILITY_TORCHRUN_TRIALS", "5"))
PROCESSES = 2
SECONDS = 240

pytestmark = [pytest.mark.kill, pytest.mark.timeout(3600)]


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    options = ("--standalone", "--nproc-per-node", str(PROCESSES), "-m", "tuckerize")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)],
        stdout=subprocess.DEVNULL,  # errors are shown by pytest where a test fails
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def workers_of(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    commands = {int(c): Path(f"/proc/{c}/cmdline").read_bytes() for c in children}
    return [child for child, command in commands.items() if b"tuckerize" in command]


def until_both_run(agent: subprocess.Popen[bytes]) -> list[int]:
    while len(workers := workers_of(agent.pid)) < PROCESSES:
        assert agent.poll() is None
        time.sleep(0.05)
    return workers


def killed_trials(*arguments: str | Path) -> Iterator[bool]:
    """Run a command several times and kill one process; yields whether the run was ended by it."""
    started = time.monotonic()
    whole = start(*arguments)
    until_both_run(whole)
    before = time.monotonic()
    assert whole.wait(SECONDS) == 0
    seconds = time.monotonic() - before
    random = Random(len(arguments))
    yield False
    for trial in range(TRIALS):
        run = start(*arguments)
        workers = until_both_run(run)
        time.sleep(seconds * (0.4 + 0.6 * random.random()))  # the first part is imports
        chosen = workers[trial % PROCESSES]
        if Path(f"/proc/{chosen}").exists():
            os.kill(chosen, signal.SIGKILL)
        code = run.wait(SECONDS)
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
        yield code != 0
    print(f"{arguments[0]}: {TRIALS} kills in {time.monotonic() - started:.0f} s")  # noqa: T201


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("kill") / "model", shards=True)


def continues_to_identical_bytes(out: Path, timed: set[str], *command: str | Path) -> None:
    """Kill a command that writes a folder, and start it again; some of its files have times."""

    def files() -> dict[str, bytes]:
        return {name: file for name, file in files_of(out).items() if name not in timed}

    ended, whole = 0, dict[str, bytes]()
    for was_ended in killed_trials(*command):
        if was_ended:
            ended += 1
            assert not (out / MANIFEST).exists() or files() == whole
            if files() != whole:  # else it was killed when all was done
                assert start(*command).wait(SECONDS) == 0
        whole = whole or files()
        assert files() == whole
        shutil.rmtree(out)
    assert ended


def test_decompose_continues_to_identical_bytes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("decompose", "--model", model, "--rank", "full,full,50%", "--output", out)
    continues_to_identical_bytes(out, set(), *command)


def test_calibrated_decompose_is_continued_by_one_process(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tokenizer(model)
    text = write_text(tmp_path / "text.txt", 9000)
    out, cache, whole = (tmp_path / name for name in ("out", "cache", "whole"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    options = ("--calibration", text, "--calibration-tokens", "8192", "--refine", "20")
    command = ("decompose", "--model", model, "--keep", "0.6", "--output", out, *options)
    ended = 0
    for was_ended in killed_trials(*command):
        if was_ended:
            ended += 1
            if not (out / MANIFEST).exists():
                succeed(*command)
        if not whole.exists():
            shutil.copytree(out, whole)
        same(out, whole)
        shutil.rmtree(out)
        shutil.rmtree(cache)  # the profile is interrupted as well
    assert ended


@pytest.mark.parametrize("spread", ["--tp=2", "--fsdp"])
def test_heal_continues_to_identical_bytes(model: Path, tmp_path: Path, spread: str) -> None:
    from tuckerize import DecomposeRequest, ShardRequest, decompose, shard

    add_tokenizer(model)
    out, healed = tmp_path / "out", tmp_path / "healed"
    decompose(DecomposeRequest(model=model, rank="full,full,50%", output=out))
    shard(ShardRequest(folder=out, tp=PROCESSES, layout="intermediate"))
    text = write_text(tmp_path / "text.txt", 9000)
    command = ("heal", out, "--data", text, "--output", healed, "--teacher", model, spread)
    sizes = ("--tokens", "6400", "--window", "16", "--batch", "4")
    continues_to_identical_bytes(healed, {LOG, MANIFEST}, *command, *sizes)


def test_verify_ends_without_a_verdict_and_passes_again(model: Path, tmp_path: Path) -> None:
    from tuckerize import DecomposeRequest, ShardRequest, decompose, shard

    out = tmp_path / "out"
    decompose(DecomposeRequest(model=model, rank="full,full,50%", output=out))
    shard(ShardRequest(folder=out, tp=PROCESSES))
    before = files_of(out)
    report = out / "tp2" / "verify.json"
    ended = 0
    for was_ended in killed_trials("verify", out, "--tokens", "20000"):
        ended += was_ended
        assert report.exists() or was_ended
        report.unlink(missing_ok=True)
        assert files_of(out) == before
    assert ended
