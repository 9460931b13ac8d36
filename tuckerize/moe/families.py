"""Table of supported model families.

A family is one row of `FAMILIES`: where its experts, router and norm are below a decoder layer, and
how its router scores. Where the layers are, which of the layouts a checkpoint has, and whether
weights are transposed, the tensors tell. Nothing else in the package depends on the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tuckerize.moe.family import FamilyRow, Latent
from tuckerize.moe.readers import (
    RoutingReader,
    clamped_glu,
    deepseek_v2_routing,
    inkling_glu,
    kolibri_routing,
    llama4_routing,
    openai_glu,
    privacy_filter_routing,
    relu_squared_glu,
    router,
    step_glu,
)
from tuckerize.moe.storage import (
    GATE_UP_DOWN,
    W1_W3_W2,
    Packed,
    PerExpert,
    Storage,
    packed,
    per_expert,
)


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
_MINIMAX_M3 = router("sigmoid", normalize=True, scaled=False)
# DeepSeek-V3's: sigmoid, a correction bias, groups scored by their two best experts.
_V3 = router("sigmoid", default_normalize=True, groups="two_best")
_GRANITE = (
    Packed("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    packed("block_sparse_moe.experts"),
)

FAMILIES: Mapping[str, FamilyRow] = {
    row.model_type: row
    for row in (
        _row(
            "deepseek_v2",
            deepseek_v2_routing,
            also_sized="shared_experts",
            models="DeepSeek-V2, V2-Lite",
        ),
        *(
            _row(model_type, _V3, correction=_BIAS, also_sized="shared_experts", models=models)
            for model_type, models in {
                "deepseek_v3": "DeepSeek-V3, R1; Moonlight",
                "deepseek_v32": "DeepSeek-V3.2",
                "dots1": "dots.llm1",
                "glm4_moe": "GLM-4.5 to 4.7, Air",
                "glm4_moe_lite": "GLM-4.7-Flash",
                "glm4v_moe": "GLM-4.5V, 4.6V",
                "glm_moe_dsa": "GLM-5",
                "kimi_k2": "Kimi-K2",
                "mimo_v2_flash": "MiMo-V2-Flash",
                "solar_open": "Solar Open",
            }.items()
        ),
        _row(
            "gpt_oss",
            _NORMALIZED,
            storages=(replace(packed("mlp.experts"), interleaved=True, biased=True),),
            router="router.weight",
            router_bias="router.bias",
            glu=openai_glu,
            models="gpt-oss-20b, 120b",
        ),
        _row(
            "openai_privacy_filter",
            privacy_filter_routing,
            storages=(replace(packed("mlp.experts"), transposed=True, biased=True),),
            router="router.weight",
            router_bias="router.bias",
            glu=openai_glu,
            models="OpenAI Privacy Filter, which classifies tokens",
        ),
        *(
            _row(
                model_type,
                router("sigmoid", normalize=True),
                storages=(
                    Packed("mlp.experts.w13_weight", "mlp.experts.w2_weight", interleaved=True),
                ),
                correction="gate.bias",
                input_norm="mlp_norm.weight",
                glu=inkling_glu,
                models=models,
            )
            for model_type, models in {
                "inkling2_text": "Inkling 2, without images",
                "inkling2_loop_text": "Inkling 2 Mini, without images",
            }.items()
        ),
        _row(
            "llama4_text",
            llama4_routing,
            "feed_forward",
            storages=(packed("feed_forward.experts"),),
            router="router.weight",
            also_sized="others",
            models="Llama 4 Scout, Maverick",
        ),
        _row(
            "beam",
            router("sigmoid", default_normalize=True, groups="two_best", scaled=False),
            correction=_BIAS,
            input_norm="pre_feedforward_layernorm.weight",
            models="Beam",
        ),
        _row(
            "bailing_hybrid",
            _V3,
            correction="gate.expert_bias",
            also_sized="shared_experts",
            models="Ling 2.5",
        ),
        _row(
            "deepseek_v4",
            router("sqrtsoftplus", normalize=True),
            "ffn",
            names=W1_W3_W2,
            correction="gate.bias",
            expert_table="ffn.gate.tid2eid",
            input_norm="ffn_norm.weight",
            also_sized="others",  # transformers has one shared expert, whatever config.json says
            glu=clamped_glu,
            models="DeepSeek-V4-Flash, Pro",
        ),
        *(
            _row(
                model_type,
                _V3,
                correction=_BIAS,
                also_sized="shared_experts",
                glu=clamped_glu,
                models=models,
            )
            for model_type, models in {
                "glm5_next": "GLM-5.3-Flash",
                "hy_v4": "Hy4",
                "hy_v4_vl": "Hy4 with images",
            }.items()
        ),
        _row(
            "hy_v3",
            router("sigmoid", normalize=True),
            router="router.gate.weight",
            correction="expert_bias",
            also_sized="others",
            models="Hy3",
        ),
        replace(
            _row("kolibri1", kolibri_routing, models="Kolibri 1"),
            correction="moe.router.expert_bias",
        ),
        _row(
            "mistral4",
            router(default_normalize=True, groups="two_best"),
            also_sized="shared_experts",
            models="Mistral Small 4",
        ),
        *(
            _row(model_type, _SOFTMAX, models=models)
            for model_type, models in {
                "flex_olmo": "FlexOlmo",
                "olmoe": "OLMoE",
                "qwen2_moe": "Qwen1.5-MoE, Qwen2-MoE",
                "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B, Coder",
            }.items()
        ),
        _row(
            "qwen3_next", router(default_normalize=True), norm_offset=1.0, models="Qwen3-Next-80B"
        ),
        *(
            _row(model_type, _NORMALIZED, norm_offset=1.0, models="Qwen3.5-MoE, Qwen3.6-MoE")
            for model_type in ("qwen3_5_moe", "qwen3_5_moe_text")
        ),
        _row("qwen3_vl_moe", _NORMALIZED, models="Qwen3-VL-30B-A3B, 235B-A22B"),
        *(
            _row(model_type, _NORMALIZED, "block_sparse_moe", names=W1_W3_W2, models=models)
            for model_type, models in {
                "mixtral": "Mixtral",
                "minimax": "MiniMax-Text-01, M1",
            }.items()
        ),
        _row(
            "minimax_m2",
            router("sigmoid", normalize=True),
            "block_sparse_moe",
            names=W1_W3_W2,
            correction="e_score_correction_bias",
            models="MiniMax-M2",
        ),
        _row(
            "minimax_m3_vl",
            _MINIMAX_M3,
            "block_sparse_moe",
            names=W1_W3_W2,
            correction="e_score_correction_bias",
            norm_offset=1.0,
            glu=openai_glu,
            models="MiniMax-M3",
        ),
        _row(
            "minimax_m3_vl_text",
            _MINIMAX_M3,
            correction=_BIAS,
            norm_offset=1.0,
            glu=openai_glu,
            models="MiniMax-M3 without images",
        ),
        FamilyRow(
            "step3p5",
            router("sigmoid", normalize=True),
            experts="mlp.experts",
            storages=(PerExpert(*(f"moe.{name}.weight" for name in GATE_UP_DOWN)),),
            router="moe.gate.weight",
            correction="moe.router_bias",
            norm_offset=1.0,
            glu=step_glu,
            models="Step-3.5 Flash, 3.7 Flash",
        ),
        _row(
            "phimoe",
            router("sparsemixer"),
            "block_sparse_moe",
            names=W1_W3_W2,
            models="Phi-3.5-MoE",
        ),
        _row(
            "ernie4_5_moe",
            _NORMALIZED,
            correction="moe_statics.e_score_correction_bias",
            also_sized="shared_experts",
            models="ERNIE-4.5-21B-A3B, 300B-A47B",
        ),
        _row(
            "hunyuan_v1_moe",
            _NORMALIZED,
            router="gate.wg.weight",
            intermediate_keys=("intermediate_size",),
            also_sized="others",
            models="Hunyuan-A13B",
        ),
        *(
            _row(
                model_type,
                _NORMALIZED,
                "block_sparse_moe",
                storages=_GRANITE,
                router="router.layer.weight",
                models=models,
            )
            for model_type, models in {
                "granitemoe": "Granite 3 MoE",
                "granitemoehybrid": "Granite 4",
                "granitemoeshared": "Granite MoE with shared experts",
            }.items()
        ),
        *(
            _row(
                model_type,
                _NORMALIZED,
                storages=(Packed("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"),),
                router="router.weight",
                also_sized="others",
                models="Aria",
            )
            for model_type in ("aria", "aria_text")
        ),
        *(
            FamilyRow(
                model_type,
                _NORMALIZED,
                experts="experts",
                storages=(packed("experts"),),
                router="router.proj.weight",
                router_scale="router.scale",
                expert_scale="router.per_expert_scale",
                input_norm="pre_feedforward_layernorm_2.weight",
                models="Gemma 4 26B-A4B",
            )
            for model_type in ("gemma4", "gemma4_text")
        ),
        _row(
            "jamba",
            router(normalize=False),
            "feed_forward",
            router="router.weight",
            input_norm="pre_ff_layernorm.weight",
            also_sized="others",
            models="Jamba",
        ),
        _row(
            "lfm2_moe",
            router("sigmoid", default_normalize=True),
            "feed_forward",
            names=W1_W3_W2,
            correction="expert_bias",
            input_norm="ffn_norm.weight",
            models="LFM2-8B-A1B",
        ),
        _row(
            "nemotron_h",
            _V3,
            "mixer",
            storages=(  # relu² is relu(up) · up: up is its own gate
                per_expert("mixer.experts", ("up_proj", "up_proj", "down_proj")),
            ),
            correction=_BIAS,
            input_norm="norm.weight",
            hidden_keys=("moe_latent_size", "hidden_size"),
            latent=Latent("mixer.fc1_latent_proj", "mixer.fc2_latent_proj", "moe_latent_size"),
            also_sized="others",
            glu=relu_squared_glu,
            models="Nemotron 3 Nano, Super, Ultra",
        ),
    )
}

UNSUPPORTED: Mapping[str, str] = {
    "dbrx": "all experts of a projection are one matrix, without a dimension of experts",
    "doge": "experts are rows of an embedding",
    "jetmoe": "attention has experts as well, and gate and up are one matrix",
    "longcat_flash": "transformers loads no checkpoint that lacks weights of its identity experts",
    "muse_spark_text": "a norm follows the experts",
    "nllb-moe": "experts are those of an encoder and a decoder, without gate_proj",
    "switch_transformers": "experts are those of an encoder and a decoder, without gate_proj",
}
"""MoE families that are refused, and why."""
