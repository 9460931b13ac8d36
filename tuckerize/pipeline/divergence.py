"""Divergence of a checkpoint's predictions from another's, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tuckerize.report.evaluation import Divergence, Estimate


def estimate(values_S: Tensor) -> Estimate:
    """Mean over windows and its standard error; windows count as independent, tokens do not."""
    count = len(values_S)
    error = float(values_S.double().std()) / math.sqrt(count) if count > 1 else None
    return Estimate(float(values_S.double().mean()), error)


def exponential(nats: Estimate) -> Estimate:
    """Perplexity, or a ratio of two, from nats per token; its error to first order."""
    value = math.exp(min(nats.value, 700.0))  # finite
    return Estimate(value, None if nats.error is None else value * nats.error)


@dataclass(frozen=True, slots=True)
class PredictionSums:
    """Means of every window, of two models: the one that is measured against, and the other.

    Attributes:
        nats: Negative log-likelihoods of the first and of the other, nats per token.
        kl: KL divergence of the other from the first, nats per token.
        same_top: Share of the tokens with the same most likely next token.
    """

    nats: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    kl: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)

    def add(self, tokens_L: Tensor, logits: list[Tensor]) -> None:
        """Add a window.

        Args:
            tokens_L: Its tokens; all but the first are predicted.
            logits: Logits of each model, shape (L, V); of one, there is nothing to compare.
        """
        logs = [log_softmax(logits_LV[:-1].float(), dim=-1) for logits_LV in logits]
        for found, logs_LV in zip(self.nats, logs, strict=False):
            found.append(cross_entropy(logs_LV, tokens_L[1:]).cpu())
        if len(logs) > 1:
            first_LV, other_LV = logs
            self.kl.append(kl_div(other_LV, first_LV, log_target=True, reduction="batchmean").cpu())
            same_L = first_LV.argmax(-1) == other_LV.argmax(-1)
            self.same_top.append(same_L.float().mean().cpu())

    def divergence(self, experts_changed: Estimate | None) -> Divergence:
        """Divergence over all windows."""
        first_S, other_S = (torch.stack(nats) for nats in self.nats)
        return Divergence(
            perplexity_ratio=exponential(estimate(other_S - first_S)),
            kl=estimate(torch.stack(self.kl)),
            same_top=estimate(torch.stack(self.same_top)),
            experts_changed=experts_changed,
        )


Choices = Mapping[int, Tensor]
"""Experts of every token by layer, shape (S, L, k), as the router numbers them."""


def experts_changed(first: Choices, other: Choices) -> Estimate | None:
    """Share of the predicting tokens whose set of experts differs in any layer.

    Tokens that predict nothing, the last of each window, do not count. None where the two models
    have not the same layers of experts.
    """
    if not first or {i: c.shape for i, c in first.items()} != {
        i: c.shape for i, c in other.items()
    }:
        return None
    changed_SL = torch.stack(
        [
            (chosen_SLk.sort(-1).values != other[layer].sort(-1).values).any(-1)
            for layer, chosen_SLk in first.items()
        ]
    ).any(0)
    return estimate(changed_SL[:, :-1].float().mean(-1))
