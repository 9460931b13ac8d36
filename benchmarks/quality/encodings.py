"""Quantisation alone, as a competitor: round to nearest and GPTQ, every stored bit counted.

Written apart from `tuckerize.linalg.quantise`, which our own rows use: it tests that one, and has
zero points and any number of bits. Letters: E matrices, O outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean input energy, as published
_SHARES = tuple(1 - 0.04 * step for step in range(16))  # of the range that codes span
_SCALE_BITS = 16
_TURNS, _SWEEPS = 2, 4  # of coordinate descent
LEARNED = "learned"
"""Rounding that is learned on the output of a layer, by `learned.learn`."""


@dataclass(frozen=True)
class Encoding:
    """How the values of a matrix are stored.

    Attributes:
        bits: Bits of a code.
        group: Inputs that share a scale; None for all of a row.
        zero: Whether every group has a zero point, of as many bits as a code (asymmetric).
    """

    bits: int
    group: int | None
    zero: bool

    def __str__(self) -> str:
        group = "channel" if self.group is None else f"g{self.group}"
        return f"{self.bits} bits, {group}{', zero points' if self.zero else ''}"

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Bits of codes, scales and zero points of a matrix."""
        if not inputs:
            return 0
        groups = 1 if self.group is None else -(-inputs // self.group)
        own = _SCALE_BITS + self.bits * self.zero
        return outputs * (inputs * self.bits + groups * own)


@dataclass(frozen=True)
class Grid:
    """Values that codes stand for: (code − zero) scale, by column, (E, O, K) each."""

    scale_EOK: Tensor
    zero_EOK: Tensor
    low: int
    high: int

    def codes(self, values: Tensor, columns: slice | int = slice(None)) -> Tensor:
        """Nearest codes of values of some columns."""
        scale, zero = self.scale_EOK[..., columns], self.zero_EOK[..., columns]
        return (values / scale + zero).round().clamp(self.low, self.high)

    def values(self, codes: Tensor, columns: slice | int = slice(None)) -> Tensor:
        """Values of the codes of some columns."""
        return (codes - self.zero_EOK[..., columns]) * self.scale_EOK[..., columns]


@dataclass(frozen=True)
class Rounded:
    """Matrices as they are stored: their codes (E, O, K) and what these stand for."""

    codes_EOK: Tensor
    grid: Grid

    @property
    def values(self) -> Tensor:
        """The values, (E, O, K)."""
        return self.grid.values(self.codes_EOK)


def round_to_nearest(matrices_EOK: Tensor, encoding: Encoding, _moments: Tensor) -> Rounded:
    """Round to nearest with the scales of least squared error."""
    grid = _fit(matrices_EOK, encoding, torch.ones_like(matrices_EOK[:, 0]))
    return Rounded(grid.codes(matrices_EOK), grid)


def gptq(matrices_EOK: Tensor, encoding: Encoding, moments_EKK: Tensor) -> Rounded:
    """GPTQ (Frantar et al. 2023): columns that follow make up for the rounding of one.

    With the inverse root of every matrix's own moment, columns in the order of falling energy, and
    scales fixed beforehand (static groups), so that no order is stored. Scales are fitted again
    to the codes, and every output takes the best of what was tried by its error on the moment.
    """
    energy_EK = moments_EKK.diagonal(dim1=1, dim2=2)
    tried = []
    for weight_EK in (energy_EK, torch.ones_like(energy_EK)):
        grid = _fit(matrices_EOK, encoding, weight_EK)
        codes = _gptq_codes(matrices_EOK, grid, moments_EKK)
        refitted = _refit(matrices_EOK, codes, grid, moments_EKK, encoding)
        tried += [Rounded(grid.codes(matrices_EOK), grid), Rounded(codes, grid), refitted]
    return _best(matrices_EOK, tried, moments_EKK)


def descended(matrices_EOK: Tensor, encoding: Encoding, moments_EKK: Tensor) -> Rounded:
    """GPTQ, then coordinate descent: code after code the best one for what all others miss.

    Codes and scales take turns; every output takes the best of what was tried.
    """
    found = gptq(matrices_EOK, encoding, moments_EKK)
    tried = [found]
    for _ in range(_TURNS):
        moved = _descend(matrices_EOK, found, moments_EKK)
        found = _refit(matrices_EOK, moved.codes_EOK, moved.grid, moments_EKK, encoding)
        tried += [moved, found]
    return _best(matrices_EOK, tried, moments_EKK)


ROUNDINGS: dict[str, Callable[[Tensor, Encoding, Tensor], Rounded]] = {
    "RTN": round_to_nearest,
    "GPTQ": gptq,
    LEARNED: descended,  # the start of `learned.learn`
}


def _best(matrices_EOK: Tensor, tried: list[Rounded], moments_EKK: Tensor) -> Rounded:
    errors = []
    for found in tried:
        missed = matrices_EOK - found.values
        errors.append(((missed @ moments_EKK.to(missed)) * missed).sum(-1))
    best_EO = torch.stack(errors).argmin(0)

    def chosen(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).gather(0, best_EO[None, ..., None].expand_as(parts[0][None]))[0]

    scale_EOK = chosen([found.grid.scale_EOK for found in tried])
    zero_EOK = chosen([found.grid.zero_EOK for found in tried])
    grid = replace(tried[0].grid, scale_EOK=scale_EOK, zero_EOK=zero_EOK)
    return Rounded(chosen([found.codes_EOK for found in tried]), grid)


def _fit(matrices_EOK: Tensor, encoding: Encoding, weight_EK: Tensor) -> Grid:
    """Scales and zero points of least weighted squared error of rounding to nearest."""
    inputs = matrices_EOK.shape[-1]
    group = encoding.group or max(inputs, 1)
    grouped = _grouped(matrices_EOK, group)
    weight_E1Gg = (
        _grouped(weight_EK[:, None], group).to(grouped).clamp_min(torch.finfo(grouped.dtype).tiny)
    )
    best = grouped.new_full(grouped.shape[:-1], torch.inf)[..., None]
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    low, high = _range(encoding)
    for trial_scale, trial_zero in _trials(grouped, encoding):
        codes = (grouped / trial_scale + trial_zero).round().clamp(low, high)
        missed = grouped - (codes - trial_zero) * trial_scale
        error = (weight_E1Gg * missed.square()).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial_scale, scale)
        zero = torch.where(better, trial_zero, zero)
    scale_EOK, zero_EOK = (
        part.expand(-1, -1, -1, group).flatten(-2)[..., :inputs] for part in (scale, zero)
    )
    return Grid(scale_EOK, zero_EOK, low, high)


