"""decompose --calibration on a tiny model, up to what transformers loads again."""

from __future__ import annotations

import gc
import json
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tuckerize
from tests.expert_cases import SWIGLU
from tests.running import files_of, run_here, start, torchrun
from tests.tiny_models import write_text
from tuckerize.calibration import calibration_pass as run_module
from tuckerize.calibration import tokens as tokens_module
from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.profile_pass import ProfileCache, profile_model
from tuckerize.calibration.refine import Refinement, refine
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.compression import calibrated as calibrated_module
from tuckerize.domain import Projection
from tuckerize.errors import TuckerizeError, UsageError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.linalg.sharing import Sharing
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.pipeline.decompose import DecomposeRequest
from tuckerize.progress import SilentProgress, Stage
from tuckerize.recipe import CalibrationSettings, Recipe, Rule
from tuckerize.report.plans import PlanReport
from tuckerize.report.results import DecomposeReport
from tuckerize.report.verification import VerifyReport
from tuckerize.runtime.experts import TuckerExperts

CPU = torch.device("cpu")
BLOCK = 64  # held-out tokens stand in blocks of so many: 1024 tokens have one


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Profiles of this module's tests; those with the same model and text share them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(tokens_module, "HELD_OUT_BLOCK", BLOCK)
        yield folder


