"""Refinement: gradient steps on cores and factors against the layer's own routed output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tuckerize.calibration.tokens import LayerTokens
from tuckerize.progress import Stage, silent
from tuckerize.runtime.experts import TuckerExperts

# Step size of a tensor as a share of its root mean square; falls to 0 as a cosine.
_STEP = 1.6e-2
_WARM_UP_STEPS = 20
_BATCH_TOKENS = 2048
# Passes over the tokens after which the error of others rises again.
_MAX_EPOCHS = 25
# Weight of the ridge towards the closed-form solution, relative to the relative squared error.
_RIDGE = 1e-2
_SEED = 0
_STEPS_PER_STAGE = 10
# Devices where torch has Adam in one kernel; elsewhere it takes one for each of its operations.
_FUSED_ADAM = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Refinement:
    """Result of the gradient steps on a layer.

    Attributes:
        error_before: Relative output error on the validation set before the steps (unitless).
        error_after: The same after them.
        kept: Whether the held-out error fell; otherwise the module was restored.
    """

    error_before: float
    error_after: float
    kept: bool


def refine(
    module: TuckerExperts,
    fit: LayerTokens,
    held_out: LayerTokens,
    dense: Callable[[LayerTokens], Tensor],
    *,
    steps: int,
    stage: Stage = silent,
) -> Refinement:
    """Improve a layer in place by gradient steps, which a held-out error decides to keep.

    Args:
        module: The layer, in float32.
        fit: Tokens to fit.
        held_out: Validation set.
        dense: Computes the routed output of the dense layer, shape (T, I).
        steps: Number of steps of Adam; as many as make 25 passes over the tokens, if that is less.
        stage: Is told the steps, some at a time.
    """
    batch, steps = batch_and_steps(len(fit.x_TI), steps)
    target_TI = dense(fit)
    before = relative_output_error(module, held_out, dense(held_out))
    parameters = dict(module.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    for value in parameters.values():
        value.requires_grad_(True)  # noqa: FBT003
    _adam(module, parameters, start, fit, target_TI, steps, batch, stage)
    for value in parameters.values():
        value.requires_grad_(False)  # noqa: FBT003
        value.grad = None
    after = relative_output_error(module, held_out, dense(held_out))
    kept = after < before
    if not kept:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(start[name])
    return Refinement(before, after, kept)


def batch_and_steps(tokens: int, most: int) -> tuple[int, int]:
    """Tokens of a step, and the number of steps that are made of at most so many.

    Args:
        tokens: Tokens to fit.
        most: Upper bound on the steps.
    """
    batch = max(1, min(_BATCH_TOKENS, tokens))
    return batch, min(most, -(-_MAX_EPOCHS * tokens // batch))


@torch.no_grad()
def relative_output_error(module: TuckerExperts, tokens: LayerTokens, target_TI: Tensor) -> float:
    """‖ŷ − y‖ / ‖y‖ over all tokens (unitless); NaN without tokens."""
    if not len(tokens.x_TI):
        return math.nan
    missed = float((module(*tokens) - target_TI).norm())
    return missed / max(float(target_TI.norm()), torch.finfo(torch.float32).tiny)


def _adam(
    module: TuckerExperts,
    parameters: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    fit: LayerTokens,
    target_TI: Tensor,
    steps: int,
    batch: int,
    stage: Stage,
) -> None:
    sizes = {name: _root_mean_square(value) for name, value in start.items()}
    optimizer = torch.optim.Adam(
        [{"params": [value], "name": name} for name, value in parameters.items()],
        betas=(0.9, 0.99),
        fused=fit.x_TI.device.type in _FUSED_ADAM,
    )
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if step % _STEPS_PER_STAGE == 0:
            stage(f"refinement, step {step + 1} of {steps}", _STEPS_PER_STAGE if step else 0)
        if len(order) < batch:
            order = torch.randperm(len(fit.x_TI), generator=generator)
        places, order = order[:batch].to(fit.x_TI.device), order[batch:]
        slope = min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = _STEP * sizes[group["name"]] * slope
        optimizer.zero_grad()
        with torch.enable_grad():
            own_TI = target_TI[places]
            missed = (module(*fit.part(places)) - own_TI).square().sum()
            (missed / own_TI.square().sum().clamp_min(1e-30)).backward()
        for name, value in parameters.items():
            mean_square = max(sizes[name] ** 2, 1e-30) * value.numel()
            pull = 2 * _RIDGE / len(parameters) / mean_square
            if value.grad is None:  # of experts that no token of the batch sees
                value.grad = torch.zeros_like(value)
            value.grad.add_(value, alpha=pull).add_(start[name], alpha=-pull)
        optimizer.step()


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
