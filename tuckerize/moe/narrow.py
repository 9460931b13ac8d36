"""Narrower experts in a stock checkpoint: what else a smaller intermediate size changes.

In families such as DeepSeek-V3 the same configuration key sizes the shared experts, n times as wide
as a routed one. Their number is raised until they fit, and their new neurons are zero.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from tuckerize.domain import Projection, StackShape
from tuckerize.moe.family import SHARED_KEYS, Config, Family, text_config

_SHARED_MODULES = ("shared_experts", "shared_expert", "shared_mlp")
# Names on disk of their gate_proj; Hy4 has the second.
_GATES = (Projection.GATE.value, "linear_gate")


def can_narrow(family: Family) -> bool:
    """Whether the intermediate size of the routed experts can be changed alone."""
    return family.row.also_sized != "others"


def shared_expert_names(
    family: Family, layer: int, projection: Projection, present: Container[str]
) -> list[str]:
    """Names of the weights of a layer's shared experts whose size follows that of the routed."""
    if family.row.also_sized != "shared_experts":
        return []
    block = family.row.experts.rpartition(".")[0]
    own = _GATES if projection == Projection.GATE else (projection.value,)
    names = (
        family.name(layer, f"{block}.{module}.{name}.weight")
        for module in _SHARED_MODULES
        for name in own
    )
    return [name for name in names if name in present]


def narrow_config(config: Config, family: Family, shape: StackShape, width: int) -> dict[str, Any]:
    """config.json of the same model with experts of another width.

    Args:
        config: Contents of config.json.
        family: Family of the model.
        shape: Sizes (E, H, I) of its stacks.
        width: New intermediate size of the routed experts, below H.
    """
    text = text_config(config)
    changed = {next(key for key in family.row.intermediate_keys if key in text): width}
    if family.row.also_sized == "shared_experts":
        for key in (key for key in SHARED_KEYS if text.get(key)):
            changed[key] = narrow_count(text[key], shape, width)
    nested = config.get("text_config")
    if nested is None:
        return {**config, **changed}
    own = {**nested, **{key: value for key, value in changed.items() if key in nested}}
    return {
        **config,
        **{key: value for key, value in changed.items() if key in config},
        "text_config": own,
    }


def narrow_count(shared_experts: int, shape: StackShape, width: int) -> int:
    """Number of shared experts of a width that hold all neurons of those of width H."""
    return -(-shared_experts * shape.intermediate // width)


def with_zero_neurons(weight: Tensor, projection: Projection, neurons: int) -> Tensor:
    """Weight of a shared expert with zero neurons appended: rows, or columns of down."""
    missing = neurons - weight.shape[1 if projection == Projection.DOWN else 0]
    return pad(weight, (0, missing) if projection == Projection.DOWN else (0, 0, 0, missing))
