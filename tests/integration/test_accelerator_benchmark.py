"""The benchmark of an accelerator runs with small sizes, on whatever device is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import accelerator


def test_every_part_runs_and_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script must be right when a device is lent: nothing may fail, everything is noted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["accelerator", "--tiny", "--write", str(tmp_path / "r.json")])
    accelerator.main()
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["shipped"]["verify"]["exit"] == 0
    for place in {"cpu", results["device"]} & set(results["shipped"]):
        shipped = results["shipped"][place]
        assert shipped["perplexity_dense"] < shipped["perplexity_tucker"] < 30
    layer = results["layer tiny"]
    assert layer["plan"]["seconds"] > 0
    assert layer["decompose"]["profile"]
    assert "rates" in capsys.readouterr().out
