"""A stand-in of vllm-ascend's MoE interface on vLLM's CPU engine.

Names and flow of calls are those of its branches releases/v0.26.0rc and main (August 2026): what
is asked of a quantization method, when, with what, and what is expected back. Its communication
and its kernels are left out.
"""

# ruff: noqa: ANN401  theirs have no types that are known here

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

PLACE = "vllm_ascend.ops.fused_moe"


@dataclass
class FusedExpertsResult:
    """What the runner takes from `apply`."""

    routed_out: Tensor
    before_dispatch_evt: object = None
    before_gmm2_evt: object = None
    before_combine_evt: object = None
    group_list_type: int = 1
    expert_tokens: Tensor | None = None


class AscendUnquantizedFusedMoEMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """The method of a layer that is not quantized."""

    def __init__(self, moe: Any, tid2eid: Tensor | None = None) -> None:
        super().__init__(moe=moe)
        self.tid2eid = tid2eid

    def apply(self, layer: Any, x: Tensor, **settings: Any) -> FusedExpertsResult:
        if "router_logits" in settings:
            routing: Any = select_experts(hidden_states=x, **settings)
        else:
            routing = settings["topk_weights"], settings["topk_ids"]
        routed = super().apply(layer, x, *routing, None, None)
        return FusedExpertsResult(routed_out=routed)


def select_experts(hidden_states: Tensor, router_logits: Tensor, **_: object) -> Any:
    """Weights and experts of every token: vLLM's, which `_forward_026` hands over."""
    assert len(hidden_states) == len(router_logits[0])
    return router_logits


def install(release: str) -> None:
    """Make vLLM's layers behave as vllm-ascend's; `release` is `main` or `v0.26.0rc`."""
    holder = "routed_experts" if release == "main" else "fused_moe"
    members: dict[str, Any] = {
        holder: AscendUnquantizedFusedMoEMethod,
        "moe_comm_method": FusedExpertsResult,
        "experts_selector": select_experts,
    }
    for name, member in members.items():
        module = ModuleType(f"{PLACE}.{name}")
        setattr(module, member.__name__, member)
        sys.modules[module.__name__] = module
    for parent in ("vllm_ascend", "vllm_ascend.ops", PLACE):
        sys.modules[parent] = ModuleType(parent)
    if release == "main":
        RoutedExperts._get_quant_method = _ask_once
    else:
        _ask_again_in_the_runner()
    RoutedExperts.forward_modular = _forward_main if release == "main" else _forward_026


def _ask_once(layer: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
    """`AscendRoutedExperts._get_quant_method` of main: nothing replaces None."""
    if quant_config is None:
        return AscendUnquantizedFusedMoEMethod(moe_config)
    return quant_config.get_quant_method(layer, prefix, tid2eid=None)


def _ask_again_in_the_runner() -> None:
    """`AscendMoERunner.__init__` of v0.26.0rc: weights exist already."""
    plain = MoERunner.__init__

    def init(
        runner: Any,
        layer_name: str,
        moe_config: Any,
        router: Any,
        routed_experts: Any,
        *rest: Any,
        **more: Any,
    ) -> None:
        plain(runner, layer_name, moe_config, router, routed_experts, *rest, **more)
        routed_experts.quant_method = _ask_once(
            routed_experts, layer_name, routed_experts.quant_config, moe_config
        )

    MoERunner.__init__ = init


def _forward_main(
    layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: object, **__: object
) -> Tensor:
    """`AscendRoutedExperts.forward_impl` of main."""
    result: FusedExpertsResult = layer.quant_method.apply(
        layer=layer,
        x=x,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        shared_experts=None,
        shared_experts_input=None,
    )
    return result.routed_out


def _forward_026(
    layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: object, **__: object
) -> Tensor:
    """`AscendMoERunner.no_shared_forward_impl` of v0.26.0rc: the method routes."""
    result: FusedExpertsResult = layer.quant_method.apply(
        layer=layer,
        x=x,
        router_logits=(topk_weights, topk_ids),
        pertoken_scale=None,
        top_k=layer.top_k,
        renormalize=layer.renormalize,
        use_grouped_topk=layer.use_grouped_topk,
        num_experts=layer.moe_config.num_experts,
        expert_map=None,
        topk_group=layer.topk_group,
        num_expert_group=layer.num_expert_group,
        custom_routing_function=layer.custom_routing_function,
        scoring_func=layer.scoring_func,
        routed_scaling_factor=layer.routed_scaling_factor,
        e_score_correction_bias=layer.e_score_correction_bias,
        activation=layer.activation,
        apply_router_weight_on_input=layer.apply_router_weight_on_input,
        enable_force_load_balance=False,
        log2phy=None,
        global_redundant_expert_num=0,
        mc2_mask=None,
    )
    return result.routed_out
