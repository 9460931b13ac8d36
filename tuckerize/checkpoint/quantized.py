"""Quantized weights in a checkpoint: found by the names and types of what is stored.

A quantized weight lies in several tensors: codes, scales, zero points. `find_quantized` finds them
in the headers, under the names of the dense weights; `dequantize.py` computes these. The tensors
decide; config.json gives only what they do not say: bits of packed codes, sizes of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tuckerize.checkpoint.quantization_config import FP8_BLOCK, WORD_BITS, QuantizationDescription
from tuckerize.domain import TensorHeader
from tuckerize.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64")
"""Types of dense weights, by safetensors' names."""


class Coding(StrEnum):
    """Encoding of a quantized weight."""

    FP8 = "FP8"
    INT8 = "INT8"
    PACKED_INT = "packed integers"
    NVFP4 = "NVFP4"
    MXFP4 = "MXFP4"
    GPTQ = "GPTQ"
    AWQ = "AWQ"


class Role(StrEnum):
    """Role of one stored tensor of a quantized weight."""

    CODES = "codes"
    SCALE = "scale"
    ZERO_POINT = "zero point"
    GLOBAL_SCALE = "global scale"
    SHAPE = "shape"
    GROUP_INDEX = "group index"


# Endings that are added to the name of the weight.
_ENDINGS = {
    "": Role.CODES,
    "_packed": Role.CODES,
    "_blocks": Role.CODES,
    "_scale": Role.SCALE,
    "_scale_inv": Role.SCALE,
    "_scales": Role.SCALE,
    "_zero_point": Role.ZERO_POINT,
    "_global_scale": Role.GLOBAL_SCALE,
    "_shape": Role.SHAPE,
    "_g_idx": Role.GROUP_INDEX,
}
# Names beside that of a `weight`: DeepSeek-V4's scale, and those of GPTQ and AWQ.
_NEIGHBOURS = {
    "scale": Role.SCALE,
    "qweight": Role.CODES,
    "scales": Role.SCALE,
    "qzeros": Role.ZERO_POINT,
    "g_idx": Role.GROUP_INDEX,
}
# They belong to activations: nothing of the weight is computed from them.
_OF_ACTIVATIONS = re.compile(
    r"(?:.+_proj_)?(?:input|output|activation|k|v)_(?:scale|global_scale|zero_point)"
)
_ONLY_OF_QUANTIZED = re.compile(
    r"(?:weight|.+_proj)_(?:packed|blocks|scales?|scale_inv|zero_point|global_scale|shape|g_idx)"
    r"|qweight|qzeros"
)
_NEEDED = {
    Coding.FP8: {Role.SCALE},
    Coding.INT8: {Role.SCALE},
    Coding.PACKED_INT: {Role.SCALE, Role.SHAPE},
    Coding.NVFP4: {Role.SCALE, Role.GLOBAL_SCALE},
    Coding.MXFP4: {Role.SCALE},
    Coding.GPTQ: {Role.SCALE, Role.ZERO_POINT},
    Coding.AWQ: {Role.SCALE, Role.ZERO_POINT},
}
_OPTIONAL = {
    Coding.INT8: {Role.ZERO_POINT},
    Coding.PACKED_INT: {Role.ZERO_POINT, Role.GROUP_INDEX},
    Coding.GPTQ: {Role.GROUP_INDEX},
}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight and the tensors that it is stored in.

    Attributes:
        name: Name of the dense weight.
        coding: Its encoding.
        header: Header of the dense weight; its bytes are those of all stored tensors.
        stored: Names of the stored tensors, by role.
        unused: Stored tensors that belong to its activations.
        bits: Bits per code.
        block: Rows and columns that share a scale of FP8, where the scale is a matrix.
        transposed: Whether the codes of every expert are those of the transposed weight.
        zeros_less_one: Whether zero points of GPTQ are stored less one.
    """

    name: str
    coding: Coding
    header: TensorHeader
    stored: Mapping[Role, str]
    unused: tuple[str, ...] = ()
    bits: int = 8
    block: tuple[int, int] = FP8_BLOCK
    transposed: bool = False
    zeros_less_one: bool = True

    @property
    def codes(self) -> str:
        """Name of the tensor of its codes."""
        return self.stored[Role.CODES]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all tensors that are stored for the weight."""
        return (*self.stored.values(), *self.unused)


