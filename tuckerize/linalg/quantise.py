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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.domain import CoreType
from tuckerize.linalg.tucker import in_float64

# Scales that are tried, relative to one that just reaches the largest magnitude.
_SCALE_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64)
# Share of the mean input energy that is added to each, as in GPTQ.
_DAMPING = 0.01
# Columns whose rounding errors are passed on together.
_BLOCK = 128
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
        grouped = _grouped(self.codes.to(dtype), self.core_type.group_size or columns)
        return (grouped * self.scales.to(dtype).unsqueeze(-1)).flatten(-2)[..., :columns]

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
    moments_EKK: Sequence[Tensor] | None = None,
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
    found = [
        _round_to_nearest(matrix_OK, core_type, scale_dtype)
        if moments_EKK is None
        else _for_inputs(matrix_OK, core_type, moments_EKK[place], scale_dtype)
        for place, matrix_OK in enumerate(wide_EOK)
    ]
    codes, scales = (torch.stack(parts) for parts in zip(*found, strict=True))
    return QuantisedMatrices(codes, scales, core_type)


def code_dtype(core_type: CoreType) -> torch.dtype:
    """Type of codes before they are packed."""
    return torch.float8_e4m3fn if core_type == CoreType.FP8 else torch.int8


def nearest_codes(values: Tensor, core_type: CoreType) -> Tensor:
    """Codes nearest to values over their scales, in the values' type."""
    codes = values.clamp(*core_type.code_range)
    if core_type == CoreType.FP8:
        return codes.to(code_dtype(core_type)).to(values.dtype)
    return codes.round()


def pack(codes: Tensor, core_type: CoreType) -> Tensor:
    """Pack codes along the last dimension, the first in the lowest bits.

    Codes are stored with an offset, so that they are not negative; zeros fill the last word up.

    Returns:
        Eight codes of 4 bits an int32, or eight of 3 bits three bytes (uint8): the bytes of
            compressed-tensors' words since 0.20.
    """
    bits, per_word = core_type.bits, core_type.word_codes
    offset = _grouped(codes.to(torch.int32), per_word) + 2 ** (bits - 1)
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


Found = tuple[Tensor, Tensor]
"""Codes (O, K) and scales (O, G)."""


def _round_to_nearest(
    matrix_OK: Tensor,
    core_type: CoreType,
    scale_dtype: torch.dtype,
    energy_K: Tensor | None = None,
) -> Found:
    """Round with the scales of least squared error, weighted by the energy of the inputs."""
    columns = matrix_OK.shape[-1]
    group = core_type.group_size or columns
    grouped_OGg = _grouped(matrix_OK, group)
    weight = torch.ones(columns) if energy_K is None else energy_K
    weight = weight.to(matrix_OK).clamp_min(torch.finfo(matrix_OK.dtype).tiny)
    weight_Gg = _grouped(weight, group)
    low, high = core_type.code_range
    extreme_OG1 = grouped_OGg.gather(-1, grouped_OGg.abs().argmax(-1, keepdim=True))
    ends: tuple[int, ...] = (low, high)
    if low == -high:  # the sign of a scale makes no difference
        extreme_OG1, ends = extreme_OG1.abs(), (high,)
    best_OG1 = torch.full_like(extreme_OG1, math.inf)
    scale_OG1 = torch.ones_like(extreme_OG1)
    for share in _SCALE_SHARES:
        for last_code in ends:
            # For the codes of a scale, the scale by least squares.
            codes = _encoded(grouped_OGg, extreme_OG1 * (share / last_code), core_type)
            weighted = weight_Gg * codes
            fitted = (weighted * grouped_OGg).sum(-1, keepdim=True) / (weighted * codes).sum(
                -1, keepdim=True
            )
            tried = fitted.nan_to_num(1.0).to(scale_dtype).to(matrix_OK.dtype)
            missed = grouped_OGg - tried * _encoded(grouped_OGg, tried, core_type)
            error_OG1 = (weight_Gg * missed.square()).sum(-1, keepdim=True)
            better = error_OG1 < best_OG1
            best_OG1 = torch.where(better, error_OG1, best_OG1)
            scale_OG1 = torch.where(better, tried, scale_OG1)
    codes_OGg = _encoded(grouped_OGg, scale_OG1, core_type)
    codes_OK = codes_OGg.flatten(-2)[..., :columns].to(code_dtype(core_type))
    return codes_OK, scale_OG1.squeeze(-1).to(scale_dtype)


