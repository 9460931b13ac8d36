"""Readers of config.json: how families' routers score, and what their experts compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from tuckerize.errors import CheckpointError
from tuckerize.moe.family import (
    EXPERTS_KEYS,
    TOP_K_KEYS,
    Config,
    Glu,
    Routing,
    plain_glu,
    positive,
)

_SCALE_KEYS = (
    "routed_scaling_factor",
    "router_scaling_factor",
    "moe_routed_scaling_factor",
    "route_scale",
)

RoutingReader = Callable[[Config], Routing]


def router(
    score: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"] = "softmax",
    *,
    normalize: bool | None = None,
    default_normalize: bool = False,
    groups: Literal["best", "two_best"] | None = None,
    scaled: bool = True,
) -> RoutingReader:
    """Reader of a routing from the keys that most families share.

    Args:
        score: Score function.
        normalize: Whether weights are normalised; None: `norm_topk_prob` says.
        default_normalize: Its value where config.json lacks it.
        groups: How groups of experts are scored; None: the family has none.
        scaled: Whether the factor is on the weights, and not on the routed output.
    """

    def read(config: Config) -> Routing:
        own = config.get("norm_topk_prob", config.get("moe_renormalize", default_normalize))
        scale = _first(config, *_SCALE_KEYS) if scaled else None
        routing = Routing(
            top_k=positive(config, *TOP_K_KEYS),
            score=score,
            normalize=bool(own if normalize is None else normalize),
            scale=1.0 if scale is None else float(scale),
            groups=int(_first(config, "n_group", "num_expert_group") or 1) if groups else 1,
            top_groups=int(config.get("topk_group") or 1) if groups else 1,
            group_score=groups or "best",
            jitter=float(config.get("router_jitter_noise") or 0.0),
        )
        return _checked(routing, positive(config, *EXPERTS_KEYS))

    return read


def _first(config: Config, *keys: str) -> Any:  # noqa: ANN401
    """Value of the first of some keys that config.json has."""
    return next((config[key] for key in keys if key in config), None)


def _checked(routing: Routing, experts: int) -> Routing:
    groups = routing.groups
    if routing.top_k > experts or experts % groups or not 1 <= routing.top_groups <= groups:
        raise CheckpointError(
            f"config.json routes each token to {routing.top_k} of {experts} experts in "
            f"{routing.top_groups} of {groups} groups, which does not work out",
            hint="check the numbers of experts, groups and experts per token in config.json",
        )
    return routing


def llama4_routing(config: Config) -> Routing:
    """Routing of Llama 4, to one expert, whose input its weight scales."""
    routing = router("sigmoid", normalize=False)(config)
    if routing.top_k != 1:
        raise CheckpointError(
            f"config.json has num_experts_per_tok = {routing.top_k}, expected 1 in a Llama 4",
            hint="every expert of a token would see another input, which is not supported",
        )
    return replace(routing, scales_inputs=True)


def kolibri_routing(config: Config) -> Routing:
    """Routing of Kolibri, which corrects logits and weighs by sigmoids."""
    return replace(router("sigmoid", default_normalize=True)(config), corrects_logits=True)


def clamped_glu(config: Config, layer: int) -> Glu:
    """SwiGLU of bounded gate and up (DeepSeek-V4's)."""
    return replace(plain_glu(config, layer), limit=float(config.get("swiglu_limit", 10.0)))


def openai_glu(config: Config, layer: int) -> Glu:  # noqa: ARG001
    """The activation of gpt-oss, whatever `hidden_act` says."""
    return Glu(
        slope=float(config.get("swiglu_alpha", 1.702)),
        offset=1.0,
        limit=float(config.get("swiglu_limit", 7.0)),
    )


def privacy_filter_routing(config: Config) -> Routing:
    """Routing of OpenAI's Privacy Filter, whose output is multiplied by k again."""
    routing = router(normalize=True)(config)
    return replace(routing, scale=1 / routing.top_k)


def inkling_glu(config: Config, layer: int) -> Glu:
    """SwiGLU whose linear factors tanh bounds (Inkling 2's)."""
    caps = float(config["mlp_gate_softcap"]), float(config["mlp_up_softcap"])
    return replace(plain_glu(config, layer), soft_caps=caps)


def relu_squared_glu(config: Config, layer: int) -> Glu:  # noqa: ARG001
    """ReLU² of up, as a gated linear unit whose gate is up (Nemotron-H's)."""
    activation = config.get("mlp_hidden_act", "relu2")
    if activation != "relu2":
        raise CheckpointError(
            f"config.json has mlp_hidden_act = '{activation}', expected relu2",
            hint="experts of another activation without a gate_proj are not supported",
        )
    return Glu("relu")


def step_glu(config: Config, layer: int) -> Glu:
    """SwiGLU whose bounds the layers have of their own; 0 or null is none."""
    limits = config.get("swiglu_limits")
    limit = float(limits[layer] or 0) if limits and layer < len(limits) else 0
    plain = plain_glu(config, layer)
    return replace(plain, limit=limit, limits_activated=True) if limit else plain


def deepseek_v2_routing(config: Config) -> Routing:
    """Routing of DeepSeek-V2: greedy, or within groups."""
    method = str(config.get("topk_method", "greedy"))  # transformers fails at null
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json has topk_method = '{method}', expected greedy or group_limited_greedy",
            hint="other routings of this family are not supported",
        )
    # transformers does not look at norm_topk_prob.
    return router(normalize=False, groups=None if method == "greedy" else "best")(config)
