from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import StackShape, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.moe.describe import describe_moe
from tuckerize.moe.families import FAMILIES, UNSUPPORTED
from tuckerize.moe.family import Family, Glu, MoeModel, Routing

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 2,
    "moe_intermediate_size": 3,
    "hidden_size": 4,
    "num_experts_per_tok": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
ROW = FAMILIES["deepseek_v2"]
FAMILY = Family(ROW, "model.layers", ROW.storages[0])
SHAPE = StackShape(2, 3, 4)
PROJECTIONS = {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}
UP = "model.layers.1.mlp.experts.1.up_proj.weight"


def tensors_of(layers: tuple[int, ...] = (1, 2), dtype: str = "BF16") -> dict[str, TensorHeader]:
    headers = {"model.embed_tokens.weight": TensorHeader(dtype, (8, 4), 64)}
    for layer in layers:
        headers[FAMILY.name(layer, ROW.router)] = TensorHeader(dtype, (2, 4), 16)
        for expert in range(2):
            for projection, shape in PROJECTIONS.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                headers[name] = TensorHeader(dtype, shape, 24)
    return headers


def refusal(config: dict[str, Any], tensors: dict[str, TensorHeader]) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        describe_moe(config, tensors)
    return caught.value.message, caught.value.hint


def test_describe_moe_of_a_complete_checkpoint_gives_its_facts() -> None:
    model = describe_moe(CONFIG, tensors_of())
    assert model == MoeModel(
        family=FAMILY,
        layers=(1, 2),
        shape=SHAPE,
        shared_experts=2,
        routing=Routing(top_k=1, scale=1.5),
        glus=(Glu(), Glu()),
        dtype="BF16",
    )
    assert model.routed_parameters == 2 * 3 * 24


def test_describe_moe_of_a_saved_model_finds_every_routed_tensor(tiny_model: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model)
    model = describe_moe(checkpoint.config, checkpoint.tensors)
    routed = {name for name in checkpoint.tensors if ".experts." in name}
    assert {name for name in checkpoint.tensors if model.is_routed(name)} == routed
    assert (model.layers, model.shape, model.dtype) == ((1, 2), StackShape(8, 24, 32), "BF16")
    assert model.routing == Routing(top_k=2, scale=1.5)


def test_describe_moe_without_a_tensor_names_it() -> None:
    tensors = tensors_of()
    del tensors[UP]
    assert refusal(CONFIG, tensors) == (
        f"the tensor {UP} is missing",
        "the checkpoint is incomplete: fetch it again",
    )


def test_describe_moe_without_the_first_tensor_names_it() -> None:
    tensors = tensors_of()
    first = "model.layers.1.mlp.experts.0.gate_proj.weight"
    del tensors[first]
    assert refusal(CONFIG, tensors)[0] == f"the tensor {first} is missing"


def test_describe_moe_with_a_transposed_tensor_names_both_shapes() -> None:
    tensors = {**tensors_of(), UP: TensorHeader("BF16", (4, 3), 24)}
    assert refusal(CONFIG, tensors) == (
        f"the tensor {UP} has shape [4, 3], expected [3, 4]",
        "check the sizes in config.json",
    )


def test_describe_moe_with_mixed_types_names_the_tensor() -> None:
    tensors = {**tensors_of(), UP: TensorHeader("F32", (3, 4), 48)}
    assert refusal(CONFIG, tensors) == (
        f"the tensor {UP} has type F32, expected one of BF16, F16, F32, F64 and the same for all "
        "routed experts",
        "convert the checkpoint to bf16 first",
    )


def test_describe_moe_of_eight_bit_weights_is_refused() -> None:
    message, _ = refusal(CONFIG, tensors_of(dtype="F8_E4M3"))
    assert message.startswith("the tensor model.layers.1.mlp.experts.0.gate_proj.weight has type")


def test_describe_moe_with_an_extra_expert_names_its_tensor() -> None:
    extra = "model.layers.2.mlp.experts.2.up_proj.weight"
    tensors = {**tensors_of(), extra: TensorHeader("BF16", (3, 4), 24)}
    assert refusal(CONFIG, tensors) == (
        f"layer 2 has the tensor {extra}, which the family deepseek_v2 with 2 experts does not "
        "know",
        "check n_routed_experts in config.json",
    )


