"""The loss: next-token cross-entropy, mixed with the KL divergence to a teacher's predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tuckerize.engines.trainable import Model


class Losses(NamedTuple):
    """Sums over the predicted tokens of some windows, in nats.

    Attributes:
        objective: What is minimised.
        nats: Negative log-likelihood.
    """

    objective: Tensor
    nats: Tensor


def losses(model: Model, teacher: Model | None, share: float, tokens_SL: Tensor) -> Losses:
    """Losses of windows of tokens; every token but the first of a window is predicted.

    Args:
        model: The model that is trained.
        teacher: The model whose predictions it learns; None learns the text alone.
        share: Share of the KL divergence to the teacher in the objective.
        tokens_SL: The windows, shape (S, L).
    """
    logits_NV = model.logits(tokens_SL)[:, :-1].flatten(0, 1).float()
    nats = cross_entropy(logits_NV, tokens_SL[:, 1:].flatten(), reduction="sum")
    if teacher is None:
        return Losses(nats, nats.detach())
    with torch.no_grad():
        known_NV = log_softmax(teacher.logits(tokens_SL)[:, :-1].flatten(0, 1).float(), -1)
    divergence = kl_div(log_softmax(logits_NV, -1), known_NV, reduction="sum", log_target=True)
    return Losses((1 - share) * nats + share * divergence, nats.detach())
