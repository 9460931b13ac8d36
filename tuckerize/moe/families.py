"""Table of supported model families.

A family is one row of `FAMILIES`: where its experts, router and norm are below a decoder layer, and
how its router scores. Where the layers are, which of the layouts a checkpoint has, and whether
weights are transposed, the tensors tell. Nothing else in the package depends on the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from tuckerize.errors import CheckpointError
from tuckerize.moe.family import (
    EXPERTS_KEYS,
    TOP_K_KEYS,
    Config,
    FamilyRow,
    Routing,
    positive,
)
from tuckerize.moe.storage import Packed, PerExpert, Storage

LAYERS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "model.text_model.layers",
    "layers",
)
"""Modules of the decoder layers in checkpoints, the first that has experts counts."""

RoutingReader = Callable[[Config], Routing]

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")


def per_expert(experts: str, names: tuple[str, str, str] = GATE_UP_DOWN) -> PerExpert:
    """One linear layer per expert and projection, below a module of experts."""
    return PerExpert(*(f"{experts}.{{expert}}.{name}.weight" for name in names))


def packed(experts: str) -> Packed:
    """Transformers' own tensors of all experts, below a module of experts."""
    return Packed(f"{experts}.gate_up_proj", f"{experts}.down_proj")


def router(
    score: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"] = "softmax",
    *,
    normalize: bool | None = None,
    default_normalize: bool = False,
    groups: Literal["best", "two_best"] | None = None,
) -> RoutingReader:
    """Reader of a routing from the keys that most families share.

    Args:
        score: Score function.
        normalize: Whether weights are normalised; None: `norm_topk_prob` says.
        default_normalize: Its value where config.json lacks it.
        groups: How groups of experts are scored; None: the family has none.
    """

    def read(config: Config) -> Routing:
        own = config.get("norm_topk_prob", config.get("moe_renormalize", default_normalize))
        scale = config.get("routed_scaling_factor")
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


def _deepseek_v2_routing(config: Config) -> Routing:
    method = str(config.get("topk_method") or "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json has topk_method = '{method}', expected greedy or group_limited_greedy",
            hint="other routings of this family are not supported",
        )
    # transformers does not look at norm_topk_prob.
    return router(normalize=False, groups=None if method == "greedy" else "best")(config)


def _row(
    model_type: str,
    routing: RoutingReader,
    block: str = "mlp",
    *,
    names: tuple[str, str, str] = GATE_UP_DOWN,
    storages: tuple[Storage, ...] | None = None,
    router: str = "gate.weight",
    correction: str | None = None,
    router_bias: str | None = None,
    **others: Any,  # noqa: ANN401
) -> FamilyRow:
    """A row whose experts, router and bias are below one block."""
    experts = f"{block}.experts"
    return FamilyRow(
        model_type=model_type,
        routing=routing,
        experts=experts,
        storages=storages or (per_expert(experts, names), packed(experts)),
        router=f"{block}.{router}",
        correction=correction and f"{block}.{correction}",
        router_bias=router_bias and f"{block}.{router_bias}",
        **others,
    )


_BIAS = "gate.e_score_correction_bias"
_SOFTMAX = router()
_NORMALIZED = router(normalize=True)
# DeepSeek-V3's: sigmoid, a correction bias, groups scored by their two best experts.
_V3 = router("sigmoid", default_normalize=True, groups="two_best")
_GRANITE = (
    Packed("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    packed("block_sparse_moe.experts"),
)

FAMILIES: Mapping[str, FamilyRow] = {
    row.model_type: row
    for row in (
        _row("deepseek_v2", _deepseek_v2_routing, also_sized="shared_experts"),
        *(
            _row(name, _V3, correction=_BIAS, also_sized="shared_experts")
            for name in (
                "deepseek_v3",
                "deepseek_v32",
                "dots1",
                "glm4_moe",
                "glm4_moe_lite",
                "glm4v_moe",
                "glm_moe_dsa",
                "kimi_k2",
                "mimo_v2_flash",
                "solar_open",
            )
        ),
        _row("bailing_hybrid", _V3, correction="gate.expert_bias", also_sized="shared_experts"),
        _row(
            "mistral4",
            router(default_normalize=True, groups="two_best"),
            also_sized="shared_experts",
        ),
        *(_row(name, _SOFTMAX) for name in ("olmoe", "qwen2_moe", "qwen3_moe")),
        _row("flex_olmo", _SOFTMAX, input_norm="post_attention_layernorm.weight"),
        _row("qwen3_next", router(default_normalize=True), norm_offset=1.0),
        *(_row(name, _NORMALIZED, norm_offset=1.0) for name in ("qwen3_5_moe", "qwen3_5_moe_text")),
        _row("qwen3_vl_moe", _NORMALIZED),
        *(
            _row(name, _NORMALIZED, "block_sparse_moe", names=W1_W3_W2)
            for name in ("mixtral", "minimax")
        ),
        _row(
            "minimax_m2",
            router("sigmoid", normalize=True),
            "block_sparse_moe",
            names=W1_W3_W2,
            correction="e_score_correction_bias",
        ),
        _row("phimoe", router("sparsemixer"), "block_sparse_moe", names=W1_W3_W2),
        _row(
            "ernie4_5_moe",
            _NORMALIZED,
            correction="moe_statics.e_score_correction_bias",
            also_sized="shared_experts",
        ),
        _row(
            "hunyuan_v1_moe",
            _NORMALIZED,
            router="gate.wg.weight",
            intermediate_keys=("intermediate_size",),
            also_sized="others",
        ),
        *(
            _row(
                name,
                _NORMALIZED,
                "block_sparse_moe",
                storages=_GRANITE,
                router="router.layer.weight",
            )
            for name in ("granitemoe", "granitemoeshared", "granitemoehybrid")
        ),
        _row(
            "jamba",
            router(normalize=False),
            "feed_forward",
            router="router.weight",
            input_norm="pre_ff_layernorm.weight",
            also_sized="others",
        ),
        _row(
            "lfm2_moe",
            router("sigmoid", default_normalize=True),
            "feed_forward",
            names=W1_W3_W2,
            correction="expert_bias",
            input_norm="ffn_norm.weight",
        ),
    )
}

UNSUPPORTED: Mapping[str, str] = {}
"""MoE families that are refused, and why."""
