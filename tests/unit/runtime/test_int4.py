from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.runtime.int4 import Layout, scales_and_zeros

pytestmark = pytest.mark.skipif(
    Layout.find(16, 32, 1) is None, reason="torch has no kernel for 4 bits on this processor"
)


@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(1, 40))
def test_products(blocks: int, groups: int, size: int, rows: int) -> None:
    """As in float64, of few rows by the kernel and of many without it; packing is undone."""
    outputs, inputs = 16 * blocks, groups * size
    layout = Layout.find(outputs, inputs, groups)
    assert layout is not None
    codes_OK = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scales_OG = torch.randn(outputs, groups).bfloat16()
    words = layout.pack(codes_OK)
    assert words.numel() == codes_OK.numel() // 2
    assert torch.equal(layout.unpack(words), codes_OK)
    rows_NK = torch.randn(rows, inputs).bfloat16()
    matrix_OK = codes_OK.double() * scales_OG.double().repeat_interleave(size, 1)
    expected_NO = rows_NK.double() @ matrix_OK.mT
    product_NO = layout.multiply(rows_NK, words, scales_and_zeros(scales_OG))
    allowed = 2**-8 * float(rows_NK.double().abs().amax() * matrix_OK.abs().sum(1).amax())
    torch.testing.assert_close(product_NO.double(), expected_NO, rtol=0, atol=allowed)


@pytest.mark.parametrize("shape", [(24, 64, 2), (0, 64, 2), (32, 96, 2), (32, 60, 2), (32, 64, 1)])
def test_shapes_that_the_kernel_does_not_take(shape: tuple[int, int, int]) -> None:
    taken = shape == (32, 64, 1)
    assert (Layout.find(*shape) is not None) == taken
