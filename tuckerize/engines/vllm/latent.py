"""vLLM: layers of the latent shape on the engine's own fused-MoE kernels.

Where gate and up of all experts share one U_I, and no other mode has a factor, a layer is an
ordinary MoE layer of hidden size r between two projections shared by its experts. Without any
factor it is one of the model's hidden size, with narrower experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform

from tuckerize.domain import Projection
from tuckerize.engines.slices import WorkerGroup
from tuckerize.format.config import GroupShape
from tuckerize.names import TensorName
from tuckerize.parallel.layouts import owned_slice

# The kernels have one hidden size: the smaller r_I of gate and up, and of down, is zero-padded.
_LARGEST_GROWTH = 1.1


class LatentKernel:
    """The engine's method for a MoE layer of hidden size r.

    Args:
        method: The engine's.
    """

    def __init__(self, method: UnquantizedFusedMoEMethod) -> None:
        self.method = method

    @classmethod
    def find(
        cls,
        moe: Any,  # noqa: ANN401
        groups: Sequence[GroupShape],
    ) -> LatentKernel | None:
        """The kernel of a layer; None if it has another shape, or the engine none for its sizes.

        Args:
            moe: The engine's settings of the layer.
            groups: Sizes of its groups.
        """
        parallel = moe.moe_parallel_config
        width = _latent_width(moe, groups)
        if width is None or parallel.use_ep or current_platform.is_out_of_tree():
            return None
        settings = copy(moe)
        settings.hidden_dim = settings.hidden_dim_unpadded = width
        _, neurons = owned_slice(groups[0].widths[0], parallel.tp_size, parallel.tp_rank)
        settings.intermediate_size_per_partition = neurons
        settings.intermediate_size_per_partition_unpadded = neurons
        try:
            method = UnquantizedFusedMoEMethod(settings)
        except (NotImplementedError, ValueError):
            return None
        return None if method.is_monolithic else cls(method)

    def empty(self, layer: Any, group: WorkerGroup, dtype: torch.dtype) -> dict[TensorName, Tensor]:  # noqa: ANN401
        """The worker's tensors without values; the cores are parts of the kernel's weights."""
        tensors = group.empty(dtype)
        experts, neurons, _ = tensors[TensorName.core(Projection.GATE)].shape
        self.method.create_weights(layer, experts, self.method.moe.hidden_dim, neurons, dtype)
        gate_up = layer.w13_weight.data.zero_()
        weights = {
            Projection.GATE: gate_up[:, :neurons],
            Projection.UP: gate_up[:, neurons:],
            Projection.DOWN: layer.w2_weight.data.zero_().mT,
        }
        for projection, weight in weights.items():
            name = TensorName.core(projection)
            tensors[name] = weight[..., : tensors[name].shape[2]]
        return tensors

    def apply(
        self,
        layer: Any,  # noqa: ANN401
        x_TI: Tensor,
        routing: Sequence[Tensor],
        ends: Sequence[Tensor | None],
    ) -> Tensor:
        """The routed output, shape (T, I).

        Args:
            layer: The engine's layer.
            x_TI: Tokens.
            routing: Weights and experts of every token.
            ends: U_I of gate and up, and of down, shapes (I, r_I); None where there is none.
        """
        low_TR = x_TI if ends[0] is None else x_TI @ ends[0]
        if missing := self.method.moe.hidden_dim - low_TR.shape[1]:
            low_TR = functional.pad(low_TR, (0, missing))
        result_TR = self.method.apply(layer, low_TR, *routing, None, None)
        output: Tensor = (
            result_TR if ends[1] is None else result_TR[:, : ends[1].shape[1]] @ ends[1].T
        )
        return output


def _latent_width(moe: Any, groups: Sequence[GroupShape]) -> int | None:  # noqa: ANN401
    """Hidden size r of a layer of the latent shape; None if it has another one."""
    if len(groups) > 1 or not groups[0].equal_widths or groups[0].core_type:
        return None
    whole = (moe.num_experts, groups[0].widths[0])
    ranks = [groups[0].ranks[projection] for projection in Projection]
    sizes = [rank.hidden for rank in ranks]
    no_factor = min(sizes) == moe.hidden_dim
    if any(rank[:2] != whole for rank in ranks) or not (groups[0].joint or no_factor):
        return None
    if no_factor:
        return sizes[0]
    if sizes[0] != sizes[1] or max(sizes) >= moe.hidden_dim:
        return None
    return max(sizes) if 3 * max(sizes) <= _LARGEST_GROWTH * sum(sizes) else None
