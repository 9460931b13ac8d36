"""MoBE: every expert's inner factor is a nonlinear mixture of a few basis matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.encodings import Encoding, gptq, round_to_nearest
from benchmarks.quality.layer import Compressed, Layer, Stacks, dense, output_error, triple

Activation = Callable[[Tensor], Tensor]

STEPS = 300
TRIAL_STEPS = 60
# In units of a basis matrix's rows, which start orthonormal times START.
START, _RATE = 4.0, 0.08


@dataclass(frozen=True)
class Setting:
    """What the paper leaves to be chosen.

    Attributes:
        bases: Number m of basis matrices.
        activation: f.
        transposed: Whether the bases are on the side of the intermediate mode.
    """

    bases: int
    activation: Activation
    transposed: bool

    def rank(self, stack: Tensor, budget: int) -> int:
        """The largest inner size for which factors, bases and coefficients fit the budget."""
        experts, outer, inner = (stack.mT if self.transposed else stack).shape
        return min(inner, (budget - experts * self.bases) // (experts * outer + self.bases * inner))


def mobe(layers: Sequence[Layer], keep: float) -> list[Compressed]:
    """MoBE (ICLR 2026): W_e ≈ A_e f(Σ_j α_ej B_j), data-free, fitted with Adam.

    A_e belongs to the expert, the m basis matrices B_j to all experts of the layer and projection.
    Start: B_j from the SVD of a group of experts, as in the paper's code. A_e is the least-squares
    solution at every step instead of a third set of Adam's variables. Down is compressed alike or,
    where the rest can pay for it, left whole as in the paper. Tuned on the middle layer: m, f, the
    side of the bases, and what happens to down. What rounding leaves goes to another rank of up
    or down.
    """
    if keep >= 1:
        return [dense(layer) for layer in layers]
    middle = layers[len(layers) // 2]
    plans = list(_plans(middle, keep))
    plan = min(plans, key=lambda p: output_error(middle.few_tokens, _fit(middle, p, TRIAL_STEPS)))
    return [_fit(layer, plan, STEPS) for layer in layers]


Plan = tuple[tuple[Setting | None, int], ...]
"""For gate, up and down the setting and the budget; no setting leaves the stack whole."""


def _plans(layer: Layer, keep: float) -> Iterator[Plan]:
    gate, _, down = layer.stacks
    budget = int(keep * layer.dense)
    for of_down in (keep, 1.0):
        of_gate = (3 * keep - of_down) / 2
        if of_gate < 0.2:
            continue
        size = int(of_gate * gate.numel())
        best = _best_setting(gate, size)
        if of_down == 1.0:
            yield (best, size), (best, budget - down.numel() - _cost(best, gate, size)), (None, 0)
        else:
            left = budget - 2 * _cost(best, gate, size)
            yield (best, size), (best, size), (_best_setting(down, left), left)


def _cost(setting: Setting, stack: Tensor, budget: int) -> int:
    experts, outer, inner = (stack.mT if setting.transposed else stack).shape
    rank = setting.rank(stack, budget)
    return experts * outer * rank + setting.bases * (rank * inner + experts)


def _best_setting(stack: Tensor, budget: int) -> Setting:
    """By the error of the weights after a few steps."""
    experts = len(stack)
    counts = [m for m in (1, 2, 4, 8, 16) if m <= experts]

    def error(setting: Setting) -> float:
        if setting.rank(stack, budget) < 1:
            return torch.inf
        return float((_approximate(stack, setting, budget, TRIAL_STEPS).stack - stack).norm())

    tried = [Setting(m, torch.tanh, side) for m, side in product(counts, (False, True))]
    best = min(tried, key=error)
    return min(best, Setting(best.bases, silu, best.transposed), key=error)


def _fit(layer: Layer, plan: Plan, steps: int) -> Compressed:
    return of_fits([
        Fit.whole(stack) if setting is None else _approximate(stack, setting, budget, steps)
        for stack, (setting, budget) in zip(layer.stacks, plan, strict=True)
    ])  # fmt: skip


def _approximate(stack: Tensor, setting: Setting, budget: int, steps: int) -> Fit:
    """The fit of a stack."""
    target_EMN = stack.mT if setting.transposed else stack
    unit = float(target_EMN.std())
    start = first_bases(target_EMN, setting.bases, setting.rank(stack, budget))
    found = fit_bases(target_EMN / unit, start, setting.activation, steps)
    return found.scaled(unit, transposed=setting.transposed)


@dataclass(frozen=True)
class Bases:
    """Basis matrices and their mixtures.

    Attributes:
        factors: The matrices B (J, R, N), or factors (J, R, K) and (J, K, N) of each.
        alpha_EJ: Coefficients of the mixtures.
    """

    factors: tuple[Tensor, ...]
    alpha_EJ: Tensor

    def mixed(self, activation: Activation) -> Tensor:
        """f(Σ_j α_ej B_j), (E, R, N)."""
        outer_JRX, *inner_JKN = self.factors
        bases_JRN = outer_JRX @ inner_JKN[0] if inner_JKN else outer_JRX
        return activation(torch.einsum("ej,jrn->ern", self.alpha_EJ, bases_JRN))

    def rounded(self, encoding: Encoding) -> tuple[Bases, int]:
        """With matrices rounded to nearest, and the bits of these and of α, which keeps 16."""
        found = [_to_nearest(factor, encoding) for factor in self.factors]
        bits = sum(own for _, own in found) + 16 * self.alpha_EJ.numel()
        return Bases(tuple(factor for factor, _ in found), self.alpha_EJ), bits


@dataclass(frozen=True)
class Fit:
    """What a fit found.

    Attributes:
        stack: The fitted stack.
        parts: A, the bases and α, which are stored.
        rounded: The stack of rounded parts, and their bits.
    """

    stack: Tensor
    parts: Sequence[Tensor]
    rounded: Callable[[Encoding], tuple[Tensor, int]]

    @classmethod
    def whole(cls, stack: Tensor) -> Fit:
        """A stack as it is."""
        return cls(stack, [stack], lambda encoding: _to_nearest(stack, encoding))

    def scaled(self, unit: float, *, transposed: bool) -> Fit:
        """That of a stack in another unit, and orientation."""

        def stack_of(fitted: Tensor) -> Tensor:
            return unit * (fitted.mT if transposed else fitted)

        def rounded(encoding: Encoding) -> tuple[Tensor, int]:
            fitted, bits = self.rounded(encoding)
            return stack_of(fitted), bits

        return Fit(stack_of(self.stack), self.parts, rounded)


def of_fits(fits: Sequence[Fit]) -> Compressed:
    """A layer of three fits."""

    def rounded(encoding: Encoding) -> tuple[Stacks, int]:
        found = [fit.rounded(encoding) for fit in fits]
        return triple(stack for stack, _ in found), sum(bits for _, bits in found)

    parts = tuple(part for fit in fits for part in fit.parts)
    return Compressed(triple(fit.stack for fit in fits), parts, rounded=rounded)


def _to_nearest(matrices_EOK: Tensor, encoding: Encoding) -> tuple[Tensor, int]:
    count, outputs, inputs = matrices_EOK.shape
    found = round_to_nearest(matrices_EOK, encoding, torch.empty(0))
    return found.values, count * encoding.stored_bits(outputs, inputs)


def first_bases(target_EMN: Tensor, bases: int, rank: int) -> Bases:
    """From the leading right singular vectors of as many groups of experts, which take one each.

    Args:
        target_EMN: Stack.
        bases: Number J.
        rank: Rows R.
    """
    groups = target_EMN.tensor_split(bases)
    starts = [torch.linalg.svd(group.flatten(0, 1))[2][:rank] for group in groups]
    member = [torch.full((len(group),), j) for j, group in enumerate(groups)]
    return Bases((START * torch.stack(starts),), torch.eye(bases)[torch.cat(member)])


def fit_bases(target_EMN: Tensor, start: Bases, activation: Activation, steps: int) -> Fit:
    """Minimise Σ_e ‖W_e − A_e f(Σ_j α_ej B_j)‖² over A (E, M, R), B and α.

    Args:
        target_EMN: W, of unit variance.
        start: B and α to begin with.
        activation: f.
        steps: Steps of Adam with a cosine schedule.
    """
    variables = [part.clone().requires_grad_() for part in (*start.factors, start.alpha_EJ)]
    found = Bases(tuple(variables[:-1]), variables[-1])
    adam = _Adam(variables)
    for step in range(steps):
        mixed_ERN = found.mixed(activation)
        # At the optimum over A the gradient by the rest is the one with A held fixed.
        A_EMR = _least_squares(target_EMN, mixed_ERN.detach())
        loss = (target_EMN - A_EMR @ mixed_ERN).square().mean()
        gradients = torch.autograd.grad(loss, variables)
        adam.step(gradients, _RATE * (1 + math.cos(math.pi * step / steps)) / 2)
    bases = Bases(tuple(own.detach() for own in found.factors), found.alpha_EJ.detach())
    mixed_ERN = bases.mixed(activation)
    A_EMR = _least_squares(target_EMN, mixed_ERN)

    def rounded(encoding: Encoding) -> tuple[Tensor, int]:
        """A by GPTQ, after least squares for the rounded bases, which are its inputs."""
        stored, bits = bases.rounded(encoding)
        mixed_ERN = stored.mixed(activation)
        exact_EMR = _least_squares(target_EMN, mixed_ERN)
        codes = gptq(exact_EMR, encoding, mixed_ERN @ mixed_ERN.mT)
        experts, outer, columns = exact_EMR.shape
        bits += experts * encoding.stored_bits(outer, columns)
        return codes.values @ mixed_ERN, bits

    return Fit(A_EMR @ mixed_ERN, [A_EMR, *bases.factors, bases.alpha_EJ], rounded)


class _Adam:
    """Kingma & Ba 2015. PyTorch's own imports its compiler first, which takes longer than a fit."""

    def __init__(self, variables: list[Tensor]) -> None:
        self.variables = variables
        self.means = [torch.zeros_like(variable) for variable in variables]
        self.squares = [torch.zeros_like(variable) for variable in variables]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        self.steps += 1
        unbias = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        moments = zip(self.variables, gradients, self.means, self.squares, strict=True)
        for variable, gradient, mean, square in moments:
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.001)
            variable.sub_(rate * (mean / unbias[0]) / ((square / unbias[1]).sqrt() + 1e-12))


def _least_squares(target_EMN: Tensor, mixed_ERN: Tensor) -> Tensor:
    gram_ERR = mixed_ERN @ mixed_ERN.mT
    mean_E11 = gram_ERR.diagonal(0, 1, 2).mean(-1)[:, None, None]
    root_ERR = torch.linalg.cholesky(gram_ERR + 1e-5 * mean_E11 * torch.eye(gram_ERR.shape[-1]))
    return torch.cholesky_solve(mixed_ERN @ target_EMN.mT, root_ERR).mT
