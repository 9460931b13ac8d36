"""Quantised experts in an ordinary checkpoint, read by tools that do not know ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.running import files_of
from tests.tiny_models import add_tokenizer, make_tiny_family
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    check,
    decompose,
    inspect,
    reconstruct,
)
from tuckerize.domain import CoreType
from tuckerize.errors import OutputError
from tuckerize.progress import SilentProgress
from tuckerize.report.results import ReconstructReport

IDS = torch.arange(3, 43)[None]
NARROW: dict[str, Any] = {"keep": 0.7, "calibration": {"target": "any-engine", "refine": 10}}
WAYS: dict[str, dict[str, Any]] = {
    "w4": {**NARROW, "quantize": "w4"},
    "w3": {**NARROW, "quantize": "w3"},
    "w4-g128": {**NARROW, "quantize": "w4-g128"},
    "w8": {**NARROW, "quantize": "w8"},
    "fp8": {"rank": "full,full,full", "quantize": "fp8"},
    "groups": {"rank": "full,full,full", "quantize": "w4", "group_size": 4},
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 experts, 96 neurons and a hidden size of 64."""
    folder = tmp_path_factory.mktemp("stock") / "model"
    return add_tokenizer(make_tiny_family(folder, "qwen3_moe", neurons=96))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes are whole groups of 128."""
    folder = tmp_path_factory.mktemp("stock") / "wide"
    return add_tokenizer(make_tiny_family(folder, "qwen3_moe", neurons=256, hidden=128))


def compress(source: Path, output: Path, text: Path, **options: Any) -> Path:  # noqa: ANN401
    if "calibration" in options:
        own = {"texts": [str(text)], "tokens": 2048, **options["calibration"]}
        options = {**options, "calibration": own}
    decompose(DecomposeRequest(model=source, output=output, dtype="bfloat16", **options))
    return output


@pytest.fixture(scope="module")
def made(
    source: Path, wide: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ReconstructReport]:
    """Reports of reconstructions that keep the codes."""
    folder = tmp_path_factory.mktemp("made")
    found: dict[str, ReconstructReport] = {}
    for name, options in WAYS.items():
        model = wide if name == "w4-g128" else source
        tucker = compress(model, folder / name / "out", text, **options)
        stock = folder / name / "stock"
        found[name] = reconstruct(ReconstructRequest(folder=tucker, output=stock))
        dense = folder / name / "dense"
        reconstruct(ReconstructRequest(folder=tucker, output=dense, dequantize=True))
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def logits(folder: Path, **options: Any) -> Tensor:  # noqa: ANN401
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("name", WAYS)
def test_compressed_tensors_reads_the_experts(
    name: str, made: dict[str, ReconstructReport]
) -> None:
    """Its decompressor makes of each expert what `--dequantize` writes."""
    stock = Path(made[name].output)
    config = json.loads((stock / "config.json").read_text())
    found = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = found.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(found.format)
    expected, stored = tensors_of(stock.parent / "dense"), tensors_of(stock)
    quantised = {own.removesuffix("_scale") for own in stored if own.endswith("_scale")}
    assert len(quantised) == len(made[name].layers) * 3 * 8
    for weight in quantised:
        parts = {
            own.rpartition(".")[2]: tensor
            for own, tensor in stored.items()
            if own.startswith(weight)
        }
        dense = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(dense.to(torch.bfloat16), expected[weight])
    assert {own for own in expected if own in stored} == expected.keys() - quantised | (
        quantised & stored.keys()
    )


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    "options", [{}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}]
)
@pytest.mark.parametrize("name", ["w4", "w3", "w4-g128", "groups", "fp8"])
def test_transformers_loads_what_is_not_int8(
    name: str, options: dict[str, Any], made: dict[str, ReconstructReport]
) -> None:
    stock = Path(made[name].output)
    expected = logits(stock.parent / "dense")
    assert torch.equal(logits(stock, **options), expected)


@pytest.mark.parametrize("name", WAYS)
def test_sizes_and_hashes_are_those_of_the_tucker_checkpoint(
    name: str, made: dict[str, ReconstructReport]
) -> None:
    report, tucker = made[name], inspect(Path(made[name].output).parent / "out")
    assert report.cores == CoreType(WAYS[name]["quantize"])
    assert report.dequantised_because is None
    assert report.size.routed_parameters == tucker.size.routed_parameters
    shapes = report.size.routed_bytes - tucker.size.routed_bytes
    is_packed = report.cores.word_codes > 1
    assert shapes == (len(report.layers) * 3 * 8 * 16 if is_packed else 0)
    assert check(report.output).passed
    assert inspect(report.output).size == report.size


@pytest.mark.parametrize(("name", "form"), [("w8", "int-quantized"), ("fp8", "float-quantized")])
def test_8_bits_are_for_kernels_that_round_the_inputs(
    name: str, form: str, made: dict[str, ReconstructReport]
) -> None:
    config = json.loads((Path(made[name].output) / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert config["quantization_config"]["format"] == form
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True


class Stop(SilentProgress):
    """Interrupts a run after its first piece."""

    def advance(self, amount: float, note: str) -> None:
        del amount, note
        raise KeyboardInterrupt


def test_run_is_not_continued_with_the_other_choice(
    made: dict[str, ReconstructReport], tmp_path: Path
) -> None:
    tucker, output = Path(made["groups"].output).parent / "out", tmp_path / "stock"
    with pytest.raises(KeyboardInterrupt):
        reconstruct(ReconstructRequest(folder=tucker, output=output), Stop())
    with pytest.raises(OutputError, match="dequantize"):
        reconstruct(ReconstructRequest(folder=tucker, output=output, dequantize=True))
    reconstruct(ReconstructRequest(folder=tucker, output=output))
    assert files_of(output) == files_of(Path(made["groups"].output))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": "full,full,40"}, "layer 0 has the factor"),
        ({"rank": "full,full,full", "layers": "1"}, "layer 0 is not compressed"),
        (
            {"keep": 0.7, "calibration": {"shape": "neurons", "multiple": 8, "refine": 0}},
            "experts of layer 0 are not",
        ),
    ],
)
def test_cores_that_an_ordinary_checkpoint_cannot_have_are_dequantised(
    options: dict[str, Any], reason: str, source: Path, text: Path, tmp_path: Path
) -> None:
    tucker = compress(source, tmp_path / "out", text, quantize="w4", **options)
    report = reconstruct(ReconstructRequest(folder=tucker, output=tmp_path / "dense"))
    assert report.cores is None
    assert reason in str(report.dequantised_because)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
