"""Layers that predict further tokens in the real vLLM engine: `make test-vllm`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_families import make_family
from tests.vllm.running import decompose, run
from tuckerize.checkpoint.files import read_json_object, write_json

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def make_further(folder: Path) -> Path:
    """A GLM-4-MoE model with a layer that predicts further tokens, as its releases have it."""
    width = 64
    sizes = {
        "hidden_size": width,
        "head_dim": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
    }
    make_family(folder, "glm4_moe", num_hidden_layers=3, moe_intermediate_size=32, **sizes)
    weights = folder / "model.safetensors"
    tensors, layer = load_file(weights), "model.layers.2"
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{layer}.{name}.weight"] = torch.ones(width)
    tensors[f"{layer}.eh_proj.weight"] = 0.1 * torch.randn(width, 2 * width)
    for own, shared in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        tensors[f"{layer}.{own}.weight"] = tensors[f"{shared}.weight"].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    config = read_json_object(folder / "config.json")
    counts = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    write_json(folder / "config.json", {**config, **counts})
    return folder


def test_layers_that_predict_further_tokens_draft_where_they_were_copied(tmp_path: Path) -> None:
    model = make_further(tmp_path / "dense")
    size = ("--rank", "full,full,40")
    factored = decompose(model, tmp_path / "factored", *size)
    copied = decompose(model, tmp_path / "copied", *size, "--mtp", "copy")
    [expected] = run([factored])
    [found] = run([copied], "--mtp")
    assert found["tokens"] == expected["tokens"]
    with pytest.raises(
        AssertionError, match=r"layers\.2\.mlp\.experts, .*decompose with --mtp copy"
    ):
        run([factored], "--mtp")
