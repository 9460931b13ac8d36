"""Quantized weights read as dense ones, against the float64 values that their codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

from tests import quantized_models as q
from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.quantized import Coding
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.errors import CheckpointError

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


# Releases of compressed-tensors before 0.20 leave bits of a word empty.
DENSE_BITS = (3, 5, 6, 7) if Version(version("compressed-tensors")) >= Version("0.20") else ()


def ct(bits: int) -> dict[str, Any]:
    """compressed-tensors' description of integers."""
    weights = {"num_bits": bits, "type": "int"}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


KINDS: dict[str, tuple[Callable[[Tensor], q.Quantized], dict[str, Any], Coding]] = {
    "fp8 blocks": (q.fp8_blocks, FP8, Coding.FP8),
    "fp8 of DeepSeek-V4": (q.fp8_powers, FP8, Coding.FP8),
    "fp8 tensor": (q.fp8_tensor, {}, Coding.FP8),
    "fp8 channel": (q.fp8_channel, {}, Coding.FP8),
    "int8 channel": (q.int8_channel, {}, Coding.INT8),
    "int4": (q.packed_ints(4), ct(4), Coding.PACKED_INT),
    "int4 g128": (q.packed_ints(4, group=128), ct(4), Coding.PACKED_INT),
    "int4 asymmetric": (q.packed_ints(4, symmetric=False), ct(4), Coding.PACKED_INT),
    "int4 act-order": (q.packed_ints(4, shuffled=True), ct(4), Coding.PACKED_INT),
    "int8 packed": (q.packed_ints(8), ct(8), Coding.PACKED_INT),
    **{
        f"int{bits} packed": (q.packed_ints(bits), ct(bits), Coding.PACKED_INT)
        for bits in (2, *DENSE_BITS)
    },
    "nvfp4": (q.nvfp4, {}, Coding.NVFP4),
    "mxfp4": (q.mxfp4, {}, Coding.MXFP4),
    "mxfp4 of DeepSeek": (q.mxfp4_deepseek, {}, Coding.MXFP4),
    "gptq": (q.gptq, {"quant_method": "gptq", "bits": 4}, Coding.GPTQ),
    "gptq act-order": (
        partial(q.gptq, shuffled=True),
        {"quant_method": "gptq", "bits": 4},
        Coding.GPTQ,
    ),
    "awq": (q.awq, {"quant_method": "awq", "bits": 4}, Coding.AWQ),
}


def write(
    folder: Path, stored: dict[str, Tensor], description: dict[str, Any], dtype: str = "float32"
) -> Checkpoint:
    """A checkpoint of the tensors, read as a dense one."""
    folder.mkdir(exist_ok=True)
    write_json(folder / CONFIG, {"dtype": dtype, "quantization_config": description or None})
    save_file(stored, folder / SINGLE_FILE)
    checkpoint = Checkpoint.open(folder)
    return checkpoint.dense(QuantizationDescription.of(checkpoint.config))


def named(stored: dict[str, Tensor], module: str = "a.up_proj") -> dict[str, Tensor]:
    """Stored tensors of a module."""
    return {f"{module}.{name}": tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weight_is_what_the_codes_stand_for(tmp_path: Path, kind: str) -> None:
    quantize, description, coding = KINDS[kind]
    torch.manual_seed(1)
    stored, dense = quantize(0.02 * torch.randn(200 if "fp8" in kind else 64, 256))
    norm = torch.ones(3)
    checkpoint = write(tmp_path, {**named(stored), "norm.weight": norm}, description)
    assert sorted(checkpoint.tensors) == ["a.up_proj.weight", "norm.weight"]
    header = checkpoint.tensors["a.up_proj.weight"]
    assert header.shape == tuple(dense.shape)
    assert header.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert checkpoint.quantized["a.up_proj.weight"].coding == coding
    assert set(checkpoint.stored("a.up_proj.weight")) == set(named(stored))
    read = checkpoint.read_one("a.up_proj.weight")
    assert read.dtype == torch.float32
    # compressed-tensors rounds the scales of NVFP4 to bfloat16.
    rounding = 2**-7 if coding == Coding.NVFP4 else 2**-22
    assert float((read.double() - dense).norm() / dense.norm()) < rounding
    assert float(dense.norm()) > 1  # something is there
    assert torch.equal(checkpoint.read_one("norm.weight"), norm)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 9))
def test_partial_blocks_at_the_edges(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, seed: int
) -> None:
    torch.manual_seed(seed)
    stored, dense = q.fp8_blocks(torch.randn(rows, columns))
    checkpoint = write(tmp_path_factory.mktemp("fp8"), named(stored), FP8)
    read = checkpoint.read_one("a.up_proj.weight")
    torch.testing.assert_close(read.double(), dense, rtol=1e-6, atol=0)


