"""Quantised cores at run time: packed in memory, dequantised while a product needs them.

On a CPU the matrix of one expert at a time is expanded, and only of experts with tokens; in
bfloat16 torch's own kernels multiply few rows by integers as they are. On a device, where the host
does not know the experts with tokens, a grouped GEMM multiplies the expanded core of one stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuckerize.domain import CoreType
from tuckerize.format.cores import packed_type, values_of
from tuckerize.linalg.packing import pack, unpack
from tuckerize.names import CorePart
from tuckerize.runtime.grouped import (
    Assignments,
    gemm,
    mix_and_multiply,
    multiply,
    multiply_one_by_one,
    zero_padded,
)
from tuckerize.runtime.int4 import Layout, scales_and_zeros


class QuantisedCore(nn.Module):
    """Codes and scales of a core, or of one expert's matrix.

    The first product that torch's kernel for 4 bits may compute packs codes of 4 and 3 bits for it,
    4 bits each, with scales of twice the size. What is stored comes back when it is asked for.

    Args:
        parts: Its tensors as they are stored.
    """

    weight_scale: Tensor
    kernel_codes: Tensor | None
    kernel_scales: Tensor | None
    core_type: CoreType  # of what is packed for the kernel, as is the layout
    layout: Layout

    def __init__(self, parts: Mapping[CorePart, Tensor]) -> None:
        super().__init__()
        for part, tensor in parts.items():
            self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("kernel_codes", None, persistent=False)
        self.register_buffer("kernel_scales", None, persistent=False)

    def parts(self) -> dict[CorePart, Tensor]:
        """Codes and scales as they are stored."""
        if self.kernel_codes is not None:
            words = self.get_parameter(CorePart.PACKED_CODES)
            stored = [pack(self.layout.unpack(own), self.core_type) for own in self.kernel_codes]
            words.data = torch.stack(stored).view(*self.weight_scale.shape[:-1], -1)
            self.weight_scale.data = self.weight_scale.contiguous()
            self.kernel_codes = self.kernel_scales = None
        return {CorePart(name): parameter.data for name, parameter in self.named_parameters()}

    def _parts_of(self, expert: int | None) -> dict[CorePart, Tensor]:
        """Codes and scales of one matrix, or of all."""
        return {part: own if expert is None else own[expert] for part, own in self.parts().items()}

    def _pack_for_kernel(self) -> None:
        """Pack codes for torch's kernel for 4 bits, unless they are, or it does not take them."""
        words, scales = self._parameters.get(CorePart.PACKED_CODES), self.weight_scale.data
        if words is None or self.kernel_codes is not None:
            return
        core_type, inputs = packed_type(words, scales)
        layout = Layout.find(self.outputs, inputs, scales.shape[-1])
        if layout is None:
            return
        with torch.inference_mode(mode=False):
            matrices = words.data.reshape(-1, self.outputs, words.shape[-1])
            sizes = len(matrices), self.outputs, inputs // 2
            codes = words.new_empty(sizes, dtype=torch.uint8)
            for expert, own in enumerate(matrices):
                codes[expert] = layout.pack(unpack(own, core_type, inputs))
            self.kernel_codes = codes
            self.kernel_scales = scales_and_zeros(scales.reshape(len(codes), self.outputs, -1))
            self.core_type, self.layout = core_type, layout
            self.weight_scale.data = self.kernel_scales[..., 0].mT.view_as(scales)
            words.data = words.new_empty(0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def product(self, rows_NX: Tensor, expert: int | None = None) -> Tensor:
        """Rows in bfloat16 times one matrix, on a CPU, shape (N, outputs).

        Args:
            rows_NX: The rows; those of other experts may have more values.
            expert: Which matrix of the core; None if it is the only one.
        """
        self._pack_for_kernel()
        if self.kernel_codes is not None and self.kernel_scales is not None:
            words, scales_GO2 = (
                own[expert or 0] for own in (self.kernel_codes, self.kernel_scales)
            )
            return self.layout.multiply(_fitted(rows_NX, 2 * words.shape[1]), words, scales_GO2)
        parts = self._parts_of(expert)
        codes = parts.get(CorePart.CODES)
        if codes is not None and codes.dtype == torch.int8:
            own_NX = _fitted(rows_NX, codes.shape[1])
            return _multiply_int8(own_NX, codes, parts[CorePart.SCALES][:, 0])
        matrix_XY = values_of(parts, rows_NX.dtype).mT
        return gemm(_fitted(rows_NX, len(matrix_XY)), matrix_XY)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Move codes, but keep their type: float8 is a floating type to torch, as scales have."""

        def apply(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved.to(tensor.dtype) if tensor.dtype.itemsize == 1 else moved

        self.parts()
        return super()._apply(apply, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any) -> None:  # noqa: ANN401
        self.parts()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401
        self.parts()
        super()._load_from_state_dict(*args)

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
        return values_of(self._parts_of(expert), dtype).mT


def _fitted(rows_NX: Tensor, inputs: int) -> Tensor:
    """Rows cut or filled up with zeros to the inputs of a matrix."""
    return functional.pad(rows_NX, (0, inputs - rows_NX.shape[1]))


# Rows of an expert up to which torch's int8 kernel is faster than expanding its matrix, and what
# its inputs are multiples of: its loops have no remainder.
_FEW_ROWS, _KERNEL_INPUTS = 16, 32


def _multiply_int8(rows_NX: Tensor, codes_YX: Tensor, scales_Y: Tensor) -> Tensor:
    """Product with int8: of few rows by torch's kernel, of many with the codes as values."""
    whole = codes_YX.shape[1] % _KERNEL_INPUTS == 0 and codes_YX.is_contiguous()
    if whole and len(rows_NX) <= _FEW_ROWS:
        return torch._weight_int8pack_mm(rows_NX.contiguous(), codes_YX, scales_Y)
    return gemm(rows_NX, codes_YX.to(rows_NX.dtype).mT) * scales_Y  # codes are exact in bfloat16


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


def _has_kernels(rows_NX: Tensor, core: QuantisedCore | QuantisedRows) -> bool:
    """Whether these may be multiplied by torch's kernels for a CPU."""
    scales = (core[0] if isinstance(core, QuantisedRows) else core).weight_scale
    return (
        rows_NX.device.type == "cpu"
        and rows_NX.dtype == scales.dtype == torch.bfloat16
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and rows_NX.requires_grad)
    )


def _multiply_by_kernels(
    rows_NX: Tensor, core: QuantisedCore | QuantisedRows, assigned: Assignments, width: int
) -> Tensor:
    product_NY = rows_NX.new_zeros(len(rows_NX), width)
    stop = 0
    for expert, count in enumerate(assigned.counts):
        start, stop = stop, stop + count
        if not count:
            continue
        if isinstance(core, QuantisedRows):
            own_NY = core[expert].product(rows_NX[start:stop])
        else:
            own_NY = core.product(rows_NX[start:stop], expert)
        product_NY[start:stop, : own_NY.shape[1]] = own_NY
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
    if not isinstance(core, CoreOnDisk) and _has_kernels(rows_NX, core):
        return _multiply_by_kernels(rows_NX, core, assigned, matrices.outputs)
    if rows_NX.device.type == "cpu" or isinstance(core, CoreOnDisk):
        return multiply_one_by_one(rows_NX, matrices, assigned, width=matrices.outputs)
    whole = (
        core.matrices(rows_NX.dtype)[:, : rows_NX.shape[1]]
        if isinstance(core, QuantisedCore)
        else zero_padded(matrices)
    )
    return multiply(rows_NX, whole, assigned)
