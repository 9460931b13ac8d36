"""Dense weights from quantized ones, by the functions of compressed-tensors.

What other tools store in their own way is first put into compressed-tensors' form. Scales are
checked before they are used: one that is missing, zero or NaN gives a model that speaks and errs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from tuckerize.checkpoint.gptq import unpack_awq, unpack_gptq
from tuckerize.checkpoint.quantization_config import WORD_BITS
from tuckerize.checkpoint.quantized import Coding, QuantizedWeight, Role
from tuckerize.errors import CheckpointError

_FORMATS = {
    Coding.FP8: "float-quantized",
    Coding.INT8: "int-quantized",
    Coding.PACKED_INT: "pack-quantized",
    Coding.NVFP4: "nvfp4-pack-quantized",
    Coding.MXFP4: "mxfp4-pack-quantized",
    Coding.GPTQ: "int-quantized",
    Coding.AWQ: "int-quantized",
}
_FP4 = (Coding.NVFP4, Coding.MXFP4)


def dequantize(weight: QuantizedWeight, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Dense weight of its stored tensors.

    Args:
        weight: Its description.
        stored: Its stored tensors, or the same rows (experts) of all of them.
        dtype: Type of the result.

    Returns:
        The weight, shape (out, in), or (E, rows, columns) where experts are stored together.

    Raises:
        CheckpointError: A scale is NaN, infinite or zero, or has a shape that does not fit.
    """
    parts = {role: stored[name] for role, name in weight.stored.items()}
    _check_scales(weight, parts)
    codes = parts[Role.CODES]
    together = 3  # dimensions
    if codes.ndim < together:
        return _matrix(weight, parts).to(dtype)
    if weight.transposed:
        parts[Role.CODES] = codes.flatten(2)
    experts = [
        _matrix(weight, {role: part[expert] for role, part in parts.items()})
        for expert in range(len(codes))
    ]
    dense = torch.stack([expert.to(dtype) for expert in experts])
    return dense.mT.contiguous() if weight.transposed else dense


def _check_scales(weight: QuantizedWeight, parts: Mapping[Role, Tensor]) -> None:
    codes = parts[Role.CODES]
    for role in (Role.SCALE, Role.GLOBAL_SCALE):
        if role not in parts:
            continue
        scale = _as_floats(parts[role])
        name = weight.stored[role]
        if not scale.isfinite().all():
            raise CheckpointError(
                f"the {role} {name} holds NaN or infinity",
                hint="the checkpoint is damaged: fetch it again, or quantize the model again",
            )
        as_bytes = _as_bytes(codes).flatten()
        nothing = _as_bytes(parts[role]) == 0 if _is_power(parts[role]) else scale == 0
        if nothing.all() and not (as_bytes == as_bytes[0]).all():
            raise CheckpointError(
                f"the {role} {name} is zero everywhere, which would make {weight.name} zero",
                hint="the checkpoint is damaged: fetch it again, or quantize the model again",
            )


def _is_power(scale: Tensor) -> bool:
    """Whether a scale is stored as exponents of 2 (ue8m0), of which 255 is NaN."""
    return scale.dtype in (torch.uint8, torch.float8_e8m0fnu)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _as_floats(scale: Tensor) -> Tensor:
    """A scale in float32."""
    return (scale.view(torch.float8_e8m0fnu) if _is_power(scale) else scale).float()


def _matrix(weight: QuantizedWeight, parts: Mapping[Role, Tensor]) -> Tensor:
    """Dense matrix (out, in) of its parts."""
    # They import transformers: seconds that only a quantized source costs.
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    if WORD_BITS % weight.bits and Version(version("compressed-tensors")) < Version("0.20"):
        raise CheckpointError(
            f"this release of compressed-tensors has another packing of {weight.bits} bits",
            hint="pip install 'compressed-tensors>=0.20'",
        )
    order = None
    if Role.GROUP_INDEX in parts and weight.coding == Coding.GPTQ:
        order = parts[Role.GROUP_INDEX].argsort(stable=True)
    state, args = _in_form(weight, parts, order)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(_FORMATS[weight.coding])
    try:
        dense: Tensor = compressor.decompress(state, scheme)["weight"]
    except NotImplementedError:
        raise CheckpointError(
            f"this release of compressed-tensors cannot dequantize {weight.coding}",
            hint="pip install 'compressed-tensors>=0.16', which needs torch 2.10 or newer",
        ) from None
    dense = dense[:, : weight.header.shape[-1]]
    return dense if order is None else dense[:, order.argsort()]