@pytest.fixture(scope="module")
def refined(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Tucker checkpoint of 60 %, with enough text to hold some out."""
    out = tmp_path_factory.mktemp("refined") / "out"
    decompose(model, text, out, {"multiple": 1, "refine": 5}, keep=0.6)
    return out


def request_of(
    model: Path, text: Path, out: Path | None, settings: dict[str, Any], options: dict[str, Any]
) -> DecomposeRequest:
    """A request with calibration, without refinement unless the settings say so."""
    calibration = {"texts": [str(text)], "tokens": 1024, "refine": 0, **settings}
    return DecomposeRequest(model=model, output=out, **{**options, "calibration": calibration})


def decompose(
    model: Path,
    text: Path,
    out: Path,
    settings: dict[str, Any],
    **options: Any,  # noqa: ANN401
) -> DecomposeReport:
    """Decompose with settings of the calibration and options beside it."""
    report = tuckerize.decompose(request_of(model, text, out, settings, options))
    assert report is not None
    return report


def plan_of(model: Path, text: Path, *, keep: float) -> PlanReport:
    """The plan of a calibrated decomposition."""
    plan = tuckerize.preview(request_of(model, text, None, {}, {"keep": keep}))
    assert plan is not None
    return plan


def verify(folder: Path) -> VerifyReport:
    """Verify a Tucker checkpoint in this process."""
    return tuckerize.verify(tuckerize.VerifyRequest(folder=folder))


def shard(folder: Path, tp: int, **options: Any) -> None:  # noqa: ANN401
    """Cut a Tucker checkpoint into shards."""
    tuckerize.shard(tuckerize.ShardRequest(folder=folder, tp=tp, **options))


def reconstruct(folder: Path, output: Path) -> None:
    """Expand a Tucker checkpoint."""
    tuckerize.reconstruct(tuckerize.ReconstructRequest(folder=folder, output=output))


def manifest_of(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "tuckerize.json").read_text())
    return value


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def routed_parameters(folder: Path) -> int:
    return sum(t.numel() for name, t in weights_of(folder).items() if ".experts." in name)


def stored_layer(tucker: TuckerCheckpoint, layer: int) -> TuckerExperts:
    groups = [tucker.read_group(layer, group) for group in range(tucker.manifest.groups)]
    size = tucker.manifest.group_size
    return TuckerExperts(groups, group_size=size, activation=SWIGLU)


def test_budget_is_kept_and_manifest_and_config_say_what_was_done(
    model: Path, refined: Path
) -> None:
    budget = 0.6 * routed_parameters(model)
    manifest = manifest_of(refined)
    assert 0.99 * budget <= routed_parameters(refined) <= budget
    assert manifest["after"]["routed_parameters"] == routed_parameters(refined)
    assert manifest["joint"] == "gate_up"
    assert manifest["recipe"]["calibration"]["refine"] == 5
    assert [layer["layer"] for layer in manifest["calibrated"]] == [1, 2]
    for layer in manifest["calibrated"]:
        assert 0 < layer["output_error"] < 1
        assert 0 < layer["predicted_error"] < 1
    announced = json.loads((refined / "config.json").read_text())["quantization_config"]
    assert announced["format_version"] == 2
    for layer in manifest["calibrated"]:
        (group,) = announced["modules"][f"model.layers.{layer['layer']}.mlp.experts"]
        widths = group["neurons"]
        assert sum(widths) == 8 * layer["neurons"] if layer["kept"] else widths == 24
        assert group["gate_proj"][1] == layer["neurons"]
        assert len(layer["kept"]) == (layer["neurons"] < 24)
    assert not (refined / ".tuckerize").exists()
    assert "tokenizer.json" in files_of(refined)


def test_result_is_verified_alone_and_in_shards(refined: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(refined, out)
    report = verify(out)
    assert report.passed
    for layer in report.layers:
        assert layer.output_error is not None
        assert 0 < layer.output_error < 1
        assert layer.residual_difference is not None
        assert layer.residual_difference < 1e-6
    tuckerize.inspect(out)
    shard(out, 2, layout="intermediate")
    with pytest.raises(UsageError, match="layout 'rank' splits experts of equal width only"):
        shard(out, 2, layout="rank", overwrite=True)
    with pytest.raises(UsageError, match="is not enough for 25"):
        shard(out, 25)
    result = torchrun(2, "-m", "tuckerize", "verify", out)
    assert result.returncode == 0, result.stderr


def test_reconstruction_computes_what_the_factors_do(refined: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    reconstruct(refined, dense)
    loaded = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tucker = TuckerCheckpoint.open(refined)
    weights = weights_of(dense)
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(40, 32, generator=generator)
    weights_Tk, experts_Tk = torch.rand(40, 8, generator=generator).topk(2, dim=1)
    for layer in (1, 2):
        with torch.no_grad():
            expected_TI = loaded.model.layers[layer].mlp.experts(x_TI, experts_Tk, weights_Tk)
        found_TI = stored_layer(tucker, layer)(x_TI, experts_Tk, weights_Tk)
        torch.testing.assert_close(found_TI, expected_TI, rtol=1e-4, atol=1e-4)
        kept = tucker.kept(layer, 0)
        for expert in range(8) if kept is not None else ():
            rows = {
                projection: weights[
                    f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                ]
                for projection in Projection
            }
            rows[Projection.DOWN] = rows[Projection.DOWN].T
            for matrix_HI in rows.values():
                alive = matrix_HI.abs().sum(1).nonzero()[:, 0]
                assert kept is not None
                assert torch.equal(alive, kept.of_expert(expert))
    manifest = tucker.manifest
    assert any(manifest.kept_neurons(layer, 0) is not None for layer in (1, 2))


def test_same_command_twice_gives_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for place in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / place))
        decompose(model, text, tmp_path / place, {"refine": 5}, keep=0.7)
        results.append(files_of(tmp_path / place))
    assert results[0] == results[1]


ROUTED = 8 * 3 * 24 * 32  # parameters of the experts of a layer


def budget_request(
    model: Path,
    text: Path,
    out: Path,
    *,
    calibration: dict[str, Any] | None = None,
    **options: Any,  # noqa: ANN401
) -> DecomposeRequest:
    """A request to compress to 70 %, with recipe keys of calibration and options beside it."""
    settings = {"multiple": 2, **(calibration or {})}
    return request_of(model, text, out, settings, {"keep": 0.7, **options})


@pytest.mark.parametrize(
    "option",
    [
        {"calibration": {"shape": "latent"}},
        {"calibration": {"shape": "neurons"}},
        {"calibration": {"equal_widths": True}},
        {"calibration": {"allocate": "uniform"}},
        {"group_size": 4},
        {"layers": "2"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_budget_is_kept_and_used_as_planned_with_every_option(
    option: dict[str, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    request = budget_request(model, text, out, **option)
    plan, report = tuckerize.preview(request), tuckerize.decompose(request)
    assert plan is not None
    assert report is not None
    assert plan.after == report.after
    assert plan.predicted_kl == report.predicted_kl is not None
    assert report.predicted_kl > 0
    manifest = manifest_of(out)
    layers = [layer["layer"] for layer in manifest["calibrated"]]
    stored = manifest["after"]["routed_parameters"] - (2 - len(layers)) * ROUTED
    # The smallest step of neurons alone is an eighth of the smallest that may be left over.
    assert 0.93 * 0.7 * len(layers) * ROUTED <= stored <= 0.7 * len(layers) * ROUTED
    assert verify(out).passed


def compressed_layers(
    model: Path,
    text: Path,
    out: Path,
    **options: Any,  # noqa: ANN401
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Compress to 70 %; each layer as the manifest has it, and as config.json has its groups."""
    tuckerize.decompose(budget_request(model, text, out, **options))
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    return [
        (layer, modules[f"model.layers.{layer['layer']}.mlp.experts"])
        for layer in manifest_of(out)["calibrated"]
    ]


def test_latent_shape_keeps_all_neurons(model: Path, text: Path, tmp_path: Path) -> None:
    for layer, groups in compressed_layers(
        model, text, tmp_path / "out", calibration={"shape": "latent"}
    ):
        assert (layer["neurons"], layer["kept"]) == (24, [])
        assert groups[0]["gate_proj"][2] < 32


def test_shape_of_neurons_has_no_hidden_factor(model: Path, text: Path, tmp_path: Path) -> None:
    for layer, groups in compressed_layers(
        model, text, tmp_path / "out", calibration={"shape": "neurons"}
    ):
        assert layer["neurons"] < 24
        assert [groups[0][projection][2] for projection in Projection] == [32] * 3


def test_experts_of_equal_widths_are_sharded_by_rank(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    widths = [
        group["neurons"]
        for _, groups in compressed_layers(model, text, out, calibration={"equal_widths": True})
        for group in groups
    ]
    assert all(isinstance(width, int) for width in widths)
    assert min(widths) < 24
    shard(out, 2, layout="rank")
    result = torchrun(2, "-m", "tuckerize", "verify", out)
    assert result.returncode == 0, result.stderr


def test_uniform_allocation_gives_every_layer_the_same_budget(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for layer, _ in compressed_layers(model, text, out, calibration={"allocate": "uniform"}):
        prefix = f"model.layers.{layer['layer']}.mlp.experts."
        own = sum(t.numel() for name, t in weights_of(out).items() if name.startswith(prefix))
        assert 0.93 * 0.7 * ROUTED <= own <= 0.7 * ROUTED


def test_every_group_keeps_neurons_of_its_own(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = [
        (len(layer["kept"]), len(groups), layer["neurons"])
        for layer, groups in compressed_layers(model, text, out, group_size=4)
    ]
    assert [groups for _, groups, _ in kept] == [2, 2]
    assert [own for own, _, _ in kept] == [2 * (neurons < 24) for _, _, neurons in kept]
    assert min(neurons for _, _, neurons in kept) < 24


def test_layers_that_are_not_named_stay_dense(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    layers = compressed_layers(model, text, out, layers="2")
    assert [layer["layer"] for layer, _ in layers] == [2]
    source, found = weights_of(model), weights_of(out)
    dense = [name for name in source if name.startswith("model.layers.1.mlp.experts.")]
    assert len(dense) == 8 * 3
    assert all(torch.equal(found[name], source[name]) for name in dense)


def test_factors_are_stored_in_the_type_that_is_asked_for(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compressed_layers(model, text, out, dtype="bfloat16")
    dtypes = {t.dtype for name, t in weights_of(out).items() if ".experts." in name}
    assert dtypes == {torch.bfloat16}


def test_one_shot_differs_behind_the_first_compressed_layer(
    model: Path, text: Path, tmp_path: Path
) -> None:
    layers = []
    for name, sequential in (("sequential", True), ("one-shot", False)):
        settings = {"sequential": sequential}
        decompose(model, text, tmp_path / name, settings, rank="full,full,20")
        tucker = TuckerCheckpoint.open(tmp_path / name)
        layers.append([tucker.read_group(layer, 0) for layer in (1, 2)])
    same = [
        all(torch.equal(own[name], one_shot[name]) for name in own)
        for own, one_shot in zip(*layers, strict=True)
    ]
    assert same == [True, False]


def test_outputs_count_relative_to_the_lengths_of_hidden_states(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer is refined to, against transformers, also behind a compressed layer."""
    targets: list[dict[bool, Tensor]] = []

    def noted(
        module: TuckerExperts,
        fit: LayerTokens,
        held_out: LayerTokens,
        dense: Callable[[LayerTokens], Tensor],
        *,
        steps: int,
        stage: Stage,
        sharing: Sharing,
    ) -> Refinement:
        targets.append({False: dense(fit), True: dense(held_out)})
        return refine(module, fit, held_out, dense, steps=steps, stage=stage, sharing=sharing)

    monkeypatch.setattr(calibrated_module, "refine", noted)
    out = tmp_path / "out"
    decompose(model, text, out, {"refine": 2}, rank="full,16,20")
    settings = CalibrationSettings(texts=(str(text),), tokens=1024)
    recipe = Recipe(rules=(Rule(rank="full,16,20"),), calibration=settings)
    tokens_SL = CalibrationPass.open(SourceModel.open(model), recipe, CPU).windows_SL
    is_held_out_T = torch.arange(tokens_SL.numel()) // BLOCK % 16 == 15
    dense = AutoModelForCausalLM.from_pretrained(model)
    compressed = AutoModelForCausalLM.from_pretrained(out)
    for layer, parts in zip((1, 2), targets, strict=True):
        found = layer_call(compressed, layer, tokens_SL)
        with torch.no_grad():
            output_TI = dense.model.layers[layer].mlp.experts(*found.arguments)
        behind_TI = found.behind_TI - found.experts_TI + output_TI
        lengths_T1 = behind_TI.norm(dim=1, keepdim=True)
        expected_TI = output_TI / (lengths_T1 / lengths_T1.median())
        for held_out, target_TI in parts.items():
            own_TI = expected_TI[is_held_out_T == held_out]
            torch.testing.assert_close(target_TI, own_TI, rtol=1e-3, atol=1e-5)
    assert len(targets[1][True]) == BLOCK


class LayerCall(NamedTuple):
    """What a decoder layer gives, what its routed experts give, and what those get."""

    behind_TI: Tensor
    experts_TI: Tensor
    arguments: tuple[Tensor, ...]


@torch.no_grad()
def layer_call(loaded: Any, index: int, tokens_SL: Tensor) -> LayerCall:  # noqa: ANN401
    """What happens in one layer of a model of transformers."""
    layer = loaded.model.layers[index]
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:  # noqa: ANN401
        return lambda _module, inputs, output: seen.update({name: output, f"{name} in": inputs})

    hooks = [
        layer.register_forward_hook(note("layer")),
        layer.mlp.experts.register_forward_hook(note("experts")),
    ]
    loaded(tokens_SL)
    for hook in hooks:
        hook.remove()
    return LayerCall(seen["layer"].flatten(0, 1), seen["experts"], seen["experts in"])


@pytest.mark.parametrize("joint", [None, "gate_up"], ids=["alone", "joint"])
@pytest.mark.parametrize("rank", ["50%,50%,50%", "full,full,60%", "6,full,full"])
def test_core_sizes_may_be_given(
    rank: str, joint: str | None, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = decompose(model, text, out, {}, rank=rank, joint=joint)
    assert report.predicted_kl is None
    manifest = manifest_of(out)
    assert all(layer["predicted_error"] is None for layer in manifest["calibrated"])
    assert len({tuple(stack["multilinear_rank"]) for stack in manifest["stacks"]}) == 1
    assert verify(out).passed


def test_recipe_may_mix_budgets_and_core_sizes(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    calibration = {"texts": [str(text)], "tokens": 1024, "refine": 0, "multiple": 2}
    rules = [{"layers": "1", "keep": 0.6}, {"layers": "2", "rank": "full,12,20"}]
    recipe.write_text(json.dumps({"rules": rules, "calibration": calibration}))
    out = tmp_path / "out"
    tuckerize.decompose(DecomposeRequest(model=model, recipe=recipe, output=out))
    by_layer = {stack["layer"]: stack for stack in manifest_of(out)["stacks"]}
    assert by_layer[2]["multilinear_rank"] == [8, 12, 20]
    assert verify(out).passed
    shard(out, 2)
    reconstruct(out, tmp_path / "dense")


def test_whole_budget_gives_the_dense_model_back(model: Path, text: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(model, text, out, {"refine": 300}, keep=1)
    reconstruct(out, dense)
    source, result = weights_of(model), weights_of(dense)
    assert source.keys() == result.keys()
    assert all(torch.equal(source[name], result[name]) for name in source)
    assert verify(out).passed


def test_calibration_has_less_output_error_than_none(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """On the text itself, at equal size: what all of this is for."""
    report = decompose(model, text, tmp_path / "with", {"shape": "latent"}, keep=0.6)
    tuckerize.decompose(DecomposeRequest(model=model, keep=0.6, output=tmp_path / "without"))
    losses = []
    tokens = torch.tensor([[int(word) for word in text.read_text().split()[:512]]])
    exact = logits(model, tokens)
    for name in ("with", "without"):
        reconstruct(tmp_path / name, tmp_path / f"{name}-dense")
        found = logits(tmp_path / f"{name}-dense", tokens)
        losses.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert routed_parameters(tmp_path / "with") <= routed_parameters(tmp_path / "without")
    assert losses[0] < losses[1]
    assert report.predicted_kl is not None
    assert report.predicted_kl > 0


@torch.no_grad()
def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logarithms of the probabilities of all next tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output: Tensor = loaded(tokens).logits.double().log_softmax(-1)
    return output


class Stop(KeyboardInterrupt):
    """The run is interrupted here."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int) -> list[int]:
    """Let a method raise in its n-th call, before it does anything; returns the calls so far."""
    calls: list[int] = []
    original = getattr(owner, method)

    def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        calls.append(1)
        if len(calls) == call:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    return calls


@pytest.mark.parametrize(
    ("method", "call"),
    [("write_record", 1), ("write_record", 2), ("save", 1), ("save", 2), ("save", 3)],
)
def test_run_that_is_interrupted_anywhere_ends_with_the_same_bytes(
    method: str, call: int, model: Path, text: Path, tmp_path: Path
) -> None:
    rank = "full,16,20"
    decompose(model, text, tmp_path / "whole", {}, rank=rank)
    out = tmp_path / "out"
    owner = OutputFolder if method == "write_record" else run_module.SavedStates
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, method, call)
        with pytest.raises(Stop):
            decompose(model, text, out, {}, rank=rank)
    assert not (out / "tuckerize.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        layers = interrupt(patch, run_module.CalibrationPass, "groups", 0)
        decompose(model, text, out, {}, rank=rank)
    done = {("write_record", 2): 1, ("save", 3): 1}.get((method, call), 0)
    assert len(layers) == 2 - done
    assert files_of(out) == files_of(tmp_path / "whole")


def test_killed_run_continues_and_ends_with_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real kill, as soon as the first layer is noted."""
    monkeypatch.setattr(tokens_module, "HELD_OUT_BLOCK", 512)
    out = tmp_path / "out"
    rank, settings = "full,16,20", {"tokens": 8192, "refine": 20}
    options = ("--rank", rank, "--calibration-tokens", "8192", "--refine", "20")
    arguments = ("--model", model, "--output", out, "--calibration", text)
    process = start("decompose", *arguments, *options)
    record = out / ".tuckerize" / "layer-00001.json"
    while not record.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    _, errors = process.communicate()
    assert record.exists(), errors.decode()
    assert not (out / "tuckerize.json").exists()
    decompose(model, text, out, settings, rank=rank)
    decompose(model, text, tmp_path / "whole", settings, rank=rank)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("sequential", [True, False])
def test_nothing_of_a_layer_is_left_when_the_next_begins(
    *,
    sequential: bool,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[TuckerExperts]] = []
    left: list[int] = []
    groups, module = CalibrationPass.groups, CalibrationPass.module

    def noted_groups(self: CalibrationPass, layer: int) -> list[DenseGroup]:
        gc.collect()
        left.append(sum(own() is not None for own in made))
        return groups(self, layer)

    def noted_module(
        self: CalibrationPass, layer: int, tensors: list[dict[TensorName, Tensor]]
    ) -> TuckerExperts:
        result = module(self, layer, tensors)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(CalibrationPass, "groups", noted_groups)
    monkeypatch.setattr(CalibrationPass, "module", noted_module)
    decompose(model, text, tmp_path / "out", {"sequential": sequential}, keep=0.6)
    assert len(made) > len(left) > 1
    assert left == [0] * len(left)


def test_profile_is_made_once_for_all_budgets(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = plan_of(model, text, keep=0.5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert sum(path.suffix == ".safetensors" for path in before) == 2
    calls = interrupt(monkeypatch, run_module.CalibrationPass, "run_layer", 0)
    second = plan_of(model, text, keep=0.8)
    assert calls == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before
    assert first.predicted_kl is not None
    assert second.predicted_kl is not None
    assert second.predicted_kl < first.predicted_kl
    # Another text, another profile.
    other = write_text(tmp_path / "other.txt", 2000, seed=1)
    plan_of(model, other, keep=0.5)
    assert calls


def test_sensitivity_is_of_all_texts_whichever_comes_first(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_text(tmp_path / "other.txt", 1000, seed=1)
    settings = CalibrationSettings(texts=(str(text), str(other)), tokens=2048, window=64)
    recipe = Recipe(rules=(Rule(keep=0.5),), calibration=settings)
    run = CalibrationPass.open(SourceModel.open(model), recipe, CPU)
    one, two, random = run.windows_SL[:8], run.windows_SL[8:16], run.windows_SL[16:]
    found: list[list[float]] = []
    for order in ((one, two), (two, one)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(len(found))))
        ordered = replace(run, windows_SL=torch.cat([*order, random]))
        profiles = profile_model(ordered, SilentProgress())
        found.append([
            own for p in profiles for own in (p.sensitivity, p.small_sensitivity, p.switching)
        ])  # fmt: skip
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_divergence_grows_with_the_square_where_no_router_follows(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = CalibrationSettings(texts=(str(text),), tokens=2048, window=64)
    recipe = Recipe(rules=(Rule(keep=0.5),), calibration=settings)
    run = CalibrationPass.open(SourceModel.open(model), recipe, CPU)
    last = profile_model(run, SilentProgress())[-1]
    assert last.small_sensitivity == pytest.approx(last.sensitivity, rel=0.1)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_interrupted_profile_continues_behind_the_last_layer(
    call: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    whole = plan_of(model, text, keep=0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, run_module.SavedStates, "save", call)
        with pytest.raises(Stop):
            plan_of(model, text, keep=0.5)
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt(patch, run_module.SavedStates, "save", 0)
        assert plan_of(model, text, keep=0.5) == whole
    assert len(calls) == 3 - (call - 1)
    folders = [next((tmp_path / name / "tuckerize").iterdir()) for name in ("whole", "cache")]
    assert files_of(folders[0]) == files_of(folders[1])


def test_profile_interrupted_at_its_end_is_finished(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    whole = plan_of(model, text, keep=0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        # Two open profiles were saved in the pass, then one of the finished.
        interrupt(patch, ProfileCache, "save", 4)
        with pytest.raises(Stop):
            plan_of(model, text, keep=0.5)
    assert plan_of(model, text, keep=0.5) == whole


def test_few_tokens_of_an_expert_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = {"texts": [str(text)], "tokens": 64, "window": 32, "refine": 0}
    rules = [{"rank": "full,full,20"}]
    recipe.write_text(json.dumps({"rules": rules, "calibration": settings}))
    out = tmp_path / "out"
    report = tuckerize.decompose(DecomposeRequest(model=model, recipe=recipe, output=out))
    assert report is not None
    notes = "\n".join(report.notes)
    assert "saw fewer than 32 tokens" in notes
    assert any(note.startswith("layer 1: experts") for note in report.notes)
    assert all(np.isfinite(s["relative_residual"]) for s in manifest_of(out)["stacks"])
    found = verify(out)
    assert not found.damaged
    assert all("zeros would have 1" in fault for layer in found.layers for fault in layer.failures)
    with pytest.raises(TuckerizeError, match="64 tokens in windows of 512"):
        tuckerize.preview(request_of(model, text, None, {"tokens": 64}, {"keep": 0.5}))


@pytest.mark.parametrize("name", ["experts.5.up_proj.weight", "gate.weight"])
def test_nan_in_a_weight_names_the_layer(
    name: str, model: Path, text: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights[f"model.layers.2.mlp.{name}"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TuckerizeError, match="layer 2") as caught:
        decompose(broken, text, tmp_path / "out", {}, keep=0.7)
    if "experts" in name:
        place = "the stack holds nan at expert 5, intermediate 3, hidden 4"
        assert place in caught.value.message


@pytest.mark.parametrize(
    ("source", "options", "message", "hint"),
    [
        ("nowhere.txt", {}, "the file nowhere.txt is missing", "check the path"),
        ("EMPTY", {}, "empty.txt has no text", "give a file with text"),
        ("TEXT:-1", {}, "with a positive weight", "notes.txt:0.7"),
        ("TEXT", {"engine": "tensorly"}, "tensorly is data-free", ""),
        ("TEXT", {"projections": "up_proj"}, "all three projections", ""),
        ("TEXT", {"layers": "0"}, "names layer 0 without routed", "are 1 to 2"),
        ("TEXT", {"group_size": 3}, "does not divide the 8", "1, 2, 4, 8"),
        ("TEXT", {"calibration": {"multiple": 0}}, "--multiple 0 is not", "at least 1"),
        ("TEXT", {"calibration": {"tokens": 100}}, "100 tokens in windows", ""),
    ],
)
def test_bad_option_of_calibration_says_what_to_change_and_writes_nothing(
    source: str,
    options: dict[str, Any],
    message: str,
    hint: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    cache: Path,
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    own = source.replace("TEXT", str(text)).replace("EMPTY", str(empty))
    calibration = {"texts": [own], **options.get("calibration", {})}
    refused(
        model,
        tmp_path,
        {"keep": 0.7, **options, "calibration": calibration},
        message,
        hint,
        cache,
    )


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--refine", "10"), "--refine belongs to --calibration", "--calibration FILE"),
        (("--calibration-tokens", "9"), "--calibration-tokens belongs to", "--calibration FILE"),
        (("--calibration", "TEXT", "--multiple", "0"), "--multiple", "equal to 1"),
    ],
)
def test_bad_option_of_the_command_line_is_refused_by_it(
    options: tuple[str, ...],
    message: str,
    hint: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    cache: Path,
) -> None:
    before, out = files_of(cache), tmp_path / "out"
    own = [word.replace("TEXT", str(text)) for word in options]
    result = run_here("decompose", "--model", model, "--keep", "0.7", *own, "--output", out)
    assert result.returncode == 2, result.stderr
    words = " ".join(result.stderr.split())
    assert message in words
    assert hint in words
    assert "Traceback" not in result.stderr
    assert not out.exists()
    assert files_of(cache) == before


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"tolerance": 0.1}, "a tolerance is of weights", "give keep"),
        ({"keep": 0.01}, "keep 0.01 is below what the smallest", "at least 0.061, or a smaller"),
        ({"rank": "9,24,32"}, "core size 9 of the expert mode (E) is not between 1 and 8", ""),
        (
            {"rank": "2,3,7", "joint": "gate_up"},
            "core size 7 of the hidden mode (I) is above 6",
            "at most 6",
        ),
    ],
)
def test_bad_size_with_calibration_is_refused_before_any_work(
    options: dict[str, Any],
    message: str,
    hint: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    cache: Path,
) -> None:
    refused(model, tmp_path, {"calibration": text, **options}, message, hint, cache)


def test_budget_below_the_smallest_latent_size_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"keep 0\.01 is below") as caught:
        decompose(model, text, tmp_path / "out", {"shape": "latent"}, keep=0.01)
    assert "at least 0.278" in caught.value.hint
    assert not (tmp_path / "out").exists()


def refused(
    model: Path, folder: Path, options: dict[str, Any], message: str, hint: str, cache: Path
) -> None:
    """The request is refused, and neither a folder nor a profile was begun."""
    before = files_of(cache)
    out = folder / "out"
    with pytest.raises(TuckerizeError) as caught:
        tuckerize.decompose(DecomposeRequest(model=model, output=out, **options))
    assert message in caught.value.message
    assert hint in f"{caught.value.message} {caught.value.hint}"
    assert not out.exists()
    assert files_of(cache) == before


def test_model_without_a_tokenizer_is_refused(
    tiny_model: Path, text: Path, tmp_path: Path, cache: Path
) -> None:
    options = {"keep": 0.7, "calibration": text}
    refused(tiny_model, tmp_path, options, "has no tokenizer", "tokenizer files", cache)
