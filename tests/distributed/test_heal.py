"""Recovery training over processes equals that of one, and any mesh continues any other's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.healing_runs import run
from tests.running import files_of, torchrun
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize import DecomposeRequest, ShardRequest, decompose, shard
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.healing.result import LOG

STEPS = 50
SIZES: dict[str, Any] = {"tokens": 64 * STEPS, "window": 16, "batch": 4, "learning_rate": 0.01}
SHORT: dict[str, Any] = {**SIZES, "tokens": 64 * 6}
FEW: dict[str, Any] = {**SIZES, "tokens": 4 * 2 * 10, "window": 4, "batch": 2}
TP: dict[str, Any] = {"tp": 2}
FSDP: dict[str, Any] = {"fsdp": True, "recompute": True}
REPLICAS: dict[str, Any] = {}
# Names of the runs of two processes: how they are spread, and what they train.
WHOLE = {
    "w4, TP": ("w4", SIZES, TP),
    "w4, FSDP": ("w4", SIZES, FSDP),
    "w8, TP": ("w8", SHORT, TP),
    "w8, FSDP": ("w8", SHORT, FSDP),
    "experts without tokens, replicas": ("many", FEW, REPLICAS),
}
CONTINUED = {"TP": TP, "FSDP": FSDP, "replicas": REPLICAS}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, of two, and those that either has continued for the other."""
    work = tmp_path_factory.mktemp("heal")
    sizes: dict[str, Any] = {"dtype": torch.float32, "intermediate": 64, "layers": 2}
    add_tokenizer(make_tiny_model(work / "model", **sizes))
    add_tokenizer(make_tiny_model(work / "many-model", experts=32, **sizes))
    write_text(work / "text.txt", 9000)
    for out, model, quantize in (("w4", "model", "w4"), ("w8", "model", "w8"),
                                 ("many", "many-model", None)):  # fmt: skip
        how: dict[str, Any] = {"rank": "full,full,50%", "quantize": quantize}
        group = 2 if out == "many" else 4
        decompose(DecomposeRequest(model=work / model, output=work / out, group_size=group, **how))
    for out in ("w4", "w8"):
        shard(ShardRequest(folder=work / out, tp=2, layout="intermediate"))

    def settings(out: str, output: str, sizes: dict[str, Any], **how: object) -> dict[str, Any]:
        teacher = {"teacher": str(work / "model")} if out == "w4" else {}
        paths = {"folder": str(work / out), "output": str(work / output)}
        return {**paths, "data": str(work / "text.txt"), **teacher, **sizes, **how}

    run(
        [
            settings("w4", "w4, one", SIZES),
            settings("w8", "w8, one", SHORT),
            settings("many", "many, one", FEW),
            settings("w4", "short, one", SHORT),
            *(settings("w4", f"one to {name}", SHORT, stop=3) for name in CONTINUED),
        ]
    )
    both = [settings(out, name, sizes, **how) for name, (out, sizes, how) in WHOLE.items()]
    for name, how in CONTINUED.items():
        both += [
            settings("w4", f"short, {name}", SHORT, **how),
            settings("w4", f"{name} to itself", SHORT, **how, stop=3),
            settings("w4", f"{name} to itself", SHORT, **how, continues=True),
            settings("w4", f"{name} to one", SHORT, **how, stop=3),
            settings("w4", f"one to {name}", SHORT, **how, continues=True),
        ]
    (work / "runs.json").write_text(json.dumps(both))
    script = Path(__file__).with_name("healing_runs.py")
    result = torchrun(2, script, work / "runs.json")
    assert result.returncode == 0, result.stderr
    run([settings("w4", f"{name} to one", SHORT, continues=True) for name in CONTINUED])
    return work


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line.get("loss", line.get("validation_loss")) for line in lines]


def norms(folder: Path) -> list[float]:
    """Norms of all gradients together, before clipping."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line["gradient_norm"] for line in lines if "loss" in line]


def assert_equal(found: Path, expected: Path) -> None:
    """To rounding: all losses, norms of gradients, and what was written."""
    for read, close in ((losses, 2e-5), (norms, 1e-3)):
        ours, theirs = read(found), read(expected)
        assert len(ours) == len(theirs)
        assert all(math.isclose(a, b, rel_tol=close) for a, b in zip(ours, theirs, strict=True))
    new, one = Checkpoint.open(found), Checkpoint.open(expected)
    assert new.tensors.keys() == one.tensors.keys()
    for tensor in one.tensors:
        if one.tensors[tensor].dtype == "F32":  # codes at the edge may be rounded to either side
            torch.testing.assert_close(
                new.read_one(tensor), one.read_one(tensor), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_equal_one(work: Path, name: str) -> None:
    out, sizes, _ = WHOLE[name]
    assert_equal(work / name, work / f"{out}, one")
    steps = sizes["tokens"] // (sizes["window"] * sizes["batch"])
    assert len(losses(work / name)) >= steps


@pytest.mark.parametrize("name", CONTINUED)
def test_interrupted_mesh_continues_to_the_same_bits(work: Path, name: str) -> None:
    found, expected = files_of(work / f"{name} to itself"), files_of(work / f"short, {name}")
    assert losses(work / f"{name} to itself") == losses(work / f"short, {name}")
    for files in (found, expected):  # which hold the seconds
        del files[LOG], files[MANIFEST]
    assert found == expected


@pytest.mark.parametrize("name", CONTINUED)
def test_another_mesh_continues(work: Path, name: str) -> None:
    assert_equal(work / f"{name} to one", work / "short, one")
    assert losses(work / f"{name} to one")[:5] == losses(work / f"short, {name}")[:5]
    assert_equal(work / f"one to {name}", work / "short, one")
    assert losses(work / f"one to {name}")[:5] == losses(work / "short, one")[:5]
