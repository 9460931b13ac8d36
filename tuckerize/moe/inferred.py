"""Families that are not in the table, inferred from the tensors and config.json of a checkpoint.

Names of experts follow a few conventions, and shapes tell a router from a norm. How the router
scores matters to the tokens that `verify` takes only; that the experts compute what ours do, the
engine checks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from tuckerize.domain import TensorHeader
from tuckerize.moe.family import (
    EXPERTS_KEYS,
    Config,
    Family,
    FamilyRow,
    Routing,
    positive,
    text_config,
)
from tuckerize.moe.readers import router
from tuckerize.moe.storage import GATE_UP_DOWN, W1_W3_W2, Storage, packed, per_expert

# The first tensor of a layer's routed experts, as transformers saves or holds them.
_FIRST = re.compile(
    r"(?P<layers>(?:\w+\.)*layers)\.(?P<layer>\d+)\.(?P<experts>(?:\w+\.)?experts)\."
    r"(?:0\.(?P<name>gate_proj|w1)\.weight|gate_up_proj)"
)
_NORMS = (
    "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    "pre_ff_layernorm.weight",
    "ffn_norm.weight",
    "input_layernorm.weight",
)
_SCORES: Mapping[str, Literal["softmax", "sigmoid", "sqrtsoftplus"]] = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrtsoftplus",
}
_SCORE_KEYS = ("scoring_func", "score_function", "expert_selection_fn")


@dataclass(frozen=True, slots=True)
class InferredNames:
    """Names of a layer's modules and tensors below the layer, as `FamilyRow` has them."""

    experts: str
    router: str
    router_bias: str | None
    correction: str | None
    input_norm: str | None

    @classmethod
    def of(cls, row: FamilyRow) -> InferredNames:
        """The names of a row."""
        return cls(row.experts, row.router, row.router_bias, row.correction, row.input_norm)

    def row(self, model_type: str) -> FamilyRow:
        """A row with these names."""

        def routing(config: Config) -> Routing:
            named = next((config[key] for key in _SCORE_KEYS if key in config), None)
            score = _SCORES.get(str(named), "sigmoid" if self.correction else "softmax")
            groups: Literal["two_best"] | None = "two_best" if self.correction else None
            return router(score, default_normalize=True, groups=groups)(config)

        return FamilyRow(
            model_type=model_type,
            routing=routing,
            experts=self.experts,
            storages=(),
            router=self.router,
            router_bias=self.router_bias,
            correction=self.correction,
            input_norm=self.input_norm,
            also_sized="others",
            inferred=True,
        )


def infer_family(
    model_type: str, config: Config, tensors: Mapping[str, TensorHeader]
) -> Family | None:
    """Family of a dense checkpoint; None if its names follow no convention.

    Args:
        model_type: `model_type` in config.json.
        config: Contents of config.json.
        tensors: Headers of all tensors.

    Raises:
        CheckpointError: config.json lacks a size.
    """
    found = filter(None, map(_FIRST.fullmatch, tensors))
    first = next((match for match in found if not match["layers"].startswith("mtp.")), None)
    if first is None:
        return None
    layers, experts = first["layers"], first["experts"]
    numbered = {"gate_proj": GATE_UP_DOWN, "w1": W1_W3_W2}.get(first["name"])
    storage: Storage = per_expert(experts, numbered) if numbered else packed(experts)
    module = f"{layers}.{first['layer']}"
    shapes = {
        name.removeprefix(f"{module}."): header.shape
        for name, header in tensors.items()
        if name.startswith(f"{module}.")
    }
    names = _names(experts, shapes, text_config(config))
    if names is None:
        return None
    return Family(names.row(model_type), layers, storage.oriented(tensors, module))


def _names(
    experts: str, shapes: Mapping[str, tuple[int, ...]], config: Config
) -> InferredNames | None:
    """Names below a layer by the shapes of its tensors; None if none is like a router."""
    num_experts, hidden = positive(config, *EXPERTS_KEYS), positive(config, "hidden_size")
    own = {n: size for n, size in shapes.items() if n.startswith(experts.removesuffix("experts"))}
    routers = [name for name, shape in own.items() if shape == (num_experts, hidden)]
    if len(routers) != 1:
        return None
    bias = f"{routers[0].removesuffix('weight')}bias"
    corrections = [
        name
        for name, shape in own.items()
        if "bias" in name and name != bias and prod(shape) == num_experts
    ]
    return InferredNames(
        experts=experts,
        router=routers[0],
        router_bias=bias if bias in own else None,
        correction=corrections[0] if len(corrections) == 1 else None,
        input_norm=next((name for name in _NORMS if name in shapes), None),
    )
