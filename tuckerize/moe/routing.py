"""Routers: from tokens to experts and weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.moe.family import Family, Routing


class Router(NamedTuple):
    """Tensors of a router: weight (E, I), bias of its logits (E,), correction of scores (E,).

    Gemma 4 has factors of the experts' weights (E,) as well, and DeepSeek-V4 has layers where a
    table gives the k experts of every token of the vocabulary, shape (V, k).
    """

    weight_EI: Tensor
    bias_E: Tensor | None = None
    correction_E: Tensor | None = None
    scale_E: Tensor | None = None
    experts_Vk: Tensor | None = None

    @classmethod
    def read(cls, checkpoint: Checkpoint, family: Family, layer: int) -> Router:
        """Read the router of a layer from a checkpoint of a family.

        Raises:
            CheckpointError: Its weight is missing, or a tensor cannot be read.
        """

        def find(below: str | None) -> Tensor | None:
            name = family.name(layer, below or "")
            return checkpoint.read_one(name) if name in checkpoint.tensors else None

        row = family.row
        weight_EI = checkpoint.read_one(family.name(layer, row.router))
        if (scale_I := find(row.router_scale)) is not None:  # of what the norm before the experts
            scale_I = scale_I.float() / read_input_norm(checkpoint, family, layer)  # scales, too
            weight_EI = weight_EI.float() * scale_I / weight_EI.shape[1] ** 0.5
        return cls(
            weight_EI,
            bias_E=_flat(find(row.router_bias)),
            correction_E=_flat(find(row.correction)),
            scale_E=_flat(find(row.expert_scale)),
            experts_Vk=find(row.expert_table),
        )


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten()


def read_input_norm(checkpoint: Checkpoint, family: Family, layer: int) -> Tensor:
    """Read the factors of the norm before the MoE block of a layer: float32, (I,) or a scalar.

    Raises:
        CheckpointError: The tensor is missing or cannot be read.
    """
    if family.row.input_norm is None:
        return torch.ones(())
    weight_I = checkpoint.read_one(family.name(layer, family.row.input_norm))
    return weight_I.float() + family.row.norm_offset


class Routes(NamedTuple):
    """Top-k experts per token and their routing weights, both (T, k)."""

    experts: Tensor
    weights: Tensor


def route(x_TI: Tensor, router: Router, routing: Routing, tokens_T: Tensor | None = None) -> Routes:
    """Route tokens: scores of all experts, then top-k, as transformers' routers do, in float32.

    Args:
        x_TI: Tokens, shape (T, I).
        router: Tensors of the router.
        routing: Score function, top-k, scale and expert groups.
        tokens_T: Their places in the vocabulary, where a table of the router gives the experts.

    Returns:
        Expert indices (int64) and float32 weights, scaled, and normalised where the family does so.

    Source:
        DeepSeek-V2 2024, section 2.2; DeepSeek-V3 2024, section 2.1.2; the routers of transformers.
    """
    logits_TE = x_TI.float() @ router.weight_EI.float().T
    if router.bias_E is not None:
        logits_TE = logits_TE + router.bias_E.float()
    if routing.score == "sparsemixer":
        return _sparsemixer(logits_TE, routing)
    scores_TE = _scores(logits_TE, routing)
    chosen_by_TE = logits_TE if routing.corrects_logits else scores_TE
    experts_Tk = _choice(chosen_by_TE, router, routing, tokens_T)
    weights_Tk = scores_TE.gather(1, experts_Tk)
    if routing.normalize:
        weights_Tk = weights_Tk / weights_Tk.sum(dim=-1, keepdim=True)
    if router.scale_E is not None:
        weights_Tk = weights_Tk * router.scale_E.float()[experts_Tk]
    return Routes(experts_Tk, weights_Tk * routing.scale)


def _choice(choice_TE: Tensor, router: Router, routing: Routing, tokens_T: Tensor | None) -> Tensor:
    """Experts of tokens, shape (T, k)."""
    if router.experts_Vk is not None:
        if tokens_T is None:
            raise ValueError("the router looks at the tokens: give them")
        return router.experts_Vk[tokens_T].long()
    if router.correction_E is not None:
        choice_TE = choice_TE + router.correction_E.float()
    if routing.groups > 1:
        choice_TE = _best_groups(choice_TE, routing)
    return choice_TE.topk(routing.top_k, dim=-1).indices


def _scores(logits_TE: Tensor, routing: Routing) -> Tensor:
    if routing.score == "sigmoid":
        return logits_TE.sigmoid()
    if routing.score == "sqrtsoftplus":
        return functional.softplus(logits_TE).sqrt()
    return logits_TE.softmax(dim=-1)


def _best_groups(choice_TE: Tensor, routing: Routing) -> Tensor:
    """Set all scores outside of the `top_groups` groups with the highest score to −∞."""
    tokens, experts = choice_TE.shape
    grouped = choice_TE.view(tokens, routing.groups, experts // routing.groups)
    counted = 1 if routing.group_score == "best" else 2
    scores = grouped.topk(min(counted, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    best = scores.topk(routing.top_groups, dim=-1).indices
    outside = torch.ones_like(scores, dtype=torch.bool).scatter_(1, best, value=False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).view(tokens, experts)


def _sparsemixer(logits_TE: Tensor, routing: Routing) -> Routes:
    """Take the best expert again and again, weighted among those whose logits are near its own.

    Source:
        GRIN 2024; transformers' `sparsemixer`, in evaluation.
    """
    left_TE, experts, weights = logits_TE, [], []
    for _ in range(routing.top_k):
        best_T1, expert_T1 = left_TE.max(dim=-1, keepdim=True)
        scale_TE = logits_TE.abs().clamp(min=best_T1)
        far = (best_T1 - logits_TE) / scale_TE > 2 * routing.jitter
        near_TE = left_TE.masked_fill(far, -torch.inf)
        experts.append(expert_T1)
        weights.append(near_TE.softmax(dim=-1).gather(1, expert_T1))
        left_TE = left_TE.scatter(1, expert_T1, -torch.inf)
    return Routes(torch.cat(experts, dim=1), torch.cat(weights, dim=1))
