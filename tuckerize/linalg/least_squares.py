"""Small least-squares problems and linear systems, solved directly or by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tuckerize.linalg.tucker import in_float64

_CONJUGATE_GRADIENT_STEPS = 10
_CONJUGATE_GRADIENT_TOLERANCE = 1e-9


def least_squares(gram_NN: Tensor, right_NK: Tensor) -> Tensor:
    """Solve a small, possibly singular normal equation in float64 on the host."""
    solution: Tensor = torch.linalg.lstsq(gram_NN.cpu().double(), right_NK.cpu().double()).solution
    return solution.to(right_NK)


def solve(grams_ENN: Tensor, right_ENK: Tensor) -> Tensor:
    """Solve well-conditioned systems in float64, one large one per expert at a time."""
    solution = torch.empty_like(right_ENK)
    for own_NK, gram_NN, right_NK in zip(solution, grams_ENN, right_ENK, strict=True):
        own_NK.copy_(torch.linalg.solve(in_float64(gram_NN), in_float64(right_NK)))
    return solution


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    *,
    steps: int = _CONJUGATE_GRADIENT_STEPS,
    precondition: Callable[[Tensor], Tensor] = torch.clone,
) -> Tensor:
    """Solve normal(Z) = right from a start; each step lowers the corresponding quadratic."""
    solution = start.clone()
    residual = right - normal(solution)
    conditioned = precondition(residual)
    direction = conditioned
    squared = float((residual * conditioned).sum())
    enough = _CONJUGATE_GRADIENT_TOLERANCE * float((right * precondition(right)).sum())
    for _ in range(steps):
        if squared <= enough:
            break
        applied = normal(direction)
        curvature = float((direction * applied).sum())
        if curvature <= 0:
            break
        step = squared / curvature
        solution += step * direction
        residual -= step * applied
        conditioned = precondition(residual)
        before, squared = squared, float((residual * conditioned).sum())
        direction = conditioned + (squared / before) * direction
    return solution
