from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tuckerize.domain import CoreType
from tuckerize.format.cores import CODES, values_of
from tuckerize.linalg.packing import pack
from tuckerize.linalg.quantise import QuantisedMatrices, quantise
from tuckerize.names import CorePart
from tuckerize.runtime.grouped import assign
from tuckerize.runtime.quantised import QuantisedCore, QuantisedRows, multiply_quantised


def parts(found: QuantisedMatrices) -> dict[CorePart, Tensor]:
    packed = CODES[found.core_type] == CorePart.PACKED_CODES
    codes = pack(found.codes, found.core_type) if packed else found.codes.contiguous()
    return {CODES[found.core_type]: codes, CorePart.SCALES: found.scales}


@given(
    st.sampled_from(CoreType),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_values_are_codes_times_scales(
    core_type: CoreType, experts: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Bit for bit, also of no experts, which a process may own; zero beyond the inputs."""
    found = quantise(torch.randn(4, outputs, inputs), core_type)
    values = values_of({part: own[:experts] for part, own in parts(found).items()}, dtype)
    assert torch.equal(values[..., :inputs], found.dequantised(dtype)[:experts])
    assert not values[..., inputs:].any()


@pytest.mark.parametrize("inputs", [64, 72])  # the kernel takes whole blocks of 32
@pytest.mark.parametrize("uneven", [False, True])
def test_int8_of_few_and_of_many_rows(
    inputs: int, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, few = torch._weight_int8pack_mm, []

    def noted(rows: Tensor, *operands: Tensor) -> Tensor:
        few.append(len(rows))
        product: Tensor = kernel(rows, *operands)
        return product

    monkeypatch.setattr(torch, "_weight_int8pack_mm", noted)
    found = quantise(torch.randn(4, 48, inputs), CoreType.W8)
    if uneven:  # the second expert has half of the inputs
        halves = [
            found.of_expert(e).narrowed(inputs=(inputs, inputs // 2)[e == 1]) for e in range(4)
        ]
        core: QuantisedCore | QuantisedRows = QuantisedRows(QuantisedCore(parts(h)) for h in halves)
    else:
        core, halves = QuantisedCore(parts(found)), [found.of_expert(e) for e in range(4)]
    experts_N = torch.tensor([0] * 3 + [1] * 2 + [3] * 50)
    rows_NX = torch.randn(len(experts_N), inputs).bfloat16()
    product_NY = multiply_quantised(rows_NX, core, assign(experts_N[:, None], range(4)), None)
    matrices = [half.dequantised(torch.float64) for half in halves]
    expected_NY = torch.stack([
        matrices[expert] @ row[: matrices[expert].shape[1]].double()
        for expert, row in zip(experts_N.tolist(), rows_NX, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(product_NY.double(), expected_NY, rtol=0.02, atol=0.05)
    assert few == ([3, 2] if inputs % 64 == 0 else [])
