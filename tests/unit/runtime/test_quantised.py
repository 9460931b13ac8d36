from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace

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
from tuckerize.runtime import grouped, int4
from tuckerize.runtime.grouped import assign
from tuckerize.runtime.int4 import Layout
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


@pytest.mark.parametrize("inputs", [64, 72])  # kernels take whole blocks of 32
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("core_type", CoreType)
@pytest.mark.parametrize("slow", [set(), {torch.bfloat16}], ids=["kernels for 16 bits", "none"])
def test_few_and_many_rows_in_bfloat16(
    inputs: int,
    uneven: bool,
    core_type: CoreType,
    slow: set[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouped, "_SLOW_ON_CPU", slow)
    few: list[int] = []
    for owner, name in ((torch, "_weight_int8pack_mm"), (int4, "_multiply")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), few))
    core, halves = core_and_parts(quantise(torch.randn(4, 48, inputs), core_type), uneven=uneven)
    experts_N = torch.tensor([0] * 3 + [1] * 2 + [3] * 70)
    rows_NX = torch.randn(len(experts_N), inputs).bfloat16()
    product_NY = multiply_quantised(rows_NX, core, assign(experts_N[:, None], range(4)), None)
    matrices = [half.dequantised(torch.float64) for half in halves]
    expected_NY = torch.stack([
        matrices[expert] @ row[: matrices[expert].shape[1]].double()
        for expert, row in zip(experts_N.tolist(), rows_NX, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(product_NY.double(), expected_NY, rtol=0.02, atol=0.15)
    has_int4 = core_type.bits < 8 and Layout.find(48, 64, 2) is not None
    has_kernel = core_type == CoreType.W8 or has_int4
    assert few == ([3, 2] if inputs % 64 == 0 and has_kernel else [])


def noting(kernel: Callable[..., Tensor], few: list[int]) -> Callable[..., Tensor]:
    """A kernel that notes the rows that it multiplies."""

    def noted(rows_NX: Tensor, *operands: object) -> Tensor:
        few.append(len(rows_NX))
        return kernel(rows_NX, *operands)

    return noted


def core_and_parts(
    found: QuantisedMatrices, *, uneven: bool
) -> tuple[QuantisedCore | QuantisedRows, list[QuantisedMatrices]]:
    """A core of four experts, and theirs; where uneven, the second has half of the inputs."""
    whole = found.codes.shape[-1]
    if not uneven:
        return QuantisedCore(parts(found)), [found.of_expert(e) for e in range(4)]
    halves = [found.of_expert(e).narrowed(inputs=(whole, whole // 2)[e == 1]) for e in range(4)]
    return QuantisedRows(QuantisedCore(parts(half)) for half in halves), halves


@pytest.mark.parametrize("core_type", [own for own in CoreType if own.bits < 8])
@pytest.mark.parametrize("uneven", [False, True])
def test_codes_come_back_from_the_packing_of_a_kernel(core_type: CoreType, uneven: bool) -> None:
    """Whoever stores, moves or trains a core sees what it was given, whatever it multiplied."""
    found = quantise(torch.randn(4, 48, 256), core_type)
    core, _ = core_and_parts(replace(found, scales=found.scales.bfloat16()), uneven=uneven)
    stored = {name: own.clone() for name, own in core.state_dict().items()}
    first = core[0] if isinstance(core, QuantisedRows) else core
    expert = None if uneven else 0
    matrix_XY = first.matrices(torch.float32, expert)

    def use() -> None:
        rows_NX = torch.randn(8, 256).bfloat16()
        multiply_quantised(rows_NX, core, assign(torch.arange(8)[:, None] % 4, range(4)), None)
        if Layout.find(48, 256, 2) is not None:
            assert any(own.numel() for own in core.buffers())
            assert not first.get_parameter(CorePart.PACKED_CODES).numel()

    use()
    torch.testing.assert_close(core.state_dict(), stored, rtol=0, atol=0)
    use()
    copied = copy.deepcopy(core).to(torch.float32).to(torch.bfloat16)
    torch.testing.assert_close(copied.state_dict(), stored, rtol=0, atol=0)
    use()
    core.load_state_dict(stored)
    torch.testing.assert_close(core.state_dict(), stored, rtol=0, atol=0)
    use()
    assert torch.equal(first.matrices(torch.float32, expert), matrix_XY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_rows_after_inference(dtype: torch.dtype) -> None:
    found = quantise(torch.randn(4, 48, 64), CoreType.W4)
    core, halves = core_and_parts(found, uneven=False)
    core.to(dtype)
    rows_NX, assigned = torch.randn(4, 64).to(dtype), assign(torch.arange(4)[:, None], range(4))
    with torch.inference_mode():
        multiply_quantised(rows_NX, core, assigned, None)
    rows_NX.requires_grad_()
    torch.autograd.backward(multiply_quantised(rows_NX, core, assigned, None).sum())
    expected_NX = torch.stack([half.dequantised().sum(0) for half in halves])
    assert rows_NX.grad is not None
    torch.testing.assert_close(rows_NX.grad.float(), expected_NX, rtol=0.02, atol=0.2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler for the CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_products_are_the_same(dtype: torch.dtype) -> None:
    """Of 90 inputs codes have room for 96; Inductor miscomputed what was cut from it."""
    found = quantise(torch.randn(4, 48, 90), CoreType.W4)
    core, _ = core_and_parts(found, uneven=False)
    core.to(dtype)

    def multiplied(rows_NX: Tensor, experts_N1: Tensor) -> Tensor:
        return multiply_quantised(rows_NX, core, assign(experts_N1, range(4)), None)

    torch.compiler.reset()
    rows_NX, experts_N1 = torch.randn(9, 90).to(dtype), torch.arange(9)[:, None] % 4
    with torch.no_grad():
        compiled = torch.compile(multiplied)(rows_NX, experts_N1)
        torch.testing.assert_close(compiled, multiplied(rows_NX, experts_N1))