def find_quantized(
    tensors: Mapping[str, TensorHeader], description: QuantizationDescription, dtype: str
) -> dict[str, QuantizedWeight]:
    """Quantized weights of a checkpoint, by the names of the dense weights.

    Args:
        tensors: Headers of the stored tensors.
        description: What config.json says of them.
        dtype: safetensors' name of the type that the weights are dequantized to.

    Raises:
        CheckpointError: A scale is missing, a tensor beside a quantized weight is not known, or the
            encoding is not one that can be read.
    """
    beside: dict[str, list[str]] = {}
    for name in tensors:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, QuantizedWeight] = {}
    used: dict[str, str] = {}
    for stored in tensors:
        weight = _weight_of(stored, tensors)
        if weight is None:
            continue
        quantized = _describe(weight, stored, tensors, beside, description, dtype)
        for part in quantized.parts:
            if part in used:
                raise CheckpointError(
                    f"the tensor {part} would be used for {used[part]} and for {weight}",
                    hint="the checkpoint holds a weight twice: remove one of them",
                )
            used[part] = weight
        found[weight] = quantized
    _refuse_rest(tensors, used, description)
    return found


def _weight_of(stored: str, tensors: Mapping[str, TensorHeader]) -> str | None:
    """Name of the dense weight that a tensor holds the codes of; None for any other tensor."""
    module, _, leaf = stored.rpartition(".")
    if leaf == "qweight":
        return f"{module}.weight"
    for ending in ("_packed", "_blocks"):
        if leaf.endswith(ending):
            return stored.removesuffix(ending)
    is_weight = leaf == "weight" or leaf.endswith("_proj")
    kind = tensors[stored].dtype
    if is_weight and (kind.startswith("F8_E") or kind in ("I8", "F4")):
        return stored
    return None


def _describe(
    weight: str,
    codes: str,
    tensors: Mapping[str, TensorHeader],
    beside: Mapping[str, list[str]],
    description: QuantizationDescription,
    dtype: str,
) -> QuantizedWeight:
    module, _, leaf = weight.rpartition(".")
    stored: dict[Role, str] = {}
    unused: list[str] = []
    for name in beside[module]:
        own = name.rpartition(".")[2]
        role = _role(own, leaf, tensors[name].dtype)
        if role is not None:
            if role in stored:
                raise CheckpointError(
                    f"{weight} has two tensors for its {role}: {stored[role]} and {name}",
                    hint="the checkpoint holds a weight twice: remove one of them",
                )
            stored[role] = name
        elif _OF_ACTIVATIONS.fullmatch(own) and (leaf == "weight" or own.startswith(leaf)):
            unused.append(name)
        elif (leaf == "weight" or own.startswith(f"{leaf}_")) and not own.endswith("bias"):
            raise CheckpointError(
                f"the tensor {name} stands beside the quantized weight {codes}, and no encoding "
                "that tuckerize reads has it",
                hint=_READ,
            )
    coding = _coding(codes, stored, tensors, description)
    missing = _NEEDED[coding] - stored.keys()
    extra = stored.keys() - _NEEDED[coding] - _OPTIONAL.get(coding, set()) - {Role.CODES}
    if missing or extra:
        place = f"the {' and the '.join(sorted(missing or extra))} of {codes} ({coding})"
        names = ", ".join(stored[role] for role in sorted(extra))
        raise CheckpointError(
            f"{place} is missing" if missing else f"{place} is not known: {names}",
            hint="the checkpoint is incomplete: fetch it again" if missing else _READ,
        )
    bits = description.bits(module) if coding in _PACKED else 8
    if WORD_BITS % bits and coding != Coding.PACKED_INT:
        raise CheckpointError(
            f"{codes} holds {coding} codes of {bits} bits, of which only 2, 4 and 8 are read",
            hint=_READ,
        )
    blocks = codes.endswith("_blocks")
    if blocks:  # gpt-oss: (E, rows, blocks, 16 bytes), used transposed
        experts, rows, count, size = tensors[codes].shape
        shape: tuple[int, ...] = (experts, 2 * count * size, rows)
    else:
        shape = _dense_shape(coding, tensors[codes], bits)
    stored_bytes = sum(tensors[name].bytes for name in (*stored.values(), *unused))
    return QuantizedWeight(
        name=weight,
        coding=coding,
        header=TensorHeader(dtype, shape, stored_bytes),
        stored=stored,
        unused=tuple(unused),
        bits=bits,
        block=description.block(module),
        transposed=blocks,
        zeros_less_one=description.value.get("checkpoint_format") != "gptq_v2",
    )


