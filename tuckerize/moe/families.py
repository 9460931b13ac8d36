"""Table of supported model families.

A family is one row of `FAMILIES`: names of tensors, layout of the experts on disk, configuration
keys and routing. Nothing else in the package depends on the family.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuckerize.errors import CheckpointError
from tuckerize.moe.family import Config, Family, Routing, positive
from tuckerize.moe.storage import PerExpert


def _deepseek_v2_routing(config: Config) -> Routing:
    method = str(config.get("topk_method") or "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json has topk_method = '{method}', expected greedy or group_limited_greedy",
            hint="other routings of this family are not supported",
        )
    experts, top_k = (positive(config, k) for k in ("n_routed_experts", "num_experts_per_tok"))
    scale = config.get("routed_scaling_factor")
    if method == "greedy":
        routing = Routing("greedy", top_k, 1.0 if scale is None else float(scale))
    else:
        groups, top_groups = (positive(config, key) for key in ("n_group", "topk_group"))
        routing = Routing(
            "group_limited_greedy",
            top_k,
            float(scale or 1.0),
            groups=groups,
            top_groups=top_groups,
        )
    if top_k > experts or experts % routing.groups or routing.top_groups > routing.groups:
        raise CheckpointError(
            f"config.json routes each token to {top_k} of {experts} experts in "
            f"{routing.top_groups} of {routing.groups} groups, which does not work out",
            hint="check num_experts_per_tok, n_routed_experts, n_group and topk_group",
        )
    return routing


_PER_PROJECTION = PerExpert(
    gate="{expert}.gate_proj.weight",
    up="{expert}.up_proj.weight",
    down="{expert}.down_proj.weight",
)

# In checkpoints as published, and in some that transformers saves.
_EXPERTS_KEYS = ("num_experts", "num_local_experts")


def _softmax_routing(config: Config) -> Routing:
    """Softmax over all experts, then top-k, as in Qwen3-MoE and OLMoE."""
    experts = positive(config, *_EXPERTS_KEYS)
    top_k = positive(config, "num_experts_per_tok")
    if top_k > experts:
        raise CheckpointError(
            f"config.json routes each token to {top_k} of {experts} experts",
            hint=f"check num_experts_per_tok and {' or '.join(_EXPERTS_KEYS)}",
        )
    return Routing("greedy", top_k, normalize=bool(config.get("norm_topk_prob", False)))


def _llama_like(model_type: str, intermediate_key: str) -> Family:
    """A family with DeepSeek's tensor names and no shared experts."""
    return Family(
        model_type=model_type,
        experts="model.layers.{layer}.mlp.experts",
        storage=_PER_PROJECTION,
        router_weight="model.layers.{layer}.mlp.gate.weight",
        input_norm="model.layers.{layer}.post_attention_layernorm.weight",
        experts_keys=_EXPERTS_KEYS,
        intermediate_key=intermediate_key,
        shared_key=None,
        routing=_softmax_routing,
    )


FAMILIES: Mapping[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            model_type="deepseek_v2",
            experts="model.layers.{layer}.mlp.experts",
            storage=_PER_PROJECTION,
            router_weight="model.layers.{layer}.mlp.gate.weight",
            input_norm="model.layers.{layer}.post_attention_layernorm.weight",
            experts_keys=("n_routed_experts",),
            intermediate_key="moe_intermediate_size",
            shared_key="n_shared_experts",
            routing=_deepseek_v2_routing,
        ),
        _llama_like("olmoe", "intermediate_size"),
        _llama_like("qwen3_moe", "moe_intermediate_size"),
    )
}
