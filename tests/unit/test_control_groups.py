from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuckerize.cli import boundary
from tuckerize.control_groups import usable_cores

CORES = {*range(64)}


def written(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.fixture(autouse=True)
def wide_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: CORES, raising=False)


def test_without_a_quota_all_cores_that_it_may_run_on(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none") == 64
    unlimited = {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "max 100000"}
    assert usable_cores(written(tmp_path, unlimited)) == 64


@pytest.mark.parametrize(
    ("quota", "cores"), [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1)]
)
@pytest.mark.parametrize("place", ["", "job/", "job/inner/"])
@pytest.mark.parametrize("version", [1, 2])
def test_quota_of_any_group_above_the_process_counts(
    version: int, place: str, quota: str, cores: int, tmp_path: Path
) -> None:
    """Whole cores of it: what is left of one makes all threads wait."""
    most, period = quota.split()
    if version == 2:
        base, files = "sys/fs/cgroup", {"proc/self/cgroup": "0::/job/inner"}
        files |= {f"{base}/job/cpu.max": "max 100000", f"{base}/{place}cpu.max": quota}
    else:
        base = "sys/fs/cgroup/cpu"
        files = {"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/job/inner\n0::/"}
        files |= {f"{base}/job/cpu.cfs_quota_us": "-1", f"{base}/job/cpu.cfs_period_us": "100000"}
        files |= {f"{base}/{place}cpu.cfs_quota_us": most}
        files |= {f"{base}/{place}cpu.cfs_period_us": period}
    assert usable_cores(written(tmp_path, files)) == cores


def test_torch_gets_the_cores_of_the_quota_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(boundary, "usable_cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that what is set here does not stay
    monkeypatch.delenv("OMP_NUM_THREADS")
    boundary._limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    boundary._limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
