"""Grouped GEMM of an NPU, `npu_grouped_matmul`, on rows sorted by expert.

Source: op-plugin, npu_grouped_matmul (constraints), August 2026.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuckerize.ascend.constraints import HALF_TYPES, Constraint, at_most
from tuckerize.ascend.npu import import_torch_npu

_GENERATIONS = ("A2", "A3", "310P")


def grouped_matmul_constraints(
    generation: str, *, num_experts: int, inner: int, outer: int, dtype: torch.dtype
) -> list[Constraint]:
    """Documented constraints of `npu_grouped_matmul` on rows sorted by expert.

    Args:
        generation: NPU generation: A2, A3 or 310P.
        num_experts: Experts of the process, one group of rows each.
        inner: Columns of the rows.
        outer: Columns of the products.
        dtype: Type of both.
    """
    types = (torch.float16,) if generation == "310P" else (*HALF_TYPES, torch.float32)
    names = " or ".join(str(kind).removeprefix("torch.") for kind in types)
    return [
        Constraint("generation", generation, "A2, A3 or 310P", generation in _GENERATIONS),
        Constraint("dtype", str(dtype), names, dtype in types),
        Constraint("experts per process", str(num_experts), "2 to 128", 2 <= num_experts <= 128),
        at_most("columns of the rows", inner, 65535),
        at_most("columns of the products", outer, 65535),
    ]


def has_grouped_matmul(num_experts: int, inner: int, outer: int, dtype: torch.dtype) -> bool:
    """Whether `grouped_matmul` may be used on A2 and A3, whose constraints are the same.

    Args:
        num_experts: Experts of the process.
        inner: Columns of the rows.
        outer: Columns of the products.
        dtype: Type of both.
    """
    constraints = grouped_matmul_constraints(
        "A2", num_experts=num_experts, inner=inner, outer=outer, dtype=dtype
    )
    return all(constraint.met for constraint in constraints)


def grouped_matmul(rows_NX: Tensor, matrices_EXY: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply rows sorted by expert by their experts' matrices; no gradient.

    Args:
        rows_NX: Rows, shape (N, X).
        matrices_EXY: One matrix per expert, shape (E, X, Y).
        counts_E: Rows per expert, int64, on the device.

    Returns:
        Products, shape (N, Y); undefined for rows beyond the sum of the counts.
    """
    product_NY: Tensor
    # One tensor of rows, one of products; rows are grouped, and their counts are given.
    (product_NY,) = import_torch_npu().npu_grouped_matmul(
        [rows_NX],
        [matrices_EXY],
        group_list=counts_E,
        split_item=3,
        group_type=0,
        group_list_type=1,
    )
    return product_NY
