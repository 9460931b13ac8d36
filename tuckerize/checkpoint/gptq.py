"""Codes of GPTQ and AWQ as plain integers: their packing, which compressed-tensors lacks or hides.

Both keep a linear layer as (in, out): GPTQ packs 32-bit words along the inputs, AWQ along the
outputs, in an order of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD_BITS = 32
# Places of the eight outputs in a word of AWQ.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_gptq(
    codes: Tensor, zeros: Tensor, bits: int, *, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """Codes and zero points of GPTQ, as signed integers.

    Args:
        codes: Packed codes, shape (in x bits / 32, out).
        zeros: Packed zero points, shape (groups, out x bits / 32).
        bits: Bits per code.
        plus_one: Whether zero points are stored less one, as in all but format `gptq_v2`.

    Returns:
        Codes (out, in) and zero points (out, groups), of type int8.
    """
    points = (_unpack(zeros, bits).T + int(plus_one)) & (2**bits - 1)
    return _signed(_unpack(codes.T, bits), bits), _signed(points, bits)


def unpack_awq(codes: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and zero points of AWQ, as signed integers.

    Args:
        codes: Packed codes, shape (in, out x bits / 32).
        zeros: Packed zero points, shape (groups, out x bits / 32).
        bits: Bits per code.

    Returns:
        Codes (out, in) and zero points (out, groups), of type int8.
    """
    order = torch.tensor(_AWQ_ORDER[: _WORD_BITS // bits])

    def ordered(packed: Tensor) -> Tensor:
        words = _unpack(packed, bits).reshape(len(packed), -1, _WORD_BITS // bits)
        return _signed(words[..., order].flatten(1).T, bits)

    return ordered(codes), ordered(zeros)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of the words of every row, from the lowest bits up."""
    shifts = torch.arange(0, _WORD_BITS, bits)
    codes: Tensor = (words.unsqueeze(2) >> shifts) & (2**bits - 1)
    return codes.flatten(1)


def _signed(codes: Tensor, bits: int) -> Tensor:
    signed: Tensor = codes - 2 ** (bits - 1)
    return signed.to(torch.int8).contiguous()
