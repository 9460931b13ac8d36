"""vLLM and vllm-ascend: layers of the latent shape on the engine's own fused-MoE kernels.

Where gate and up of all experts share one U_I, and no other mode has a factor, a layer is an
ordinary MoE layer of hidden size r between two projections shared by its experts. Without any
factor it is one of the model's hidden size, with narrower experts. Quantised cores are the weights
of such a layer in the format of compressed-tensors: the engine's method for that format takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform

from tuckerize.domain import CoreType, Projection
from tuckerize.engines.slices import WorkerGroup
from tuckerize.engines.vllm.ascend import dense_method
from tuckerize.format.config import GroupShape
from tuckerize.format.cores import stock_scheme
from tuckerize.names import TensorKind, TensorName
from tuckerize.parallel.layouts import owned_slice

# The kernels have one hidden size: the smaller r_I of gate and up, and of down, is zero-padded.
_LARGEST_GROWTH = 1.1


class LatentKernel:
    """The engine's method for a MoE layer of hidden size r.

    Args:
        method: The engine's.
        hidden: r.
    """

    def __init__(self, method: Any, hidden: int) -> None:  # noqa: ANN401
        self.method = method
        self.hidden = hidden

    @classmethod
    def find(
        cls,
        layer: Any,  # noqa: ANN401
        prefix: str,
        groups: Sequence[GroupShape],
        **ascend: Any,  # noqa: ANN401
    ) -> LatentKernel | None:
        """The kernel of a layer; None if it has another shape, or the engine none for its sizes.

        Args:
            layer: The engine's layer.
            prefix: Its name.
            groups: Sizes of its groups.
            **ascend: What vllm-ascend adds where its methods do all of a layer's work, exchange of
                tokens between expert-parallel workers included.
        """
        moe = layer.moe_config
        parallel = moe.moe_parallel_config
        if not ascend and (parallel.use_ep or current_platform.is_out_of_tree()):
            return None
        core_type = groups[0].core_type
        unit = (core_type and core_type.group_size) or 1
        _, neurons = owned_slice(groups[0].widths[0], parallel.tp_size, parallel.tp_rank, unit)
        hidden = _latent_width(moe, groups, unit)
        if hidden is None or not neurons or neurons % unit:
            return None
        settings = copy(moe)
        settings.hidden_dim = settings.hidden_dim_unpadded = hidden
        settings.intermediate_size_per_partition = neurons
        settings.intermediate_size_per_partition_unpadded = neurons
        try:
            method = _method(layer, prefix, settings, core_type, ascend)
        except (AssertionError, NotImplementedError, ValueError):  # no kernel, in words of its own
            return None
        return None if method.is_monolithic else cls(method, hidden)

    def empty(self, layer: Any, group: WorkerGroup, dtype: torch.dtype) -> dict[TensorName, Tensor]:  # noqa: ANN401
        """The worker's tensors without values; the cores are parts of the kernel's weights."""
        tensors = group.empty(dtype)
        cores = {name: own for name, own in tensors.items() if name.kind == TensorKind.CORE}
        gate = next(own for name, own in cores.items() if name.projection == Projection.GATE)
        experts, neurons = gate.shape[:2]
        self.method.create_weights(layer, experts, self.hidden, neurons, dtype)
        for name, own in cores.items():
            down = name.projection == Projection.DOWN
            weight = getattr(layer, f"{'w2' if down else 'w13'}_{name.part or 'weight'}").data
            if own.dtype == torch.uint8:  # codes of 3 bits, which the engine has in int32
                weight = weight.view(torch.uint8)
            if name.projection == Projection.UP:
                weight = weight[:, neurons:]
            else:
                weight.zero_()
            if down and name.part is None:
                weight = weight.mT
            tensors[name] = weight[tuple(map(slice, own.shape))]
        return tensors

    def apply(
        self,
        layer: Any,  # noqa: ANN401
        x_TI: Tensor,
        ends: Sequence[Tensor | None],
        *routing: Any,  # noqa: ANN401
        **settings: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The routed output, shape (T, I), or the engine's own record of it.

        Args:
            layer: The engine's layer.
            x_TI: Tokens.
            ends: U_I of gate and up, and of down, shapes (I, r_I); None where there is none.
            *routing: Further arguments of the engine's method.
            **settings: Those that it names.
        """
        low_TR = x_TI if ends[0] is None else x_TI @ ends[0]
        if missing := self.hidden - low_TR.shape[1]:
            low_TR = functional.pad(low_TR, (0, missing))
        result = self.method.apply(layer, low_TR, *routing, **settings)
        if isinstance(result, Tensor):
            return _lifted(result, ends[1])
        return replace(result, routed_out=_lifted(result.routed_out, ends[1]))


def _lifted(result_TR: Tensor, end: Tensor | None) -> Tensor:
    """Results in hidden space."""
    return result_TR if end is None else result_TR[:, : end.shape[1]] @ end.T


def _method(
    layer: Any,  # noqa: ANN401
    prefix: str,
    settings: Any,  # noqa: ANN401
    core_type: CoreType | None,
    ascend: dict[str, Any],
) -> Any:  # noqa: ANN401
    """The engine's method for a layer with other settings than its own."""
    if core_type is None:
        return dense_method(settings, **ascend) if ascend else UnquantizedFusedMoEMethod(settings)
    scheme = stock_scheme(core_type)
    config = get_quantization_config(scheme["quant_method"]).from_config(scheme)
    own, layer.moe_config = layer.moe_config, settings
    try:
        method = config.get_quant_method(layer, prefix, **ascend)
    finally:
        layer.moe_config = own
    if getattr(method, "experts_cls", method) is None:  # as the method of FP8 says it
        raise NotImplementedError("the engine has no kernel")
    return method


def _latent_width(moe: Any, groups: Sequence[GroupShape], unit: int) -> int | None:  # noqa: ANN401
    """Hidden size r of a layer of the latent shape, a multiple of a unit; else None."""
    if len(groups) > 1 or not groups[0].equal_widths:
        return None
    whole = (moe.num_experts, groups[0].widths[0])
    ranks = [groups[0].ranks[projection] for projection in Projection]
    sizes = [rank.hidden for rank in ranks]
    no_factor = min(sizes) == moe.hidden_dim
    if any(rank[:2] != whole for rank in ranks) or not (groups[0].joint or no_factor):
        return None
    width = -(-max(sizes) // unit) * unit
    if no_factor:
        return width if width == moe.hidden_dim else None
    if sizes[0] != sizes[1] or max(sizes) >= moe.hidden_dim:
        return None
    return width if 3 * width <= _LARGEST_GROWTH * sum(sizes) else None
