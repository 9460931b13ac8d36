"""Recovery training over processes: tensor parallel with replicas, and FSDP, equal one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.running import succeed, torchrun
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize import DecomposeRequest, decompose
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.healing.result import LOG

SIZES = ("--tokens", "3200", "--window", "16", "--batch", "4", "--learning-rate", "0.01")
STEPS = 50
MESHES = {
    "tensor parallel, replicated": (4, ("--tp", "2")),
    "FSDP": (2, ("--fsdp", "--recompute")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all kinds of factors and quantised cores, shards, and its healed result."""
    work = tmp_path_factory.mktemp("heal")
    model = add_tokenizer(
        make_tiny_model(work / "model", dtype=torch.float32, intermediate=64, layers=2)
    )
    write_text(work / "text.txt", 9000)
    decompose(
        DecomposeRequest(
            model=model, output=work / "out", rank="full,full,50%", quantize="w4", group_size=4
        )
    )
    succeed("shard", work / "out", "--tp", "2", "--layout", "intermediate")
    succeed("heal", work / "out", "--data", work / "text.txt", "--output", work / "one", *SIZES)
    return work


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line.get("loss", line.get("validation_loss")) for line in lines]


INTERRUPTED = """
import sys
from tuckerize import HealRequest, heal
from tuckerize.progress import SilentProgress


class Stop(SilentProgress):
    left = 25

    def advance(self, amount, note):
        self.left -= note.startswith("loss")
        if not self.left:
            raise SystemExit(9)


folder, text, output = sys.argv[1:]
sizes = {"tokens": 3200, "window": 16, "batch": 4, "learning_rate": 0.01}
heal(HealRequest(folder=folder, data=text, output=output, tp=2, **sizes), Stop())
"""


def test_interrupted_mesh_is_continued_by_one_process(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    text, new = folder / "text.txt", tmp_path / "new"
    result = torchrun(2, tmp_path / "interrupted.py", folder / "out", text, new)
    assert "exitcode  : 9" in result.stderr
    before = losses(new)
    assert STEPS > len(before) > STEPS // 4
    succeed("heal", folder / "out", "--data", text, "--output", new, *SIZES)
    found, expected = losses(new), losses(folder / "one")
    assert found[:20] == before[:20]
    assert len(found) == len(expected)
    assert all(math.isclose(a, b, rel_tol=2e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", MESHES)
def test_training_equals_that_of_one_process(folder: Path, name: str, tmp_path: Path) -> None:
    processes, options = MESHES[name]
    data = ("--data", folder / "text.txt", "--output", tmp_path / "new")
    result = torchrun(processes, "-m", "tuckerize", "heal", folder / "out", *data, *SIZES, *options)
    assert result.returncode == 0, result.stderr
    found, expected = losses(tmp_path / "new"), losses(folder / "one")
    assert len(found) == len(expected) > STEPS
    assert all(math.isclose(a, b, rel_tol=2e-5) for a, b in zip(found, expected, strict=True))
    new, one = Checkpoint.open(tmp_path / "new"), Checkpoint.open(folder / "one")
    for tensor in one.tensors:
        ours, theirs = new.read_one(tensor), one.read_one(tensor)
        if ours.is_floating_point():  # codes at the edge may be rounded to either side
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
