"""Attention with narrow values: the fused kernel, and the same result."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tuckerize.calibration.attention import FusedAttention


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("keys", "values"), [(12, 8), (8, 8), (8, 12)])
@pytest.mark.parametrize("masked", [False, True])
def test_result_is_that_of_the_plain_call(keys: int, values: int, masked: bool) -> None:
    query, key = (random(2, 4, 9, keys, seed=seed) for seed in (0, 1))
    value = random(2, 4, 9, values, seed=2)
    mask = random(2, 1, 9, 9, seed=3) > 0 if masked else None
    if mask is not None:
        mask |= torch.eye(9, dtype=torch.bool)

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=not masked, scale=0.3
        )

    expected = attend()
    with FusedAttention():
        found = attend()
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_fused_kernel_takes_narrow_values() -> None:
    query, key, value = (random(1, 2, 9, size, seed=size) for size in (12, 12, 8))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(RuntimeError, match="No available kernel"):
            scaled_dot_product_attention(query, key, value)
        with FusedAttention():
            scaled_dot_product_attention(query, key, value)
