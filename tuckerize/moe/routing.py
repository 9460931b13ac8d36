"""Routers of the supported families: from router logits to experts and weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tuckerize.moe.family import Routing


class Routes(NamedTuple):
    """Top-k experts per token and their routing weights, both (T, k)."""

    experts: Tensor
    weights: Tensor


def route(x_TI: Tensor, router_EI: Tensor, routing: Routing) -> Routes:
    """Route tokens: softmax over all experts, then top-k.

    Args:
        x_TI: Tokens, shape (T, I).
        router_EI: Router weight, shape (E, I).
        routing: Method, top-k, scale and expert groups.

    Returns:
        Expert indices (int64) and float32 weights, scaled, and normalised where the family does so.

    Source:
        DeepSeek-V2 2024, section 2.2; transformers' `DeepseekV2TopkRouter`, `Qwen3MoeTopKRouter`.
    """
    scores_TE = (x_TI.float() @ router_EI.float().T).softmax(dim=-1)
    if routing.method == "group_limited_greedy":
        scores_TE = _keep_best_groups(scores_TE, routing)
    weights_Tk, experts_Tk = scores_TE.topk(routing.top_k, dim=-1)
    if routing.normalize:
        weights_Tk = weights_Tk / weights_Tk.sum(dim=-1, keepdim=True)
    return Routes(experts_Tk, weights_Tk * routing.scale)


def _keep_best_groups(scores_TE: Tensor, routing: Routing) -> Tensor:
    """Zero all scores outside the `top_groups` groups with the highest maximum score."""
    tokens, experts = scores_TE.shape
    grouped = scores_TE.view(tokens, routing.groups, experts // routing.groups)
    best = grouped.amax(dim=-1).topk(routing.top_groups, dim=-1).indices
    mask = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1.0)
    return (grouped * mask.unsqueeze(-1)).view(tokens, experts)
