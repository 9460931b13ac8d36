"""`fold`: a smaller latent space in a stock Nemotron-H, as transformers runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantized_models import quantize_model
from tests.running import succeed
from tests.tiny_families import auto_class, make_family
from tests.tiny_models import add_tokenizer, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    FitRequest,
    FoldRequest,
    check,
    decompose,
    evaluate,
    fit,
    fold,
    inspect,
)
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.errors import CheckpointError, UsageError

IDS = torch.arange(3, 43)[None]
OPTIONS: dict[str, Any] = {"tokens": 512, "window": 64}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = auto_class(folder).from_pretrained(folder, dtype=torch.float32)
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def distance(folder: Path, source: Path) -> float:
    expected = logits(source)
    return float((logits(folder) - expected).norm() / expected.norm())


@pytest.mark.parametrize("own", [{}, {"moe_latent_size": None}, {"mlp_bias": True}], ids=str)
def test_whole_latent_space_is_the_model(own: dict[str, Any], tmp_path: Path) -> None:
    """Also of a Nano, whose experts read the hidden states: it gets a latent space."""
    model, out = make_family(tmp_path / "model", "nemotron_h", **own), tmp_path / "out"
    report = fold(FoldRequest(model=model, output=out, keep=1.0))
    assert report.latent_size == report.latent_before == (32 if None in own.values() else 16)
    assert [layer.layer for layer in report.layers] == [1, 3]
    assert max(layer.input_error + layer.output_error for layer in report.layers) < 1e-6
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-5)
    assert check(out).passed


def test_smaller_space_is_the_better_for_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_family(tmp_path / "model", "nemotron_h", moe_latent_size=None))
    text = write_text(tmp_path / "text.txt", 3000)
    free, fitted = tmp_path / "free", tmp_path / "fitted"
    report = fold(FoldRequest(model=model, output=free, keep="50%"))
    assert (report.latent_size, inspect(free).shape.hidden) == (16, 16)
    assert report.after.routed_parameters == report.before.routed_parameters // 2
    calibration = OPTIONS | {"texts": [str(text)]}
    fold(FoldRequest(model=model, output=fitted, keep=0.5, calibration=calibration))
    compared = EvaluateRequest(model=fitted, against=model, text=text, **OPTIONS)
    divergence = evaluate(compared).divergence
    compared = EvaluateRequest(model=free, against=model, text=text, **OPTIONS)
    data_free = evaluate(compared).divergence
    assert divergence is not None
    assert data_free is not None
    assert 0 < divergence.kl.value < data_free.kl.value
    assert distance(fitted, model) < 0.2


def test_layers_that_predict_further_tokens_get_the_same_size(tmp_path: Path) -> None:
    model, out = make_family(tmp_path / "model", "nemotron_h"), tmp_path / "out"
    tensors = load_file(model / SINGLE_FILE)
    begin = next(name for name in tensors if ".layers.3." in name).split("layers.3.")[0]
    further = {n.replace(f"{begin}layers.3.", "mtp.layers.1."): t for n, t in tensors.items()}
    further = {name: tensor.clone() for name, tensor in further.items() if "mtp." in name}
    save_file(tensors | further, model / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((model / CONFIG).read_text()) | {"num_hidden_layers": 4}
    (model / CONFIG).write_text(json.dumps(config))
    fold(FoldRequest(model=model, output=out, keep=0.5))
    found = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    for name, tensor in further.items():
        is_narrower = ".experts." in name or "latent" in name
        assert found[name].numel() == tensor.numel() // (2 if is_narrower else 1)
    del config["num_hidden_layers"]
    (model / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not count the layer of mtp\.layers\.1"):
        fold(FoldRequest(model=model, output=tmp_path / "other", keep=0.5))


def test_quantized_source_is_folded_dense(tmp_path: Path) -> None:
    wide = {"moe_latent_size": 32, "moe_intermediate_size": 32}
    model, out = make_family(tmp_path / "model", "nemotron_h", **wide), tmp_path / "out"
    dense = quantize_model(model, tmp_path / "quantized", "fp8")
    assert any("experts" in name for name in dense)
    assert any("latent" in name for name in dense)
    fold(FoldRequest(model=tmp_path / "quantized", output=out, keep=1.0))
    values = {name: tensor.float() for name, tensor in dense.items()}
    tensors = load_file(model / SINGLE_FILE) | values
    save_file(tensors, model / SINGLE_FILE, metadata={"format": "pt"})
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-5)


def test_each_command_refuses_the_models_of_the_other(tmp_path: Path) -> None:
    model, out = make_family(tmp_path / "model", "nemotron_h"), tmp_path / "out"
    for run in (
        lambda: decompose(DecomposeRequest(model=model, output=out, keep=0.75)),
        lambda: fit(FitRequest(model=model, devices="1x1GiB")),
    ):
        with pytest.raises(UsageError, match="no gate_proj") as refused:
            run()
        assert "tuckerize fold" in str(refused.value.hint)
    assert "latent size 16 → 8" in succeed("fold", model, "--keep", "50%", "--output", out)
    olmoe = make_family(tmp_path / "olmoe", "olmoe")
    with pytest.raises(UsageError, match="olmoe do not compute in a latent space"):
        fold(FoldRequest(model=olmoe, output=tmp_path / "other", keep=0.75))
