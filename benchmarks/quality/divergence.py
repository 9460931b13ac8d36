"""How far a model's predictions are from the dense model's, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.quality.models import MoeModel, windows


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a text.

    Attributes:
        hidden: States before the head, window batch by window batch.
        experts: Of every MoE layer the experts of every token, sorted, (T, k).
    """

    hidden: list[Tensor]
    experts: list[Tensor]


@torch.no_grad()
def predict(model: MoeModel, tokens: Tensor) -> Prediction:
    """Run a model over a stream of tokens."""
    calls: list[list[tuple[Tensor, ...]]] = [[] for _ in model.blocks]
    hidden = []
    with model.recording(calls):
        for source, _ in windows(tokens):
            found = model.model.model(input_ids=source, use_cache=False)
            hidden.append(found.last_hidden_state)
    experts = []
    for own, kept in zip(calls, model.kept_experts, strict=True):
        chosen_Tk = torch.cat([call[1] for call in own])
        names = chosen_Tk if kept is None else torch.tensor(kept)[chosen_Tk]
        experts.append(names.sort(-1).values)
    return Prediction(hidden, experts)


@torch.no_grad()
def divergence(model: MoeModel, tokens: Tensor, dense: Prediction) -> dict[str, Any]:
    """Perplexity over the dense model's, and what tokens it predicts otherwise.

    Standard errors are those of means over windows, which are taken as independent.
    """
    own = predict(model, tokens)
    head = model.model.lm_head
    nats, rise, kl, same = [], [], [], []
    for (_, target), mine, other in zip(windows(tokens), own.hidden, dense.hidden, strict=True):
        logits, expected = head(mine), head(other)
        loss = cross_entropy(logits.mT, target, reduction="none")
        nats.append(loss.flatten())
        rise.append((loss - cross_entropy(expected.mT, target, reduction="none")).mean(-1))
        logs, expected_logs = log_softmax(logits, -1), log_softmax(expected, -1)
        per_token = kl_div(logs, expected_logs, log_target=True, reduction="none").sum(-1)
        kl.append(per_token.mean(-1))
        same.append((logits.argmax(-1) == expected.argmax(-1)).float().mean(-1))
    changed = torch.zeros(len(own.experts[0]), dtype=torch.bool)
    for mine, other in zip(own.experts, dense.experts, strict=True):
        changed |= (mine != other).any(-1)
    rise_W = torch.cat(rise)
    kl_W = torch.cat(kl)
    return {
        "perplexity": exp(float(torch.cat(nats).double().mean())),
        "ratio": exp(float(rise_W.mean())),
        "ratio_error": exp(float(rise_W.mean())) * _standard_error(rise_W),
        "kl": float(kl_W.mean()),
        "kl_error": _standard_error(kl_W),
        "top1": float(torch.cat(same).mean()),
        "experts_changed": float(changed.float().mean()),
    }


def _standard_error(values_W: Tensor) -> float:
    return float(values_W.std()) / sqrt(len(values_W))