@pytest.mark.parametrize("model_type", ["mixtral_x", None, 3])
def test_describe_moe_of_another_family_lists_the_supported_ones(model_type: object) -> None:
    assert refusal({**CONFIG, "model_type": model_type}, {}) == (
        f"model_type '{model_type}' in config.json is not a supported MoE family",
        "docs/reference/models.md lists the supported families",
    )


def test_describe_moe_without_experts_shows_the_name_it_looks_for() -> None:
    message, _ = refusal(CONFIG, tensors_of(layers=()))
    assert message == (
        "no tensor is named like the routed experts of deepseek_v2 "
        "(model.layers.0.mlp.experts.0.gate_proj.weight); there is model.embed_tokens.weight"
    )
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in tensors_of().items()}
    message, hint = refusal(CONFIG, wrapped)
    assert "; there is _orig_mod.model.layers.1.mlp.experts.0.down_proj.weight" in message
    assert "a prefix of the tool that wrapped the model" in hint


@pytest.mark.parametrize(
    "key", ["n_routed_experts", "moe_intermediate_size", "hidden_size", "num_experts_per_tok"]
)
@pytest.mark.parametrize("value", [None, 0, -1, "8", 2.0])
def test_describe_moe_with_a_wrong_size_names_the_key(key: str, value: object) -> None:
    message, _ = refusal({**CONFIG, key: value}, tensors_of())
    assert message == f"config.json has {key} = {value!r}, expected a positive integer"


def test_describe_moe_with_another_routing_is_refused() -> None:
    message, _ = refusal({**CONFIG, "topk_method": "noaux_tc"}, tensors_of())
    assert message == (
        "config.json has topk_method = 'noaux_tc', expected greedy or group_limited_greedy"
    )


def test_routing_with_groups_reads_them() -> None:
    config = {**CONFIG, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    assert FAMILY.routing(config) == Routing(1, scale=1.5, groups=2, top_groups=1)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", 12),
        ("model.layers.1.mlp.experts.group_0.down_proj.core", 1),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
        ("model.layers.1.mlp.experts", None),
        ("xmodel.layers.1.mlp.experts.3.up_proj.weight", None),
        ("model_layers.1.mlp.experts.3.up_proj.weight", None),
    ],
)
def test_layer_of_a_name_is_that_of_routed_experts_only(name: str, layer: int | None) -> None:
    assert FAMILY.layer_of(name) == layer


def test_layers_after_the_last_one_stay_as_they_are() -> None:
    """DeepSeek-V3 and GLM-4-MoE keep what predicts further tokens as one more layer."""
    assert describe_moe({**CONFIG, "num_hidden_layers": 2}, tensors_of((1, 2))).layers == (1,)


def test_nested_configuration_and_layers_are_found() -> None:
    tensors = {
        name.replace("model.layers", "language_model.model.layers"): header
        for name, header in tensors_of().items()
    }
    model = describe_moe({"model_type": "outer", "text_config": CONFIG}, tensors)
    assert (model.family.row, model.layers, model.shape) == (ROW, (1, 2), SHAPE)
    assert model.family.experts_prefix(2) == "language_model.model.layers.2.mlp.experts"
    assert model.routing == Routing(top_k=1, scale=1.5)


def test_sizes_that_are_listed_for_each_layer_must_be_the_same() -> None:
    listed = {**CONFIG, "moe_intermediate_size": [3, 3]}
    assert describe_moe(listed, tensors_of()).shape == SHAPE
    message, _ = refusal({**CONFIG, "moe_intermediate_size": [3, 4]}, tensors_of())
    assert message == "config.json has moe_intermediate_size = [3, 4], expected a positive integer"


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_family_that_cannot_be_done_is_refused_with_the_reason(model_type: str) -> None:
    assert model_type not in FAMILIES
    message, _ = refusal({"model_type": model_type}, {})
    assert message.endswith(UNSUPPORTED[model_type])
