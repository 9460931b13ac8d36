"""Words of one model family and the MoE facts of one checkpoint, as types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuckerize.domain import Projection, StackShape
from tuckerize.errors import CheckpointError
from tuckerize.moe.storage import Storage

Config = Mapping[str, Any]
"""Contents of config.json."""


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


def positive(config: Config, *keys: str) -> int:
    """Value of the first of some keys that is in config.json.

    Raises:
        CheckpointError: It is not a positive integer.
    """
    key = next((key for key in keys if key in config), keys[0])
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json has {key} = {value!r}, expected a positive integer",
            hint="repair the source's config.json",
        )
    return value