def _grouped(values: Tensor, group: int) -> Tensor:
    """Values in groups along the last dimension, zero-padded, (..., G, group)."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % group))
    return padded.view(*padded.shape[:-1], -1, group)


def _range(encoding: Encoding) -> tuple[int, int]:
    if encoding.zero:
        return 0, 2**encoding.bits - 1
    return -(2 ** (encoding.bits - 1)), 2 ** (encoding.bits - 1) - 1


def _trials(grouped: Tensor, encoding: Encoding) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points whose codes span shares of the values' range."""
    low, high = _range(encoding)
    bottom = grouped.amin(-1, keepdim=True).clamp_max(0)
    top = grouped.amax(-1, keepdim=True).clamp_min(0)
    extreme = torch.where(top >= -bottom, top, bottom)
    for share in _SHARES:
        if encoding.zero:
            scale = _sixteen_bits((top - bottom) * share / high)
            for code in (-bottom * share / scale, -bottom / scale):
                yield scale, code.round().clamp(low, high)
        else:  # a scale may be negative, so that the code without a counterpart is of use
            for last in (low, high):
                yield _sixteen_bits(extreme * share / last), torch.zeros_like(extreme)


def _sixteen_bits(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale).bfloat16().to(scale.dtype)


def _gptq_codes(matrices_EOK: Tensor, grid: Grid, moments_EKK: Tensor) -> Tensor:
    damped_EKK = damped(moments_EKK)
    order_EK = damped_EKK.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
    back_EK = order_EK.argsort(dim=-1)

    def sorted_columns(values_EOK: Tensor, order_EK: Tensor) -> Tensor:
        return values_EOK.gather(-1, order_EK[:, None].expand_as(values_EOK))

    damped_EKK = sorted_columns(sorted_columns(damped_EKK, order_EK).mT, order_EK)
    inverse_EKK = torch.cholesky_inverse(torch.linalg.cholesky(damped_EKK))
    root_EKK = torch.linalg.cholesky(inverse_EKK, upper=True).to(matrices_EOK)
    left_EOK = sorted_columns(matrices_EOK, order_EK).clone()
    own = Grid(
        sorted_columns(grid.scale_EOK, order_EK),
        sorted_columns(grid.zero_EOK, order_EK),
        grid.low,
        grid.high,
    )
    codes_EOK = torch.empty_like(left_EOK)
    for k in range(left_EOK.shape[-1]):
        codes_EOK[..., k] = own.codes(left_EOK[..., k], k)
        missed_EO = (left_EOK[..., k] - own.values(codes_EOK[..., k], k)) / root_EKK[:, None, k, k]
        left_EOK[..., k + 1 :] -= missed_EO[..., None] * root_EKK[:, None, k, k + 1 :]
    return sorted_columns(codes_EOK, back_EK)


