"""The whole job on families other than DeepSeek-V2, whose models transformers makes and runs.

Two of them are rows that the tests add: experts named w1, w3 and w2, and packed experts. A row must
be all that a family takes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.running import torchrun
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    evaluate,
    inspect,
    reconstruct,
    shard,
    verify,
)
from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import StackShape
from tuckerize.moe.families import FAMILIES
from tuckerize.moe.family import Family, Routing
from tuckerize.moe.storage import Packed, PerExpert

IDS = torch.arange(3, 43)[None]
FULL = "full,full,full"

MIXTRAL = Family(
    model_type="mixtral",
    experts="model.layers.{layer}.block_sparse_moe.experts",
    storage=PerExpert(
        gate="{expert}.w1.weight", up="{expert}.w3.weight", down="{expert}.w2.weight"
    ),
    router_weight="model.layers.{layer}.block_sparse_moe.gate.weight",
    input_norm="model.layers.{layer}.post_attention_layernorm.weight",
    experts_keys=("num_local_experts",),
    intermediate_key="intermediate_size",
    shared_key=None,
    routing=lambda config: Routing("greedy", config["num_experts_per_tok"], normalize=True),
)
PACKED_QWEN = replace(FAMILIES["qwen3_moe"], storage=Packed("gate_up_proj", "down_proj"))


@pytest.fixture(scope="module", params=["olmoe", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    return add_tokenizer(make_tiny_family(folder, request.param))


def decompose_calibrated(model: Path, text: Path, output: Path) -> None:
    """Decompose to 60 % with few tokens and steps."""
    calibration = {"texts": [str(text)], "tokens": 2048, "refine": 5}
    decompose(DecomposeRequest(model=model, keep=0.6, calibration=calibration, output=output))


def perplexities(model: Path, tucker: Path, text: Path) -> tuple[float, ...]:
    """Of the dense model, and of the Tucker checkpoint."""
    request = EvaluateRequest(model=tucker, against=model, text=text, tokens=1024)
    return tuple(result.perplexity for result in evaluate(request).results)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
        IDS
    ).logits
    return found


def test_checkpoint_is_decomposed_sharded_verified_loaded_and_reconstructed(
    model: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    facts = inspect(model)
    assert facts.shape == StackShape(8, 24, 64)
    assert (facts.layers, facts.top_k, facts.shared_experts) == ((0, 1), 2, 0)
    decompose(DecomposeRequest(model=model, rank="6,16,24", output=out))
    shard(ShardRequest(folder=out, tp=2))
    result = torchrun(2, "-m", "tuckerize", "verify", out)
    assert result.returncode == 0, result.stderr
    reconstruct(ReconstructRequest(folder=out, output=dense))
    torch.testing.assert_close(logits(out), logits(dense), rtol=1e-4, atol=1e-4)


def test_full_rank_is_the_dense_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-4)


def test_calibration_streams_the_family(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, text = tmp_path / "out", write_text(tmp_path / "text.txt", 4000)
    decompose_calibrated(model, text, out)
    assert verify(VerifyRequest(folder=out)).passed
    dense, factored = perplexities(model, out, text)
    assert factored == pytest.approx(dense, rel=0.2)


def saved_packed(folder: Path) -> Path:
    """A Qwen3-MoE model as transformers holds it in memory, which is packed."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_family(folder / "plain", "qwen3_moe"))
    packed = folder / "model"
    packed.mkdir()
    write_json(packed / CONFIG, read_json_object(folder / "plain" / CONFIG))
    write_tensors(packed / SINGLE_FILE, model.state_dict())
    return packed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("family", [MIXTRAL, PACKED_QWEN], ids=["numbered", "packed"])
def test_row_is_all_that_another_layout_takes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(FAMILIES, family.model_type, family)
    if isinstance(family.storage, Packed):
        model = saved_packed(tmp_path)
    else:
        model = make_tiny_family(tmp_path / "model", family.model_type)
    add_tokenizer(model)
    text = write_text(tmp_path / "text.txt", 4000)
    full, dense, small = tmp_path / "full", tmp_path / "dense", tmp_path / "small"

    decompose(DecomposeRequest(model=model, rank=FULL, output=full))
    torch.testing.assert_close(logits(full), logits(model), rtol=1e-4, atol=1e-4)
    reconstruct(ReconstructRequest(folder=full, output=dense))
    expected, found = weights(model), weights(dense)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    decompose_calibrated(model, text, small)
    report = verify(VerifyRequest(folder=small))
    assert report.passed
    for layer in report.layers:
        assert layer.residual_difference is not None
        assert layer.residual_difference < 1e-4
    before, after = perplexities(model, small, text)
    assert after == pytest.approx(before, rel=0.2)
