"""Sizes that fit: the cache is that of transformers, experts are those that `shard` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.published import MODELS, planned_source, published
from tests.running import run_here, succeed
from tests.tiny_families import auto_class, make_family
from tuckerize import DecomposeRequest, FitRequest, ShardRequest, decompose, fit, shard
from tuckerize.domain import CoreType, Target
from tuckerize.errors import UsageError
from tuckerize.moe.source import SourceModel
from tuckerize.planning.fit import Devices, Workload, fit_devices
from tuckerize.report.plans import FitChoice, FitReport

ROOMY = Devices(1, 2**40)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next", "phimoe", "glm4_moe"]
)
def test_cache_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", family)
    source = SourceModel.open(folder)
    found = fit_devices(source, ROOMY, Workload(context=24, sequences=2))
    model = auto_class(folder).from_pretrained(folder)
    tokens_SL = torch.randint(3, 60, (2, 24))
    cache = model(input_ids=tokens_SL, use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    # A sliding window of transformers holds one token less: the next one is not there yet.
    values = sum(
        (own.numel() // own.shape[-2]) * min(24, getattr(layer, "sliding_window", 24) or 24)
        for layer in layers
        for own in (layer.keys, layer.values)
    )
    assert found.cache_bytes == 2 * values
    assert bool(found.notes) == (len(layers) < len(cache.layers))


@pytest.mark.parametrize(
    ("name", "values"),
    [("deepseek-v2-lite", 27 * (512 + 64)), ("qwen3-30b-a3b", 48 * 2 * 4 * 128)],
)
def test_cache_of_published_models(name: str, values: int) -> None:
    recipe = next(own for own in MODELS if own.startswith(name))
    source = planned_source(published(recipe)["config"])
    one = fit_devices(source, ROOMY, Workload(context=1000, sequences=3))
    assert one.cache_bytes == values * 3000 * 2
    split = fit_devices(source, Devices(8, 2**40), Workload(context=1000, sequences=3))
    # Latents are whole on every device; 4 key-value heads are not split over more than 4.
    assert split.cache_bytes * (1 if "deepseek" in name else 4) == one.cache_bytes


@pytest.mark.parametrize("quantize", [None, "w8", "w4"])
@pytest.mark.parametrize("devices", [1, 2])
def test_experts_are_the_bytes_that_shard_writes(
    quantize: str | None, devices: int, tmp_path: Path
) -> None:
    folder = make_family(tmp_path / "model", "qwen3_moe", hidden_size=64, moe_intermediate_size=96)
    source = SourceModel.open(folder)
    workload = Workload(1, 1)
    cores = None if quantize is None else CoreType(quantize)
    roomy = fit_devices(source, Devices(devices, 2**40), workload)
    whole = _choice(roomy, cores).device_bytes
    reserved = roomy.rest_bytes + roomy.cache_bytes
    tight = fit_devices(
        source, Devices(devices, int((0.8 * whole + reserved) / 0.88) + 1), workload
    )
    found = _choice(tight, cores)
    assert found.device_bytes <= 0.8 * whole
    hidden = next(r for r in range(64, 0, -1) if found.kept >= _kept(source, r))
    out = tmp_path / "out"
    decompose(
        DecomposeRequest(
            model=folder,
            output=out,
            rank=f"full,full,{hidden}",
            joint="gate_up",
            quantize=quantize,
        )
    )
    costs = {cost.layout: cost for cost in shard(ShardRequest(folder=out, tp=devices)).costs}
    assert found.device_bytes == costs["intermediate"].bytes_per_process
    manifest = json.loads((out / "tuckerize.json").read_text())
    assert found.total_bytes == manifest["after"]["total_bytes"]
    assert found.kept == manifest["after"]["routed_parameters"] / source.size.routed_parameters


def _kept(source: SourceModel, hidden: int) -> float:
    shape = source.moe.shape
    cores = 3 * shape.experts * shape.intermediate * hidden
    return (cores + 2 * shape.hidden * hidden) / (3 * shape.parameters)


def _choice(report: FitReport, cores: CoreType | None, target: Target = Target.FREE) -> FitChoice:
    return next(own for own in report.choices if (own.target, own.cores) == (target, cores))


def test_equal_widths_have_no_factors_and_whole_groups(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "qwen3_moe", hidden_size=64, moe_intermediate_size=96)
    source = SourceModel.open(folder)
    roomy = fit_devices(source, ROOMY, Workload(1, 1))
    whole = _choice(roomy, CoreType.W4, Target.ANY_ENGINE)
    assert whole.bits == 5  # 4 bits, and 32 for each 32
    memory = (roomy.rest_bytes + roomy.cache_bytes + 0.8 * whole.device_bytes) / 0.88
    tight = fit_devices(source, Devices(1, int(memory)), Workload(1, 1))
    assert _choice(tight, CoreType.W4, Target.ANY_ENGINE).kept == 2 / 3  # 64 of 96 neurons


def test_equal_widths_in_16_bits_are_those_of_decompose(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 512}
    source = SourceModel.open(make_family(tmp_path / "model", "qwen3_moe", **sizes))
    roomy = fit_devices(source, ROOMY, Workload(1, 1))
    whole = _choice(roomy, None, Target.ANY_ENGINE)
    memory = (roomy.rest_bytes + roomy.cache_bytes + 0.8 * whole.device_bytes) / 0.88
    tight = fit_devices(source, Devices(1, int(memory)), Workload(1, 1))
    assert _choice(tight, None, Target.ANY_ENGINE).kept == 384 / 512


def test_more_memory_never_fits_less(tmp_path: Path) -> None:
    source = SourceModel.open(make_family(tmp_path / "model", "qwen3_moe"))
    found = []
    for memory in range(2**15, 2**18, 2**13):
        try:
            found.append(fit_devices(source, Devices(2, memory), Workload(64, 1)).bits)
        except UsageError:
            found.append(0.0)
    assert found == sorted(found)
    assert found[0] == 0 < found[-1] == 32


def test_command_says_what_to_type_and_what_it_costs(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "model", "qwen3_moe", hidden_size=64, moe_intermediate_size=96)
    words = ("plan", "--model", folder, "--fit", "2x0.4MB", "--context", "64", "--sequences", "1")
    out = " ".join(succeed(*words).split())
    assert f"next: tuckerize decompose --model {folder} --bits" in out
    report = fit(FitRequest(model=folder, devices="2x0.4MB", context=64, sequences=1))
    assert f"--bits {int(100 * report.bits) / 100:g} " in out
    as_json = json.loads(succeed(*words, "--json"))
    assert as_json["bits"] == report.bits
    roomy = succeed("plan", "--model", folder, "--fit", "1TiB")
    assert "the model fits as it is, with 32 bits per weight" in roomy


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fit", "4x"], "not a number of devices"),
        (["--fit", "0x32GiB"], "not a number of devices"),
        (["--fit", "2x0.1MB"], "nothing fits"),
        (["--fit", "2x32GiB", "--bits", "3"], "decides the bits"),
        (["--context", "64"], "belongs to --fit"),
        ([], "needs --calibration, --fit, or both"),
    ],
)
def test_what_cannot_be_answered_is_refused(words: list[str], told: str) -> None:
    done = run_here("plan", "--model", "examples/tiny-moe", *words)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.split())
