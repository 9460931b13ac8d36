"""The shipped model is what its card says, and the main job on it keeps it a language model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuckerize import DecomposeRequest, ReconstructRequest, decompose, reconstruct

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = EXAMPLES / "tiny-moe"
TEXT = (EXAMPLES / "held_out.txt").read_text(encoding="utf-8")[:30_000]


@pytest.fixture(scope="module")
def perplexity() -> Callable[..., Any]:
    """The function of examples/perplexity.py."""
    spec = importlib.util.spec_from_file_location("perplexity", EXAMPLES / "perplexity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["perplexity"] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = module.perplexity
    return function


def test_shipped_model_is_small_and_its_routed_experts_matter(
    perplexity: Callable[..., Any],
) -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8_000_000
    whole = perplexity(SHIPPED, TEXT).perplexity
    without_experts = perplexity(SHIPPED, TEXT, zero_routed=True).perplexity
    assert whole < 30
    assert without_experts > 1.6 * whole


def test_more_kept_parameters_lose_less_perplexity(
    perplexity: Callable[..., Any], tmp_path: Path
) -> None:
    found = [perplexity(SHIPPED, TEXT).perplexity]
    for keep in (0.9, 0.75, 0.5):
        out, dense = tmp_path / f"{keep}", tmp_path / f"dense-{keep}"
        decompose(DecomposeRequest(model=SHIPPED, keep=keep, joint="gate_up", output=out))
        reconstruct(ReconstructRequest(folder=out, output=dense))
        found.append(perplexity(dense, TEXT).perplexity)
    assert found == sorted(found)
    assert found[-1] < 1.6 * found[0]


def test_model_for_vllm_is_the_same_function(
    perplexity: Callable[..., Any], tmp_path: Path
) -> None:
    subprocess.run([sys.executable, EXAMPLES / "for_vllm.py", tmp_path], check=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 576
    found, expected = (perplexity(folder, TEXT).perplexity for folder in (tmp_path, SHIPPED))
    assert found == pytest.approx(expected, rel=1e-5)
