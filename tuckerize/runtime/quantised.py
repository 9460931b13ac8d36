"""Quantised cores at run time: packed in memory, dequantised while a product needs them.

On the CPU the matrix of one expert at a time is expanded, and only of experts with tokens; torch's
own kernel multiplies few rows by int8 as it is. On a device, where the host does not know the
experts with tokens, a grouped GEMM multiplies the expanded core of one stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuckerize.format.cores import values_of
from tuckerize.names import CorePart
from tuckerize.runtime.grouped import (
    Assignments,
    gemm,
    mix_and_multiply,
    multiply,
    multiply_one_by_one,
    zero_padded,
)


class QuantisedCore(nn.Module):
    """Codes and scales of a core, or of one expert's matrix.

    Args:
        parts: Its tensors.
    """

    weight_scale: Tensor

    def __init__(self, parts: Mapping[CorePart, Tensor]) -> None:
        super().__init__()
        for part, tensor in parts.items():
            self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Move codes, but keep their type: float8 is a floating type to torch, as scales have."""

        def apply(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved.to(tensor.dtype) if tensor.dtype.itemsize == 1 else moved

        return super()._apply(apply, *args, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def outputs(self) -> int:
        """Outputs of a matrix."""
        return self.weight_scale.shape[-2]

    def __len__(self) -> int:
        return len(self.weight_scale)

    def matrices(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Matrices that map inputs to outputs, shape (..., inputs, outputs).

        Inputs are filled up with zeros to what the codes have room for.

        Args:
            dtype: Type of the result.
            expert: Which matrix of the core; all by default.
        """
        parts = {
            CorePart(name): parameter if expert is None else parameter[expert]
            for name, parameter in self.named_parameters()
        }
        return values_of(parts, dtype).mT


class CoreOnDisk(QuantisedCore):
    """The matrices of dense experts, each read when a product needs it.

    Args:
        read: Reads the matrix (outputs, inputs) of an expert.
        count: Number of experts.
        outputs: Outputs of a matrix.
    """

    def __init__(self, read: Callable[[int], Tensor], count: int, outputs: int) -> None:
        super().__init__({})
        self.read = read
        self.count = count
        self._outputs = outputs

    @property
    def outputs(self) -> int:
        """Outputs of a matrix."""
        return self._outputs

    def __len__(self) -> int:
        return self.count

    def matrices(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The matrix of one expert, shape (inputs, outputs)."""
        if expert is None:
            raise TypeError("experts on disk are read one by one")
        return self.read(expert).to(dtype).mT


class QuantisedRows(nn.ModuleList):
    """One quantised matrix per expert, where experts differ in width."""

    def __getitem__(self, expert: int) -> QuantisedCore:  # type: ignore[override]
        own = super().__getitem__(expert)
        if not isinstance(own, QuantisedCore):
            raise TypeError(f"{own} is not a quantised core")
        return own


@dataclass(frozen=True)
class _Expanding(Sequence[Tensor]):
    """Matrices of experts, each expanded when it is asked for.

    Attributes:
        core: Where they are.
        dtype: Type to expand them to.
        inputs: Their inputs at most.
    """

    core: QuantisedCore | QuantisedRows
    dtype: torch.dtype
    inputs: int

    def __len__(self) -> int:
        return len(self.core)

    def __getitem__(self, expert: Any) -> Any:  # noqa: ANN401  # no slices
        if isinstance(self.core, QuantisedRows):
            matrix_XY = self.core[expert].matrices(self.dtype)
        else:
            matrix_XY = self.core.matrices(self.dtype, expert)
        return matrix_XY[: self.inputs]

    def parts(self, expert: int) -> tuple[Tensor, Tensor]:
        """Codes of 8 bits (outputs, inputs), and scales, of one of them."""
        if isinstance(self.core, QuantisedRows):
            found: dict[str, Tensor] = dict(self.core[expert].named_parameters())
        else:
            found = {name: whole[expert] for name, whole in self.core.named_parameters()}
        return found[CorePart.CODES], found[CorePart.SCALES]

    @property
    def outputs(self) -> int:
        """The largest number of outputs of a matrix."""
        if isinstance(self.core, QuantisedCore):
            return self.core.outputs
        return max(self.core[expert].outputs for expert in range(len(self.core)))


# Rows of an expert up to which torch's int8 kernel is faster than expanding its matrix, and what
# its inputs are multiples of: its loops have no remainder.
_FEW_ROWS, _KERNEL_INPUTS = 16, 32


def _takes_int8(rows_NX: Tensor, core: QuantisedCore | QuantisedRows) -> bool:
    """Whether torch's int8 kernel for a CPU may multiply these."""
    parts = dict((core[0] if isinstance(core, QuantisedRows) else core).named_parameters())
    return (
        CorePart.CODES in parts
        and parts[CorePart.CODES].dtype == torch.int8
        and rows_NX.dtype == parts[CorePart.SCALES].dtype == torch.bfloat16
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and rows_NX.requires_grad)
    )


def _multiply_int8(rows_NX: Tensor, matrices: _Expanding, assigned: Assignments) -> Tensor:
    """Products with int8 on a CPU: of few rows by torch's kernel, of many with the codes as values.

    Args:
        rows_NX: Rows in bfloat16.
        matrices: Matrices of int8.
        assigned: Assignment of rows to experts.
    """
    product_NY = rows_NX.new_zeros(len(rows_NX), matrices.outputs)
    stop = 0
    for expert, count in enumerate(assigned.counts):
        start, stop = stop, stop + count
        if not count:
            continue
        codes_YX, scales_Y1 = matrices.parts(expert)
        outputs, inputs = codes_YX.shape
        own_NX = rows_NX[start:stop, :inputs].contiguous()
        whole = inputs % _KERNEL_INPUTS == 0 and codes_YX.is_contiguous()
        if whole and count <= _FEW_ROWS:
            own_NY = torch._weight_int8pack_mm(own_NX, codes_YX, scales_Y1[:, 0])
        else:  # codes are exact in bfloat16
            own_NY = gemm(own_NX, codes_YX.to(torch.bfloat16).mT) * scales_Y1[:, 0]
        product_NY[start:stop, :outputs] = own_NY
    return product_NY


def multiply_quantised(
    rows_NX: Tensor,
    core: QuantisedCore | QuantisedRows,
    assigned: Assignments,
    U_E: Tensor | None,
) -> Tensor:
    """Multiply each row by the matrix of its expert, shape (N, Y).

    Args:
        rows_NX: Rows, zero-padded to the widest where experts differ in width.
        core: The core, or a list of the experts' matrices.
        assigned: Assignment of rows to experts.
        U_E: Coefficients of the core's matrices per expert; None if it has one per expert.
    """
    if U_E is not None and isinstance(core, QuantisedCore):
        matrices_PXY = core.matrices(rows_NX.dtype)[:, : rows_NX.shape[1]]
        return mix_and_multiply(rows_NX, U_E, matrices_PXY, assigned)
    matrices = _Expanding(core, rows_NX.dtype, rows_NX.shape[1])
    if rows_NX.device.type == "cpu" and _takes_int8(rows_NX, core):
        return _multiply_int8(rows_NX, matrices, assigned)
    if rows_NX.device.type == "cpu" or isinstance(core, CoreOnDisk):
        return multiply_one_by_one(rows_NX, matrices, assigned, width=matrices.outputs)
    whole = (
        core.matrices(rows_NX.dtype)[:, : rows_NX.shape[1]]
        if isinstance(core, QuantisedCore)
        else zero_padded(matrices)
    )
    return multiply(rows_NX, whole, assigned)
