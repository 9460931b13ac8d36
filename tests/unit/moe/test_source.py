from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from tests.tiny_models import make_tiny_family
from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import Projection
from tuckerize.errors import CheckpointError
from tuckerize.moe.source import SourceModel

EXPERTS = "model.layers.2.mlp.experts"


@pytest.mark.parametrize("experts", [None, range(8), range(2, 5)])
@pytest.mark.parametrize("projection", Projection)
def test_stack_is_the_weights_on_disk(
    tiny_model: Path, projection: Projection, experts: range | None
) -> None:
    stack = SourceModel.open(tiny_model).stack(2, projection, experts)
    on_disk = load_file(tiny_model / "model.safetensors")
    weights = [on_disk[f"{EXPERTS}.{e}.{projection}.weight"] for e in experts or range(8)]
    expected = torch.stack([w.T if projection == Projection.DOWN else w for w in weights])
    assert stack.shape[1:] == (24, 32)
    assert stack.dtype == torch.bfloat16
    assert torch.equal(stack, expected)
    wide = SourceModel.open(tiny_model).stack(2, projection, experts, dtype=torch.float32)
    assert torch.equal(wide, expected.float())


def test_expert_router_and_norm_are_the_weights_on_disk(tiny_model: Path) -> None:
    source = SourceModel.open(tiny_model)
    on_disk = load_file(tiny_model / "model.safetensors")
    gate_HI, up_HI, down_HI = source.expert(2, 3)
    assert torch.equal(gate_HI, on_disk[f"{EXPERTS}.3.gate_proj.weight"])
    assert torch.equal(up_HI, on_disk[f"{EXPERTS}.3.up_proj.weight"])
    assert torch.equal(down_HI.T, on_disk[f"{EXPERTS}.3.down_proj.weight"])
    assert torch.equal(source.router(2).weight_EI, on_disk["model.layers.2.mlp.gate.weight"])
    norm = on_disk["model.layers.2.post_attention_layernorm.weight"]
    assert torch.equal(source.input_norm(2), norm.float())


def test_routed_tensors_and_size_are_those_of_the_headers(tiny_model: Path) -> None:
    source = SourceModel.open(Checkpoint.open(tiny_model))
    headers = source.checkpoint.tensors
    routed = {name for name in headers if ".experts." in name}
    found = {name for layer in (1, 2) for name in source.routed_tensors(layer)}
    assert found == routed
    assert source.size.routed_bytes == sum(headers[name].bytes for name in routed)
    assert source.size.total_parameters == sum(header.parameters for header in headers.values())


def test_folder_that_is_no_moe_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    with pytest.raises(CheckpointError, match="not a supported MoE family"):
        SourceModel.open(replace(checkpoint, config={"model_type": "bert"}))
    with pytest.raises(CheckpointError):
        SourceModel.open(tmp_path)


def test_packed_checkpoint_reads_as_the_one_that_transformers_saves(
    tmp_path: Path,
) -> None:
    plain = make_tiny_family(tmp_path / "plain", "qwen3_moe")
    packed = tmp_path / "packed"
    packed.mkdir()
    write_json(packed / CONFIG, read_json_object(plain / CONFIG))
    write_tensors(packed / SINGLE_FILE, Qwen3MoeForCausalLM.from_pretrained(plain).state_dict())
    expected = SourceModel.open(plain)
    source = SourceModel.open(packed)
    assert source.routed_tensors(1) == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert source.size == expected.size
    for layer in source.moe.layers:
        for projection in Projection:
            for experts in (None, range(3, 6)):
                assert torch.equal(
                    source.stack(layer, projection, experts),
                    expected.stack(layer, projection, experts),
                )
