"""Refinement: gradient steps on cores and factors against the layer's own routed output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuckerize.calibration.tokens import LayerTokens
from tuckerize.domain import Projection
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.names import TensorKind, TensorName
from tuckerize.progress import Stage, silent
from tuckerize.runtime.experts import TuckerExperts

# Step size of tensors of one name as a share of their root mean square; falls to 0 as a cosine.
_STEP = 2.6e-2
_WARM_UP_STEPS = 20
_BATCH_TOKENS = 1024
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
    blocks = blocks_of(module, sharing)
    module.requires_grad_(requires_grad=True)
    _adam(module, blocks, fit, target_TI, steps, batch, stage, sharing)
    module.requires_grad_(requires_grad=False)
    module.zero_grad()
    after = relative_output_error(module, held_out, held_out_TI, sharing)
    kept = after < before
    if not kept:
        with torch.no_grad():
            for block in blocks:
                torch._foreach_copy_(block.parameters, block.start)
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
    blocks: Sequence[Block],
    fit: LayerTokens,
    target_TI: Tensor,
    steps: int,
    batch: int,
    stage: Stage,
    sharing: Sharing,
) -> None:
    optimizer = torch.optim.Adam(
        [{"params": block.parameters} for block in blocks],
        betas=(0.9, 0.95),
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
        optimizer.zero_grad()
        with torch.enable_grad():
            own_TI = target_TI[own]
            energy = sharing.sum(own_TI.square().sum())
            missed = (module(*fit.part(own)) - own_TI).square().sum()
            (missed / energy.clamp_min(1e-30)).backward()
        for group, block in zip(optimizer.param_groups, blocks, strict=True):
            group["lr"] = _STEP * block.root_mean_square * slope
            block.complete_gradients(sharing)
        optimizer.step()


@dataclass(frozen=True, slots=True)
class Block:
    """A parameter, or those of all experts that have the same name.

    Attributes:
        parameters: Those of this process.
        start: Their values before the first step.
        is_common: Whether every process has the same.
        root_mean_square: Of the values of all processes.
        pull: Weight of the ridge towards the start, of a difference in its gradient.
    """

    parameters: list[Tensor]
    start: list[Tensor]
    is_common: bool
    root_mean_square: float
    pull: float

    def complete_gradients(self, sharing: Sharing) -> None:
        """Sum gradients over processes, and add those of the ridge."""
        gradients = []
        for value in self.parameters:
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = sharing.sum(gradient) if self.is_common else gradient
            gradients.append(value.grad)
        torch._foreach_add_(gradients, self.parameters, alpha=self.pull)
        torch._foreach_add_(gradients, self.start, alpha=-self.pull)


def blocks_of(module: TuckerExperts, sharing: Sharing) -> list[Block]:
    """The blocks of a layer, of which this process has its experts' parameters."""
    members: dict[TensorName, list[Tensor]] = {}
    for text, value in module.named_parameters():
        members.setdefault(replace(TensorName.parse(text), expert=None), []).append(value)
    start = {name: [own.detach().clone() for own in values] for name, values in members.items()}
    own = {
        name: (sum(float(v.square().sum()) for v in values), sum(v.numel() for v in values))
        for name, values in start.items()
    }
    common = _common(members)
    everywhere = sharing.of_all({name: size for name, size in own.items() if name not in common})
    count = len(common.union(*everywhere))
    blocks = []
    for name, values in members.items():
        sizes = [own[name]] if name in common else [of[name] for of in everywhere if name in of]
        energy, numbers = (sum(parts) for parts in zip(*sizes, strict=True))
        pull = 2 * _RIDGE / count / max(energy, 1e-30)
        root = math.sqrt(energy / numbers)
        blocks.append(Block(values, start[name], name in common, root, pull))
    return blocks


def _common(names: Collection[TensorName]) -> set[TensorName]:
    """The parameters that belong to all experts of a group: every process has them."""
    mixed = {(name.group, name.owner) for name in names if name.kind == TensorKind.U_E}

    def is_common(name: TensorName) -> bool:
        if name.kind == TensorKind.BIAS:
            return name.projection == Projection.DOWN
        if name.kind == TensorKind.CORE:
            return (name.group, name.owner) in mixed
        return name.kind != TensorKind.U_E

    return {name for name in names if is_common(name)}
