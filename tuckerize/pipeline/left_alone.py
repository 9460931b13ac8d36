"""Notes on quantized weights that a decomposition leaves as they are, and what loads them."""

from __future__ import annotations

from tuckerize.checkpoint.quantized import Coding, QuantizedWeight, Role
from tuckerize.planning.plan import Plan

_PACKAGES = {Coding.GPTQ: "gptqmodel and optimum", Coding.AWQ: "gptqmodel"}
_REFUSED = "cannot load"
# Fate in transformers (5.14 to 5.24) of experts in these encodings, of any checkpoint.
_EXPERTS = {
    Coding.INT8: _REFUSED,
    Coding.NVFP4: "loads wrong values for",
    Coding.GPTQ: "loads random values for",
    Coding.AWQ: "loads random values for",
}


def notes_on_what_stays(plan: Plan) -> list[str]:
    """Name what transformers does not load of the quantized weights that a plan leaves alone."""
    moe, quantized = plan.source.moe, plan.source.checkpoint.quantized
    stays = [name for piece in plan.copies if not piece.dequantize for name in piece.tensors]
    stored = {part: weight for weight in quantized.values() for part in weight.parts}
    left = {weight.name: weight for name in stays if (weight := stored.get(name))}
    experts: dict[tuple[str, str], set[int]] = {}
    packages = set()
    for name, weight in left.items():
        layer = moe.family.layer_of(name)
        if moe.is_routed(name) and layer in moe.layers and (what := _of_experts(weight)):
            experts.setdefault((what, weight.coding.value), set()).add(layer)
        elif weight.coding in _PACKAGES and not moe.is_routed(name):
            packages.add(weight.coding)
    notes = [
        f"transformers {what} {coding} experts, which layer {', '.join(map(str, sorted(layers)))} "
        "keeps: compress all layers, or add --dequantize-rest"
        for (what, coding), layers in experts.items()
    ]
    return notes + [
        f"what is not compressed stays {coding.value}: transformers loads it with "
        f"{_PACKAGES[coding]} installed; --dequantize-rest writes it dense"
        for coding in sorted(packages)
    ]


def _of_experts(weight: QuantizedWeight) -> str | None:
    """Fate in transformers of experts in an encoding that it does not load; None for others."""
    if weight.coding == Coding.PACKED_INT and Role.ZERO_POINT in weight.stored:
        return _REFUSED
    return _EXPERTS.get(weight.coding)
