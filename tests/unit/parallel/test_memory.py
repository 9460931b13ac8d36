from __future__ import annotations

from pathlib import Path

import pytest

from tuckerize.errors import UsageError
from tuckerize.parallel import memory
from tuckerize.parallel.memory import available_bytes, require_memory

GIB = 2**30


def written(root: Path, files: dict[str, object]) -> Path:
    base = {"proc/meminfo": f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n"}
    for name, content in {**base, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_host_alone(tmp_path: Path) -> None:
    assert available_bytes(written(tmp_path, {})) == 8 * GIB
    assert available_bytes(tmp_path / "none") is None


@pytest.mark.parametrize("place", ["", "job/", "job/inner/"])
@pytest.mark.parametrize("version", [1, 2])
def test_limit_of_any_group_above_the_process_counts(
    version: int, place: str, tmp_path: Path
) -> None:
    """Of what a group uses, files that were read count as free."""
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
        base, line = "sys/fs/cgroup/", "0::/job/inner"
    else:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        base, line = "sys/fs/cgroup/memory/", "5:cpu:/x\n4:memory:/job/inner\n0::/"
    limit, used, inactive = names
    files: dict[str, object] = {
        "proc/self/cgroup": line,
        f"{base}job/{limit}": "max" if version == 2 else 2**63 - 4096,
        f"{base}job/{used}": GIB,
        f"{base}{place}{limit}": 4 * GIB,
        f"{base}{place}{used}": 3 * GIB,
        f"{base}{place}memory.stat": f"anon 1\n{inactive} {GIB}",
    }
    assert available_bytes(written(tmp_path, files)) == 2 * GIB


def test_group_that_is_over_its_limit_has_none(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": GIB,
        "sys/fs/cgroup/memory.current": 2 * GIB,
    }
    assert available_bytes(written(tmp_path, files)) == 0


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 6 * GIB)
    require_memory(6 * GIB, "x", "y")
    require_memory(3 * GIB, "x", "y", processes=2)
    with pytest.raises(UsageError) as caught:
        require_memory(3.5 * GIB, "the experts", "start fewer processes", processes=2)
    assert caught.value.message == (
        "a process holds at least 3.5 GiB at once, the experts, and 3.0 GiB of memory are free "
        "for it, of the host or of its control group"
    )
    assert caught.value.hint == "raise the limit, or start fewer processes"
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    require_memory(2**60, "x", "y")
