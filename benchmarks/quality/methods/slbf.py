"""SLBF: as MoBE, with as many basis matrices as experts, each of low rank inside the activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.layer import Compressed, Layer, dense
from benchmarks.quality.methods import mobe


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Attributes:
        share: Columns of A over its rows; 1 as published.
        transposed: Whether A is on the side of the hidden mode.
    """

    share: float
    transposed: bool

    def sizes(self, stack: Tensor, budget: int) -> tuple[int, int]:
        """Columns of A and the largest rank of the bases, 0 if A alone is too large."""
        experts, outer, inner = self.oriented(stack).shape
        columns = int(self.share * outer)
        left = budget - experts * (outer * columns + experts)
        return columns, max(0, min(columns, left // (experts * (columns + inner))))

    def oriented(self, stack: Tensor) -> Tensor:
        """The stack with A's rows as its own."""
        return stack.mT if self.transposed else stack


SETTINGS = [Setting(*own) for own in product((1, 0.75, 0.5, 0.25), (False, True))]


def slbf(layers: Sequence[Layer], keep: float) -> list[Compressed]:
    """SLBF (arXiv 2610.09342): W_e ≈ A_e SiLU(Σ_j α_ej U_j V_j), data-free, fitted with Adam.

    Start: U_j V_j is the truncated SVD of expert j, with norms of U and V equal, α the identity.
    A_e is the least-squares solution at every step, as in our MoBE. Tuned on the middle layer,
    for each projection by the weights' error: the size of A, which is square in the paper and
    then stores half of these models alone, and its side. What rounding leaves of a projection's
    budget goes to the next one.
    """
    if keep >= 1:
        return [dense(layer) for layer in layers]
    settings = [
        _best(stack, int(keep * stack.numel())) for stack in layers[len(layers) // 2].stacks
    ]
    return [_fit(layer, keep, settings) for layer in layers]


def _best(stack: Tensor, budget: int) -> Setting:
    def error(setting: Setting) -> float:
        if setting.sizes(stack, budget)[1] < 1:
            return torch.inf
        found = _approximate(stack, setting, budget, mobe.TRIAL_STEPS)
        return float((found.stack - stack).norm())

    return min(SETTINGS, key=error)


def _fit(layer: Layer, keep: float, settings: Sequence[Setting]) -> Compressed:
    fits: list[mobe.Fit] = []
    budget = 0
    for stack, setting in zip(layer.stacks, settings, strict=True):
        budget += int(keep * stack.numel())
        fits.append(_approximate(stack, setting, budget, mobe.STEPS))
        budget -= sum(part.numel() for part in fits[-1].parts)
    return mobe.of_fits(fits)


def _approximate(stack: Tensor, setting: Setting, budget: int, steps: int) -> mobe.Fit:
    """The fit of a stack: A, U, V and α."""
    target_EMN = setting.oriented(stack)
    unit = float(target_EMN.std())
    start = first_bases(target_EMN / unit, *setting.sizes(stack, budget))
    found = mobe.fit_bases(target_EMN / unit, start, silu, steps)
    return found.scaled(unit, transposed=setting.transposed)


def first_bases(target_EMN: Tensor, columns: int, rank: int) -> mobe.Bases:
    """The leading parts of every expert, mixed to as many rows as A has columns.

    Args:
        target_EMN: Stack.
        columns: Columns R of A.
        rank: Rank K of the bases.
    """
    left_EMS, values_ES, right_ESN = torch.linalg.svd(target_EMN, full_matrices=False)
    roots_EK = values_ES[:, :rank].sqrt()
    outer_ERK = left_EMS[..., :rank] * roots_EK[:, None]
    inner_EKN = right_ESN[:, :rank] * roots_EK[..., None]
    experts, rows, _ = target_EMN.shape
    if columns < rows:
        generator = torch.Generator().manual_seed(0)
        mixing_MR = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
        outer_ERK = mixing_MR.T @ outer_ERK
    norm = (outer_ERK @ inner_EKN).square().sum(-1).mean().sqrt()
    scale = (mobe.START / norm).sqrt()
    return mobe.Bases((outer_ERK * scale, inner_EKN * scale), torch.eye(experts))
