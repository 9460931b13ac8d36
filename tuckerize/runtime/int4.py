"""Products with 4-bit codes in the packing of torch's kernel for a CPU.

The kernel has the outputs of a matrix in blocks; how many a block has, and in which order, depends
on the processor, so both are read off what torch packs. Letters: O outputs, K inputs, G groups of
inputs, N rows, B blocks, P places of outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tuckerize.linalg.packing import unpacked_values
from tuckerize.runtime.grouped import is_slow

_pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
_multiply = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)

# Where the kernel is vectorised; elsewhere it takes longer than to expand the codes.
_PROCESSORS = {"AVX2", "AVX512"}
_OFFSET = 8
_GROUPS = (32, 64, 128)  # sizes
_OUTPUTS = 16  # multiples of it
# Rows up to which the kernel is faster than a GEMM with values of a type; values to expand at once.
_FEW_ROWS, _EXPANDED = {torch.float32: 32, torch.bfloat16: 64}, 2**20


@dataclass(frozen=True)
class Layout:
    """Order of the codes of matrices of some outputs in the kernel.

    A block has the codes of all its outputs for the first input, then for the next one, two in a
    byte.

    Attributes:
        order_P: Outputs in the order of the kernel, shape (O,).
        block: Outputs of a block; the last one has those that are left.
    """

    order_P: Tensor
    block: int

    @classmethod
    def find(cls, outputs: int, inputs: int, groups: int) -> Layout | None:
        """Layout of a matrix whose scales are of so many groups; None if the kernel has none."""
        is_grouped = any(inputs == groups * size for size in _GROUPS)
        return _layout(outputs) if is_grouped and outputs and outputs % _OUTPUTS == 0 else None

    def pack(self, codes_OK: Tensor) -> Tensor:
        """Codes (int8, from -8 to 7) as the kernel has them, (O, K/2) bytes."""
        outputs, inputs = codes_OK.shape
        offset_PK = (codes_OK + _OFFSET).view(torch.uint8)[self.order_P]
        pairs_PK = offset_PK[::2] | (offset_PK[1::2] << 4)
        whole = (outputs - outputs % self.block) // 2
        blocks = (pairs_PK[:whole].view(-1, self.block // 2, inputs), pairs_PK[None, whole:])
        return torch.cat([own.mT.flatten() for own in blocks]).view(outputs, inputs // 2)

    def unpack(self, words: Tensor) -> Tensor:
        """The inverse of `pack`."""
        found = [values_BKP.mT.flatten(0, 1) for _, values_BKP in self._values(words, torch.int8)]
        return torch.cat(found)[self.order_P.argsort()]

    def multiply(self, rows_NK: Tensor, words: Tensor, scales_GO2: Tensor) -> Tensor:
        """Rows in bfloat16 times a matrix, shape (N, O): few by the kernel, many by a GEMM.

        The GEMM is in float32 where the CPU has none for bfloat16.

        Args:
            rows_NK: The rows.
            words: The codes of the matrix, packed.
            scales_GO2: Its scales, as `scales_and_zeros` makes them.
        """
        groups, outputs, _ = scales_GO2.shape
        size = rows_NK.shape[1] // groups
        dtype = torch.float32 if is_slow(rows_NK) else torch.bfloat16
        if len(rows_NK) <= _FEW_ROWS[dtype] and _multiply is not None:
            product: Tensor = _multiply(rows_NK.contiguous(), words, size, scales_GO2)
            return product
        scales_GP = scales_GO2[..., 0].to(dtype).index_select(1, self.order_P)
        own_NK = rows_NK.to(dtype)
        product_NP = own_NK.new_empty(len(own_NK), outputs)
        for start, values_BKP in self._values(words, dtype):
            blocks, inputs, width = values_BKP.shape
            own = slice(start, start + blocks * width)
            matrix_KP = values_BKP.new_empty(inputs, blocks * width)
            torch.mul(
                values_BKP.transpose(0, 1).view(groups, size, blocks, width),
                scales_GP[:, own].view(groups, 1, blocks, width),
                out=matrix_KP.view(groups, size, blocks, width),
            )
            torch.mm(own_NK, matrix_KP, out=product_NP[:, own])
        return product_NP.index_select(1, self.order_P.argsort()).to(rows_NK.dtype)

    def _values(self, words: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Codes of some blocks at a time, shape (B, K, P), and the first of their places."""
        outputs, inputs = words.shape[0], 2 * words.shape[1]
        whole = outputs - outputs % self.block
        step = max(1, _EXPANDED // (self.block * inputs)) * self.block
        for start in [*range(0, whole, step), whole]:
            own = words[start : min(start + step, whole) if start < whole else outputs]
            if len(own):
                values = unpacked_values(own, dtype)
                yield start, values.view(-1, inputs, min(self.block, len(own)))


def scales_and_zeros(scales_OG: Tensor) -> Tensor:
    """Scales as the kernel reads them, each before a zero point, shape (..., G, O, 2)."""
    return torch.stack([scales_OG, torch.zeros_like(scales_OG)], -1).transpose(-3, -2).contiguous()


@cache
def _layout(outputs: int) -> Layout | None:
    """Layout of matrices of so many outputs.

    Returns:
        None if torch has no such kernel, or packs in another way.
    """
    has_kernel = _pack is not None and _multiply is not None
    if not has_kernel or torch.backends.cpu.get_cpu_capability() not in _PROCESSORS:
        return None
    numbers_O2 = torch.arange(outputs, device="cpu")[:, None].expand(-1, 2)
    ends_O2 = torch.arange(2, device="cpu").expand(outputs, 2)
    block = int(_nibbles(ends_O2).argmax())  # then the next input comes
    found = torch.zeros(2 * outputs, dtype=torch.int64, device="cpu")
    for shift in range(0, outputs.bit_length(), 4):
        found += _nibbles(numbers_O2 >> shift & 15) << shift
    whole = outputs - outputs % block
    blocks_P = found[: 2 * whole].view(-1, 2, block)[:, 0].flatten()
    order_P = torch.cat([blocks_P, found[2 * whole :][: outputs - whole]])
    layout = Layout(order_P, block)
    codes_O2 = numbers_O2 * torch.tensor([3, 5], device="cpu") % 16
    is_whole = torch.equal(order_P.sort().values, numbers_O2[:, 0])
    packed = layout.pack((codes_O2 - _OFFSET).to(torch.int8)) if is_whole else None
    is_known = packed is not None and torch.equal(packed, _packed(codes_O2.to(torch.int32)))
    return layout if is_known else None


def _packed(codes_OK: Tensor) -> Tensor:
    """Codes (int32, from 0 to 15) as the kernel has them."""
    if _pack is None:
        raise TypeError("this torch has no kernel for 4 bits on a CPU")
    words: Tensor = _pack(codes_OK.contiguous(), 1)
    return words


def _nibbles(codes_OK: Tensor) -> Tensor:
    """Codes from 0 to 15 in the order of the kernel."""
    words = _packed(codes_OK.to(torch.int32))
    codes: Tensor = unpacked_values(words, torch.int8)
    return codes.flatten().to(torch.int64) + _OFFSET
