"""Trellis codes, the best published quantisation below 4 bits: QTIP, and EXL3 of exllamav3.

Matrices are rotated at random on both sides, so that their values are normal whatever they were.
Eight columns at a time are coded as one sequence of states of 14 bits: each state is the one
before, moved by as many bits as a value takes, and stands for one of 16,384 numbers. The sequence
of least squared error is found by dynamic programming; columns that follow make up for what a block
misses, as in GPTQ. The published states have 16 bits, and their beginning is their ending; here it
is stored. Both miss 0.069 of the energy of normal values at 2 bits.

Source:
    Tseng et al. 2024, QTIP: Quantization with Trellises and Incoherence Processing.

Letters: E matrices, O outputs, K inputs, T values of a sequence, S states, B branches of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.encodings import damped

_STATE_BITS = 14
_MANY_STATES = 2**13
_COLUMNS = 8
_SCALE_BITS = 16


@dataclass(frozen=True)
class Trellis:
    """Codes of a trellis.

    Attributes:
        bits: Bits by which a state moves.
    """

    bits: int

    def __str__(self) -> str:
        return f"{self.bits} bits, trellis"

    def stored_bits(self, outputs: int, inputs: int) -> int:
        """Bits of codes, of every sequence's beginning, and of the scale of a matrix.

        Rotations are drawn from a seed.
        """
        if not inputs or not outputs:
            return 0
        sequences = -(-inputs // _COLUMNS)
        return outputs * inputs * self.bits + sequences * (_STATE_BITS - self.bits) + _SCALE_BITS


def trellis_coded(matrices_EOK: Tensor, encoding: Trellis, moments_EKK: Tensor) -> Tensor:
    """What the codes of least error on the moments stand for, block of columns after block.

    Outputs of zeros at the end, and inputs, are padding: they are not coded.
    """
    values_EOK = torch.zeros_like(matrices_EOK)
    sizes = [_size(matrix_OK) for matrix_OK in matrices_EOK]
    for outputs, inputs in dict.fromkeys(sizes):
        alike = [place for place, size in enumerate(sizes) if size == (outputs, inputs)]
        if outputs and inputs:
            own_EKK = moments_EKK[alike][:, :inputs, :inputs]
            own_EOK = matrices_EOK[alike][:, :outputs, :inputs]
            values_EOK[alike, :outputs, :inputs] = _coded(own_EOK, encoding, own_EKK)
    return values_EOK


def _size(matrix_OK: Tensor) -> tuple[int, int]:
    """Outputs and inputs up to the last that is not zero."""
    outputs, inputs = (
        int(found[-1]) + 1 if len(found := matrix_OK.any(mode).nonzero()) else 0 for mode in (1, 0)
    )
    return outputs, inputs


def _coded(matrices_EOK: Tensor, encoding: Trellis, moments_EKK: Tensor) -> Tensor:
    outputs, inputs = matrices_EOK.shape[1:]
    left_OO, right_KK = _rotation(outputs), _rotation(inputs)
    rotated_EOK = left_OO.T @ matrices_EOK.double() @ right_KK
    turned_EKK = right_KK.T @ damped(moments_EKK) @ right_KK
    inverse_EKK = torch.cholesky_inverse(torch.linalg.cholesky(turned_EKK))
    root_EKK = torch.linalg.cholesky(inverse_EKK, upper=True).to(matrices_EOK)
    size_E11 = rotated_EOK.square().mean((1, 2), keepdim=True).sqrt()
    wanted_EOK = (rotated_EOK / size_E11).to(matrices_EOK)
    coded_EOK = torch.empty_like(wanted_EOK)
    for start in range(0, inputs, _COLUMNS):
        own, later = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        block_EOK = wanted_EOK[..., own].clone()
        coded_EOK[..., own] = nearest_path(block_EOK.flatten(1), encoding.bits).view_as(block_EOK)
        missed_EOK = block_EOK - coded_EOK[..., own]
        moved_EKK = torch.linalg.solve_triangular(
            root_EKK[:, own, own], root_EKK[:, own, later], upper=True
        )
        wanted_EOK[..., later] -= missed_EOK @ moved_EKK
    found_EOK = _scaled(coded_EOK.double(), rotated_EOK, turned_EKK)
    return (left_OO @ found_EOK @ right_KK.T).to(matrices_EOK)


def _scaled(coded_EOK: Tensor, rotated_EOK: Tensor, moments_EKK: Tensor) -> Tensor:
    """Codes times the scale of a matrix with the least error on the moments."""
    seen_EOK = coded_EOK @ moments_EKK
    energy_E = (seen_EOK * coded_EOK).sum((1, 2))
    scale_E = (seen_EOK * rotated_EOK).sum((1, 2)) / energy_E
    return coded_EOK * scale_E.bfloat16().double()[:, None, None]


def _rotation(size: int) -> Tensor:
    """A random orthogonal matrix, in float64, the same for all matrices of a size."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation, upper = torch.linalg.qr(drawn)
    signed: Tensor = rotation * upper.diagonal().sign()
    return signed


def numbers() -> Tensor:
    """What the states stand for, (S,): normal values."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2**_STATE_BITS, generator=generator)


def nearest_path(wanted_ET: Tensor, bits: int) -> Tensor:
    """The values of the path of least squared error through the trellis, (E, T).

    Args:
        wanted_ET: Values to code.
        bits: Bits by which a state moves.
    """
    experts, length = wanted_ET.shape
    number_S = numbers()
    branches = 2**bits
    rest = len(number_S) // branches
    step = _compiled if len(number_S) >= _MANY_STATES else _step
    cost_ES = (wanted_ET[:, :1] - number_S).square()
    dropped_TER = torch.empty(length, experts, rest, dtype=torch.uint8)
    for place in range(1, length):
        cost_ES, dropped_TER[place] = step(cost_ES, wanted_ET[:, place], number_S, branches)
    states_TE = [cost_ES.argmin(1)]
    for dropped_ER in dropped_TER[1:].flip(0):
        kept_E = states_TE[-1] // branches
        highest_E = dropped_ER.gather(1, kept_E[:, None])[:, 0].long()
        states_TE.append(highest_E * rest + kept_E)
    states_ET = torch.stack(states_TE[::-1], dim=1)
    return number_S[states_ET]


def _step(
    cost_ES: Tensor, wanted_E: Tensor, number_S: Tensor, branches: int
) -> tuple[Tensor, Tensor]:
    """Least cost of paths that end in every state, one value later, and where they come from.

    A state is its highest bits, which the next state drops, and the rest R that it keeps.

    Returns:
        Costs (E, S), and the highest bits of the state before, by its rest, (E, R).
    """
    cost_EBR = cost_ES.view(len(cost_ES), branches, -1)
    least_ER, dropped_ER = cost_EBR[:, 0], torch.zeros_like(cost_EBR[:, 0])
    for branch in range(1, branches):
        is_less_ER = cost_EBR[:, branch] < least_ER
        least_ER = torch.where(is_less_ER, cost_EBR[:, branch], least_ER)
        dropped_ER = torch.where(is_less_ER, float(branch), dropped_ER)
    missed_ES = (wanted_E[:, None] - number_S).square()
    missed_ERB = missed_ES.view(len(cost_ES), -1, branches)
    return (missed_ERB + least_ER[..., None]).flatten(1), dropped_ER.to(torch.uint8)


_compiled = torch.compile(_step, dynamic=True)  # takes a fifth of the time, once it is compiled
