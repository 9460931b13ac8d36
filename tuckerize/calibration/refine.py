"""Refinement: gradient steps on cores and factors against the layer's own routed output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.tokens import LayerTokens
from tuckerize.domain import Projection
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.names import TensorKind, TensorName
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
    sharing: Sharing = ALONE,
) -> Refinement:
    """Improve a layer in place by gradient steps, which a held-out error decides to keep.

    Args:
        module: The layer, in float32; of the experts of this process.
        fit: Tokens to fit.
        held_out: Validation set.
        dense: Computes the routed output of the dense layer, shape (T, I).
        steps: Number of steps of Adam; as many as make 25 passes over the tokens, if that is less.
        stage: Is told the steps, some at a time.
        sharing: Processes that share the layer's experts, and the tokens of every step.
    """
    batch, steps = batch_and_steps(len(fit.x_TI), steps)
    target_TI = dense(fit)
    held_out_TI = dense(held_out)
    before = relative_output_error(module, held_out, held_out_TI, sharing)
    parameters = dict(module.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    for value in parameters.values():
        value.requires_grad_(True)  # noqa: FBT003
    _adam(module, start, fit, target_TI, steps, batch, stage, sharing)
    for value in parameters.values():
        value.requires_grad_(False)  # noqa: FBT003
        value.grad = None
    after = relative_output_error(module, held_out, held_out_TI, sharing)
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
def relative_output_error(
    module: TuckerExperts, tokens: LayerTokens, target_TI: Tensor, sharing: Sharing = ALONE
) -> float:
    """‖ŷ − y‖ / ‖y‖ over all tokens (unitless); NaN without tokens."""
    if not len(tokens.x_TI):
        return math.nan
    own = sharing.own(len(target_TI))
    missed_1 = (module(*tokens.part(own)) - target_TI[own]).norm()[None]
    missed = float(sharing.gather(missed_1).norm())
    return missed / max(float(target_TI.norm()), torch.finfo(torch.float32).tiny)


def _adam(
    module: TuckerExperts,
    start: Mapping[str, Tensor],
    fit: LayerTokens,
    target_TI: Tensor,
    steps: int,
    batch: int,
    stage: Stage,
    sharing: Sharing,
) -> None:
    parameters = dict(module.named_parameters())
    common = _common(start)
    sizes, count = _sizes(start, common, sharing)
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
        own = places[sharing.own(batch)]
        slope = min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = _STEP * sizes[group["name"]].root_mean_square * slope
        optimizer.zero_grad()
        with torch.enable_grad():
            own_TI = target_TI[own]
            energy = sharing.sum(own_TI.square().sum())
            missed = (module(*fit.part(own)) - own_TI).square().sum()
            (missed / energy.clamp_min(1e-30)).backward()
        for name, value in parameters.items():
            mean_square = max(sizes[name].root_mean_square ** 2, 1e-30) * sizes[name].values
            pull = 2 * _RIDGE / count / mean_square
            if value.grad is None:  # of experts that no token of the batch sees
                value.grad = torch.zeros_like(value)
            if name in common:
                value.grad = sharing.sum(value.grad)
            value.grad.add_(value, alpha=pull).add_(start[name], alpha=-pull)
        optimizer.step()


class _Size(NamedTuple):
    """Root mean square, and number of values, of a parameter; of all processes' parts of it."""

    root_mean_square: float
    values: int


def _sizes(
    tensors: Mapping[str, Tensor], common: set[str], sharing: Sharing
) -> tuple[dict[str, _Size], int]:
    """Sizes of parameters, those of the same name taken together, and how many there are."""
    own = {
        name: _Size(float(value.square().mean().sqrt()), value.numel())
        for name, value in tensors.items()
    }
    alone = {name for name in tensors if TensorName.parse(name).expert is not None}
    split = {name: own[name] for name in tensors if name not in common | alone}
    everywhere = sharing.of_all(split)
    for name in split if len(everywhere) > 1 else ():
        parts = [theirs[name] for theirs in everywhere if name in theirs]
        values = sum(part.values for part in parts)
        square = sum(part.root_mean_square**2 * part.values for part in parts) / values
        own[name] = _Size(math.sqrt(square), values)
    shared = common.union(*everywhere)
    return own, len(shared) + sharing.total(len(alone))


def _common(names: Iterable[str]) -> set[str]:
    """The parameters that belong to all experts of a group: every process has them."""
    parsed = {text: TensorName.parse(text) for text in names}
    mixed = {(n.group, n.owner) for n in parsed.values() if n.kind == TensorKind.U_E}

    def is_common(name: TensorName) -> bool:
        if name.kind == TensorKind.BIAS:
            return name.projection == Projection.DOWN
        if name.kind == TensorKind.CORE:
            return (name.group, name.owner) in mixed
        return name.kind != TensorKind.U_E

    return {text for text, name in parsed.items() if is_common(name)}
