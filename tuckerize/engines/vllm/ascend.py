"""vllm-ascend: its interface of quantization methods beyond vLLM's. Not run on hardware.

Written from the sources of its branches releases/v0.26.0rc and main (for vLLM 0.26 and 0.27.1) in
August 2026; tests run it against a stand-in of both. They differ: in the former the method routes
the tokens, and is requested a second time after weights were created. Its own kernels, quantised
ones included, compute layers of the latent shape in the latter alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

_ROUTING = (
    "router_logits",
    "top_k",
    "use_grouped_topk",
    "renormalize",
    "topk_group",
    "num_expert_group",
    "custom_routing_function",
    "scoring_func",
    "routed_scaling_factor",
    "e_score_correction_bias",
    "num_experts",
)


class AscendMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not installed here
    """A factored layer as vllm-ascend runs it.

    Args:
        method: The layer's method in vLLM.

    Raises:
        ValueError: The experts were to be shared out over devices.
    """

    def __init__(self, method: Any) -> None:  # noqa: ANN401
        super().__init__(method.moe)
        if method.moe.moe_parallel_config.use_ep and not method.kernel:
            raise ValueError(
                "vllm-ascend exchanges tokens inside of its own experts' products, which layers of "
                "this shape do not use: run without --enable-expert-parallel, or decompose with "
                "--target fused-kernels"
            )
        self.method = method

    def create_weights(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401
        """As in vLLM."""
        self.method.create_weights(*arguments, **settings)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:  # noqa: ARG002
        """Nothing is quantized."""
        return

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As in vLLM."""
        self.method.process_weights_after_loading(layer)

    def apply(
        self,
        layer: Any,  # noqa: ANN401
        x: Tensor,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The worker's part of the routed output, in the form that vllm-ascend's runner takes.

        Its own methods dispatch the tokens to the experts' workers, in r dimensions.
        """
        if self.method.kernel:
            settings |= {"topk_weights": topk_weights, "topk_ids": topk_ids}
            return self.method.kernel.apply(layer, x, self.method.ends, **settings)
        from vllm_ascend.ops.fused_moe.moe_comm_method import FusedExpertsResult

        if topk_ids is None:
            from vllm_ascend.ops.fused_moe.experts_selector import select_experts

            routing = {name: settings[name] for name in _ROUTING}
            topk_weights, topk_ids = select_experts(hidden_states=x, **routing)
        return FusedExpertsResult(routed_out=self.method.apply(layer, x, topk_weights, topk_ids))


def dense_method(moe: Any, tid2eid: torch.Tensor | None) -> Any:  # noqa: ANN401
    """vllm-ascend's own method, for a MoE layer that is not factored: it has no fallback.

    Args:
        moe: The engine's settings of the layer.
        tid2eid: Experts by token id, of models that route so; vllm-ascend passes it.
    """
    try:
        from vllm_ascend.ops.fused_moe.routed_experts import AscendUnquantizedFusedMoEMethod
    except ImportError:  # until 0.26
        from vllm_ascend.ops.fused_moe.fused_moe import AscendUnquantizedFusedMoEMethod
    return AscendUnquantizedFusedMoEMethod(moe, tid2eid=tid2eid)
