"""Sharded layers under torchrun against dense experts in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.running import torchrun

SCRIPT = Path(__file__).parent / "layer_cases.py"


@pytest.mark.parametrize("processes", [2, 4])
def test_layer_sharded_any_layout_shape_and_rank_equals_dense_experts(processes: int) -> None:
    result = torchrun(processes, SCRIPT)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout)
    assert len(errors) == 130
    assert {case: error for case, error in errors.items() if not error < 2e-6} == {}