def _for_inputs(
    matrix_OK: Tensor, core_type: CoreType, moment_KK: Tensor, scale_dtype: torch.dtype
) -> Found:
    """GPTQ, then scales by least squares; every output takes the best of what was found."""
    moment_KK = moment_KK.to(matrix_OK)
    nearest = _round_to_nearest(matrix_OK, core_type, scale_dtype, moment_KK.diagonal())
    codes_OK = gptq(matrix_OK, nearest[1], moment_KK, core_type)
    fitted_OG = _fit_scales(matrix_OK, codes_OK, moment_KK, core_type).to(scale_dtype)
    found = (
        nearest,
        _round_to_nearest(matrix_OK, core_type, scale_dtype),
        (codes_OK, nearest[1]),
        (codes_OK, fitted_OG),
    )
    errors_FO = torch.stack(
        [weighted_error(matrix_OK, QuantisedMatrices(*f, core_type), moment_KK) for f in found]
    )
    best_O = errors_FO.nan_to_num(math.inf).argmin(0)
    rows_O = torch.arange(len(best_O), device=best_O.device)
    return (
        torch.stack([codes for codes, _ in found])[best_O, rows_O],
        torch.stack([scales for _, scales in found])[best_O, rows_O],
    )


def weighted_error(matrix_OK: Tensor, found: QuantisedMatrices, moment_KK: Tensor) -> Tensor:
    """Squared error of every output, summed over the inputs of a second moment, shape (O,)."""
    missed_OK = matrix_OK - found.dequantised(matrix_OK.dtype)
    return ((missed_OK @ moment_KK.to(missed_OK)) * missed_OK).sum(-1)


def gptq(matrix_OK: Tensor, scales_OG: Tensor, moment_KK: Tensor, core_type: CoreType) -> Tensor:
    """GPTQ with given scales: every column is rounded, and those that follow make up for its error.

    Args:
        matrix_OK: The matrix, shape (O, K).
        scales_OG: Its scales, shape (O, G).
        moment_KK: Second moment of its inputs, shape (K, K).
        core_type: Encoding.

    Returns:
        Codes, shape (O, K).
    """
    columns = matrix_OK.shape[-1]
    order_K = moment_KK.diagonal().argsort(descending=True, stable=True)
    inverse_KK = _inverse_root(moment_KK[order_K][:, order_K]).to(matrix_OK)
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
    """Upper triangular R with RᵀR the inverse of the damped moment (float64)."""
    damped_KK = in_float64(moment_KK).clone()
    mean = float(damped_KK.diagonal().mean())
    damped_KK.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    root_KK: Tensor = torch.linalg.cholesky(inverse_KK, upper=True)
    return root_KK


def _fit_scales(
    matrix_OK: Tensor, codes_OK: Tensor, moment_KK: Tensor, core_type: CoreType
) -> Tensor:
    """Scales of least weighted squared error for given codes, shape (O, G)."""
    columns = codes_OK.shape[-1]
    group = core_type.group_size or columns
    count = max(1, SCALE_VALUES // (-(-columns // group)) ** 2)
    rows = zip(torch.split(matrix_OK, count), torch.split(codes_OK, count), strict=True)
    return torch.cat([_fit_scales_of_rows(*some, moment_KK, group) for some in rows])


def _fit_scales_of_rows(
    matrix_OK: Tensor, codes_OK: Tensor, moment_KK: Tensor, group: int
) -> Tensor:
    columns = codes_OK.shape[-1]
    codes_OK = codes_OK.to(matrix_OK.dtype)
    normal, right = [], []
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        seen_OK = codes_OK[:, start:stop] @ moment_KK[start:stop]
        normal.append(_grouped(seen_OK * codes_OK, group).sum(-1))
        right.append((seen_OK * matrix_OK).sum(-1))
    normal_OGG, right_OG = in_float64(torch.stack(normal, -2)), in_float64(torch.stack(right, -1))
    energy_OG = normal_OGG.diagonal(dim1=-2, dim2=-1)
    ridge_O1 = 1e-6 * energy_OG.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    normal_OGG = normal_OGG + torch.diag_embed(ridge_O1.expand_as(energy_OG))
    scales_OG: Tensor = torch.linalg.solve(normal_OGG, right_OG)
    return scales_OG.to(matrix_OK)


def _grouped(values: Tensor, group: int) -> Tensor:
    """Values in groups along the last dimension, zero-padded, shape (..., G, group)."""
    padded = functional.pad(values, (0, -values.shape[-1] % group))
    return padded.view(*padded.shape[:-1], padded.shape[-1] // group, group)


def _encoded(values: Tensor, scales: Tensor, core_type: CoreType) -> Tensor:
    """Codes of values, in the values' type; of a scale of zero all are zero."""
    return nearest_codes(values / torch.where(scales == 0, torch.inf, scales), core_type)


def _per_column(scales: Tensor, columns: int, core_type: CoreType) -> Tensor:
    """The scale of every column, shape (..., O, K)."""
    return scales.repeat_interleave(core_type.group_size or columns, -1)[..., :columns]
