"""gpt-oss as it is released: experts in MXFP4, biases in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from tests.quantized_models import mxfp4_blocks
from tests.tiny_families import make_family
from tests.tiny_models import add_tokenizer, write_text
from tuckerize import (
    DecomposeRequest,
    HealRequest,
    QuantizeRequest,
    ReconstructRequest,
    ShardRequest,
    check,
    decompose,
    heal,
    inspect,
    quantize,
    reconstruct,
    shard,
)
from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.errors import UsageError

IDS = torch.arange(3, 43)[None]


def as_released(folder: Path) -> Path:
    """Quantize the experts of a float32 model, and round the rest to bf16."""
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, _ = mxfp4_blocks(tensor)
            stored |= {f"{name}{suffix}": part for suffix, part in blocks.items()}
        else:
            stored[name] = tensor.bfloat16()
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    config = read_json_object(folder / CONFIG) | {"dtype": "bfloat16"}
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    method = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    write_json(folder / CONFIG, config | {"quantization_config": method})
    return folder


def test_released_model_computes_what_transformers_dequantized_one_does(tmp_path: Path) -> None:
    made = make_family(tmp_path / "model", "gpt_oss", intermediate_size=32)
    model, out = as_released(made), tmp_path / "out"
    assert inspect(model).coding == "MXFP4"
    decompose(DecomposeRequest(model=model, rank="full,full,full", output=out))
    config = Mxfp4Config(dequantize=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
    factored: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected, found = (each.to(torch.float32)(IDS).logits for each in (whole, factored))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def logits(folder: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_biases_outlast_groups_narrow_experts_and_quantised_cores(tmp_path: Path) -> None:
    model = add_tokenizer(make_family(tmp_path / "model", "gpt_oss"))
    out, quantised, dense = (tmp_path / name for name in ("out", "quantised", "dense"))
    text = write_text(tmp_path / "text.txt", 3000)
    calibration = {"texts": [str(text)], "tokens": 512, "window": 64, "refine": 0}
    decompose(DecomposeRequest(model=model, keep=0.6, calibration=calibration, output=out))
    reconstruct(ReconstructRequest(folder=out, output=dense))
    torch.testing.assert_close(logits(dense), logits(out), rtol=1e-4, atol=1e-5)
    quantize(QuantizeRequest(folder=out, output=quantised, cores="w8"))
    torch.testing.assert_close(logits(quantised), logits(out), rtol=0, atol=0.05)


def test_checkpoint_with_biases_is_healed_and_keeps_them(tmp_path: Path) -> None:
    model = add_tokenizer(make_family(tmp_path / "model", "gpt_oss"))
    out, healed = tmp_path / "out", tmp_path / "healed"
    text = write_text(tmp_path / "text.txt", 4000)
    decompose(DecomposeRequest(model=model, keep=0.6, output=out))
    sizes: dict[str, Any] = {"tokens": 1024, "window": 32, "batch": 8, "learning_rate": 1e-1}
    heal(HealRequest(folder=out, data=text, output=healed, **sizes))
    assert check(healed).passed
    before, after = (Checkpoint.open(folder) for folder in (out, healed))
    biases = [name for name in before.tensors if name.endswith("bias") and ".experts." in name]
    assert biases
    kept = dict(after.read(biases))
    for name, bias in before.read(biases):
        assert torch.equal(bias, kept[name])
    assert not torch.equal(logits(healed), logits(out))


def test_groups_of_experts_with_biases_are_not_shared_out(tmp_path: Path) -> None:
    model, out = make_family(tmp_path / "model", "gpt_oss"), tmp_path / "out"
    request = DecomposeRequest(model=model, rank="full,full,full", group_size=4, output=out)
    decompose(request)
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="every process needs the biases"):
        shard(ShardRequest(folder=out, tp=1, ep=2))
