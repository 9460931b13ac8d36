"""Quantised cores as tensors, in the names and the packing of compressed-tensors.

`<core>.weight` holds codes of 8 bits (int8 or float8_e4m3fn), `<core>.weight_packed` codes of 4
bits, eight in an int32, or of 3 bits, eight in three bytes (uint8), and `<core>.weight_scale` the
scales. Outputs are rows, inputs are columns: the core of down_proj is stored as (r_E, r_I, r_H),
those of gate_proj and up_proj as (r_E, r_H, r_I).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tuckerize.domain import CoreType, Projection
from tuckerize.linalg.packing import pack, unpack, unpacked_values
from tuckerize.linalg.quantise import QuantisedMatrices, code_dtype
from tuckerize.names import CorePart, TensorName

CODES = {
    kind: CorePart.CODES if kind.word_codes == 1 else CorePart.PACKED_CODES for kind in CoreType
}
"""Name of the codes in each encoding."""

_FORMATS = dict.fromkeys(CoreType, "pack-quantized") | {
    CoreType.W8: "int-quantized",
    CoreType.FP8: "float-quantized",
}

_PACKED = {
    torch.int32: (CoreType.W4, CoreType.W4_G128),
    torch.uint8: (CoreType.W3, CoreType.W3_G128),
}
"""Encodings by the type of their words, the one of smaller groups first."""

_MIXED = "mixed-precision"
_ALL = "core"
_EXPERTS = r"re:.*\.experts\.\d+\..*"


def scheme_of(core_types: Mapping[str, CoreType], modules: Collection[str]) -> dict[str, Any]:
    """compressed-tensors' description of the encodings of cores, for `quantization_config`.

    Args:
        core_types: Encodings of the modules of experts that have quantised cores.
        modules: All modules of factored experts.
    """
    kinds = sorted(set(core_types.values()))
    if len(kinds) == 1 and len(core_types) == len(modules):
        return _description(_FORMATS[kinds[0]], [_scheme(kinds[0], [_ALL])])
    groups = [
        {
            **_scheme(kind, [module for module in modules if core_types.get(module) == kind]),
            "format": _FORMATS[kind],
        }
        for kind in kinds
    ]
    return _description(_MIXED, groups)


def stock_scheme(core_type: CoreType) -> dict[str, Any]:
    """compressed-tensors' description of an ordinary checkpoint whose experts are quantised.

    Codes of 8 bits are for kernels that round the inputs too, token by token.

    Args:
        core_type: Encoding of the experts.
    """
    group = _scheme(core_type, [_EXPERTS])
    if core_type.bits == 8:
        inputs = {"strategy": "token", "group_size": None, "dynamic": True}
        group["input_activations"] = {**group["weights"], **inputs}
    status = {"quantization_status": "compressed", "ignore": []}
    return {**_description(_FORMATS[core_type], [group]), **status}


def core_types_of(scheme: Mapping[str, Any], modules: Collection[str]) -> dict[str, CoreType]:
    """The encodings that a description is of, by the modules of experts that have them.

    Args:
        scheme: The description.
        modules: All modules of factored experts.

    Raises:
        ValueError: It is not one that is known.
    """
    groups = scheme.get("config_groups")
    found: dict[str, CoreType] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(targets, list) or not all(isinstance(own, str) for own in targets):
            continue
        for kind in CoreType:
            if _scheme(kind, targets)["weights"] == group.get("weights"):
                found |= dict.fromkeys(modules if targets == [_ALL] else targets, kind)
    if not found or scheme_of(found, modules) != scheme:
        known = ", ".join(
            f"{_FORMATS[core_type]} of {core_type.bits} bits" for core_type in CoreType
        )
        raise ValueError(f"it is not a scheme that this tuckerize reads: {known}")
    return found


def _description(name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
    }


def _scheme(core_type: CoreType, targets: list[str]) -> dict[str, Any]:
    group_size = core_type.group_size
    weights = {
        "num_bits": core_type.bits,
        "type": "float" if core_type == CoreType.FP8 else "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights}


def core_tensors(core: TensorName, found: QuantisedMatrices) -> Iterator[tuple[TensorName, Tensor]]:
    """Codes and scales of a core, or of one expert's matrix, by their names."""
    codes = found.codes if found.core_type.word_codes == 1 else pack(found.codes, found.core_type)
    yield replace(core, part=CODES[found.core_type]), codes
    yield replace(core, part=CorePart.SCALES), found.scales


