"""Recovery training under tensor parallelism on a stand-in for an NPU: `make test-npu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.running import succeed, torchrun
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize.healing.result import LOG

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


def test_training_under_tensor_parallelism(tmp_path: Path) -> None:
    model = add_tokenizer(make_tiny_model(tmp_path / "model", dtype=torch.float32, layers=2))
    text = write_text(tmp_path / "text.txt", 4000)
    out = tmp_path / "out"
    succeed("decompose", "--model", model, "--rank", "full,full,50%", "--output", out)
    succeed("shard", out, "--tp", "4", "--layout", "intermediate")
    sizes = ("--tokens", "640", "--window", "16", "--batch", "4", "--learning-rate", "0.02")
    data = ("--data", text, "--output", tmp_path / "healed", "--teacher", model)
    command = ("-m", "tuckerize", "heal", out, *data, *sizes, "--tp", "4", "--device", "npu")
    result = torchrun(4, *command)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "healed" / LOG).read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 10
    nats = [line["validation_nats"] for line in lines if "validation_nats" in line]
    assert nats[-1] < nats[0]
    succeed("verify", tmp_path / "healed", "--device", "cpu")