def _descend(matrices_EOK: Tensor, start: Rounded, moments_EKK: Tensor) -> Rounded:
    grid, codes_EOK = start.grid, start.codes_EOK.clone()
    damped_EKK = damped(moments_EKK).to(matrices_EOK)
    seen_EOK = (matrices_EOK - start.values) @ damped_EKK  # of what is missed
    for _ in range(_SWEEPS):
        for k in range(codes_EOK.shape[-1]):
            scale_EO, own_EO = grid.scale_EOK[..., k], codes_EOK[..., k]
            unit_EO = torch.where(scale_EO == 0, torch.inf, scale_EO)  # its codes stay
            best_EO = own_EO + seen_EOK[..., k] / (damped_EKK[:, None, k, k] * unit_EO)
            moved_EO = best_EO.round().clamp(grid.low, grid.high) - own_EO
            codes_EOK[..., k] = own_EO + moved_EO
            seen_EOK -= (moved_EO * scale_EO)[..., None] * damped_EKK[:, None, k]
    return Rounded(codes_EOK, grid)


def damped(moments_EKK: Tensor) -> Tensor:
    """Moments with a share of the mean energy added to each, in float64."""
    damped_EKK = moments_EKK.double().clone()
    energy_EK = damped_EKK.diagonal(dim1=1, dim2=2)
    mean_E1 = energy_EK.mean(-1, keepdim=True)
    energy_EK += torch.where(mean_E1 > 0, _DAMPING * mean_E1, 1.0)
    return damped_EKK


def _refit(
    matrices_EOK: Tensor, codes_EOK: Tensor, grid: Grid, moments_EKK: Tensor, encoding: Encoding
) -> Rounded:
    """The same codes and zero points with the scales of least error on the moments."""
    inputs = codes_EOK.shape[-1]
    group = encoding.group or max(inputs, 1)
    members_GK = (torch.arange(inputs) // group)[None] == torch.arange(-(-inputs // group))[:, None]
    units_EOK = (codes_EOK - grid.zero_EOK).double()
    moments_EKK = moments_EKK.double()
    scales = []
    for units_OK, moment_KK, matrix_OK in zip(units_EOK, moments_EKK, matrices_EOK, strict=True):
        parts_OGK = units_OK[:, None] * members_GK
        seen_OGK = parts_OGK @ moment_KK
        normal_OGG = seen_OGK @ parts_OGK.mT
        diagonal_OG = normal_OGG.diagonal(dim1=1, dim2=2)
        diagonal_OG += 1e-6 * diagonal_OG.mean(-1, keepdim=True) + 1e-30
        right_OG1 = seen_OGK @ matrix_OK.double()[..., None]
        scales.append(torch.linalg.solve(normal_OGG, right_OG1)[..., 0])
    scale_EOG = torch.stack(scales).to(matrices_EOK.dtype).bfloat16().to(matrices_EOK)
    scale_EOK = scale_EOG.repeat_interleave(group, -1)[..., :inputs]
    return Rounded(codes_EOK, replace(grid, scale_EOK=scale_EOK))