def core_tensor_shapes(
    core: TensorName, core_type: CoreType | None, shape: Sequence[int]
) -> dict[TensorName, tuple[int, ...]]:
    """Shapes of codes and scales by their names; of the core itself if it is not quantised.

    Args:
        core: Name of the core, or of one expert's matrix.
        core_type: Encoding.
        shape: Sizes of the core that it stands for; the last two are H and I.
    """
    if core_type is None:
        return {core: tuple(shape)}
    *experts, outputs, inputs = shape
    if core.projection == Projection.DOWN:
        outputs, inputs = inputs, outputs
    groups = -(-inputs // (core_type.group_size or inputs))
    return {
        replace(core, part=CODES[core_type]): (
            *experts,
            outputs,
            core_type.words(inputs),
        ),
        replace(core, part=CorePart.SCALES): (*experts, outputs, groups),
    }


def part_dtype(
    part: CorePart | None, core_type: CoreType | None, dtype: torch.dtype
) -> torch.dtype:
    """Type of a tensor: that of its codes, or the type of factors and scales."""
    if part == CorePart.PACKED_CODES:
        return torch.uint8 if core_type and core_type.bits == 3 else torch.int32
    return code_dtype(core_type) if part == CorePart.CODES and core_type else dtype


def values_of(parts: Mapping[CorePart, Tensor], dtype: torch.dtype) -> Tensor:
    """Values of the matrices of a core, shape (..., outputs, inputs).

    Inputs are filled up with zeros to what the codes have room for.

    Args:
        parts: Its tensors.
        dtype: Type of the values.
    """
    words, scales = parts.get(CorePart.PACKED_CODES), parts[CorePart.SCALES]
    if words is None or words.dtype != torch.int32 or words.device.type != "cpu":
        return quantised_matrices(parts).dequantised(dtype)
    core_type, _ = packed_type(words, scales)
    codes = unpacked_values(words, dtype if dtype.itemsize < 8 else torch.float32)
    return QuantisedMatrices(codes, scales, core_type).dequantised(dtype)


def packed_type(words: Tensor, scales: Tensor) -> tuple[CoreType, int]:
    """Encoding of packed codes, and the inputs that they have room for."""
    small, large = _PACKED[words.dtype]
    room = words.shape[-1] // small.words(1) * small.word_codes
    groups = -(-room // (small.group_size or 1))
    return (small if scales.shape[-1] == groups else large), room


def quantised_matrices(
    parts: Mapping[CorePart, Tensor], columns: int | None = None
) -> QuantisedMatrices:
    """A core from its codes and scales.

    Args:
        parts: Its tensors.
        columns: Inputs of its matrices; None for as many as the words of codes have room for, those
            beyond the inputs being zero.
    """
    scales = parts[CorePart.SCALES]
    if CorePart.CODES in parts:
        codes = parts[CorePart.CODES]
        core_type = CoreType.W8 if codes.dtype == torch.int8 else CoreType.FP8
        return QuantisedMatrices(codes, scales, core_type)
    words = parts[CorePart.PACKED_CODES]
    core_type, room = packed_type(words, scales)
    return QuantisedMatrices(unpack(words, core_type, columns or room), scales, core_type)


def parts_of_cores(
    tensors: Mapping[TensorName, Tensor],
) -> dict[TensorName, dict[CorePart, Tensor]]:
    """Codes and scales by the names of the cores, or of the experts' matrices, that they are of."""
    found: dict[TensorName, dict[CorePart, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.part is not None:
            found.setdefault(name.core_name, {})[name.part] = tensor
    return found


def dequantised(
    group: Mapping[TensorName, Tensor], shapes: Mapping[TensorName, Sequence[int]]
) -> dict[TensorName, Tensor]:
    """A group's tensors with cores in place of codes and scales; exact in float32.

    Args:
        group: Its tensors by their names relative to the group.
        shapes: Shapes of the cores, or of the experts' matrices.
    """
    plain = {name: tensor for name, tensor in group.items() if name.part is None}
    for core, parts in parts_of_cores(group).items():
        down = core.projection == Projection.DOWN
        found = quantised_matrices(parts, shapes[core][-2 if down else -1]).dequantised()
        plain[core] = found.mT.contiguous() if down else found
    return plain
