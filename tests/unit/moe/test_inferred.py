from __future__ import annotations

from typing import Any

import pytest

from tuckerize.domain import StackShape, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.moe.describe import describe_moe
from tuckerize.moe.family import MoeModel
from tuckerize.moe.inferred import InferredNames

CONFIG: dict[str, Any] = {
    "model_type": "new_moe",
    "num_experts": 2,
    "moe_intermediate_size": 3,
    "hidden_size": 4,
    "num_experts_per_tok": 1,
}
Shapes = dict[str, tuple[int, ...]]

NUMBERED: Shapes = {
    f"experts.{expert}.{name}.weight": shape
    for expert in range(2)
    for name, shape in {"w1": (3, 4), "w3": (3, 4), "w2": (4, 3)}.items()
}
PACKED: Shapes = {"experts.gate_up_proj": (2, 6, 4), "experts.down_proj": (2, 4, 3)}
ROUTER: Shapes = {"router.weight": (2, 4)}


def describe(block: dict[str, tuple[int, ...]], **config: Any) -> MoeModel:  # noqa: ANN401
    """A model whose layer 1 has a block of these tensors."""
    shapes = {f"decoder.layers.1.ffn.{name}": shape for name, shape in block.items()}
    shapes["mtp.layers.0.ffn.experts.gate_up_proj"] = (2, 6, 4)
    shapes["decoder.layers.1.ffn_norm.weight"] = (4,)
    return describe_moe(
        CONFIG | config, {name: TensorHeader("BF16", shape, 1) for name, shape in shapes.items()}
    )


@pytest.mark.parametrize("experts", [NUMBERED, PACKED], ids=["numbered", "packed"])
def test_names_and_sizes_are_found_in_the_tensors(experts: Shapes) -> None:
    model = describe(experts | ROUTER)
    assert InferredNames.of(model.family.row) == InferredNames(
        "ffn.experts", "ffn.router.weight", None, None, "ffn_norm.weight"
    )
    assert (model.layers, model.shape) == ((1,), StackShape(2, 3, 4))
    assert model.family.layers == "decoder.layers"
    assert model.routing.score == "softmax"


def test_correction_and_bias_are_told_apart() -> None:
    beside: Shapes = {**ROUTER, "router.bias": (2,), "score_bias": (1, 2), "shared.bias": (7,)}
    row = describe(PACKED | beside).family.row
    assert (row.router_bias, row.correction) == ("ffn.router.bias", "ffn.score_bias")
    assert row.routing(CONFIG).score == "sigmoid"
    assert row.routing(CONFIG | {"scoring_func": "softmax"}).score == "softmax"


def test_transposed_weights_are_seen() -> None:
    transposed: Shapes = {"experts.gate_up_proj": (2, 4, 6), "experts.down_proj": (2, 3, 4)}
    assert describe(transposed | ROUTER).shape == StackShape(2, 3, 4)


@pytest.mark.parametrize("routers", [{}, ROUTER | {"gate.weight": (2, 4)}], ids=["none", "two"])
def test_router_that_is_not_plain_is_refused(routers: Shapes) -> None:
    with pytest.raises(CheckpointError, match=r"'new_moe' in config.json is not a supported MoE"):
        describe(PACKED | routers)


def test_names_give_the_row_again() -> None:
    row = describe(PACKED | ROUTER).family.row
    again = InferredNames.of(row).row("new_moe")
    assert InferredNames.of(again) == InferredNames.of(row)
    assert again.inferred
