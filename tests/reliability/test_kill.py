"""Kills and faults at every boundary: the same command continues to identical bytes.

`make test-kill` runs all of it; `make test` a few points of each command. RELIABILITY_POINTS is the
largest number of points of a command, evenly spread over its boundaries.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.reliability.killing import in_child
from tests.running import files_of
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.cli.boundary import USER_ERROR
from tuckerize.healing.result import LOG

# Imported once by the parent, rather than by each of its children.
for module in (
    "tuckerize.pipeline.decompose",
    "tuckerize.pipeline.heal",
    "tuckerize.pipeline.quantize",
    "tuckerize.pipeline.reconstruct",
    "tuckerize.pipeline.shard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.deepseek_v2.modeling_deepseek_v2",
):
    importlib.import_module(module)

POINTS = int(os.environ.get("RELIABILITY_POINTS", "200"))
RANDOM = 12
FAULTS = (errno.ENOSPC, errno.EIO, errno.EACCES)
COMMANDS = ["data-free", "calibrated", "overwrite", "shard", "reconstruct", "quantize", "heal"]


def command_of(name: str, root: Path) -> Callable[[], object]:
    """The command, on the folders of a root."""

    def decompose(**options: Any) -> None:  # noqa: ANN401
        from tuckerize import DecomposeRequest
        from tuckerize import decompose as run
        from tuckerize.calibration import tokens

        tokens.HELD_OUT_BLOCK = 64  # some are left for validation
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        run(DecomposeRequest(model=root / "model", output=root / "out", **options))

    def act() -> None:
        from tuckerize import (
            HealRequest,
            QuantizeRequest,
            ReconstructRequest,
            ShardRequest,
            heal,
            quantize,
            reconstruct,
            shard,
        )

        if name in {"data-free", "tucker"}:
            decompose(rank="full,full,50%", layers="1")
        elif name == "calibrated":
            settings = {"texts": [str(root / "text.txt")], "tokens": 1024, "refine": 2}
            decompose(keep=0.6, calibration={**settings, "window": 64})
        elif name == "overwrite":
            decompose(rank="full,full,25%", overwrite=True)
        elif name == "shard":
            shard(ShardRequest(folder=root / "out", tp=2))
        elif name == "quantize":
            quantize(QuantizeRequest(folder=root / "out", output=root / "w4", cores="w4"))
        elif name == "heal":
            sizes: dict[str, Any] = {"tokens": 768, "window": 32, "batch": 8}
            data, output = root / "text.txt", root / "healed"
            heal(HealRequest(folder=root / "out", data=data, output=output, **sizes))
        else:
            reconstruct(ReconstructRequest(folder=root / "out", output=root / "dense"))

    return act


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders in the state before a command."""
    base = tmp_path_factory.mktemp("kill")

    def make() -> None:
        from tests.tiny_models import add_tokenizer, make_tiny_model, write_text

        folder = base / "new" / "model"
        add_tokenizer(make_tiny_model(folder, shards=True, experts=4, intermediate=16))
        write_text(base / "new" / "text.txt", 1000)

    assert in_child(make, base)[0] == 0
    shutil.copytree(base / "new", base / "done")
    assert in_child(command_of("tucker", base / "done"), base)[0] == 0
    return lambda name: base / ("new" if name in {"data-free", "calibrated"} else "done")


