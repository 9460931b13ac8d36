from __future__ import annotations

from pathlib import Path

import pytest

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import StackShape
from tuckerize.errors import CheckpointError
from tuckerize.pipeline.inspect import inspect


def test_inspect_of_a_dense_checkpoint_gives_its_facts(tiny_model: Path) -> None:
    report = inspect(tiny_model)
    assert (report.family, report.layers, report.shape) == (
        "deepseek_v2",
        (1, 2),
        StackShape(8, 24, 32),
    )
    assert (report.top_k, report.shared_experts, report.dtype) == (2, 1, "BF16")
    assert report.size.routed_parameters == 2 * 3 * 8 * 24 * 32
    assert report.size.routed_bytes == 2 * report.size.routed_parameters
    assert report.size.total_bytes == Checkpoint.open(tiny_model).bytes
    assert report.tucker is None


def test_inspect_of_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        inspect(tmp_path)
