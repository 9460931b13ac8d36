"""Quantised cores as tensors: shapes as announced, values as quantised, also where columns end."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from tuckerize.domain import CoreType, Projection, StackShape
from tuckerize.format.cores import (
    core_tensor_shapes,
    core_tensors,
    core_types_of,
    dequantised,
    part_dtype,
    quantised_matrices,
    scheme_of,
)
from tuckerize.linalg.quantise import quantise
from tuckerize.names import CorePart, TensorName
from tuckerize.weight_types import WEIGHT_TYPES, WeightType

sizes = st.integers(1, 70)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CoreType), st.sampled_from(Projection), st.integers(1, 3), sizes, sizes)
def test_stored_tensors_have_the_announced_shapes_and_values(
    core_type: CoreType, projection: Projection, experts: int, rows: int, columns: int
) -> None:
    core_EHI = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(0))
    down = projection == Projection.DOWN
    found = quantise(core_EHI.mT if down else core_EHI, core_type)
    name = TensorName.core(projection)
    stored = dict(core_tensors(name, found))
    assert {n: tuple(t.shape) for n, t in stored.items()} == core_tensor_shapes(
        name, core_type, core_EHI.shape
    )
    assert all(t.dtype == part_dtype(n.part, core_type, torch.bfloat16) for n, t in stored.items())
    values = found.dequantised().mT if down else found.dequantised()
    read = dequantised(stored, {name: core_EHI.shape})
    assert torch.equal(read[name], values)
    counted = WeightType("BF16", 16, 2.0**-8, core_type).core_bytes(
        StackShape(*core_EHI.shape), transposed=down
    )
    assert sum(t.numel() * t.element_size() for t in stored.values()) == counted


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([kind for kind in CoreType if kind.word_codes > 1]), sizes)
def test_codes_beyond_the_inputs_are_zero(core_type: CoreType, columns: int) -> None:
    matrix = torch.randn(1, 2, columns, generator=torch.Generator().manual_seed(1))
    stored = core_tensors(TensorName.core(Projection.UP), quantise(matrix, core_type))
    parts = {name.part: tensor for name, tensor in stored if name.part}
    room = quantised_matrices(parts).codes
    assert room.shape[-1] == -(-columns // 8) * 8
    assert not room[..., columns:].any()


@given(st.dictionaries(st.sampled_from("abcd"), st.sampled_from(CoreType), min_size=1))
def test_scheme_names_the_encoding_of_every_module(core_types: dict[str, CoreType]) -> None:
    scheme = scheme_of(core_types, "abcd")
    assert core_types_of(scheme, "abcd") == core_types
    QuantizationConfig.model_validate(scheme)
    with pytest.raises(ValueError, match="int-quantized of 8 bits, pack-quantized of 4 bits"):
        core_types_of({**scheme, "format": "marlin-24"}, "abcd")


def test_bytes_of_plain_cores_are_those_of_their_values() -> None:
    assert WEIGHT_TYPES["BF16"].core_bytes((2, 3, 5), transposed=False) == 60


def test_codes_have_types_of_their_own() -> None:
    assert part_dtype(None, None, torch.float16) == torch.float16
    assert part_dtype(CorePart.SCALES, CoreType.FP8, torch.float16) == torch.float16
    assert part_dtype(CorePart.PACKED_CODES, CoreType.W4, torch.float16) == torch.int32
    assert part_dtype(CorePart.PACKED_CODES, CoreType.W3, torch.float16) == torch.uint8
    assert part_dtype(CorePart.CODES, CoreType.W8, torch.float16) == torch.int8
    assert part_dtype(CorePart.CODES, CoreType.FP8, torch.float16) == torch.float8_e4m3fn
