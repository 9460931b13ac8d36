"""Sharded layers under torchrun, forward and backward, against dense experts in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.running import torchrun

SCRIPT = Path(__file__).parent / "layer_cases.py"


@pytest.mark.parametrize(
    ("processes", "meshes"),
    [
        (4, ["4x1x1", "2x1x2", "1x4x1", "2x2x1"]),
        pytest.param(8, ["2x2x2"], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_layer_on_any_mesh_equals_dense_experts_in_output_gradients_and_traffic(
    processes: int, meshes: list[str]
) -> None:
    result = torchrun(processes, SCRIPT, *meshes)
    assert result.returncode == 0, result.stderr
    cases = json.loads(result.stdout)
    assert {case["mesh"] for case in cases} == set(meshes)
    assert len(cases) > 30 * len(meshes)
    assert [case for case in cases if not max(case["errors"].values()) < 1e-12] == []
