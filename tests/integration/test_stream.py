"""A streamed model computes what transformers' whole model computes, one layer in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding

from tests.expert_cases import SWIGLU
from tests.tiny_models import make_tiny_model
from tuckerize.calibration.attention import FusedAttention
from tuckerize.calibration.states import States
from tuckerize.calibration.stream import ExpertsCall, StreamedModel
from tuckerize.calibration.text import TextSource, read_windows
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import Projection
from tuckerize.errors import CheckpointError
from tuckerize.moe.families import FAMILIES
from tuckerize.moe.family import Family
from tuckerize.runtime.dense import ExpertWeights, dense_output

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")
ROW = FAMILIES["deepseek_v2"]
DEEPSEEK = Family(ROW, "model.layers", ROW.storages[0])
PROJECTIONS = tuple(Projection)
TOKENS = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(0))


def dense_experts(
    source: Checkpoint, family: Family, layer: int, names: tuple[str, ...] = PROJECTIONS
) -> ExpertsCall:
    """The experts of a layer, read one at a time."""

    def weights(expert: int) -> ExpertWeights:
        prefix = family.experts_prefix(layer)
        return ExpertWeights(
            *(source.read_one(f"{prefix}.{expert}.{name}.weight") for name in names)
        )

    def call(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        return dense_output(x_TI, experts_Tk, weights_Tk, expert_weights=weights, activation=SWIGLU)

    return call


def stream(
    folder: Path,
    tokens_SL: Tensor,
    dtype: torch.dtype,
    family: Family = DEEPSEEK,
    names: tuple[str, ...] = PROJECTIONS,
) -> Iterator[Tensor]:
    """Hidden states before the first layer and after each one, then the logits."""
    source = Checkpoint.open(folder)
    model = StreamedModel.open(source, family, device=CPU, dtype=dtype)
    with model.embedding() as embed:
        states = embed(tokens_SL)
    yield states.hidden_SLI
    for index in range(model.layers):
        with model.layer(index, dense_experts(source, family, index, names)) as layer:
            states = layer(states)
        yield states.hidden_SLI
    with model.head() as head:
        yield head(states)


@torch.no_grad()
def whole(folder: Path, tokens_SL: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same of transformers' own forward; its last hidden states are those after the norm."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    seen: list[Tensor] = []
    layers = model.model.layers
    layers[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for layer in layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits: Tensor = model(input_ids=tokens_SL, use_cache=False).logits
    return [*seen, logits]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to the rounding of the experts' sum in another order."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert not one.requires_grad
        error = float((one - other).norm() / other.norm())
        assert error < 8 * torch.finfo(one.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, (4, 2)])
def test_streamed_states_and_logits_equal_those_of_transformers(
    tmp_path: Path, dtype: torch.dtype, groups: tuple[int, int] | None
) -> None:
    method: Any = {"topk_method": "greedy"}
    if groups is not None:
        method = {
            "topk_method": "group_limited_greedy",
            "n_group": groups[0],
            "topk_group": groups[1],
        }
    folder = make_tiny_model(tmp_path / "model", dtype=dtype, shards=True, **method)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_equal(list(stream(folder, TOKENS, dtype)), whole(folder, TOKENS, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_streaming_itself_does_not_round(tiny_sharded_model: Path, dtype: torch.dtype) -> None:
    """With transformers' own experts, and attention by the same kernel, every bit is the same."""
    with FusedAttention():
        expected = whole(tiny_sharded_model, TOKENS, dtype)
    reference = AutoModelForCausalLM.from_pretrained(tiny_sharded_model, dtype=dtype)
    source = Checkpoint.open(tiny_sharded_model)
    model = StreamedModel.open(source, DEEPSEEK, device=CPU, dtype=dtype)
    with model.embedding() as embed:
        states = embed(TOKENS)
    found = [states.hidden_SLI]
    for index, own in enumerate(reference.model.layers):
        with model.layer(index, getattr(own.mlp, "experts", None)) as layer:
            states = layer(states)
        found.append(states.hidden_SLI)
    with model.head() as head:
        found.append(head(states))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_cpu_computes_in_float32_by_default(tiny_model: Path) -> None:
    model = StreamedModel.open(Checkpoint.open(tiny_model), DEEPSEEK, device=CPU)
    assert model.dtype == torch.float32


def test_windows_of_several_shapes_in_one_open_layer_are_right(tiny_sharded_model: Path) -> None:
    source = Checkpoint.open(tiny_sharded_model)
    model = StreamedModel.open(source, DEEPSEEK, device=CPU)
    shapes = [TOKENS, TOKENS[:1], TOKENS[:, :5]]
    with model.embedding() as embed:
        hidden = [embed(tokens) for tokens in shapes]
    with model.layer(0) as layer:
        after = [layer(own).hidden_SLI for own in hidden]
    assert_close(after[1], after[0][:1])
    assert_close(after[2], after[0][:, :5])  # no token sees a later one


def test_shipped_model_streams_like_the_whole_one() -> None:
    folder = EXAMPLES / "tiny-moe"
    text = TextSource(str(EXAMPLES / "held_out.txt"))
    windows = read_windows([text], folder, tokens=256, window=128, seed=0)
    assert windows.messages == ()
    tokens = windows.tokens_SL
    assert_equal(list(stream(folder, tokens, torch.float32)), whole(folder, tokens, torch.float32))


