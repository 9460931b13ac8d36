from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from tuckerize import ShardRequest, shard
from tuckerize.format.shards import find_sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.processes import Processes
from tuckerize.pipeline.verify.verification import Verification, verify_layers
from tuckerize.progress import SilentProgress

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"

_opened: Counter[str] = Counter()
_watching: list[bool] = []


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event == "open":
        _opened[str(arguments[0])] += 1


@pytest.fixture
def opened() -> Iterator[Counter[str]]:
    """How often every file was opened, from here on."""
    sys.addaudithook(_count)  # stays, and does nothing after the test
    _opened.clear()
    _watching.append(True)
    yield _opened
    _watching.clear()


@pytest.fixture
def alone() -> Iterator[Processes]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Processes()
    dist.destroy_process_group()


def test_verify_opens_and_hashes_manifests_once_for_all_layers(
    alone: Processes, opened: Counter[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "data-free", tmp_path / "data-free"))
    shard(ShardRequest(folder=folder, tp=1))
    opened.clear()
    tucker = TuckerCheckpoint.open(folder)
    sharding = find_sharding(tucker, 1, tp=1, ep=1, cp=1)
    run = Verification(tucker, sharding, None, alone, torch.device("cpu"), tokens=16)
    report = verify_layers(run, layers=(1, 2), max_output_error=None, progress=SilentProgress())
    assert report.passed
    assert [layer.layer for layer in report.layers] == [1, 2]
    manifests = {path: count for path, count in opened.items() if path.endswith("tuckerize.json")}
    assert manifests == {
        str(folder / "tuckerize.json"): 2,  # parsed and hashed
        str(folder / "tp1" / "tuckerize.json"): 1,
    }
    assert opened[str(folder / "config.json")] == 1
