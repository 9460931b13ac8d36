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

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)

from tests.vllm.reference import routed_output, values

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


class AscendW8A8DynamicFusedMoEMethod:
    """Scheme of int8 experts, with the shapes of its source."""

    def get_weight(
        self, num_experts: int, intermediate: int, hidden: int, _: torch.dtype
    ) -> dict[str, Tensor]:
        return {
            "w13_weight": torch.empty(num_experts, 2 * intermediate, hidden, dtype=torch.int8),
            "w2_weight": torch.empty(num_experts, hidden, intermediate, dtype=torch.int8),
        }

    def get_dynamic_quant_param(
        self, num_experts: int, intermediate: int, hidden: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        outputs = {"w13": 2 * intermediate, "w2": hidden}
        return {
            f"{name}_{part}": torch.empty(num_experts, size, 1, dtype=dtype)
            for name, size in outputs.items()
            for part in ("weight_scale", "weight_offset")
        }

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.w13 = values(layer.w13_weight, layer.w13_weight_scale)
        layer.w2 = values(layer.w2_weight, layer.w2_weight_scale)


class AscendW4A16FusedMoEMethod:
    """Scheme of 4-bit experts, with the shapes and limits of its source."""

    def __init__(self) -> None:
        described = get_current_vllm_config().quant_config.quant_description
        self.group_size = described.get("group_size", 32)

    def get_weight(
        self, num_experts: int, intermediate: int, hidden: int, _: torch.dtype
    ) -> dict[str, Tensor]:
        assert intermediate % 8 == hidden % 8 == 0
        sizes = {"w13": (2 * intermediate, hidden // 8), "w2": (hidden, intermediate // 8)}
        return {
            f"{name}_weight_packed": torch.empty(num_experts, *size, dtype=torch.int32)
            for name, size in sizes.items()
        }

    def get_dynamic_quant_param(
        self, num_experts: int, intermediate: int, hidden: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        assert intermediate % self.group_size == hidden % self.group_size == 0
        sizes = {"w13": (2 * intermediate, hidden), "w2": (hidden, intermediate)}
        found = {
            f"{name}_weight_shape": torch.empty(num_experts, 2, dtype=torch.int32) for name in sizes
        }
        for name, (outputs, inputs) in sizes.items():
            shape = num_experts, outputs, inputs // self.group_size
            found[f"{name}_weight_scale"] = torch.empty(shape, dtype=dtype)
            found[f"{name}_weight_offset"] = torch.zeros(shape, dtype=dtype)
        return found

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.w13 = values(layer.w13_weight_packed, layer.w13_weight_scale)
        layer.w2 = values(layer.w2_weight_packed, layer.w2_weight_scale)


class AscendFusedMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The method of a layer that is quantised; a scheme has its weights."""

    is_monolithic = False

    def __init__(self, scheme: Any, moe: Any, tid2eid: Tensor | None = None) -> None:
        super().__init__(moe)
        self.quant_method = scheme
        self.tid2eid = tid2eid

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        sizes = num_experts, intermediate_size_per_partition, hidden_size, params_dtype
        made = self.quant_method.get_weight(*sizes)
        made |= self.quant_method.get_dynamic_quant_param(*sizes)
        for name, tensor in made.items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Any) -> None:  # noqa: ARG002
        return

    def process_weights_after_loading(self, layer: Any) -> None:
        self.quant_method.process_weights_after_loading(layer)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> FusedExpertsResult:
        assert shared_experts is shared_experts_input is None
        if layer.expert_map is not None:  # what their dispatch to the experts' workers comes to
            topk_ids = layer.expert_map[topk_ids.long()]
        return FusedExpertsResult(routed_output(x, layer.w13, layer.w2, topk_weights, topk_ids))


class AscendCompressedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """Chooses a scheme; vllm-ascend replaces vLLM's by it."""

    def get_quant_method(self, layer: Any, prefix: str, tid2eid: Tensor | None = None) -> Any:
        if not isinstance(layer, RoutedExperts):
            return super().get_quant_method(layer, prefix)
        found = self.get_scheme_dict(layer, f"{prefix}.0.gate_proj")
        inputs = found["input_activations"]
        if inputs is not None and self._is_dynamic_token_w8a8(found["weights"], inputs):
            scheme: Any = AscendW8A8DynamicFusedMoEMethod()
        elif inputs is None and found["weights"].num_bits == 4:
            scheme = AscendW4A16FusedMoEMethod()
        else:
            raise NotImplementedError("No compressed-tensors compatible quantization type")
        return AscendFusedMoEMethod(scheme, layer.moe_config, tid2eid)


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
    register_quantization_config("compressed-tensors")(AscendCompressedTensorsConfig)
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
