"""Quantised cores at run time: packed in memory, dequantised while a product needs them.

On the CPU the matrix of one expert at a time is expanded, and only of experts with tokens. On a
device, where the host does not know them, a grouped GEMM multiplies the expanded core of one stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuckerize.format.cores import quantised_matrices
from tuckerize.names import CorePart
from tuckerize.runtime.grouped import (
    Assignments,
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
        return quantised_matrices(parts).dequantised(dtype).mT


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

    @property
    def outputs(self) -> int:
        """The largest number of outputs of a matrix."""
        if isinstance(self.core, QuantisedCore):
            return self.core.outputs
        return max(self.core[expert].outputs for expert in range(len(self.core)))


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
    if rows_NX.device.type == "cpu" or isinstance(core, CoreOnDisk):
        return multiply_one_by_one(rows_NX, matrices, assigned, width=matrices.outputs)
    whole = (
        core.matrices(rows_NX.dtype)[:, : rows_NX.shape[1]]
        if isinstance(core, QuantisedCore)
        else zero_padded(matrices)
    )
    return multiply(rows_NX, whole, assigned)
