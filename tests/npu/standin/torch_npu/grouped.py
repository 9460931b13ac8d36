"""The grouped product of the stand-in: its documented semantics, on the host.

Rows behind the last group are NaN here: the real one does not promise to fill them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import npu

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> list[Tensor]:
    """Multiply sorted rows by the matrices of their groups; the one form that is used."""
    (rows,), (matrices,) = x, weight
    if (split_item, group_type, group_list_type) != (3, 0, 1):
        raise RuntimeError("stand-in NPU: another form of npu_grouped_matmul")
    if rows.dtype not in _DTYPES or matrices.dtype != rows.dtype:
        raise RuntimeError(f"stand-in NPU: npu_grouped_matmul of {rows.dtype}")
    if group_list.dtype != torch.int64 or not 2 <= len(group_list) <= 128:
        raise RuntimeError(f"stand-in NPU: npu_grouped_matmul with groups {group_list}")
    # What the real one does on the device is done on the host here, and is not counted.
    marked = npu.device.mark(False)
    on_host, counts = rows.cpu(), group_list.tolist()
    product = on_host.new_full((len(rows), matrices.shape[2]), torch.nan)
    first = 0
    for count, matrix in zip(counts, matrices.cpu(), strict=True):
        product[first : first + count] = on_host[first : first + count] @ matrix
        first += count
    result = product.to(rows.device)
    npu.device.mark(marked)
    return [result]
