"""MoE-Slimming: channels by attribution, widths of layers and experts by coverage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.budget import covering_sizes
from benchmarks.quality.layer import Compressed, Layer, best_of, dense
from benchmarks.quality.methods.pruning import narrowed

ALIGNMENT = 8
"""Widths are multiples of so many neurons, as those of equal widths are."""


def moe_slimming(layers: Sequence[Layer], keep: float) -> list[Compressed]:
    """MoE-Slimming (ICML 2026, arXiv 2606.18304): narrower experts, by score coverage.

    Its loss is that of a decoder layer whose routed output y is scaled by 0.9: ‖0.1 y‖² over the
    squared norm of the layer's output. A layer keeps the channels that cover a share of its scores,
    which grows with the loss (smoothed by four square roots); an expert those that cover a share of
    its own, which grows with the root of its attribution, Σ_t ⟨y, w f_e(x)⟩ over the squared norm.
    Widths are aligned. Tuned over the whole model, by that loss of the layers: the score, and
    whether layers are weighed by their loss or alike; in every layer, whether experts are weighed
    by attribution or alike. In place of the paper's fine-tuning down is refitted by least squares.
    """
    if keep >= 1:
        return [dense(layer) for layer in layers]
    count = int(keep * sum(layer.dense for layer in layers)) // (3 * layers[0].shape[2])
    saliencies = [_Saliency(layer) for layer in layers]
    tried = []
    for score, by_loss in product(saliencies[0].channels, (True, False)):
        gains = [own.channels[score].flatten().sort(descending=True).values for own in saliencies]
        weights = _smoothed([own.loss for own in saliencies]) if by_loss else torch.ones(len(gains))
        sizes = covering_sizes(count, gains, weights)
        found = [
            best_of(own.layer, _candidates(own, own.channels[score], size))
            for own, size in zip(saliencies, sizes, strict=True)
        ]
        missed = sum(own.missed(new) for own, new in zip(saliencies, found, strict=True))
        tried.append((missed, found))
    return min(tried, key=lambda pair: pair[0])[1]


@dataclass(frozen=True, eq=False)
class _Saliency:
    """Scores of a layer's channels and experts."""

    layer: Layer

    @cached_property
    def loss(self) -> float:
        """Squared norm of the routed output over the decoder layer's, mean over tokens."""
        return float((self.layer.output.square().sum(-1) / _squared_norms(self.layer)).mean())

    def missed(self, compressed: Compressed) -> float:
        """The same of what a compressed layer misses, on few tokens."""
        few = self.layer.few_tokens
        missed_TI = few.output_of(compressed.stacks) - few.output
        return float((missed_TI.square().sum(-1) / _squared_norms(few)).mean())

    @property
    def experts(self) -> Tensor:
        """Attribution of every expert to the loss, Σ_t ⟨y, w f_e(x)⟩ over squared norms, (E,)."""
        return self._scores["expert"]

    @property
    def channels(self) -> dict[str, Tensor]:
        """Scores of every channel, means of gate's and up's outputs and down's input, (E, H) each.

        Norms over an expert's tokens; |value × gradient|; Σ |weight| × norm of the weight's input.
        """
        return {name: own for name, own in self._scores.items() if name != "expert"}

    def _slopes(self, expert: int) -> Tensor:
        """Gradients of the loss by the routed output of an expert's tokens, over −0.2, (N, I)."""
        rows = (self.layer.experts_Tk == expert).any(-1).nonzero()[:, 0]
        return self.layer.output[rows] / _squared_norms(self.layer)[rows, None]

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        activations, attributions, magnitudes, experts = [], [], [], []
        for expert, (x_NI, w_N) in enumerate(self.layer.tokens):
            gate_HI, up_HI, down_HI = (stack[expert] for stack in self.layer.stacks)
            gate_NH, up_NH = x_NI @ gate_HI.T, x_NI @ up_HI.T
            active_NH = silu(gate_NH) * up_NH
            down_norm_H = active_NH.norm(dim=0)
            activations.append((gate_NH.norm(dim=0) + up_NH.norm(dim=0) + down_norm_H) / 3)
            slope_NH = self._slopes(expert) @ down_HI.T * w_N[:, None]
            # Up is a factor of the activation: value times gradient is that of down's input.
            of_down_NH = active_NH * slope_NH
            experts.append(of_down_NH.sum() / len(self.layer.x_TI))
            sigmoid_NH = gate_NH.sigmoid()
            derivative_NH = sigmoid_NH * (1 + gate_NH * (1 - sigmoid_NH))
            of_gate_H = (gate_NH * derivative_NH * up_NH * slope_NH).abs().sum(0)
            attributions.append((2 * of_down_NH.abs().sum(0) + of_gate_H) / (3 * max(len(w_N), 1)))
            inputs_I = x_NI.norm(dim=0)
            of_down_H = down_HI.abs().sum(-1) * down_norm_H
            magnitudes.append(((gate_HI.abs() + up_HI.abs()) @ inputs_I + of_down_H) / 3)
        scores = {"norm": activations, "attribution": attributions, "magnitude": magnitudes}
        return {name: torch.stack(own) for name, own in (*scores.items(), ("expert", experts))}


def _squared_norms(layer: Layer) -> Tensor:
    if layer.decoder_norms_T is None:
        raise ValueError("MoE-Slimming needs the norms of the decoder layers' outputs")
    return layer.decoder_norms_T.square().clamp_min(1e-30)


def _smoothed(losses: Sequence[float]) -> Tensor:
    """Four times the root, within a standard deviation of the mean, over the mean."""
    losses_L = torch.tensor(losses)
    for _ in range(4 if len(losses) > 1 else 0):
        losses_L = losses_L.sqrt()
        mean, spread = losses_L.mean(), losses_L.std()
        losses_L = losses_L.clamp(mean - spread, mean + spread)
    return losses_L / losses_L.mean()


def _candidates(saliency: _Saliency, scores_EH: Tensor, count: int) -> Iterator[Compressed]:
    """The layer with `count` channels, dealt out to the experts in both ways."""
    gains = list(scores_EH.sort(dim=-1, descending=True).values)
    attributed_E = saliency.experts.clamp_min(0).sqrt()
    attributed_E = (attributed_E / attributed_E.sum().clamp_min(1e-30)).clamp_min(1e-6)
    for weights_E in (attributed_E, torch.ones_like(attributed_E)):
        widths = _aligned(covering_sizes(count, gains, weights_E), count, scores_EH.shape[1])
        chosen = [
            scores_H.topk(width).indices.sort().values
            for scores_H, width in zip(scores_EH, widths, strict=True)
        ]
        yield narrowed(saliency.layer, chosen, saliency.layer.activation_moments(weighted=True))


def _aligned(widths: Sequence[int], count: int, most: int) -> list[int]:
    """Multiples of the alignment, or all neurons: those that lost most by rounding get one more."""
    found = [width if width == most else width // ALIGNMENT * ALIGNMENT for width in widths]
    for expert in sorted(range(len(widths)), key=lambda e: found[e] - widths[e]):
        more = min(ALIGNMENT, most - found[expert])
        if sum(found) + more <= count:
            found[expert] += more
    return found
