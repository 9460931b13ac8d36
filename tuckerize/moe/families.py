"""Table of supported model families, and the MoE facts of one checkpoint.

A family is one row of `FAMILIES`: names of tensors, layout of the experts on disk, configuration
keys and routing. Nothing else in the package depends on the family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuckerize.domain import Projection, StackShape, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.moe.storage import PerExpert, Storage

Config = Mapping[str, Any]

# Types that can be decomposed, by safetensors' names.
DECOMPOSABLE_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Routing:
    """Routing from router logits to experts and weights.

    Attributes:
        method: `greedy` takes the top-k of all experts; `group_limited_greedy` takes it from the
            best groups of experts only.
        top_k: Experts per token.
        scale: Factor on the routing weights.
        normalize: Whether the top-k weights of a token are normalised to sum to 1.
        groups: Number of expert groups (`group_limited_greedy`).
        top_groups: Expert groups per token (`group_limited_greedy`).
    """

    method: Literal["greedy", "group_limited_greedy"]
    top_k: int
    scale: float = 1.0
    normalize: bool = False
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, slots=True)
class Family:
    """Names of one model family; `{layer}` is filled in.

    Attributes:
        model_type: `model_type` in config.json.
        experts: Module of the routed experts of a layer.
        storage: Their layout on disk, with names below that module.
        router_weight: Weight of the router, shape (E, I).
        input_norm: Weight of the norm before the MoE block, shape (I,).
        experts_keys: Configuration keys of the number of routed experts; the first one present
            counts.
        intermediate_key: Configuration key of the experts' intermediate size.
        shared_key: Configuration key of the number of shared experts; None where there are none.
        routing: Reads the routing from a configuration.
    """

    model_type: str
    experts: str
    storage: Storage
    router_weight: str
    input_norm: str
    experts_keys: tuple[str, ...]
    intermediate_key: str
    shared_key: str | None
    routing: Callable[[Config], Routing]

    def shared_experts(self, config: Config) -> int:
        """Number of shared experts."""
        return int(config.get(self.shared_key) or 0) if self.shared_key else 0

    def experts_prefix(self, layer: int) -> str:
        """Prefix of the routed experts of a layer, without the final dot."""
        return self.experts.format(layer=layer)

    def stored(self, layer: int) -> Storage:
        """Layout of the routed experts of a layer, with names as in the checkpoint."""
        return self.storage.within(self.experts_prefix(layer))

    def layer_of(self, name: str) -> int | None:
        """Index of the layer whose routed experts a tensor belongs to, or None."""
        before, after = self.experts.split("{layer}")
        match = re.match(rf"{re.escape(before)}(\d+){re.escape(after)}\.", name)
        return int(match[1]) if match else None

    def is_routed(self, name: str) -> bool:
        """Whether a tensor, dense or factored, belongs to routed experts."""
        return self.layer_of(name) is not None


@dataclass(frozen=True, slots=True)
class MoeModel:
    """The MoE facts of one checkpoint.

    Attributes:
        family: Its row of the table.
        layers: Indices of the layers with routed experts.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        shared_experts: Number of shared experts.
        routing: Routing of tokens to experts.
        activation: Name of the activation between gate and up (`hidden_act`).
        dtype: safetensors' name of the routed experts' type.
    """

    family: Family
    layers: tuple[int, ...]
    shape: StackShape
    shared_experts: int
    routing: Routing
    activation: str
    dtype: str

    @property
    def routed_parameters(self) -> int:
        """Parameters of the routed experts of all layers."""
        return len(self.layers) * len(Projection) * self.shape.parameters

    def is_routed(self, name: str) -> bool:
        """Whether a tensor, dense or factored, belongs to routed experts."""
        return self.family.is_routed(name)


def describe_moe(config: Config, tensors: Mapping[str, TensorHeader]) -> MoeModel:
    """Identify the family of a checkpoint and check that its routed experts are complete.

    Args:
        config: Contents of config.json.
        tensors: Headers of all tensors.

    Raises:
        CheckpointError: The family is not supported, the weights are quantized, or routed weights
            are missing or have another shape or type than the configuration says.
    """
    family = _family(config)
    quantization = config.get("quantization_config")
    if quantization is not None:
        known = isinstance(quantization, Mapping)
        method = quantization.get("quant_method", "unknown") if known else "unknown"
        raise CheckpointError(
            f"config.json announces weights quantized with '{method}', which cannot be decomposed",
            hint="start from a bf16, fp16 or fp32 checkpoint of the model",
        )
    found = {family.layer_of(name) for name in tensors}
    layers = tuple(sorted(layer for layer in found if layer is not None))
    if not layers:
        raise CheckpointError(
            f"no tensor is named like the routed experts of {family.model_type} "
            f"({next(iter(family.stored(0).tensors(StackShape(1, 1, 1))))})",
            hint="the checkpoint may be incomplete, or saved in another layout",
        )
    shape = StackShape(
        _positive(config, *family.experts_keys),
        _positive(config, family.intermediate_key),
        _positive(config, "hidden_size"),
    )
    first = next(iter(family.stored(layers[0]).tensors(shape)))
    model = MoeModel(
        family=family,
        layers=layers,
        shape=shape,
        shared_experts=family.shared_experts(config),
        routing=family.routing(config),
        activation=str(config.get("hidden_act", "silu")),
        dtype=tensors[first].dtype if first in tensors else "",
    )
    _check_weights(model, tensors)
    return model


def _family(config: Config) -> Family:
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        is_moe = any("expert" in key for key in config)
        why = "" if is_moe else ": the configuration names no experts"
        raise CheckpointError(
            f"model_type '{model_type}' in config.json is not a supported MoE family{why}",
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def _positive(config: Config, *keys: str) -> int:
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json has {key} = {value!r}, expected a positive integer",
            hint="repair the source's config.json",
        )
    return value


def _check_weights(model: MoeModel, tensors: Mapping[str, TensorHeader]) -> None:
    for layer in model.layers:
        prefix = model.family.experts_prefix(layer) + "."
        known = model.family.stored(layer).tensors(model.shape)
        for name, expected in known.items():
            _check_weight(name, tensors.get(name), expected, model.dtype)
        extra = sorted(n for n in tensors if n.startswith(prefix) and n not in known)
        if extra:
            raise CheckpointError(
                f"layer {layer} has the tensor {extra[0]}, which the family "
                f"{model.family.model_type} with {model.shape.experts} experts does not know",
                hint=f"check {' or '.join(model.family.experts_keys)} in config.json",
            )


def _check_weight(
    name: str, header: TensorHeader | None, expected: tuple[int, ...], dtype: str
) -> None:
    if header is None:
        raise CheckpointError(
            f"the tensor {name} is missing", hint="the checkpoint is incomplete: fetch it again"
        )
    if header.shape != expected:
        raise CheckpointError(
            f"the tensor {name} has shape {list(header.shape)}, expected {list(expected)}",
            hint="check the sizes in config.json",
        )
    if header.dtype not in DECOMPOSABLE_DTYPES or header.dtype != dtype:
        raise CheckpointError(
            f"the tensor {name} has type {header.dtype}, expected one of "
            f"{', '.join(DECOMPOSABLE_DTYPES)} and the same for all routed experts",
            hint="convert the checkpoint to bf16 first",
        )


def _deepseek_v2_routing(config: Config) -> Routing:
    method = str(config.get("topk_method") or "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json has topk_method = '{method}', expected greedy or group_limited_greedy",
            hint="other routings of this family are not supported",
        )
    experts, top_k = (_positive(config, k) for k in ("n_routed_experts", "num_experts_per_tok"))
    scale = config.get("routed_scaling_factor")
    if method == "greedy":
        routing = Routing("greedy", top_k, 1.0 if scale is None else float(scale))
    else:
        groups, top_groups = (_positive(config, key) for key in ("n_group", "topk_group"))
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
    experts = _positive(config, *_EXPERTS_KEYS)
    top_k = _positive(config, "num_experts_per_tok")
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
