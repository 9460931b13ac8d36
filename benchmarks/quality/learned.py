"""Learned rounding, as a competitor: codes and scales trained on the output of a layer.

Every code may move to a neighbour and every scale may change, by gradients through the rounding
(straight-through) against the routed output of the dense experts. From the published form it
differs where that was better here: it starts from codes that are fitted already, and Adam takes
steps so small that codes move where the gradient insists; signs of gradients made it worse.

Source:
    Cheng et al. 2023, Optimize Weight Rounding via Signed Gradient Descent (SignRound, AutoRound).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.quality.encodings import Encoding, Rounded
from benchmarks.quality.layer import Layer, Stacks

_STEPS = 150
_WARM_UP_STEPS = 20
_BATCH_TOKENS = 2048
_CODE_STEP, _SCALE_STEP = 4e-3, 1e-3  # in codes, and as a share of a scale
_HELD_OUT = (512, 16)  # tokens of a block, and of how many blocks one decides
_NEAR = 0.25  # of a code that a value starts from at most


@dataclass(frozen=True)
class _Trained:
    """One projection in training.

    Attributes:
        start: Its codes, and what they stand for.
        latent_EOK: Values in codes, before rounding.
        share_EOG: Of the scales at the start.
        group: Inputs that share a scale.
    """

    start: Rounded
    latent_EOK: Tensor
    share_EOG: Tensor
    group: int

    @classmethod
    def of(cls, matrices_EOK: Tensor, start: Rounded, encoding: Encoding) -> _Trained:
        grid, inputs = start.grid, matrices_EOK.shape[-1]
        group = encoding.group or max(inputs, 1)
        missed = matrices_EOK / grid.scale_EOK + grid.zero_EOK - start.codes_EOK
        latent = start.codes_EOK + missed.clamp(-_NEAR, _NEAR)
        share = torch.ones_like(grid.scale_EOK[..., ::group])
        return cls(start, latent.requires_grad_(), share.requires_grad_(), group)

    @property
    def values(self) -> Tensor:
        """The values as stored, (E, O, K)."""
        grid = self.start.grid
        share = self.share_EOG.repeat_interleave(self.group, -1)[..., : self.latent_EOK.shape[-1]]
        scale = grid.scale_EOK * share
        scale = scale + (scale.bfloat16().to(scale) - scale).detach()
        moved = ((self.latent_EOK - grid.zero_EOK) / share + grid.zero_EOK).clamp(
            grid.low, grid.high
        )
        codes = moved + (moved.round() - moved).detach()
        return (codes - grid.zero_EOK) * scale


@torch.no_grad()
def learn(
    layer: Layer,
    matrices: Sequence[Tensor],
    rounded: Sequence[Rounded],
    encoding: Encoding,
    steps: int = _STEPS,
) -> Stacks:
    """Train the rounding of a layer: gate, up and transposed down as stored, (E, K, I) each.

    Args:
        layer: The layer, and what its output should be.
        matrices: Of gate and up (E, K, I), of down (E, I, K).
        rounded: The same as they are rounded.
        encoding: How they are stored.
        steps: Number of steps.
    """
    own = [_Trained.of(m, r, encoding) for m, r in zip(matrices, rounded, strict=True)]
    block, every = _HELD_OUT
    held_T = torch.arange(len(layer.x_TI)) // block % every == every - 1
    fit, held_out = _part(layer, ~held_T), _part(layer, held_T)
    before = _stacks([r.values for r in rounded])
    _train(own, fit, steps)
    after = _stacks([trained.values for trained in own])
    errors = [float((held_out.output_of(s) - held_out.output).norm()) for s in (before, after)]
    return after if errors[1] < errors[0] else before


def _train(own: Sequence[_Trained], fit: Layer, steps: int) -> None:
    sizes = {_CODE_STEP: [part.latent_EOK for part in own], _SCALE_STEP: [p.share_EOG for p in own]}
    adam = torch.optim.Adam([{"params": p} for p in sizes.values()], betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    target_TI, order = fit.output, torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < _BATCH_TOKENS:
            order = torch.randperm(len(fit.x_TI), generator=generator)
        places, order = order[:_BATCH_TOKENS], order[_BATCH_TOKENS:]
        slope = min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, size in zip(adam.param_groups, sizes, strict=True):
            group["lr"] = size * slope
        adam.zero_grad()
        with torch.enable_grad():
            stacks = _stacks([part.values for part in own])
            missed = (_part(fit, places).output_of(stacks) - target_TI[places]).square().sum()
            torch.autograd.backward(missed / target_TI[places].square().sum())
        adam.step()


def _stacks(values: Sequence[Tensor]) -> Stacks:
    gate_EKI, up_EKI, down_EIK = values
    return gate_EKI, up_EKI, down_EIK.mT


def _part(layer: Layer, places: Tensor) -> Layer:
    return replace(
        layer,
        x_TI=layer.x_TI[places],
        experts_Tk=layer.experts_Tk[places],
        weights_Tk=layer.weights_Tk[places],
    )