_PACKED = (Coding.PACKED_INT, Coding.GPTQ, Coding.AWQ)
_READ = (
    "docs/reference/sources.md lists the encodings; a bf16 release of the model works in any case"
)


def _role(own: str, leaf: str, dtype: str) -> Role | None:
    """Role of a tensor for a weight of the same module."""
    if leaf == "weight" and own in _NEIGHBOURS:
        return _NEIGHBOURS[own]
    ending = own.removeprefix(leaf) if own.startswith(leaf) else "?"
    if ending == "" and dtype in FLOATS:  # a dense weight beside codes
        return None
    return _ENDINGS.get(ending)


def _coding(
    codes: str,
    stored: Mapping[Role, str],
    tensors: Mapping[str, TensorHeader],
    description: QuantizationDescription,
) -> Coding:
    leaf, kind = codes.rpartition(".")[2], tensors[codes].dtype
    scale = tensors[stored[Role.SCALE]].dtype if Role.SCALE in stored else ""
    powers = scale in ("U8", "F8_E8M0")
    if leaf == "qweight" and kind == "I32":
        return Coding.AWQ if description.method == "awq" else Coding.GPTQ
    if leaf.endswith("_packed") and kind == "I32":
        return Coding.PACKED_INT
    if leaf.endswith("_packed") and kind == "U8":
        return Coding.MXFP4 if powers else Coding.NVFP4
    if (leaf.endswith("_blocks") and kind == "U8") or (kind in ("I8", "F4") and powers):
        return Coding.MXFP4
    if kind in ("F8_E4M3", "F8_E5M2"):
        return Coding.FP8
    if kind == "I8":
        return Coding.INT8
    raise CheckpointError(
        f"the tensor {codes} of type {kind} is of no encoding that tuckerize reads", hint=_READ
    )


def _dense_shape(coding: Coding, codes: TensorHeader, bits: int) -> tuple[int, ...]:
    *lead, last = codes.shape
    if coding == Coding.PACKED_INT:
        return (*lead, last * WORD_BITS // bits)
    if coding == Coding.GPTQ:
        return (last, lead[0] * WORD_BITS // bits)
    if coding == Coding.AWQ:
        return (last * WORD_BITS // bits, lead[0])
    if coding in (Coding.NVFP4, Coding.MXFP4) and codes.dtype != "F4":
        return (*lead, 2 * last)
    return codes.shape


def _refuse_rest(
    tensors: Mapping[str, TensorHeader],
    used: Mapping[str, str],
    description: QuantizationDescription,
) -> None:
    """Refuse tensors that must belong to a quantized weight, and belong to none."""
    for name, header in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name in used:
            continue
        if leaf == "weight" and header.dtype not in FLOATS:
            method = f" by '{description.method}'" if description.method else ""
            raise CheckpointError(
                f"the tensor {name} of type {header.dtype} was quantized{method} in a way that "
                "tuckerize does not read",
                hint=_READ,
            )
        if _ONLY_OF_QUANTIZED.fullmatch(leaf) and not _OF_ACTIVATIONS.fullmatch(leaf):
            dense = tensors.get(f"{module}.weight")
            kind = f"but {module}.weight is {dense.dtype}" if dense else "which is missing"
            raise CheckpointError(
                f"the tensor {name} belongs to a quantized weight, {kind}",
                hint="fetch the checkpoint again; if a script dequantized it, remove the scales",
            )
