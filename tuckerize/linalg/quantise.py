"""Quantisation of matrices to codes with scales: round to nearest, or GPTQ for given inputs.

A matrix (O, K) maps K inputs to O outputs. Its values are codes times scales: one scale per output,
or per output and group of consecutive inputs. Scales may be negative, so that the value of largest
magnitude gets the code that has no counterpart, -8 of 4 bits: nearly as good as zero points, which
would take bits of their own.

Source:
    Frantar et al. 2023 (GPTQ), with columns in the order of falling input energy and scales fixed
    beforehand, so that no permutation is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tuckerize.domain import CoreType
from tuckerize.linalg.packing import grouped
from tuckerize.linalg.tucker import in_float64, on_solver

# Scales that are tried, relative to one that just reaches the largest magnitude.
_SCALE_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64)
# Share of the mean input energy that is added to each, as in GPTQ.
_DAMPING = 0.01
# Columns whose rounding errors are passed on together.
_BLOCK = 128
# Values of a matrix that scales are tried on at once: what a core's cache holds.
_CACHED_VALUES = 2**18
SCALE_VALUES = 2**24
"""Values of the normal equations of scales that are solved at once (128 MiB in float64)."""


@dataclass(frozen=True, slots=True)
class QuantisedMatrices:
    """Matrices as codes and scales; leading dimensions count matrices.

    Attributes:
        codes: Integers (int8), or float8_e4m3fn of `fp8`, shape (..., O, K).
        scales: Scales, shape (..., O, G) with G groups of inputs.
        core_type: Encoding.
    """

    codes: Tensor
    scales: Tensor
    core_type: CoreType

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values, shape (..., O, K); exact in float32 where scales have 16 bits."""
        columns = self.codes.shape[-1]
        whole = grouped(self.codes.to(dtype), self.core_type.group_size or columns)
        return (whole * self.scales.to(dtype).unsqueeze(-1)).flatten(-2)[..., :columns]

    def split(self, count: int) -> list[QuantisedMatrices]:
        """Equal parts of the outputs, one after another."""
        parts = zip(self.codes.chunk(count, -2), self.scales.chunk(count, -2), strict=True)
        return [replace(self, codes=codes, scales=scales) for codes, scales in parts]

    def of_expert(self, expert: int) -> QuantisedMatrices:
        """One of the matrices."""
        return replace(self, codes=self.codes[expert], scales=self.scales[expert])

    def narrowed(
        self, *, outputs: int | None = None, inputs: int | None = None
    ) -> QuantisedMatrices:
        """The first outputs or inputs of the matrices; all by default."""
        group = self.core_type.group_size
        groups = None if inputs is None or group is None else -(-inputs // group)
        return replace(
            self,
            codes=self.codes[..., :outputs, :inputs],
            scales=self.scales[..., :outputs, :groups],
        )


def quantise(
    matrices_EOK: Tensor,
    core_type: CoreType,
    moments_EKK: Iterable[Tensor] | None = None,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantisedMatrices:
    """Quantise matrices, each for the inputs that it sees.

    Args:
        matrices_EOK: The matrices, shape (E, O, K).
        core_type: Encoding.
        moments_EKK: Second moment of every matrix's inputs, each (K, K); None rounds to nearest.
        scale_dtype: Type of the scales.
    """
    wide_EOK = matrices_EOK.float()
    if moments_EKK is None:
        found = [_round_to_nearest(matrix_OK, core_type, scale_dtype) for matrix_OK in wide_EOK]
    else:
        found = [
            _for_inputs(matrix_OK, core_type, Inputs.of(moment_KK.to(matrix_OK)), scale_dtype)
            for matrix_OK, moment_KK in zip(wide_EOK, moments_EKK, strict=True)
        ]
    codes, scales = (torch.stack(parts) for parts in zip(*found, strict=True))
    return QuantisedMatrices(codes, scales, core_type)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs that matrices are rounded for.

    Attributes:
        moment_KK: Second moment, relative to its mean diagonal, shape (K, K).
        order_K: Inputs by falling energy.
        inverse_KK: In that order, upper triangular R with RᵀR the inverse of the damped moment.
    """

    moment_KK: Tensor
    order_K: Tensor
    inverse_KK: Tensor

    @classmethod
    def of(cls, moment_KK: Tensor) -> Self:
        """Those of a second moment."""
        mean = moment_KK.diagonal().mean()
        moment_KK = moment_KK / torch.where(mean > 0, mean, 1.0)
        order_K = moment_KK.diagonal().argsort(descending=True, stable=True)
        return cls(moment_KK, order_K, _inverse_root(moment_KK[order_K][:, order_K]))

    def quantise(
        self, matrix_OK: Tensor, core_type: CoreType, scale_dtype: torch.dtype = torch.bfloat16
    ) -> QuantisedMatrices:
        """A matrix (O, K), as `quantise` does it."""
        codes_OK, scales_OG = _for_inputs(matrix_OK.float(), core_type, self, scale_dtype)
        return QuantisedMatrices(codes_OK, scales_OG, core_type)


def code_dtype(core_type: CoreType) -> torch.dtype:
    """Type of codes before they are packed."""
    return torch.float8_e4m3fn if core_type == CoreType.FP8 else torch.int8


def nearest_codes(values: Tensor, core_type: CoreType) -> Tensor:
    """Codes nearest to values over their scales, in the values' type."""
    codes = values.clamp(*core_type.code_range)
    if core_type == CoreType.FP8:
        return codes.to(code_dtype(core_type)).to(values.dtype)
    return codes.round()


Found = tuple[Tensor, Tensor]
"""Codes (O, K) and scales (O, G)."""


def _round_to_nearest(matrix_OK: Tensor, core_type: CoreType, scale_dtype: torch.dtype) -> Found:
    """Round with the scales of least squared error."""
    scales_OG = _nearest_scales(matrix_OK, core_type, scale_dtype)
    columns = matrix_OK.shape[-1]
    of_columns_OK = _per_column(scales_OG.to(matrix_OK), columns, core_type)
    codes_OK = _encoded(matrix_OK, of_columns_OK, core_type)
    return codes_OK.to(code_dtype(core_type)), scales_OG


def _nearest_scales(
    matrix_OK: Tensor,
    core_type: CoreType,
    scale_dtype: torch.dtype,
    energy_K: Tensor | None = None,
) -> Tensor:
    """Scales of least squared error, weighted by the energy of the inputs, shape (O, G)."""
    columns = matrix_OK.shape[-1]
    group = core_type.group_size or columns
    weight_K = torch.ones(columns) if energy_K is None else energy_K
    weight_K = weight_K.to(matrix_OK).clamp_min(torch.finfo(matrix_OK.dtype).tiny)
    weight_Gg = grouped(weight_K, group)
    cached = _CACHED_VALUES if matrix_OK.device.type == "cpu" else matrix_OK.numel()
    rows = torch.split(matrix_OK, max(1, cached // columns))
    return torch.cat(
        [_scales_of_rows(grouped(own, group), weight_Gg, core_type, scale_dtype) for own in rows]
    )


def _scales_of_rows(
    values_OGg: Tensor, weight_Gg: Tensor, core_type: CoreType, scale_dtype: torch.dtype
) -> Tensor:
    low, high = core_type.code_range
    extreme_OG1 = values_OGg.gather(-1, values_OGg.abs().argmax(-1, keepdim=True))
    ends: tuple[int, ...] = (low, high)
    if low == -high:  # the sign of a scale makes no difference
        extreme_OG1, ends = extreme_OG1.abs(), (high,)
    best_OG1 = torch.full_like(extreme_OG1, math.inf)
    scales_OG1 = torch.ones_like(extreme_OG1)
    for share in _SCALE_SHARES:
        for last_code in ends:
            # For the codes of a scale, the scale by least squares.
            codes_OGg = _encoded(values_OGg, extreme_OG1 * (share / last_code), core_type)
            weighted_OGg = weight_Gg * codes_OGg
            mixed_OG1 = (weighted_OGg * values_OGg).sum(-1, keepdim=True)
            fitted_OG1 = mixed_OG1 / (weighted_OGg * codes_OGg).sum(-1, keepdim=True)
            tried_OG1 = fitted_OG1.nan_to_num(1.0).to(scale_dtype).to(values_OGg)
            missed_OGg = values_OGg - tried_OG1 * _encoded(values_OGg, tried_OG1, core_type)
            error_OG1 = (weight_Gg * missed_OGg.square()).sum(-1, keepdim=True)
            better_OG1 = error_OG1 < best_OG1
            best_OG1 = torch.where(better_OG1, error_OG1, best_OG1)
            scales_OG1 = torch.where(better_OG1, tried_OG1, scales_OG1)
    return scales_OG1[..., 0].to(scale_dtype)


def _for_inputs(
    matrix_OK: Tensor, core_type: CoreType, inputs: Inputs, scale_dtype: torch.dtype
) -> Found:
    """GPTQ, then scales by least squares where an output gains by them."""
    moment_KK = inputs.moment_KK
    scales_OG = _nearest_scales(matrix_OK, core_type, scale_dtype, moment_KK.diagonal())
    codes_OK = gptq(matrix_OK, scales_OG, inputs, core_type)
    return codes_OK, fit_scales(matrix_OK, codes_OK, scales_OG, moment_KK, core_type)


def gptq(matrix_OK: Tensor, scales_OG: Tensor, inputs: Inputs, core_type: CoreType) -> Tensor:
    """GPTQ with given scales: every column is rounded, and those that follow make up for its error.

    Args:
        matrix_OK: The matrix, shape (O, K).
        scales_OG: Its scales, shape (O, G).
        inputs: Its inputs.
        core_type: Encoding.

    Returns:
        Codes, shape (O, K).
    """
    columns = matrix_OK.shape[-1]
    order_K, inverse_KK = inputs.order_K, inputs.inverse_KK
    left_KO = matrix_OK.T[order_K]  # one row after another is read and written
    scales_KO = _per_column(scales_OG.to(matrix_OK.dtype), columns, core_type).T[order_K]
    codes_KO = torch.empty_like(left_KO)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        missed_BO = torch.empty_like(left_KO[start:stop])
        for k in range(start, stop):
            codes_KO[k] = code_O = _encoded(left_KO[k], scales_KO[k], core_type)
            missed_BO[k - start] = missed_O = (left_KO[k] - code_O * scales_KO[k]) / inverse_KK[
                k, k
            ]
            left_KO[k + 1 : stop] -= inverse_KK[k, k + 1 : stop, None] * missed_O
        left_KO[stop:] -= inverse_KK[start:stop, stop:].T @ missed_BO
    return codes_KO[order_K.argsort()].T.contiguous().to(code_dtype(core_type))


def _inverse_root(moment_KK: Tensor) -> Tensor:
    """Upper triangular R with RᵀR the inverse of the damped moment."""
    mean = float(moment_KK.diagonal().mean())
    damped_KK = moment_KK.flip(0, 1)
    damped_KK.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    # With the moment UUᵀ, of which U is upper triangular, R is the inverse of U.
    root_KK = torch.linalg.cholesky(on_solver(damped_KK))
    return _inverse_of_lower(root_KK).flip(0, 1).to(moment_KK.device)


def _inverse_of_lower(lower_NN: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, in products of its halves."""
    size = len(lower_NN)
    if size <= _BLOCK:
        unit_NN = torch.eye(size, dtype=lower_NN.dtype, device=lower_NN.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower_NN, unit_NN, upper=False)
        return inverse
    half = size // 2
    inverse_NN = torch.zeros_like(lower_NN)
    first, last = inverse_NN[:half, :half], inverse_NN[half:, half:]
    first.copy_(_inverse_of_lower(lower_NN[:half, :half]))
    last.copy_(_inverse_of_lower(lower_NN[half:, half:]))
    torch.mm(last @ lower_NN[half:, :half], -first, out=inverse_NN[half:, :half])
    return inverse_NN


def fit_scales(
    matrix_OK: Tensor,
    codes_OK: Tensor,
    scales_OG: Tensor,
    moment_KK: Tensor,
    core_type: CoreType,
) -> Tensor:
    """Scales of least weighted squared error for given codes, where they are better than others.

    Args:
        matrix_OK: The matrix, shape (O, K).
        codes_OK: Its codes.
        scales_OG: Scales that an output keeps, unless it gains by new ones.
        moment_KK: Second moment of its inputs, shape (K, K).
        core_type: Encoding.

    Returns:
        Scales, of the type and shape of the given ones.
    """
    group = core_type.group_size or codes_OK.shape[-1]
    count = max(1, SCALE_VALUES // scales_OG.shape[-1] ** 2)
    parts = (torch.split(own, count) for own in (matrix_OK, codes_OK, scales_OG))
    return torch.cat([
        _fit_scales_of_rows(matrix, codes, scales, moment_KK, group)
        for matrix, codes, scales in zip(*parts, strict=True)
    ])  # fmt: skip


def _fit_scales_of_rows(
    matrix_OK: Tensor, codes_OK: Tensor, scales_OG: Tensor, moment_KK: Tensor, group: int
) -> Tensor:
    codes_OK = codes_OK.to(matrix_OK.dtype)
    normal_OGG = matrix_OK.new_zeros(*scales_OG.shape, scales_OG.shape[-1])
    right_OG = grouped((matrix_OK @ moment_KK) * codes_OK, group).sum(-1)
    for place, start in enumerate(range(0, codes_OK.shape[-1], group)):
        own = slice(start, start + group)
        seen_OK = codes_OK[:, own] @ moment_KK[own, start:]
        products_OG = grouped(seen_OK.mul_(codes_OK[:, start:]), group).sum(-1)
        normal_OGG[:, place, place:] = products_OG  # it is symmetric
        normal_OGG[:, place:, place] = products_OG
    normal_OGG, right_OG1 = in_float64(normal_OGG), in_float64(right_OG[..., None])
    energy_OG = normal_OGG.diagonal(dim1=-2, dim2=-1)
    ridge_O1 = 1e-6 * energy_OG.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    root_OGG = torch.linalg.cholesky_ex(
        normal_OGG + torch.diag_embed(ridge_O1.expand_as(energy_OG))
    )
    fitted_OG1 = torch.cholesky_solve(right_OG1, root_OGG.L)
    fitted_OG = fitted_OG1[..., 0].to(scales_OG)

    # The squared errors, less what is the same for all scales.
    fitted_O, given_O = (
        (own_OG1 * (normal_OGG @ own_OG1 - 2 * right_OG1)).sum((-2, -1))
        for own_OG1 in (in_float64(own_OG)[..., None] for own_OG in (fitted_OG, scales_OG))
    )
    better_O1 = (fitted_O < given_O).to(scales_OG.device)[:, None]
    return torch.where(better_O1, fitted_OG, scales_OG)


def _encoded(values: Tensor, scales: Tensor, core_type: CoreType) -> Tensor:
    """Codes of values, in the values' type; of a scale of zero all are zero."""
    return nearest_codes(values / torch.where(scales == 0, torch.inf, scales), core_type)


def _per_column(scales: Tensor, columns: int, core_type: CoreType) -> Tensor:
    """The scale of every column, shape (..., O, K)."""
    return scales.repeat_interleave(core_type.group_size or columns, -1)[..., :columns]
