"""Codes of quantised matrices in the packing of compressed-tensors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.domain import CoreType

# Codes that are packed at once; they take eight bytes each meanwhile.
_PACKED_VALUES = 2**22


def pack(codes: Tensor, core_type: CoreType) -> Tensor:
    """Pack codes along the last dimension, the first in the lowest bits.

    Codes are stored with an offset, so that they are not negative; zeros fill the last word up.

    Returns:
        Eight codes of 4 bits an int32, or eight of 3 bits three bytes (uint8): the bytes of
            compressed-tensors' words since 0.20.
    """
    columns = codes.shape[-1]
    rows = torch.split(codes.flatten(0, -2), max(1, _PACKED_VALUES // max(1, columns)))
    packed = torch.cat([_packed(own, core_type) for own in rows])
    return packed.view(*codes.shape[:-1], core_type.words(columns))


def _packed(codes: Tensor, core_type: CoreType) -> Tensor:
    bits, per_word = core_type.bits, core_type.word_codes
    offset = grouped(codes.to(torch.int32), per_word) + 2 ** (bits - 1)
    shifts = torch.arange(0, per_word * bits, bits, dtype=torch.int32, device=codes.device)
    words: Tensor = (offset << shifts).sum(-1, dtype=torch.int32)
    if core_type.words(1) == 1:
        return words
    whole = words.unsqueeze(-1).view(torch.uint8)
    return whole[..., : core_type.words(1)].flatten(-2)


def unpack(words: Tensor, core_type: CoreType, columns: int) -> Tensor:
    """Unpack codes (int8); the inverse of `pack`.

    Args:
        words: Packed codes.
        core_type: Encoding.
        columns: Number of codes in a row.
    """
    bits, mask = core_type.bits, 2**core_type.bits - 1
    read = words.contiguous().view(torch.uint8)  # the lowest bits first
    if 8 % bits == 0:
        parts = [(read >> place) & mask for place in range(0, 8, bits)]
    else:  # codes lie in two bytes
        low, middle, high = (read[..., place::bits] for place in range(bits))
        whole = low | (middle.to(torch.int32) << 8) | (high.to(torch.int32) << 16)
        places = range(0, core_type.word_codes * bits, bits)
        parts = [((whole >> place) & mask).to(torch.uint8) for place in places]
    offset = torch.stack(parts, -1).flatten(-2)
    codes: Tensor = offset[..., :columns].view(torch.int8) - 2 ** (bits - 1)
    return codes


@torch.compiler.disable  # type: ignore[untyped-decorator]
def unpacked_values(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of 4 bits in a type of 8 to 32, two at a time by a table, which a CPU does faster.

    Inductor (torch 2.13) computes wrong values where it fuses the change of type at the end.

    Args:
        words: Packed codes, shape (..., O, K/8) in int32, or as bytes, two codes in each.
        dtype: Type of the result, shape (..., O, K).
    """
    places = words.contiguous().view(torch.uint8)
    found = _pairs(dtype).index_select(0, places.flatten().to(torch.int32))
    return found.view(dtype).view(*places.shape[:-1], 2 * places.shape[-1])


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """Both codes of 4 bits in every byte, the lower one first, as one integer."""
    codes = torch.arange(16, device="cpu") - 8
    pairs = torch.cartesian_prod(codes, codes).flip(1).to(dtype)
    return pairs.view({1: torch.int16, 2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()


def grouped(values: Tensor, group: int) -> Tensor:
    """Values in groups along the last dimension, zero-padded, shape (..., G, group)."""
    padded = functional.pad(values, (0, -values.shape[-1] % group))
    return padded.view(*padded.shape[:-1], padded.shape[-1] // group, group)