class Campaign:
    """Kills of one command, each on folders of its own."""

    def __init__(self, name: str, state: Path, folder: Path) -> None:
        self.name, self.state, self.folder = name, state, folder
        root = self._fresh()
        started = time.monotonic()
        code, self.boundaries = in_child(command_of(name, root), root)
        assert code == 0
        self.seconds = time.monotonic() - started
        self.whole = self._files(root)
        self.reads = in_child(command_of(name, self._fresh()), root, reads=True)[1]

    def _fresh(self) -> Path:
        """The folders before the command, always under the same path: results name the source."""
        root = self.folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.state, root)
        return root

    def _files(self, root: Path) -> dict[str, bytes]:
        """All files; without the log of training, whose lines have seconds, and the hash of it."""
        timed = {f"healed/{LOG}", f"healed/{MANIFEST}"}
        return {name: file for name, file in files_of(root).items() if name not in timed}

    def kill(self, **how: Any) -> None:  # noqa: ANN401
        """Kill the command, start it again, and compare every file."""
        root = self._fresh()
        source = files_of(root / "model")
        code, _ = in_child(command_of(self.name, root), root, **how)
        if "error" in how:
            assert code in (0, USER_ERROR), how  # told, or done without
        if code != 0:
            assert in_child(command_of(self.name, root), root)[0] == 0, how
        found, whole = self._files(root), self.whole
        if "error" in how:  # a cache that cannot be written or read is done without
            found, whole = (
                {n: f for n, f in files.items() if not n.startswith("cache")}
                for files in (found, whole)
            )
        assert found.keys() == whole.keys(), how
        assert found == whole, how
        assert files_of(root / "model") == source

    @staticmethod
    def points(most: int, boundaries: int) -> list[int]:
        """Boundaries, evenly spread, with the first and the last."""
        count, last = min(most, boundaries), boundaries - 1
        return sorted({1 + place * last // max(1, count - 1) for place in range(count)})


@pytest.mark.parametrize("name", COMMANDS)
def test_command_killed_at_a_few_boundaries_continues(
    name: str, prepared: Callable[[str], Path], tmp_path: Path
) -> None:
    campaign = Campaign(name, prepared(name), tmp_path)
    for point in campaign.points(4, campaign.boundaries):
        campaign.kill(at=point)


@pytest.mark.parametrize("name", ["overwrite"])
def test_command_that_meets_a_few_faults_tells_them_and_continues(
    name: str, prepared: Callable[[str], Path], tmp_path: Path
) -> None:
    campaign = Campaign(name, prepared(name), tmp_path)
    for point, error in zip(campaign.points(3, campaign.boundaries), FAULTS, strict=True):
        campaign.kill(at=point, error=error)
    for point in campaign.points(2, campaign.reads):
        campaign.kill(at=point, error=errno.EIO, reads=True)


@pytest.mark.kill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_command_that_meets_any_fault_tells_it_and_continues_to_identical_bytes(
    name: str, prepared: Callable[[str], Path], tmp_path: Path
) -> None:
    campaign = Campaign(name, prepared(name), tmp_path)
    most = max(1, POINTS // 2)
    writing, reading = (campaign.points(most, n) for n in (campaign.boundaries, campaign.reads))
    for number, point in enumerate(writing):
        campaign.kill(at=point, error=FAULTS[number % len(FAULTS)])
    for point in reading:
        campaign.kill(at=point, error=errno.EIO, reads=True)
    print(  # noqa: T201
        f"{name}: {len(writing)} of {campaign.boundaries} faults of writing, "
        f"{len(reading)} of {campaign.reads} of reading"
    )


@pytest.mark.kill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_command_killed_anywhere_continues_to_identical_bytes(
    name: str, prepared: Callable[[str], Path], tmp_path: Path
) -> None:
    campaign = Campaign(name, prepared(name), tmp_path)
    points = campaign.points(POINTS, campaign.boundaries)
    for point in points:
        campaign.kill(at=point)
    random = Random(0)
    for number in range(RANDOM):
        chosen = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[number % 3]

        def stop(child: int, seconds: float, chosen: signal.Signals = chosen) -> None:
            time.sleep(seconds)
            os.kill(child, chosen)

        seconds = random.random() * campaign.seconds
        campaign.kill(while_it_runs=lambda child, own=seconds, act=stop: act(child, own))
    print(f"{name}: {len(points)} of {campaign.boundaries} boundaries, {RANDOM} random moments")  # noqa: T201
