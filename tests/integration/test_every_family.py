"""Every row of the table, on a random model that transformers makes and runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_families import (
    DATA_FREE,
    FAMILY_NAMES,
    INFERRED,
    auto_class,
    make_family,
)
from tests.tiny_models import add_tokenizer, write_text
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    inspect,
    preview,
    reconstruct,
    shard,
    verify,
)
from tuckerize.calibration.stream import StreamedModel
from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.domain import Projection
from tuckerize.errors import CheckpointError
from tuckerize.moe.routing import Router, route
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.dense import ExpertWeights, dense_output
from tuckerize.runtime.experts import TuckerExperts

IDS = torch.arange(3, 43)[None]
FULL = "full,full,full"


@pytest.fixture(scope="module", params=[*FAMILY_NAMES, *INFERRED])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / request.param
    return make_family(folder, request.param)


def load(folder: Path) -> Any:  # noqa: ANN401
    """The model as transformers loads it, in float32."""
    return auto_class(folder).from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_equal_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_rank_is_the_model_and_reconstructs_to_its_files(model: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    factored = load(out)
    layers = SourceModel.open(model).moe.layers
    assert sum(isinstance(part, TuckerExperts) for part in factored.modules()) == len(layers)
    torch.testing.assert_close(logits(factored), logits(load(model)), rtol=1e-4, atol=1e-5)
    reconstruct(ReconstructRequest(folder=out, output=dense))
    assert_equal_weights(dense, weights(model))


def test_routes_are_those_of_the_family_in_transformers(model: Path) -> None:
    source = SourceModel.open(model)
    seen: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}  # last where layers run repeatedly

    def look(module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
        x_TI, experts_Tk, weights_Tk = (part.flatten(0, -2) for part in inputs)
        seen[module] = x_TI, experts_Tk, weights_Tk

    def look_at_router(module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ANN401
        scores_TE, _ = outputs  # 0 of the experts that a token does not go to
        weights_Tk, experts_Tk = scores_TE.topk(source.moe.routing.top_k)
        seen[module] = inputs[0], experts_Tk, weights_Tk

    dense = load(model)
    for path, module in dense.named_modules():
        if source.moe.routing.scales_inputs:
            if path.endswith(".router"):
                module.register_forward_hook(look_at_router)
        elif path.endswith(".experts"):
            module.register_forward_pre_hook(look)
    logits(dense)
    assert len(seen) == len(source.moe.layers)
    for layer, (x_TI, experts_Tk, weights_Tk) in zip(source.moe.layers, seen.values(), strict=True):
        routes = route(x_TI, source.router(layer), source.moe.routing, IDS[0])
        order, own = experts_Tk.argsort(1), routes.experts.argsort(1)
        assert torch.equal(routes.experts.gather(1, own), experts_Tk.gather(1, order))
        torch.testing.assert_close(
            routes.weights.gather(1, own), weights_Tk.gather(1, order).float(), rtol=1e-4, atol=1e-6
        )


def test_streamed_model_is_the_model(model: Path) -> None:
    if model.name in DATA_FREE:
        with pytest.raises(CheckpointError, match=DATA_FREE[model.name]):
            streamed_logits(model)
        return
    expected = logits(load(model))
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["glm5_next", "glm_moe_dsa", "hy_v4"])
def test_layers_that_share_the_tokens_they_attend_to_are_streamed(
    name: str, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"indexer_types": ["full", "shared", "full"], "num_hidden_layers": 3}
    if name == "glm5_next":
        own |= {"layer_types": ["indexed_attention"] * 3}
        own |= {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    model = make_family(tmp_path / "model", name, **own)
    expected = logits(load(model))
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-5)


def test_layers_that_read_states_before_earlier_ones_are_streamed(tmp_path: Path) -> None:
    own: dict[str, Any] = {"num_hidden_layers": 3, "n_layers_per_attn_res_block": 2}
    own |= {"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]}
    model = make_family(tmp_path, "inkling2_text", **own)
    expected = logits(load(model))
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-5)


def test_layers_that_run_more_than_once_are_not_streamed(tmp_path: Path) -> None:
    model = make_family(tmp_path, "inkling2_loop_text")
    query = load(model).state_dict()["model.message_input.query"]
    tensors = {name: own for name, own in weights(model).items() if "cross_pass" not in name}
    tensors["model.message_input.query"] = query  # it is of two tensors in the release
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its layers run more than once"):
        streamed_logits(model)


def test_layers_that_look_up_the_tokens_are_streamed(tmp_path: Path) -> None:
    ngrams: dict[str, Any] = {"heads_per_ngram": 2, "ngram_vocab_size_base": 40}
    ngrams |= {"make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 1}
    ngrams |= {"layer_types": ["linear_attention"] * 2, "ple_layer_ids": [1]}
    model = make_family(tmp_path, "qwen4_exp", **ngrams)
    expected = logits(load(model))
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-5)


def test_files_that_hold_the_decoder_alone_are_the_model(tmp_path: Path) -> None:
    """DeepSeek-V4 is released so: `layers.0.ffn`, where transformers saves `model.layers.0.ffn`."""
    model, out = make_family(tmp_path / "model", "deepseek_v4"), tmp_path / "out"
    expected = logits(load(model))
    released = {"embed_tokens": "embed", "hc_head.hc": "hc_head"}
    tensors = {name.removeprefix("model."): tensor for name, tensor in weights(model).items()}
    for own, other in released.items():
        tensors = {name.replace(own, other): tensor for name, tensor in tensors.items()}
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    assert torch.equal(logits(load(model)), expected)
    torch.testing.assert_close(streamed_logits(model), expected, rtol=1e-4, atol=1e-5)
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    torch.testing.assert_close(logits(load(out)), expected, rtol=1e-4, atol=1e-5)


def streamed_logits(folder: Path) -> Tensor:
    """Logits of a model that is run layer by layer, as calibration does it."""
    source = SourceModel.open(folder)
    decoder = StreamedModel.open(source.checkpoint, source.moe.family, device=torch.device("cpu"))
    with decoder.embedding() as embed:
        states = embed(IDS)
    for layer in range(decoder.layers):
        experts = partial(_routed, source, layer)
        with decoder.layer(layer, experts) as step:
            states = step(states)
    with decoder.head() as head:
        return head(states)


def _routed(
    source: SourceModel, layer: int, x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor
) -> Tensor:
    """Output of the dense experts of a layer."""

    def read(expert: int) -> ExpertWeights:
        gate_HI, up_HI, down_HI = source.expert(layer, expert)
        return ExpertWeights(gate_HI, up_HI, down_HI.T)

    activation = activation_of(source.moe.glu(layer))
    return dense_output(
        x_TI,
        experts_Tk,
        weights_Tk,
        expert_weights=read,
        activation=activation,
        biases=[list(bias) for bias in source.biases(layer).values()],
    )


def packed(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """The checkpoint as transformers holds it in memory, with a change to the experts."""
    tensors = load(folder).state_dict()
    prefixes = {"model.layers.": "model.layers."}
    if any(name.startswith("model.language_model.") for name in weights(folder)):
        prefixes = {"model.language_model.": "model.language_model."}
    assert all(any(name.startswith(p) for p in prefixes) for name in tensors if "experts" in name)
    save_file(
        {n: change(n, t).contiguous().clone() for n, t in tensors.items()}, folder / SINGLE_FILE
    )
    return folder


def _transposed(name: str, tensor: Tensor) -> Tensor:
    is_expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return tensor.mT if is_expert else tensor


@pytest.mark.parametrize("change", [lambda _, tensor: tensor, _transposed], ids=["", "transposed"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "qwen3_moe"])
def test_layout_is_that_of_the_tensors(
    name: str, change: Callable[[str, Tensor], Tensor], tmp_path: Path
) -> None:
    """bf16 releases of Qwen3-Next are packed, its FP8 releases are not."""
    plain = SourceModel.open(make_family(tmp_path / "plain", name))
    model = packed(make_family(tmp_path / "model", name), change)
    source = SourceModel.open(model)
    assert len(source.routed_tensors(0)) == 2
    for projection in Projection:
        assert torch.equal(source.stack(1, projection), plain.stack(1, projection))
    decompose(DecomposeRequest(model=model, rank=FULL, output=tmp_path / "out"))
    found = logits(load(tmp_path / "out"))
    torch.testing.assert_close(found, logits(load(tmp_path / "plain")), rtol=1e-4, atol=1e-5)
    reconstruct(ReconstructRequest(folder=tmp_path / "out", output=tmp_path / "dense"))
    assert_equal_weights(tmp_path / "dense", weights(model))


def make_further(folder: Path, name: str, count: int = 1) -> tuple[Path, str]:
    """A model with a layer that predicts further tokens, and the module of its experts.

    DeepSeek-V3 and GLM-4.5 have it after the last layer, Qwen3-Next and Qwen3.5 beside them.
    """
    more: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
    make_family(folder, name, num_hidden_layers=3, **(more if name == "qwen3_next" else {}))
    config = read_json_object(folder / CONFIG)
    if name == "qwen3_next":
        config["layer_types"] = config["layer_types"][:2]
        tensors = {
            n.replace("model.layers.2.", "mtp.layers.0."): t for n, t in weights(folder).items()
        }
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    else:
        config["num_nextn_predict_layers"] = count
    write_json(folder / CONFIG, config | {"num_hidden_layers": 2})
    return folder, f"{'mtp.layers.0' if name == 'qwen3_next' else 'model.layers.2'}.mlp.experts."


def further_of(folder: Path, experts: str) -> dict[str, Tensor]:
    """Tensors of the experts of such a layer."""
    return {name: tensor for name, tensor in weights(folder).items() if name.startswith(experts)}


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next"])
def test_layer_that_predicts_further_tokens_is_compressed(name: str, tmp_path: Path) -> None:
    model, experts = make_further(tmp_path / "model", name)
    out, dense, again = (tmp_path / name for name in ("out", "dense", "again"))
    facts = inspect(model)
    assert facts.layers == ((1,) if name != "qwen3_next" else (0, 1))
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    assert inspect(out).layers == facts.layers
    found = further_of(out, experts)
    assert found
    assert all(TensorName.find(own) for own in found)
    torch.testing.assert_close(logits(load(out)), logits(load(model)), rtol=1e-4, atol=1e-5)
    shard(ShardRequest(folder=out, tp=2))
    report = verify(VerifyRequest(folder=out))
    assert report.passed
    assert [own.layer for own in report.layers] == [*facts.layers, 2]
    reconstruct(ReconstructRequest(folder=out, output=dense))
    assert_equal_weights(dense, weights(model))
    load(out).save_pretrained(again)  # transformers leaves such layers out
    assert not further_of(again, experts)
    assert verify(VerifyRequest(folder=again, model=str(model))).passed


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("target", ["free", "any-engine"])
def test_calibration_leaves_further_layers_data_free_or_for_stock_as_they_are(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, experts = make_further(tmp_path / "model", name)
    out, text = tmp_path / "out", write_text(tmp_path / "text.txt", 3000)
    add_tokenizer(model)
    settings = {"texts": [str(text)], "tokens": 512, "window": 64, "refine": 2, "target": target}
    request = DecomposeRequest(model=model, keep=0.75, calibration=settings, output=out)
    planned, report = preview(request), decompose(request)
    assert planned is not None
    assert report is not None
    assert planned.after == report.after == inspect(out).size
    before, after = (further_of(folder, experts) for folder in (model, out))
    if target == "any-engine":
        assert all(torch.equal(after[own], before[own]) for own in before)
    else:
        sizes = [sum(tensor.nbytes for tensor in own.values()) for own in (before, after)]
        assert 0.7 * sizes[0] < sizes[1] <= 0.75 * sizes[0]
    assert verify(VerifyRequest(folder=out)).passed
    assert logits(load(out)).isfinite().all()


@pytest.mark.parametrize(("mtp", "count"), [("copy", 1), (None, 0)])
def test_layer_after_the_last_one_is_copied_if_asked_for_or_unknown(
    mtp: str | None, count: int, tmp_path: Path
) -> None:
    """config.json may count fewer layers than the files have."""
    model, experts = make_further(tmp_path / "model", "deepseek_v3", count)
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=model, rank=FULL, output=out, mtp=mtp))
    before, after = further_of(model, experts), further_of(out, experts)
    assert before
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(logits(load(out)), logits(load(model)), rtol=1e-4, atol=1e-5)
    reconstruct(ReconstructRequest(folder=out, output=dense))
    assert_equal_weights(dense, weights(model))


def test_router_without_its_correction_reads_as_none(tmp_path: Path) -> None:
    source = SourceModel.open(make_family(tmp_path, "lfm2_moe", use_expert_bias=False))
    assert Router.read(source.checkpoint, source.moe.family, 1).correction_E is None


def test_transformers_loads_no_longcat_as_it_is_released(tmp_path: Path) -> None:
    """The reason for its row of UNSUPPORTED: if this fails, the family can be done."""
    model = make_family(tmp_path, "longcat_flash")
    tensors = weights(model)
    identity = {name for name in tensors if re.search(r"experts\.(8|9|10|11)\.", name)}
    assert identity
    assert not [name for name in identity if "down_proj" in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in identity}
    load(model)
    save_file(kept, model / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(model)


NEVER_NARROW = {"aria", "aria_text", "deepseek_v4", "hunyuan_v1_moe", "hy_v3", "jamba"}
"""Families whose other modules are as wide as their experts, by the same configuration key."""


@pytest.mark.parametrize(
    "name",
    [
        *sorted({*NEVER_NARROW, "glm_moe_dsa", "bailing_hybrid"}),
        "hy_v4",  # its shared experts have a name of their own
        *("deepseek_v2", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoehybrid", "minimax_m2"),
        *("mistral4", "mixtral", "qwen3_5_moe"),
    ],
)
def test_any_engine_reconstructs_to_a_stock_checkpoint_of_narrow_experts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_family(tmp_path / name, name))
    out, stock, text = tmp_path / "out", tmp_path / "stock", write_text(tmp_path / "text.txt", 3000)
    calibration = {"texts": [str(text)], "tokens": 512, "window": 64, "refine": 0}
    calibration |= {"target": "any-engine", "multiple": 2}
    request = DecomposeRequest(model=model, keep=0.7, calibration=calibration, output=out)
    decompose(request)
    report = reconstruct(ReconstructRequest(folder=out, output=stock))
    source, result = SourceModel.open(model), SourceModel.open(stock)
    narrow = name not in NEVER_NARROW
    assert report.intermediate_size == result.moe.shape.intermediate == (8 if narrow else 12)
    assert (result.size.routed_bytes < source.size.routed_bytes) == narrow
    torch.testing.assert_close(logits(load(stock)), logits(load(out)), rtol=1e-4, atol=1e-5)
