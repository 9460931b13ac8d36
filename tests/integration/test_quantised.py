"""Checkpoints with quantised cores, from decompose to transformers and to shards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from tests.running import files_of, succeed, torchrun
from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    QuantizeRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    evaluate,
    inspect,
    preview,
    quantize,
    reconstruct,
    shard,
    verify,
)
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.domain import CoreType, Projection
from tuckerize.engines.transformers import TuckerConfig, TuckerQuantizer
from tuckerize.errors import RecipeError, UsageError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.names import CorePart, TensorKind, TensorName
from tuckerize.runtime.experts import TuckerExperts

IDS = torch.arange(3, 43)[None]
CALIBRATION = {"tokens": 2048, "refine": 20, "multiple": 4}
WAYS: dict[str, dict[str, Any]] = {
    "w8": {"keep": 0.7, "quantize": "w8"},
    "w4": {"keep": 0.7, "quantize": "w4"},
    "w4-g128": {"keep": 0.7, "quantize": "w4-g128"},
    "fp8": {"keep": 0.7, "quantize": "fp8"},
    "dense": {"rank": "full,full,full", "quantize": "w4"},
    "w3": {"keep": 0.7, "quantize": "w3"},
    "all modes": {"rank": "3,50,60", "quantize": "w3", "joint": "gate_up"},
    "groups": {"rank": "full,full,61", "quantize": "w8", "group_size": 2, "layers": "2"},
    "bits": {"bits": 3},
    "mixed": {"bits": 7, "calibration": CALIBRATION},
    "calibrated w4": {"keep": 0.6, "quantize": "w4", "calibration": CALIBRATION},
    "calibrated w8": {"keep": 0.6, "quantize": "w8", "calibration": CALIBRATION},
    "calibrated fp8": {"keep": 0.6, "quantize": "fp8", "calibration": CALIBRATION},
    "calibrated": {"keep": 0.6, "calibration": CALIBRATION},
}
QUANTISED = [name for name in WAYS if name != "calibrated"]


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts have several groups of inputs: 72 neurons, hidden size 80."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    return add_tokenizer(make_tiny_model(folder, experts=4, intermediate=72, hidden=80))


@pytest.fixture(scope="module")
def outputs(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Tucker checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("outputs")
    for name, options in WAYS.items():
        decompose(DecomposeRequest(model=source, output=folder / name, **with_text(options, text)))
    return {name: folder / name for name in WAYS}


def with_text(options: dict[str, Any], text: Path) -> dict[str, Any]:
    if "calibration" not in options:
        return options
    return {**options, "calibration": {"texts": [str(text)], **options["calibration"]}}


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return loaded


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(IDS).logits.float()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", QUANTISED)
def test_transformers_computes_what_the_reconstructed_experts_do(
    name: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    reconstruct(ReconstructRequest(folder=outputs[name], output=tmp_path / "dense"))
    expected = logits(load(tmp_path / "dense", torch.float32))
    model = load(outputs[name], torch.float32)
    # The dense experts were rounded to bfloat16.
    assert relative(logits(model), expected) < 1e-2
    assert relative(logits(load(outputs[name], torch.bfloat16)), expected) < 5e-2


@pytest.mark.parametrize("name", QUANTISED)
def test_codes_stay_packed_in_memory(name: str, outputs: dict[str, Path]) -> None:
    model = load(outputs[name], torch.bfloat16)
    modules = [module for module in model.modules() if isinstance(module, TuckerExperts)]
    held = sum(p.numel() * p.element_size() for own in modules for p in own.parameters())
    tucker = TuckerCheckpoint.open(outputs[name])
    stored = [h.bytes for text, h in tucker.checkpoint.tensors.items() if TensorName.find(text)]
    assert held == sum(stored)
    trained = {
        TensorName.parse(name).kind
        for own in modules
        for name, parameter in own.named_parameters()
        if parameter.requires_grad
    }
    assert TensorKind.CORE not in trained


def test_transformers_refuses_to_split_quantised_cores(outputs: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(outputs["w4"])
    config.distributed_config = DistributedConfig(tp_size=2)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    quantizer = TuckerQuantizer(TuckerConfig(**config.quantization_config))
    with pytest.raises(ValueError, match="cannot split quantised cores over processes"):
        quantizer._process_model_before_weight_loading(model)


@pytest.mark.parametrize("name", QUANTISED)
def test_verify_passes_against_the_dequantised_experts_and_the_source(
    name: str, outputs: dict[str, Path]
) -> None:
    report = verify(VerifyRequest(folder=outputs[name]))
    assert report.passed
    for layer in report.layers:
        assert layer.sharding_error is not None
        assert layer.sharding_error < 1e-5
        assert layer.residual_difference is not None
        assert layer.residual_difference < 1e-6


@pytest.mark.parametrize("name", [name for name in QUANTISED if "calibration" not in WAYS[name]])
def test_plan_predicts_the_bytes(
    name: str, source: Path, outputs: dict[str, Path], text: Path
) -> None:
    plan = preview(DecomposeRequest(model=source, **with_text(WAYS[name], text)))
    found = inspect(outputs[name])
    assert plan is not None
    assert plan.after == found.size
    assert found.tucker is not None
    assert found.tucker.cores == WAYS[name].get("quantize", "w4")


@pytest.mark.parametrize("name", QUANTISED)
def test_bits_per_weight_count_everything_that_is_stored(
    name: str, outputs: dict[str, Path]
) -> None:
    found = inspect(outputs[name])
    assert found.tucker is not None
    tensors = [
        tensor
        for file in outputs[name].glob("*.safetensors")
        for text, tensor in load_file(file).items()
        if ".experts." in text and ".shared_experts." not in text
    ]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    dense = 2 * 3 * 4 * 72 * 80
    assert found.size.bits_per_weight(found.tucker.before) == 8 * stored / dense


def test_bits_are_spent_on_encodings_by_layer(outputs: dict[str, Path], text: Path) -> None:
    """At 7 bits nothing is truncated: one layer has 8 bits, the other 4."""
    found = inspect(outputs["mixed"])
    assert found.tucker is not None
    assert isinstance(found.tucker.cores, dict)
    assert sorted(found.tucker.cores.values()) == ["w4", "w8"]
    bits = {name: inspect(outputs[name]) for name in ("bits", "mixed")}
    for name, own in bits.items():
        assert own.tucker is not None
        assert own.size.bits_per_weight(own.tucker.before) <= WAYS[name]["bits"]
    shard(ShardRequest(folder=outputs["mixed"], tp=2))
    result = torchrun(2, "-m", "tuckerize", "verify", outputs["mixed"])
    assert result.returncode == 0, result.stderr
    with pytest.raises(UsageError, match="quantised already, as w4 and w8"):
        quantize(QuantizeRequest(folder=outputs["mixed"], output=outputs["mixed"] / "again"))
    again = evaluate(EvaluateRequest(model=outputs["mixed"], text=str(text), tokens=1024))
    assert again.results[0].size == found.size


def test_evaluate_counts_the_parameters_that_codes_stand_for(
    outputs: dict[str, Path], text: Path
) -> None:
    found = evaluate(EvaluateRequest(model=outputs["w4"], text=str(text), tokens=1024)).results[0]
    assert found.size == inspect(outputs["w4"]).size
    assert found.size.routed_parameters > 0.65 * 2 * 3 * 4 * 72 * 80


def test_quantisation_for_the_inputs_adds_little_to_the_output_error(
    outputs: dict[str, Path],
) -> None:
    """On tokens that were not fitted; with 8 bits next to nothing."""

    def errors(name: str) -> list[float]:
        records = TuckerCheckpoint.open(outputs[name]).manifest.calibrated
        return [record.output_error for record in records if record.output_error is not None]

    names = ("calibrated", "calibrated w8", "calibrated w4")
    for plain, w8, w4 in zip(*map(errors, names), strict=True):
        assert w8 == pytest.approx(plain, rel=0.01)
        assert plain < w4 < 1.25 * plain


def test_experts_of_different_widths_keep_their_own_codes(outputs: dict[str, Path]) -> None:
    tucker = TuckerCheckpoint.open(outputs["calibrated w4"])
    layer = next(
        layer for layer in tucker.manifest.layers if len(set(tucker.manifest.widths(layer, 0))) > 1
    )
    widths, headers = tucker.manifest.widths(layer, 0), tucker.group_headers(layer, 0)
    for expert, width in enumerate(widths):
        core = TensorName.core(Projection.DOWN, expert)
        codes = replace(core, part=CorePart.PACKED_CODES)
        assert headers[codes].shape[-1] == -(-width // 8)
        assert headers[codes].dtype == "I32"


def test_checkpoint_without_quantised_cores_says_nothing_of_them(outputs: dict[str, Path]) -> None:
    manifest = json.loads((outputs["calibrated"] / MANIFEST).read_text())
    config = json.loads((outputs["calibrated"] / "config.json").read_text())
    assert "cores" not in manifest
    assert "quantize" not in manifest["recipe"]
    assert "cores" not in config["quantization_config"]
    assert config["quantization_config"]["format_version"] == 2


@pytest.mark.parametrize("cores", [CoreType.W4, CoreType.W3])
def test_shards_are_cut_between_groups_of_inputs(cores: CoreType, outputs: dict[str, Path]) -> None:
    """72 neurons are 3 groups: 64 and 8 for two processes, in all three projections."""
    report = shard(ShardRequest(folder=outputs[cores], tp=2))
    assert report.layout == "intermediate"
    files = sorted(Path(report.folder).glob("layer-00001*.safetensors"))
    parts = [load_file(file) for file in files]
    tucker = TuckerCheckpoint.open(outputs[cores])
    for name, whole in tucker.read_group(1, 0).items():
        own = [part[str(name.within(0, tucker.family.experts_prefix(1)))] for part in parts]
        if name.part is not None:
            dimension = 2 if name.projection == Projection.DOWN else 1
            inputs = (2, 1) if name.part == CorePart.SCALES else (cores.words(64), cores.words(8))
            sizes = inputs if dimension == 2 else (64, 8)
            assert tuple(part.shape[dimension] for part in own) == sizes
            assert torch.equal(torch.cat(own, dimension), whole)
    with pytest.raises(UsageError, match="splits a size of 3"):
        shard(ShardRequest(folder=outputs[cores], tp=4))
    with pytest.raises(UsageError, match="cores that are not quantised only"):
        shard(ShardRequest(folder=outputs[cores], tp=2, layout="rank"))


def test_groups_of_128_are_not_split(outputs: dict[str, Path]) -> None:
    """72 neurons are one group."""
    with pytest.raises(UsageError, match="splits a size of 1,") as caught:
        shard(ShardRequest(folder=outputs["w4-g128"], tp=2))
    assert caught.value.hint == "use --tp 1 or less, or decompose in groups of 32 (--quantize w4)"


def test_shards_compute_the_same_together(outputs: dict[str, Path]) -> None:
    shard(ShardRequest(folder=outputs["all modes"], tp=2))
    result = torchrun(2, "-m", "tuckerize", "verify", outputs["all modes"], "--json")
    assert result.returncode == 0, result.stderr
    assert all(layer["sharding_error"] < 1e-5 for layer in json.loads(result.stdout)["layers"])


def test_experts_of_one_group_belong_to_the_first_process(
    source: Path, text: Path, tmp_path: Path
) -> None:
    """The others compute with no neurons of them, for their share of the wider experts."""
    settings = {"texts": [str(text)], **CALIBRATION, "refine": 0, "shape": "neurons"}
    out = tmp_path / "out"
    decompose(
        DecomposeRequest(model=source, output=out, keep=0.5, quantize="w4", calibration=settings)
    )
    manifest = TuckerCheckpoint.open(out).manifest
    assert min(width for layer in manifest.layers for width in manifest.widths(layer, 0)) <= 32
    shard(ShardRequest(folder=out, tp=2))
    result = torchrun(2, "-m", "tuckerize", "verify", out, "--json")
    assert result.returncode == 0, result.stderr
    assert all(layer["sharding_error"] < 1e-5 for layer in json.loads(result.stdout)["layers"])


def test_tolerance_and_quantisation_exclude_each_other(source: Path, tmp_path: Path) -> None:
    request = DecomposeRequest(
        model=source, output=tmp_path / "out", tolerance=0.5, quantize="w4"
    )  # fmt: skip
    with pytest.raises(RecipeError, match="a tolerance is of cores that are not quantised"):
        decompose(request)


@pytest.mark.parametrize("cores", CoreType)
def test_finished_checkpoint_is_quantised_to_the_same_bytes(
    cores: str, source: Path, tmp_path: Path
) -> None:
    """Where decompose did not see float32 cores: all modes full."""
    plain, direct = tmp_path / "plain", tmp_path / "direct"
    decompose(DecomposeRequest(model=source, output=plain, rank="full,full,full"))
    decompose(DecomposeRequest(model=source, output=direct, rank="full,full,full", quantize=cores))
    report = quantize(QuantizeRequest(folder=plain, output=tmp_path / "out", cores=cores))
    found, expected = files_of(tmp_path / "out"), files_of(direct)
    for files in (found, expected):
        manifest = json.loads(files.pop(MANIFEST))
        assert manifest["recipe"].pop("quantize") == cores
        assert manifest["cores"] == cores
    assert found == expected
    assert report.largest_residual_before == 0
    assert report.largest_residual > 0
    assert report.after == inspect(tmp_path / "out").size


def test_calibrated_checkpoint_is_quantised_and_verified(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeed("quantize", outputs["calibrated"], "--output", out)
    assert verify(VerifyRequest(folder=out)).passed
    old, new = (TuckerCheckpoint.open(f).manifest for f in (outputs["calibrated"], out))
    assert all(record.output_error is None for record in new.calibrated)
    assert [record.kept for record in new.calibrated] == [record.kept for record in old.calibrated]
    assert new.after.routed_parameters == old.after.routed_parameters
    assert new.after.routed_bytes < 0.4 * old.after.routed_bytes
    with pytest.raises(UsageError, match="are quantised already, as w4"):
        quantize(QuantizeRequest(folder=out, output=tmp_path / "again"))