def _in_form(
    weight: QuantizedWeight, parts: Mapping[Role, Tensor], order: Tensor | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and quantization arguments of a matrix in compressed-tensors' form."""
    codes, scale = parts[Role.CODES], parts[Role.SCALE]
    if weight.coding in _FP4:
        state = {"weight_packed": _as_bytes(codes)}
        if weight.coding == Coding.MXFP4:
            state["weight_scale"] = _as_bytes(scale)
            strategy, size = "group", 32
        else:
            state["weight_scale"] = scale
            state["weight_global_scale"] = parts[Role.GLOBAL_SCALE].float()
            strategy, size = "tensor_group", 16
        _check_groups(weight, codes.shape[0], 2 * codes.shape[1], scale, size)
        args = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
        return state, args
    zeros = parts.get(Role.ZERO_POINT)
    if weight.coding in (Coding.GPTQ, Coding.AWQ):
        codes, zeros = _unpacked(weight, codes, parts[Role.ZERO_POINT])
        codes, scale = codes if order is None else codes[:, order], scale.T
    if Role.GROUP_INDEX in parts and order is None:
        # A scale for every column: compressed-tensors 0.20 ignores the index, 0.17 did not.
        columns = parts[Role.GROUP_INDEX].long()
        scale, zeros = scale[:, columns], None if zeros is None else zeros[:, columns]
    shape = weight.header.shape[-2:]
    scale = _as_floats(scale)
    layout, scale = _layout(weight, shape, scale)
    args = {
        "num_bits": weight.bits,
        "type": "float" if weight.coding == Coding.FP8 else "int",
        "symmetric": zeros is None,
        **layout,
    }
    state = {"weight_scale": scale}
    if zeros is not None:
        state["weight_zero_point"] = zeros
    if weight.coding != Coding.PACKED_INT:
        missing = layout.get("group_size", 0) * scale.shape[-1] - codes.shape[1]
        if missing > 0:  # columns of the last block
            codes = torch.cat([codes, codes.new_zeros(len(codes), missing)], 1)
        return {**state, "weight": codes}, args
    stored_shape = parts[Role.SHAPE].tolist()
    if tuple(stored_shape) != shape:
        raise CheckpointError(
            f"{weight.stored[Role.SHAPE]} says {stored_shape}, {weight.stored[Role.CODES]} holds "
            f"{list(shape)} values of {weight.bits} bits",
            hint="check num_bits in config.json",
        )
    return {**state, "weight_packed": codes, "weight_shape": parts[Role.SHAPE]}, args


def _unpacked(weight: QuantizedWeight, codes: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    if weight.coding == Coding.AWQ:
        return unpack_awq(codes, zeros, weight.bits)
    return unpack_gptq(codes, zeros, weight.bits, plus_one=weight.zeros_less_one)


def _layout(
    weight: QuantizedWeight, shape: tuple[int, ...], scale: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Strategy of compressed-tensors that a scale follows, and the scale in its shape.

    Scales of blocks are given to every row of a block: releases of compressed-tensors differ in
    blocks that are cut off at the edge.
    """
    rows, columns = shape
    down, across = weight.block
    if scale.numel() == 1:
        return {"strategy": "tensor"}, scale.reshape(1)
    if scale.shape in ((rows,), (rows, 1)):
        return {"strategy": "channel"}, scale.reshape(rows, 1)
    if scale.shape == (-(-rows // down), -(-columns // across)):
        wide = scale.repeat_interleave(down, 0)[:rows]
        return {"strategy": "group", "group_size": across}, wide
    if scale.ndim == len(shape) and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        return {"strategy": "group", "group_size": columns // scale.shape[1]}, scale
    raise _unfit(weight, rows, columns, scale)


def _check_groups(
    weight: QuantizedWeight, rows: int, columns: int, scale: Tensor, group: int
) -> None:
    if tuple(scale.shape) != (rows, -(-columns // group)):
        raise _unfit(weight, rows, columns, scale)


def _unfit(weight: QuantizedWeight, rows: int, columns: int, scale: Tensor) -> CheckpointError:
    return CheckpointError(
        f"the scale {weight.stored[Role.SCALE]} of shape {list(scale.shape)} fits no layout of "
        f"{weight.name}, {rows} x {columns}",
        hint="check weight_block_size in config.json, or fetch the checkpoint again",
    )
