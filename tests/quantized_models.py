"""Quantized weights and tiny quantized checkpoints, each with the dense values it stands for.

Codes and scales are made here, so that the dense value is known in float64 without any reader;
packing is compressed-tensors' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.moe.storage import Packed, PerExpert, Storage

Quantized = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by their name beside `M.`, and the dense value in float64."""

_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each nibble of a word


def fp8_blocks(weight: Tensor, block: int = 128) -> Quantized:
    """DeepSeek-V3's: one float32 scale per block."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block), -(-columns // block))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scale[i, j] = part.float().abs().max() / 448
    wide = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    codes = (weight.float() / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.double() * wide.double()


def fp8_powers(weight: Tensor) -> Quantized:
    """DeepSeek-V4's: scales of blocks are powers of 2 (ue8m0), and are named `scale`."""
    rows, columns = weight.shape
    wide = torch.empty(rows, columns)
    exponent = torch.empty(-(-rows // 128), -(-columns // 128), dtype=torch.uint8)
    for i in range(exponent.shape[0]):
        for j in range(exponent.shape[1]):
            place = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            power = (weight[place].float().abs().max() / 448).log2().ceil()
            exponent[i, j] = int(power) + 127
            wide[place] = power.exp2()
    codes = (weight.float() / wide).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "scale": exponent.view(torch.float8_e8m0fnu)}
    return stored, codes.double() * wide.double()


def fp8_tensor(weight: Tensor) -> Quantized:
    """One scale per weight."""
    scale = (weight.float().abs().max() / 448).reshape(1)
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
    return stored, codes.double() * scale.double()


def fp8_channel(weight: Tensor) -> Quantized:
    """One scale per row, in the type of the model."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(weight.dtype)
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()


def int8_channel(weight: Tensor) -> Quantized:
    """W8A8: one scale per row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()


def _grouped(weight: Tensor, bits: int, *, symmetric: bool, group: int) -> tuple[Tensor, ...]:
    """Codes, scales (out, groups), zero points (out, groups) and dense value."""
    groups = _split(weight.float(), group)
    half = 2 ** (bits - 1)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) / (half - 1)).to(weight.dtype)
        zero = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (2 * half - 1)).to(weight.dtype)
        zero = (-half - low / scale.float()).round().clamp(-half, half - 1)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(-half, half - 1)
    dense = (codes.double() - zero.double()[..., None]) * scale.double()[..., None]
    return codes.flatten(1).to(torch.int8), scale, zero.to(torch.int8), dense.flatten(1)