def test_only_the_open_part_is_in_memory(tiny_model: Path) -> None:
    source = Checkpoint.open(tiny_model)
    model = StreamedModel.open(source, DEEPSEEK, device=CPU)

    def in_memory() -> set[str]:
        return {name for name, p in model._model.named_parameters() if not p.is_meta}

    always = {"model.norm.weight"}
    assert in_memory() == always
    with model.embedding():
        assert in_memory() == {*always, "model.embed_tokens.weight"}
    for index in range(model.layers):
        with model.layer(index, lambda x, *_: x):
            own = {n for n in source.tensors if n.startswith(f"model.layers.{index}.")}
            assert in_memory() == {*always, *(n for n in own if ".experts." not in n)}
        assert in_memory() == always
    with model.head():
        assert in_memory() == {*always, "lm_head.weight"}
    assert in_memory() == always


def test_part_is_empty_again_after_an_error(tiny_model: Path) -> None:
    model = StreamedModel.open(Checkpoint.open(tiny_model), DEEPSEEK, device=CPU)
    states = States(torch.zeros(1, 4, 32), TOKENS[:1, :4])

    def fail(*_: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), model.layer(1, fail) as layer:
        layer(states)
    assert all(p.is_meta for p in model._model.model.layers.parameters())
    with model.layer(1, lambda x, *_: torch.zeros_like(x)) as layer:
        assert layer(states).hidden_SLI.isfinite().all()


def test_experts_get_the_tokens_and_the_routing(tiny_model: Path) -> None:
    model = StreamedModel.open(Checkpoint.open(tiny_model), DEEPSEEK, device=CPU)
    shapes: list[tuple[int, ...]] = []

    def look(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        shapes.extend(tuple(t.shape) for t in (x_TI, experts_Tk, weights_Tk))
        return torch.zeros_like(x_TI)

    assert model.moe_layers == (1, 2)
    with model.layer(2, look) as layer:
        layer(States(torch.randn(2, 5, 32), TOKENS[:2, :5]))
    assert shapes == [(10, 32), (10, 2), (10, 2)]


def test_moe_layer_without_experts_is_an_error(tiny_model: Path) -> None:
    model = StreamedModel.open(Checkpoint.open(tiny_model), DEEPSEEK, device=CPU)
    with pytest.raises(ValueError, match="layer 1 has routed experts"), model.layer(1):
        pass


def rewrite_config(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_missing_tensor_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = rewrite_config(tiny_model, tmp_path / "m", lambda c: c.update(attention_bias=True))
    with pytest.raises(CheckpointError, match=r"lacks 6 .*0\.self_attn\.kv_a_proj_with_mqa\.bias"):
        StreamedModel.open(Checkpoint.open(folder), DEEPSEEK, device=CPU)


def test_tensor_of_another_shape_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = rewrite_config(tiny_model, tmp_path / "m", lambda c: c.update(vocab_size=65))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \[64, 32\]"):
        StreamedModel.open(Checkpoint.open(folder), DEEPSEEK, device=CPU)


def test_config_that_transformers_refuses_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = rewrite_config(tiny_model, tmp_path / "m", lambda c: c.update(hidden_size="wide"))
    with pytest.raises(CheckpointError, match="cannot build the model"):
        StreamedModel.open(Checkpoint.open(folder), DEEPSEEK, device=CPU)


def test_buffer_that_nothing_computes_is_an_error(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda _self, _module: None)
    with pytest.raises(CheckpointError, match=r"rotary_emb\.inv_freq"):
        StreamedModel.open(Checkpoint.open(tiny_model), DEEPSEEK, device=CPU)


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "sliding_window": 6,
}
OTHERS = [
    (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZES,
            num_experts=8,
            moe_intermediate_size=24,
            use_sliding_window=True,
            tie_word_embeddings=True,
        ),
        "mlp.experts",
        PROJECTIONS,
    ),
    (
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_local_experts=8),
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
    (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **{**SIZES, "head_dim": 4, "num_key_value_heads": 4},
            moe_intermediate_size=24,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=12,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        "mlp.experts",
        PROJECTIONS,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model", "config", "experts", "names"), OTHERS)
def test_other_families_stream_too(
    tmp_path: Path,
    model: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    experts: str,
    names: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    """Sliding windows, tied heads, other names than on disk, a bias that stays in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config)
        for name, buffer in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(100, 100.2)  # in bfloat16 they are all 100
        made.save_pretrained(tmp_path)
    family = replace(DEEPSEEK, row=replace(ROW, experts=experts))
    found = list(stream(tmp_path, TOKENS, dtype, family, names))
    assert_equal(found, whole(tmp_path, TOKENS, dtype))


def test_layers_that_read_states_of_several_before_them_are_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their arguments would be captured from a pass whose hidden states mean nothing."""
    monkeypatch.setattr(
        DeepseekV2RotaryEmbedding, "forward", lambda _, states, *_args, **_kwargs: states
    )
    model = StreamedModel.open(Checkpoint.open(tiny_model), DEEPSEEK, device=CPU)
    with (
        model.layer(0) as layer,
        pytest.raises(CheckpointError, match="read the hidden states of several before them"),
    ):
        layer(States(torch.zeros(1, 4, 32), TOKENS[:1, :4]))
