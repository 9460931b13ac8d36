"""vLLM: serve a Tucker checkpoint; `register` is the entry point of vLLM's plugins.

The engine owns router, tokens and collectives. For every factored layer it asks our quantization
method to create parameters, to load them, and to compute. Tensor-parallel workers split the neurons
of every expert, expert-parallel ones the experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from tuckerize.domain import SHARED_U_I, Projection
from tuckerize.engines.slices import WorkerGroup
from tuckerize.engines.vllm.ascend import AscendMoEMethod, dense_method
from tuckerize.engines.vllm.latent import LatentKernel
from tuckerize.format.config import METHOD, GroupShape, TuckerQuantization
from tuckerize.moe.family import Glu
from tuckerize.moe.lookup import glu_of, is_after_last
from tuckerize.names import GROUP_PATTERN, TensorName, group_module
from tuckerize.runtime.activations import Activation, activation_of
from tuckerize.runtime.experts import TuckerExperts

# Some of vLLM's models rename everything that contains the name of a dense projection.
_SHORT_NAMES: Mapping[str, str] = {
    Projection.GATE: "gate",
    Projection.UP: "up",
    Projection.DOWN: "down",
    SHARED_U_I: "shared",
}


class TuckerConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed here
    """`quantization_config` of a Tucker checkpoint, see docs/reference/format.md.

    What else is quantized, where the source was, is left to the engine's own method.

    Args:
        tucker: Its contents.
    """

    def __init__(self, tucker: TuckerQuantization) -> None:
        super().__init__()
        self.tucker = tucker
        self.rest: Any = None
        if tucker.rest:
            method = get_quantization_config(str(tucker.rest["quant_method"]))
            self.rest = method.from_config(dict(tucker.rest))

    @property
    def quant_description(self) -> dict[str, Any]:
        """vllm-ascend's description of what is not factored, which its norms and schemes read."""
        return getattr(self.rest, "quant_description", None) or {}

    @classmethod
    def get_name(cls) -> str:
        """The name in config.json."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No device is too old."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TuckerConfig:
        """Read the description in config.json.

        Raises:
            ValueError: It is of another release, or malformed; the message names the key.
        """
        return cls(TuckerQuantization.parse(config))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Map of names in the checkpoint to names of parameters."""
        own = WeightsMapper(
            orig_to_new_regex={
                re.compile(rf"\.experts\.({GROUP_PATTERN})\.{long}\."): (
                    rf".experts.routed_experts.\1.{short}."
                )
                for long, short in _SHORT_NAMES.items()
            }
        )
        return own | self.rest.get_checkpoint_weight_mapper() if self.rest else own

    def maybe_update_config(self, *given: Any, **named: Any) -> None:  # noqa: ANN401
        """Update the method of what is not factored."""
        if self.rest:
            self.rest.maybe_update_config(*given, **named)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Name the factored modules as the engine does, where its model has other names.

        Args:
            hf_to_vllm_mapper: Map of names in checkpoints to names in the engine's model.
        """
        modules = hf_to_vllm_mapper.apply_dict(dict(self.tucker.modules))
        self.tucker = replace(self.tucker, modules=modules)
        if self.rest:
            self.rest.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: Any, prefix: str, **ascend: Any) -> Any:  # noqa: ANN401
        """Method that computes a layer; None, the engine's own, for what was never quantized.

        Args:
            layer: The layer.
            prefix: Its name.
            **ascend: Arguments of vllm-ascend for its MoE layers that vLLM lacks: `tid2eid`.
        """
        is_moe = hasattr(layer, "moe_config")
        groups = self.tucker.modules.get(prefix) if is_moe else None
        if groups is None and self.rest:
            self.rest.packed_modules_mapping = self.packed_modules_mapping
            return self.rest.get_quant_method(layer, prefix, **ascend)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not is_moe:
            return None
        if groups is not None and groups[0].biased:
            raise ValueError(
                "the vLLM plugin does not serve experts with biases: run 'tuckerize reconstruct', "
                "and serve its result"
            )
        if groups is None:
            return dense_method(layer.moe_config, **ascend) if ascend else None
        known = get_current_vllm_config().model_config.hf_config.to_dict()
        if is_after_last(known, prefix):  # the engine's loaders of such layers know no factors
            raise ValueError(
                f"the vLLM plugin does not serve {prefix}, factored experts of a layer that "
                "predicts further tokens: decompose with --mtp copy, or serve without speculative "
                "decoding"
            )
        method = getattr(layer, "quant_method", None)  # it has one where it is asked again
        if not isinstance(method, TuckerMoEMethod):
            glu = glu_of(known, prefix)
            plain = glu == Glu(glu.activation)
            kernel = LatentKernel.find(layer, prefix, groups, **ascend) if plain else None
            method = TuckerMoEMethod(layer.moe_config, groups, activation_of(glu), kernel)
        return AscendMoEMethod(method) if ascend else method


class TuckerMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The routed experts of one factored layer.

    Args:
        moe: The engine's settings of the layer.
        groups: Sizes of its groups.
        activation: Between gate and up of its experts.
        kernel: The engine's own for it; None if it has none.
    """

    def __init__(
        self,
        moe: Any,  # noqa: ANN401
        groups: Sequence[GroupShape],
        activation: Activation,
        kernel: LatentKernel | None,
    ) -> None:
        super().__init__(moe)
        self.groups = groups
        self.group_size = groups[0].experts
        self.activation = activation
        self.kernel = kernel
        self.waiting: set[str] = set()
        self.experts: TuckerExperts | None = None

    def create_weights(
        self,
        layer: Any,  # noqa: ANN401
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,  # noqa: ARG002
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        """Create the worker's part of all factors and cores, without values.

        Raises:
            ValueError: The workers do not own equally many experts of each of their groups.
        """
        parallel = self.moe.moe_parallel_config
        groups = {
            index: WorkerGroup(shape, hidden_size, own, parallel.tp_size, parallel.tp_rank)
            for index, shape in enumerate(self.groups)
            if (own := self._own_experts(layer, index))
        }
        sizes = {len(group.own) for group in groups.values()}
        if len(sizes) != 1 or num_experts != sum(len(group.own) for group in groups.values()):
            raise ValueError(
                f"groups of {self.group_size} experts cannot be shared out evenly over the "
                "expert-parallel workers: use another number of them, or one group a layer"
            )
        self.experts = TuckerExperts(
            [
                self.kernel.empty(layer, group, params_dtype)
                if self.kernel
                else group.empty(params_dtype)
                for group in groups.values()
            ],
            group_size=sizes.pop(),
            activation=self.activation,
        )
        modules = dict(zip(groups, self.experts.groups, strict=True))
        for index, shape in enumerate(self.groups):
            group = groups.get(index) or WorkerGroup(shape, hidden_size, own=())
            self._register(layer, index, group, modules.get(index))
        layer.load_weights = partial(_load_weights, layer)

    def _own_experts(self, layer: Any, group: int) -> list[int]:  # noqa: ANN401
        """Places in a group of the experts that this worker owns, in its order."""
        first = group * self.group_size
        if layer.expert_map is None:
            return list(range(self.group_size))
        local = layer.expert_map[first : first + self.group_size].tolist()
        return sorted((n for n in range(self.group_size) if local[n] >= 0), key=local.__getitem__)

    def _register(
        self, layer: nn.Module, index: int, group: WorkerGroup, module: nn.Module | None
    ) -> None:
        """Give the layer parameters under the names that vLLM's loaders will look for.

        Tensors of which the worker owns nothing get empty parameters.
        """
        for name in group.names:
            path = f"{group_module(index)}.{_SHORT_NAMES[name.owner]}.{name.within_owner}"
            if module is not None and group.owns(name):
                parameter: Any = module.get_parameter(str(group.own_name(name)))
                parameter.weight_loader = partial(self._load, path, group, name)
                self.waiting.add(path)
            else:
                parameter = nn.Parameter(torch.empty(0), requires_grad=False)
                parameter.weight_loader = _ignore
            _set_parameter(layer, path, parameter)

    def _load(
        self, path: str, group: WorkerGroup, name: TensorName, parameter: Tensor, loaded: Tensor
    ) -> None:
        """Copy the worker's part of a tensor of the checkpoint."""
        parameter.data.copy_(group.cut(name, loaded))
        self.waiting.discard(path)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:  # noqa: ARG002
        """Nothing is quantized."""
        return

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Refuse a layer that was not loaded completely: the engine does not check.

        Raises:
            ValueError: Tensors were not in the checkpoint.
        """
        if self.waiting:
            raise ValueError(f"{layer.layer_name} lacks {', '.join(sorted(self.waiting))}")
        if self.kernel and self.experts:
            self.kernel.method.process_weights_after_loading(layer)
            for projection in Projection:  # the kernel keeps them in its own layout
                core: Any = self.experts.groups[0].stack(projection).core
                for tensor in core.parameters() if isinstance(core, nn.Module) else (core,):
                    tensor.data = tensor.new_empty(0)

    def apply(
        self,
        layer: Any,  # noqa: ANN401
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: object,
        **__: object,
    ) -> Tensor:
        """The worker's part of the routed output, shape (T, I); the engine sums over workers."""
        if torch.compiler.is_compiling():
            compiled: Tensor = _routed_output(x, topk_weights, topk_ids, layer.layer_name)
            return compiled
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        if self.experts is None:
            raise TypeError("the layer has no weights")
        output: Tensor
        if self.kernel:
            output = self.kernel.apply(layer, x, self.ends, topk_weights, topk_ids, None, None)
            return output
        if layer.apply_router_weight_on_input:  # of the one expert of every token
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        output = self.experts(x, topk_ids, topk_weights)
        return output

    @property
    def ends(self) -> list[Tensor | None]:
        """U_I of gate and up, and of down, of a layer that a kernel of the engine computes."""
        groups = self.experts.groups if self.experts else ()
        places = (Projection.GATE, Projection.DOWN)
        return [group.hidden_factor(end) for group in groups for end in places]


@torch.library.custom_op("tuckerize::routed_output", mutates_args=())
def _routed_output(x_TI: Tensor, weights_Tk: Tensor, experts_Tk: Tensor, layer_name: str) -> Tensor:
    """The routed output of a layer as one node of the engine's compiled graph.

    On a CPU the engine traces its MoE layers; the number of tokens per expert cannot be traced.
    """
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    output: Tensor = layer.quant_method.apply(layer, x_TI, weights_Tk, experts_Tk)
    return output


@_routed_output.register_fake
def _(x_TI: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_TI)


def _ignore(parameter: Tensor, loaded: Tensor) -> None:
    """Skip a tensor of which the worker owns nothing."""


def _set_parameter(layer: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register a parameter below a layer, with modules in between."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in layer._modules:
            layer.add_module(name, nn.Module())
        layer = layer.get_submodule(name)
    layer.register_parameter(leaf, parameter)


def _load_weights(layer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Load tensors of a layer by their names below it; yields the names."""
    for name, tensor in weights:
        own = name.removeprefix("routed_experts.")
        parameter: Any = layer.get_parameter(own)
        parameter.weight_loader(parameter, tensor)
        yield own


def register() -> None:
    """Make vLLM know the format; may be called more than once."""
    register_quantization_config(METHOD)(TuckerConfig)
