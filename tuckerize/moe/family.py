"""Words of a model family and the MoE facts of one checkpoint, as types.

A family is described by a row of the table in `families.py`. Which of the row's layouts a
checkpoint has is decided by its tensors: `Family` is the row with that decision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tuckerize.domain import Projection, StackShape
from tuckerize.errors import CheckpointError
from tuckerize.moe.storage import Storage

Config = Mapping[str, Any]
"""Contents of config.json."""

EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
HIDDEN_KEYS = ("hidden_size",)
INTERMEDIATE_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# Sizes of a shared expert, where families have one or none.
_SHARED_SIZES = ("shared_expert_intermediate_size", "shared_intermediate_size")
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True, slots=True)
class Routing:
    """Routing from router logits to experts and weights.

    Attributes:
        top_k: Experts per token.
        score: Function from a token's logits to its scores, by which experts are chosen and
            weighted. `sparsemixer` is Phi-3.5-MoE's choice of two experts.
        normalize: Whether the top-k weights of a token are normalised to sum to 1.
        scale: Factor on the routing weights.
        groups: Number of expert groups; the top-k is taken from the best groups only.
        top_groups: Expert groups per token.
        group_score: Score of a group: its best expert's, or the sum of its two best.
        jitter: Relative distance from the best logit within which `sparsemixer` keeps experts.
        corrects_logits: Whether the correction is added to logits, and not to scores.
        scales_inputs: Whether a weight scales the token before its expert, and not the output.
    """

    top_k: int
    score: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "two_best"] = "best"
    jitter: float = 0.0
    corrects_logits: bool = False
    scales_inputs: bool = False


@dataclass(frozen=True, slots=True)
class Glu:
    """Gated linear unit of an expert, from gate and up to its neurons: f(gate) · (up + offset).

    Attributes:
        activation: Name of f in config.json.
        slope: Factor on the argument of the sigmoid in SiLU: gate · σ(slope · gate).
        offset: Added to up.
        limit: Bound on gate from above and on up from both sides; None if there is none.
        limits_activated: Whether f(gate) is bounded, not gate.
        soft_caps: Bounds on gate and on up by tanh; the sigmoid in SiLU sees gate without. None if
            there are none.
    """

    activation: str = "silu"
    slope: float = 1.0
    offset: float = 0.0
    limit: float | None = None
    limits_activated: bool = False
    soft_caps: tuple[float, float] | None = None


def plain_glu(config: Config, layer: int) -> Glu:  # noqa: ARG001
    """Activation times up, as in most families.

    Args:
        config: Configuration of the language model.
        layer: Index of the layer.
    """
    return Glu(str(next((config[key] for key in _ACTIVATION_KEYS if key in config), "silu")))


@dataclass(frozen=True, slots=True)
class Latent:
    """The latent space between a MoE layer and its experts (LatentMoE).

    Attributes:
        into: Linear layer from hidden states to latent ones, below a decoder layer.
        out_of: Linear layer from the sum of the experts' outputs to hidden states.
        size_key: Configuration key of its size; null where there are no such layers.
    """

    into: str
    out_of: str
    size_key: str


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One model family, a row of the table; names are those below a decoder layer.

    Attributes:
        model_type: `model_type` in config.json, or in its `text_config`.
        routing: Reads the routing from a configuration.
        experts: Module of the routed experts; factors are stored below it.
        storages: Layouts of the routed experts on disk that checkpoints of the family have.
        router: Weight of the router, shape (E, I).
        router_bias: Bias of its logits, where the family has one, shape (E,).
        correction: What is added to scores to choose experts by, where the family has it,
            shape (E,).
        router_scale: Factors of the router's input, where it reads the residual stream with a norm
            of its own (Gemma 4), shape (I,).
        expert_scale: Factors of the experts' routing weights, where the family has them, shape
            (E,).
        expert_table: Experts of every token of the vocabulary, in layers that choose them so
            (DeepSeek-V4), shape (V, k).
        input_norm: Weight of the norm before the MoE block, shape (I,); None if it has no such.
        norm_offset: What the norm adds to its weight.
        experts_keys: Configuration keys of the number of routed experts; the first one present
            counts.
        intermediate_keys: The same of the experts' intermediate size.
        hidden_keys: The same of the size of what they read; null is as good as absent.
        latent: Where the experts compute in a latent space, and what is between it and the residual
            stream. They have no gate_proj, and are not decomposed: the space is made smaller.
        also_sized: What that size sizes besides the routed experts: nothing, the shared experts
            (their number times it), or other modules.
        glu: Reads the gated linear unit of a layer's experts from a configuration.
        models: Models of the family by their public names.
        inferred: Whether the tensors of a checkpoint gave the row, and not the table.
    """

    model_type: str
    routing: Callable[[Config], Routing]
    experts: str
    storages: tuple[Storage, ...]
    router: str
    router_bias: str | None = None
    correction: str | None = None
    router_scale: str | None = None
    expert_scale: str | None = None
    expert_table: str | None = None
    input_norm: str | None = "post_attention_layernorm.weight"
    norm_offset: float = 0.0
    experts_keys: tuple[str, ...] = EXPERTS_KEYS
    intermediate_keys: tuple[str, ...] = INTERMEDIATE_KEYS
    hidden_keys: tuple[str, ...] = HIDDEN_KEYS
    latent: Latent | None = None
    also_sized: Literal["nothing", "shared_experts", "others"] = "nothing"
    glu: Callable[[Config, int], Glu] = plain_glu
    models: str = ""
    inferred: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """A family as one checkpoint has it.

    Attributes:
        row: Its row of the table.
        layers: Module of the decoder layers in the checkpoint, `model.layers` say.
        storage: The layout of the routed experts, with names below a layer.
        further: Module of the layers that predict further tokens, `mtp.layers` say, where they are
            not among the decoder layers; they are counted on after the last of those.
        depth: Number of decoder layers, where `further` is given.
    """

    row: FamilyRow
    layers: str
    storage: Storage
    further: str | None = None
    depth: int = 0

    @property
    def model_type(self) -> str:
        """`model_type` of the row."""
        return self.row.model_type

    def routing(self, config: Config) -> Routing:
        """Routing of tokens to experts.

        Raises:
            CheckpointError: A value of it is not possible.
        """
        try:
            return self.row.routing(text_config(config))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"config.json describes a routing that is not possible: {error}",
                hint="check the numbers of experts, groups and experts per token in config.json",
            ) from error

    def glu(self, config: Config, layer: int) -> Glu:
        """Gated linear unit of the experts of a layer.

        Raises:
            CheckpointError: config.json describes one that is not possible.
        """
        try:
            return self.row.glu(text_config(config), layer)
        except (TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"config.json describes an activation of layer {layer} that is not possible: "
                f"{error}",
                hint="check the keys that begin with swiglu_ in config.json",
            ) from error

    def shared_experts(self, config: Config) -> int:
        """Number of shared experts."""
        text = text_config(config)
        counts = [int(text[key]) for key in SHARED_KEYS if isinstance(text.get(key), int)]
        return counts[0] if counts else int(any(text.get(key) for key in _SHARED_SIZES))

    def name(self, layer: int, below: str) -> str:
        """Name in the checkpoint of a tensor or module of a layer."""
        return f"{self._module(layer)}.{below}"

    def _module(self, layer: int) -> str:
        if self.further and layer >= self.depth:
            return f"{self.further}.{layer - self.depth}"
        return f"{self.layers}.{layer}"

    def experts_prefix(self, layer: int) -> str:
        """Prefix of the routed experts of a layer, without the final dot."""
        return self.name(layer, self.row.experts)

    def stored(self, layer: int) -> Storage:
        """Layout of the routed experts of a layer, with names as in the checkpoint."""
        return self.storage.within(self._module(layer))

    def layer_of(self, name: str) -> int | None:
        """Index of the layer whose routed experts a tensor belongs to, or None."""
        match = _routed_names(self).match(name)
        if match is None:
            return None
        return int(match["layer"]) + (self.depth if match["module"] == self.further else 0)

    def is_routed(self, name: str) -> bool:
        """Whether a tensor, dense or factored, belongs to routed experts."""
        return self.layer_of(name) is not None

    def moe_layers(self, config: Config, names: Iterable[str]) -> tuple[int, ...]:
        """Indices of the model's layers that have routed experts among tensors of some names.

        Layers after the last one predict further tokens: no engine runs them as part of the model.
        """
        last = text_config(config).get("num_hidden_layers")
        found = self._layers_of(names)
        return tuple(layer for layer in found if not isinstance(last, int) or layer < last)

    def further_layers(self, config: Config, names: Iterable[str]) -> tuple[int, ...]:
        """Indices of the layers with routed experts that predict further tokens.

        Beside the decoder layers all are; among them those after the last that config.json counts
        as such. Others are left over from a deeper model.
        """
        text = text_config(config)
        last, count = text.get("num_hidden_layers"), text.get("num_nextn_predict_layers")
        if not isinstance(last, int):
            return ()
        own = range(last, last + count) if isinstance(count, int) else range(0)
        return tuple(
            layer
            for layer in self._layers_of(names)
            if (layer >= last if self.further else layer in own)
        )

    def _layers_of(self, names: Iterable[str]) -> list[int]:
        return sorted({layer for name in names if (layer := self.layer_of(name)) is not None})


