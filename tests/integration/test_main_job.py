"""The main job on checkpoints that transformers made, up to what transformers loads again.

The first test runs the commands as users do, the others call the API.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.running import files_of, succeed
from tests.tiny_models import make_tiny_model
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    ShardRequest,
    decompose,
    preview,
    reconstruct,
    shard,
)
from tuckerize.domain import GATE_UP
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, factors_of

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "tiny-moe"


def logits_of(folder: Path) -> Tensor:
    """Logits of a fixed prompt in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(48).unsqueeze(0) % model.config.vocab_size
    with torch.no_grad():
        output: Tensor = model(tokens).logits
    return output


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a Tucker checkpoint."""
    value: dict[str, Any] = json.loads((folder / "tuckerize.json").read_text())
    return value


def dense_stack(weights: dict[str, Tensor], layer: int, projection: str) -> Tensor:
    """The stack (E, H, I) of a dense checkpoint, in float64."""
    prefix = f"model.layers.{layer}.mlp.experts"
    experts = sum(f"{prefix}.{e}.{projection}.weight" in weights for e in range(1000))
    rows = [weights[f"{prefix}.{e}.{projection}.weight"].double() for e in range(experts)]
    return torch.stack([row.T if projection == "down_proj" else row for row in rows])


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_full_rank_reconstruct_gives_the_source_back(method: str, tmp_path: Path) -> None:
    groups = {"n_group": 4, "topk_group": 2} if method == "group_limited_greedy" else {}
    model = make_tiny_model(tmp_path / "model", topk_method=method, shards=True, **groups)  # type: ignore[arg-type]
    out, dense = tmp_path / "out", tmp_path / "dense"
    succeed("decompose", "--model", model, "--rank", "full,full,full", "--output", out)
    succeed("reconstruct", out, "--output", dense)
    source, result = weights_of(model), weights_of(dense)
    assert source.keys() == result.keys()
    assert all(torch.equal(source[name], result[name]) for name in source)
    torch.testing.assert_close(logits_of(dense), logits_of(model), rtol=0, atol=1e-5)
    assert "passed" in succeed("verify", out)


@pytest.mark.parametrize("joint", [None, "gate_up"])
def test_truncated_residuals_recomputed_from_files_equal_the_recorded(
    joint: str | None, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model", dtype=torch.float32)
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=model, rank="6,75%,70%", joint=joint, output=out))
    reconstruct(ReconstructRequest(folder=out, output=dense))
    source, result = weights_of(model), weights_of(dense)
    stacks = manifest_of(out)["stacks"]
    assert len(stacks) == 6
    for stack in stacks:
        exact = dense_stack(source, stack["layer"], stack["projection"])
        found = dense_stack(result, stack["layer"], stack["projection"])
        residual = float((exact - found).norm() / exact.norm())
        assert residual == pytest.approx(stack["relative_residual"], abs=1e-6)
        assert stack["multilinear_rank"] == [6, 18, 22]


def test_truncated_residuals_are_not_above_those_of_tensorly(
    tiny_model: Path, tmp_path: Path
) -> None:
    request = DecomposeRequest(
        model=tiny_model, rank="6,16,20", max_sweeps=5, output=tmp_path / "ours"
    )
    decompose(request)
    decompose(replace(request, engine="tensorly", output=tmp_path / "tensorly"))
    pairs = zip(
        manifest_of(tmp_path / "ours")["stacks"],
        manifest_of(tmp_path / "tensorly")["stacks"],
        strict=True,
    )
    for ours, reference in pairs:
        assert ours["relative_residual"] <= reference["relative_residual"] + 1e-4


def test_keep_on_the_shipped_model_never_exceeds_and_nearly_reaches_the_budget(
    tmp_path: Path,
) -> None:
    options: tuple[tuple[float, dict[str, Any]], ...] = (
        (0.75, {}),
        (0.5, {"joint": "gate_up"}),
        (0.9, {"group_size": 4}),
    )
    for keep, extra in options:
        out = tmp_path / f"{keep}"
        decompose(DecomposeRequest(model=SHIPPED, keep=keep, output=out, **extra))
        stored = sum(
            tensor.numel() for name, tensor in weights_of(out).items() if ".experts." in name
        )
        manifest = manifest_of(out)
        allowed = keep * manifest["before"]["routed_parameters"]
        assert manifest["after"]["routed_parameters"] == stored
        assert 0.99 * allowed < stored <= allowed


def test_tolerance_is_kept_by_every_stack(tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=SHIPPED, tolerance=0.3, output=out))
    residuals = [stack["relative_residual"] for stack in manifest_of(out)["stacks"]]
    assert max(residuals) <= 0.3
    assert max(residuals) > 0.1


def test_untouched_tensors_and_other_files_are_copied_byte_for_byte(
    tiny_sharded_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=tiny_sharded_model, keep=0.6, layers="2", output=out))
    source, result = weights_of(tiny_sharded_model), weights_of(out)
    touched = "model.layers.2.mlp.experts."
    assert {n for n in source if not n.startswith(touched)} == {
        n for n in result if not n.startswith(touched)
    }
    for name, tensor in source.items():
        if not name.startswith(touched):
            assert torch.equal(result[name], tensor), name
    generation = "generation_config.json"
    assert (out / generation).read_bytes() == (tiny_sharded_model / generation).read_bytes()
    config = json.loads((out / "config.json").read_text())
    announced = config.pop("quantization_config")
    assert config.pop("auto_map")  # ours; the source has none
    assert config == json.loads((tiny_sharded_model / "config.json").read_text())
    assert list(announced["modules"]) == ["model.layers.2.mlp.experts"]


def test_projections_left_out_are_stored_exactly(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=tiny_model, keep=0.6, projections="down_proj", output=out))
    source, tucker = weights_of(tiny_model), TuckerCheckpoint.open(out)
    group = {str(name): tensor for name, tensor in tucker.read_group(1, 0).items()}
    for projection in ("gate_proj", "up_proj"):
        assert torch.equal(group[f"{projection}.core"].double(), dense_stack(source, 1, projection))
        assert f"{projection}.U_I" not in group
    assert group["down_proj.U_I"].shape[0] == 32


def test_joint_shares_one_hidden_factor(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=tiny_model, rank="full,full,20", joint="gate_up", output=out))
    group = TuckerCheckpoint.open(out).read_group(1, 0)
    shapes = {str(name): tensor.shape for name, tensor in group.items()}
    assert shapes["gate_up_proj.U_I"] == (32, 20)
    assert not {"gate_proj.U_I", "up_proj.U_I"} & shapes.keys()
    gate, up = (factors_of(group, projection) for projection in GATE_UP)
    assert gate.U_I is up.U_I


def test_recipe_decides_by_layer_and_projection(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = ROOT / "recipes" / "tiny-moe-by-layer.yaml"
    decompose(DecomposeRequest(model=SHIPPED, recipe=recipe, output=out))
    stacks = {(s["layer"], s["projection"]): s for s in manifest_of(out)["stacks"]}
    assert stacks[1, "gate_proj"]["multilinear_rank"] == [16, 96, 96]
    assert stacks[2, "down_proj"]["relative_residual"] <= 0.2
    assert stacks[3, "up_proj"]["multilinear_rank"][2] < 96


def test_output_type_other_than_the_source_is_stored_and_reconstructed(
    tiny_model: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=tiny_model, tolerance=1e-6, dtype="float32", output=out))
    reconstruct(ReconstructRequest(folder=out, output=dense))
    assert max(s["relative_residual"] for s in manifest_of(out)["stacks"]) <= 1e-6
    source, result = weights_of(tiny_model), weights_of(dense)
    for name, tensor in source.items():
        torch.testing.assert_close(result[name].float(), tensor.float(), rtol=0, atol=1e-6)


def test_dry_run_reads_no_weights_and_predicts_what_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    request = DecomposeRequest(model=tiny_model, keep=0.7, joint="gate_up", output=tmp_path / "out")
    plan, report = preview(replace(request, output=None)), decompose(request)
    assert plan is not None
    assert report is not None
    assert plan.before == report.before
    assert plan.after == report.after
    assert plan.peak_bytes > 0
    assert 0 < plan.duration.least < plan.duration.most


def test_same_command_twice_writes_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        out = tmp_path / name
        decompose(DecomposeRequest(model=tiny_model, rank="5,20,24", output=out))
        shard(ShardRequest(folder=out, tp=3, layout="rank"))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