def test_experts_stored_together_are_read_by_rows_as_transformers_reads_them(
    tmp_path: Path,
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, dense = q.mxfp4_blocks(torch.randn(5, 64, 96))
    name = "a.experts.gate_up_proj"
    tensors = {f"{name}{ending}": tensor for ending, tensor in stored.items()}
    bias = {f"{name}_bias": torch.zeros(5, 96)}
    checkpoint = write(tmp_path, {**tensors, **bias}, {"quant_method": "mxfp4"}, "bfloat16")
    assert set(checkpoint.tensors) == {name, f"{name}_bias"}
    assert checkpoint.tensors[name].shape == (5, 64, 96)
    whole = checkpoint.read_one(name)
    expected = convert_moe_packed_tensors(stored["_blocks"], stored["_scales"])
    assert torch.equal(whole, expected)
    assert torch.equal(whole.double(), dense)
    [(_, some)] = checkpoint.read([name], rows=range(1, 4))
    assert torch.equal(some, whole[1:4])


def test_stacked_fp8_experts(tmp_path: Path) -> None:
    parts = [q.fp8_blocks(torch.randn(150, 130)) for _ in range(3)]
    tensors = {
        "a.experts.down_proj": torch.stack([stored["weight"] for stored, _ in parts]),
        "a.experts.down_proj_scale_inv": torch.stack(
            [stored["weight_scale_inv"] for stored, _ in parts]
        ),
    }
    checkpoint = write(tmp_path, tensors, FP8)
    [(_, some)] = checkpoint.read(["a.experts.down_proj"], rows=range(1, 3))
    expected = torch.stack([dense for _, dense in parts[1:]])
    torch.testing.assert_close(some.double(), expected, rtol=1e-6, atol=0)


def broken(stored: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """The same with one mistake."""
    scale = next(name for name in stored if "scale" in name and "input" not in name)
    if how == "missing":
        del stored[scale]
    elif how == "zero":
        stored[scale] = torch.zeros_like(stored[scale].view(torch.uint8)).view(stored[scale].dtype)
    elif how == "NaN":
        stored[scale].view(torch.uint8).fill_(255)
    elif how == "unknown":
        stored["weight_scale_2"] = torch.ones(1)
    elif how == "shape":
        stored[scale] = torch.ones(7, 9).to(stored[scale].dtype)
    return stored


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "the scale of a.up_proj.weight.* is missing"),
        ("zero", "scale.* is zero everywhere"),
        ("NaN", "scale.* holds NaN"),
        ("unknown", "weight_scale_2 stands beside the quantized weight a.up_proj.weight"),
        ("shape", r"of shape \[7, 9\] fits no layout"),
    ],
)
@pytest.mark.parametrize("kind", ["fp8 blocks", "int4", "mxfp4", "mxfp4 of DeepSeek"])
def test_scale_is_never_guessed(tmp_path: Path, kind: str, how: str, says: str) -> None:
    if kind == "mxfp4 of DeepSeek" and how == "missing":
        says = "the scale of a.up_proj.weight"
    quantize, description, _ = KINDS[kind]
    stored = broken(quantize(torch.randn(64, 64))[0], how)
    with pytest.raises(CheckpointError, match=says):
        write(tmp_path, named(stored), description).read_one("a.up_proj.weight")


def test_zero_weight_may_have_a_zero_scale(tmp_path: Path) -> None:
    codes = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    tensors = named({"weight": codes, "weight_scale_inv": torch.zeros(1, 1)})
    assert not write(tmp_path, tensors, FP8).read_one("a.up_proj.weight").any()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a.weight": torch.ones(2), "a.weight_scale": torch.ones(1)}, "a.weight is F32"),
        ({"a.weight_scale_inv": torch.ones(1)}, "which is missing"),
        ({"a.weight": torch.ones(2, 2, dtype=torch.uint8)}, "quantized by 'bitsandbytes'"),
        (
            {
                "a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
                "a.weight_scale": torch.ones(1),
                "a.weight_scale_inv": torch.ones(1),
            },
            "two tensors for its scale",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        write(tmp_path, tensors, {"quant_method": "bitsandbytes"})


def test_names_that_only_look_like_scales_stay(tmp_path: Path) -> None:
    tensors = {
        "router.scale": torch.ones(1),
        "layer_scale": torch.ones(2),
        "per_expert_scale": torch.ones(3),
    }
    checkpoint = write(tmp_path, tensors, {})
    assert set(checkpoint.tensors) == set(tensors)
    assert not checkpoint.quantized


def test_parts_in_different_files_are_put_together(tmp_path: Path) -> None:
    stored, dense = q.packed_ints(4)(torch.randn(32, 64))
    tensors = named(stored)
    write_json(tmp_path / CONFIG, {"dtype": "float32", "quantization_config": ct(4)})
    places = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        places[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / places[name])
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint = checkpoint.dense(QuantizationDescription.of(checkpoint.config))
    read = checkpoint.read_one("a.up_proj.weight")
    torch.testing.assert_close(read.double(), dense, rtol=1e-6, atol=0)


def test_bits_follow_the_group_that_names_the_module() -> None:
    value = ct(8)
    eight = value["config_groups"]["group_0"]
    four = {"targets": [r"re:.*\.experts\..*"], "weights": {"num_bits": 4, "type": "int"}}
    value["config_groups"] = {"group_0": eight, "group_1": four}
    description = QuantizationDescription(value)
    assert description.bits("model.layers.1.mlp.experts.3.up_proj") == 4
    assert description.bits("model.layers.1.self_attn.q_proj") == 8


def test_gptq_of_three_bits_is_refused(tmp_path: Path) -> None:
    stored, _ = q.gptq(torch.randn(64, 64))
    description = {"quant_method": "gptq", "bits": 3}
    with pytest.raises(CheckpointError, match="qweight holds GPTQ codes of 3 bits"):
        write(tmp_path, named(stored), description)