def packed_ints(
    bits: int, *, symmetric: bool = True, group: int = 32, shuffled: bool = False
) -> Callable[..., Quantized]:
    """compressed-tensors' pack-quantized, as in Kimi-K2-Thinking (4 bits, groups of 32).

    Shuffled: columns of a group in any place (act-order), as `weight_g_idx` says.
    """

    def quantize(weight: Tensor) -> Quantized:
        columns = weight.shape[1]
        order = torch.randperm(columns) if shuffled else torch.arange(columns)
        back = order.argsort()
        codes, scale, zero, dense = _grouped(
            weight[:, order], bits, symmetric=symmetric, group=group
        )
        codes, dense = codes[:, back], dense[:, back]
        stored = {
            "weight_packed": pack_to_int32(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if shuffled:
            stored["weight_g_idx"] = (torch.arange(columns) // group)[back].to(torch.int32)
        if not symmetric:
            stored["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
        return stored, dense

    return quantize


def _fp4_codes(values: Tensor) -> Tensor:
    """The nearest FP4 values."""
    return _FP4[:8][(values.abs()[..., None] - _FP4[:8]).abs().argmin(-1)] * values.sign()


def nvfp4(weight: Tensor) -> Quantized:
    """Groups of 16 with an FP8 scale, and one scale for all."""
    groups = _split(weight.float(), 16)
    whole = (448 * 6 / weight.float().abs().max()).reshape(1)
    scale = (groups.abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    wide = scale.double()[..., None] / whole.double()
    values = _fp4_codes(groups / wide.float())
    stored = {
        "weight_packed": pack_fp4_to_uint8(values.flatten(1)),
        "weight_scale": scale,
        "weight_global_scale": whole,
    }
    return stored, (values.double() * wide).flatten(1)


def _mx(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 values, exponents and dense value of groups of 32."""
    groups = _split(weight.float(), 32)
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    values = _fp4_codes(groups / exponent.exp2()[..., None])
    dense = values.double() * exponent.double().exp2()[..., None]
    return values.flatten(-2), (exponent + 127).to(torch.uint8), dense.flatten(-2)


def mxfp4(weight: Tensor) -> Quantized:
    """compressed-tensors' mxfp4-pack-quantized."""
    values, exponents, dense = _mx(weight)
    return {"weight_packed": pack_fp4_to_uint8(values), "weight_scale": exponents}, dense


def mxfp4_deepseek(weight: Tensor) -> Quantized:
    """DeepSeek-V4's: bytes as int8, and a scale named `scale`."""
    values, exponents, dense = _mx(weight)
    codes = pack_fp4_to_uint8(values).view(torch.int8)
    return {"weight": codes, "scale": exponents.view(torch.float8_e8m0fnu)}, dense


def mxfp4_blocks(weight_ERC: Tensor) -> Quantized:
    """gpt-oss': blocks and scales of the transposed weights of all experts."""
    values, exponents, dense = _mx(weight_ERC.mT.contiguous())
    experts, rows, _ = values.shape
    blocks = pack_fp4_to_uint8(values.flatten(0, 1)).view(experts, rows, -1, 16)
    return {"_blocks": blocks, "_scales": exponents}, dense.mT


def _split(tensor: Tensor, size: int) -> Tensor:
    """The last dimension in parts of a size."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)


def _words(codes: Tensor, places: Iterable[int] = range(8)) -> Tensor:
    """4-bit codes (rows, columns), packed along the columns in an order of places."""
    eights = _split(codes.long(), 8)
    word = sum(eights[..., place] << (4 * nibble) for nibble, place in enumerate(places))
    return torch.as_tensor(word).to(torch.int32).contiguous()


def gptq(weight: Tensor, *, shuffled: bool = False) -> Quantized:
    """AutoGPTQ's, optionally with columns of a group in any place (act-order)."""
    columns = weight.shape[1]
    order = torch.randperm(columns) if shuffled else torch.arange(columns)
    codes, scale, zero, _ = _grouped(weight[:, order], 4, symmetric=False, group=32)
    back = order.argsort()
    stored = {
        "qweight": _words(codes[:, back].int() + 8).T.contiguous(),
        "qzeros": _words((zero.int() + 8 - 1).T & 15),
        "scales": scale.half().T.contiguous(),
        "g_idx": (torch.arange(columns) // 32)[back].to(torch.int32),
    }
    return stored, _with_half_scales(codes, scale, zero)[:, back]


def _with_half_scales(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = _split(codes.double(), 32) - zero.double()[..., None]
    return (groups * scale.half().double()[..., None]).flatten(1)


def awq(weight: Tensor) -> Quantized:
    """AutoAWQ's GEMM format."""
    codes, scale, zero, _ = _grouped(weight, 4, symmetric=False, group=32)
    stored = {
        "qweight": _words(codes.int().T + 8, _AWQ_PLACES),
        "qzeros": _words(zero.int().T + 8, _AWQ_PLACES),
        "scales": scale.half().T.contiguous(),
    }
    return stored, _with_half_scales(codes, scale, zero)


def _ct(weights: dict[str, Any], form: str, activations: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
    """compressed-tensors' description of one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


def _weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


_DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
_GROUP = {"group_size": 32}
FORMATS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
    "fp8": (
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ),
    "float-quantized": (
        fp8_channel,
        _ct(_weights(8, "float", "channel"), "float-quantized", {**_DYNAMIC, "type": "float"}),
    ),
    "int-quantized": (
        int8_channel,
        _ct(_weights(8, "int", "channel"), "int-quantized", {**_DYNAMIC, "type": "int"}),
    ),
    "pack-quantized": (
        packed_ints(4),
        _ct(_weights(4, "int", "group", **_GROUP), "pack-quantized"),
    ),
    "asymmetric": (
        packed_ints(4, symmetric=False),
        _ct({**_weights(4, "int", "group", **_GROUP), "symmetric": False}, "pack-quantized"),
    ),
    "nvfp4-pack-quantized": (
        nvfp4,
        _ct(_weights(4, "float", "tensor_group", group_size=16), "nvfp4-pack-quantized"),
    ),
    "mxfp4-pack-quantized": (
        mxfp4,
        _ct(_weights(4, "float", "group", **_GROUP), "mxfp4-pack-quantized"),
    ),
}
"""How to quantize a weight, and how config.json describes it, by format."""

OTHERS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}
"""Formats whose loading by transformers needs packages that are not ours."""


EXPERT_FORMATS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
    **FORMATS,
    **OTHERS,
    "mxfp4": (mxfp4_blocks, {"quant_method": "mxfp4"}),
    "mxfp4-deepseek": (mxfp4_deepseek, {"quant_method": "fp8", "scale_fmt": "ue8m0"}),
}
"""Formats of routed experts that the tests read."""


def formats_of(storage: Storage) -> tuple[str, ...]:
    """Keys of `EXPERT_FORMATS` that experts in a layout are tested in.

    Experts that are stored together are released in blocks of FP8, those of gpt-oss in MXFP4.
    """
    if isinstance(storage, PerExpert) and not storage.is_stacked:
        return tuple(kind for kind in EXPERT_FORMATS if kind != "mxfp4")
    if not all(name.endswith(("_proj", ".weight")) for name in storage.names):
        return ()  # no release has them quantized, and names of scales are not known
    return ("fp8", "mxfp4") if isinstance(storage, Packed) and storage.interleaved else ("fp8",)


def quantize_model(
    source: Path, folder: Path, kind: str, *, experts_only: bool = False
) -> dict[str, Tensor]:
    """Quantize the linear layers of a tiny model of one weight file.

    Args:
        source: The model.
        folder: The new folder.
        kind: Key of `FORMATS` or `OTHERS`.
        experts_only: Whether attention and shared experts stay as they are, as in Kimi-K2-Thinking.

    Returns:
        The dense values in float64 of what was quantized.
    """
    quantize, description = (FORMATS | OTHERS)[kind]
    folder.mkdir()
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "special", "generation")):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    left = ["lm_head"]
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        linear = leaf == "weight" and module.endswith("_proj") and tensor.shape[1] % 32 == 0
        if linear and (".experts." in module or not experts_only):
            stored, dense[name] = quantize(tensor)
            tensors |= {f"{module}.{own}": part for own, part in stored.items()}
        else:
            tensors[name] = tensor
            if tensor.ndim > 1 and leaf == "weight":
                left.append(module)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ignored = "ignore" if "config_groups" in description else "modules_to_not_convert"
    config = read_json_object(source / "config.json")
    config["quantization_config"] = {**description, ignored: left}
    write_json(folder / "config.json", config)
    return dense


_DEEPSEEK_V4 = {"model.": "", "embed_tokens": "embed", "hc_head.hc": "hc_head"}
"""Parts of the names that transformers saves, and those of the releases."""


def quantize_deepseek_v4(source: Path, folder: Path) -> dict[str, Tensor]:
    """Quantize a tiny DeepSeek-V4 as its releases are: experts in MXFP4, attention in FP8.

    Names are those of the releases, too: `layers.0.ffn`, `embed`.

    Returns:
        All tensors by transformers' names, with the dense values of what was quantized.
    """
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        quantize = None
        if ".experts." in name:
            quantize = mxfp4_deepseek
        elif module.rpartition(".")[2] in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
            quantize = fp8_powers
        if quantize is None:
            tensors[name] = dense[name] = tensor
            continue
        stored, value = quantize(tensor)
        tensors |= {f"{module}.{own}": part for own, part in stored.items()}
        dense[name] = value.to(tensor.dtype)
    for own, released in _DEEPSEEK_V4.items():
        tensors = {name.replace(own, released): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json_object(source / "config.json")
    described = {**FORMATS["fp8"][1], "scale_fmt": "ue8m0"}
    write_json(folder / "config.json", {**config, "quantization_config": described})
    return dense
