"""Learned rounding, as a competitor: codes and scales trained on the output of a layer.

From GPTQ's codes on, every code may move to a neighbour and every scale may change, by signs of
gradients through the rounding (straight-through), against the routed output of the dense experts.

Source:
    Cheng et al. 2023, Optimize Weight Rounding via Signed Gradient Descent (SignRound, AutoRound).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.quality.encodings import Encoding, Rounded
from benchmarks.quality.layer import Layer, Stacks

STEPS = 200
_BATCH_TOKENS = 4096
_HELD_OUT = (512, 16)  # tokens of a block, and of how many blocks one decides
_NEAR = 0.49  # of a code that a value starts from at most


@dataclass
class _Learned:
    """One projection: what its codes round, in codes, and the shares of its scales."""

    start: Rounded
    latent_EOK: Tensor
    offset_EOK: Tensor
    share_EOG: Tensor
    group: int

    @classmethod
    def of(cls, matrices_EOK: Tensor, start: Rounded, encoding: Encoding) -> _Learned:
        grid, inputs = start.grid, matrices_EOK.shape[-1]
        group = encoding.group or max(inputs, 1)
        exact = matrices_EOK / grid.scale_EOK + grid.zero_EOK
        latent = start.codes_EOK + (exact - start.codes_EOK).clamp(-_NEAR, _NEAR)
        share = matrices_EOK.new_ones(*matrices_EOK.shape[:2], -(-inputs // group))
        offset = torch.zeros_like(matrices_EOK)
        return cls(start, latent, offset.requires_grad_(), share.requires_grad_(), group)

    @property
    def values(self) -> Tensor:
        """The values as stored, (E, O, K), with gradients of what is trained."""
        grid, inputs = self.start.grid, self.latent_EOK.shape[-1]
        share = self.share_EOG.repeat_interleave(self.group, -1)[..., :inputs]
        scale = grid.scale_EOK * share
        scale = scale + (scale.bfloat16().to(scale) - scale).detach()
        moved = (self.latent_EOK - grid.zero_EOK) / share + grid.zero_EOK + self.offset_EOK
        moved = moved.clamp(grid.low, grid.high)
        codes = moved + (moved.round() - moved).detach()
        return (codes - grid.zero_EOK) * scale


@torch.no_grad()
def learn(
    layer: Layer, dense: Stacks, rounded: Sequence[Rounded], encoding: Encoding, steps: int = STEPS
) -> Stacks:
    """Train the rounding of a layer: gate, up and transposed down as stored, (E, K, I) each.

    Args:
        layer: The layer's tokens.
        dense: Gate, up and transposed down that were rounded, (E, K, I) each.
        rounded: Their codes, of down those of its transpose, (E, I, K).
        encoding: How they are stored.
        steps: Number of steps.
    """
    gate, up, down = dense
    matrices = (gate, up, down.mT)
    with torch.enable_grad():
        learned = [_Learned.of(m, r, encoding) for m, r in zip(matrices, rounded, strict=True)]

    def stacks() -> Stacks:
        gate, up, down = (own.values for own in learned)
        return gate, up, down.mT

    block, every = _HELD_OUT
    held_T = torch.arange(len(layer.x_TI)) // block % every == every - 1
    fit, held_out = _part(layer, ~held_T), _part(layer, held_T)
    target_TI, expected_TI = fit.output, held_out.output
    before = stacks()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        places = torch.randperm(len(fit.x_TI), generator=generator)[:_BATCH_TOKENS]
        with torch.enable_grad():
            missed = _part(fit, places).output_of(stacks()) - target_TI[places]
            parameters = [p for own in learned for p in (own.offset_EOK, own.share_EOG)]
            gradients = torch.autograd.grad(missed.square().sum(), parameters)
        rate = (1 - step / steps) / steps
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * gradient.sign()
        for own in learned:
            own.offset_EOK.clamp_(-0.5, 0.5)
    after = stacks()
    errors = [float((held_out.output_of(s) - expected_TI).norm()) for s in (before, after)]
    return after if errors[1] < errors[0] else before


def _part(layer: Layer, places: Tensor) -> Layer:
    return replace(
        layer,
        x_TI=layer.x_TI[places],
        experts_Tk=layer.experts_Tk[places],
        weights_Tk=layer.weights_Tk[places],
    )