@cache
def _routed_names(family: Family) -> re.Pattern[str]:
    """Names below the module of the experts, but for the router's, and those of the layout."""
    row = family.row
    beside = "|".join(re.escape(name) for name in (row.router_bias, row.correction) if name)
    others = f"(?!(?:{beside})$)" if beside else ""
    outside = [re.escape(name) for name in family.storage.names if not name.startswith(row.experts)]
    places = "|".join([re.escape(f"{row.experts}."), *outside])
    modules = "|".join(re.escape(own) for own in (family.layers, family.further) if own)
    return re.compile(rf"(?P<module>{modules})\.(?P<layer>\d+)\.{others}(?:{places})")


@dataclass(frozen=True, slots=True)
class MoeModel:
    """The MoE facts of one checkpoint.

    Attributes:
        family: Its family.
        layers: Indices of the layers with routed experts.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        shared_experts: Number of shared experts.
        routing: Routing of tokens to experts.
        glus: Gated linear unit of the experts of every layer.
        dtype: safetensors' name of the routed experts' type.
        further: Indices of layers after them that predict further tokens, with experts alike.
    """

    family: Family
    layers: tuple[int, ...]
    shape: StackShape
    shared_experts: int
    routing: Routing
    glus: tuple[Glu, ...]
    dtype: str
    further: tuple[int, ...] = ()

    @property
    def routed_parameters(self) -> int:
        """Parameters of the routed experts of all layers."""
        return len(self.layers) * len(Projection) * self.shape.parameters

    def is_routed(self, name: str) -> bool:
        """Whether a tensor, dense or factored, belongs to routed experts."""
        return self.family.is_routed(name)

    def glu(self, layer: int) -> Glu:
        """Gated linear unit of the experts of a layer."""
        return self.glus[self.layers.index(layer)]


def model_types(config: Config) -> tuple[str, ...]:
    """`model_type` in config.json, and in its `text_config`."""
    nested = config.get("text_config")
    parts = [part for part in (config, nested) if isinstance(part, Mapping)]
    return tuple(str(part.get("model_type")) for part in parts)


def text_config(config: Config) -> Config:
    """Configuration of the language model, which models of several modalities nest."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def positive(config: Config, *keys: str) -> int:
    """Value of the first of some keys that is in config.json; lists of one value count as it.

    Raises:
        CheckpointError: It is not a positive integer.
    """
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key)
    if isinstance(value, list) and len(set(map(str, value))) == 1:  # one for every layer
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json has {key} = {value!r}, expected a positive integer",
            hint="repair the source's config.json",
        )
    return value
