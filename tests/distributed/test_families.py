"""Two processes compute together what one does, in every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.running import torchrun
from tests.tiny_families import FAMILY_NAMES, INFERRED, make_family
from tuckerize import DecomposeRequest, ShardRequest, decompose, shard
from tuckerize.checkpoint.output import REPORT


@pytest.mark.families
@pytest.mark.parametrize("name", [*FAMILY_NAMES, *INFERRED])
def test_shards_of_a_family_compute_what_its_layers_do(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = make_family(tmp_path / "model", name)
    decompose(DecomposeRequest(model=model, keep=0.75, output=out))
    shard(ShardRequest(folder=out, tp=2))
    result = torchrun(2, "-m", "tuckerize", "verify", out)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads((out / "tp2" / REPORT).read_text(encoding="utf-8"))
    assert (report["tp_size"], report["passed"]) == (2, True)
    assert all(0 < layer["sharding_error"] < 1e-5 for layer in report["layers"])
