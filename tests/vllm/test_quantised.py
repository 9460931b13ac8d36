"""Quantised cores and quantised experts in the real vLLM engine on CPU: `make test-vllm`.

Quantised MoE kernels of vLLM need AVX-512 or AMX. Its own methods are run with the products of
reference.py in their place.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tuckerize  # noqa: F401  # teaches transformers to load Tucker checkpoints
from tests.running import succeed
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text
from tests.vllm.comparing import EXACT, assert_as_in_transformers, assert_same_up_to_ties
from tests.vllm.running import LATENT, decompose, reconstruct, run

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

METHODS = {
    "w8": "CompressedTensorsW8A8Int8MoEMethod",
    "w4": "CompressedTensorsWNA16MoEMethod",
    "w3": "CompressedTensorsWNA16MoEMethod",
    "fp8": "CompressedTensorsW8A8Fp8MoEMethod",
}
"""vLLM's own for the formats of our cores."""


@pytest.mark.parametrize("encoding", METHODS)
def test_quantised_cores_are_computed_as_transformers_does(encoding: str, tmp_path: Path) -> None:
    """Packed in memory, for one worker and for two that share 72 neurons as 64 and 8."""
    model = make_tiny_family(tmp_path / "dense", "qwen3_moe", neurons=72)
    size = ("--rank", "full,full,40", "--joint", "gate_up")
    plain = decompose(model, tmp_path / "plain", *size)
    checkpoint = decompose(model, tmp_path / encoding, *size, "--quantize", encoding)
    expected, found = run([plain, checkpoint])
    assert found["kernels"] == [["TuckerMoEMethod"] * 2]
    assert_as_in_transformers(found, checkpoint)
    sizes = [
        json.loads((folder / "tuckerize.json").read_text())["after"]["total_bytes"]
        for folder in (plain, checkpoint)
    ]
    saved = expected["bytes"][0] - found["bytes"][0]
    assert saved == pytest.approx(sizes[0] - sizes[1], rel=0.1)
    [shared] = run([checkpoint], "--tp", "2")
    assert_same_up_to_ties(shared, found, EXACT)


@pytest.fixture(scope="module", params=METHODS)
def cores(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def latent(cores: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes of the latent space, of which the smaller is no multiple of a group."""
    folder = tmp_path_factory.mktemp("latent")
    model = make_tiny_family(folder / "dense", "qwen3_moe", neurons=64)
    recipe = folder / "recipe.yaml"
    recipe.write_text(LATENT.format(down=30) + f"quantize: {cores}\n")
    return decompose(model, folder / "out", "--recipe", recipe)


def test_quantised_latent_shape_is_given_to_the_engines_method(cores: str, latent: Path) -> None:
    [found] = run([latent], "--reference-kernels")
    assert found["kernels"] == [[f"kernel {METHODS[cores]}"] * 2]
    assert_as_in_transformers(found, latent)
    [shared] = run([latent], "--reference-kernels", "--tp", "2")
    assert shared["kernels"] == [[f"kernel {METHODS[cores]}"] * 2] * 2
    assert_same_up_to_ties(shared, found, EXACT)


def test_without_a_kernel_the_same_layers_are_computed_by_our_method(latent: Path) -> None:
    [found] = run([latent])
    assert found["kernels"] == [["TuckerMoEMethod"] * 2]
    assert_as_in_transformers(found, latent)


def test_vllm_ascends_methods_get_quantised_layers(cores: str, latent: Path) -> None:
    """On its stand-in; expert-parallel workers exchange tokens inside of those methods."""
    if cores == "fp8":
        pytest.skip("Ascend A2 and A3 have no float8")
    [expected] = run([latent])
    if cores == "w3":  # no scheme there takes it
        [found] = run([latent], "--ascend", "main")
        assert found["kernels"] == [["AscendMoEMethod"] * 2]
        assert_same_up_to_ties(found, expected, EXACT)
        return
    for workers in (1, 2):
        options = ("--tp", "2", "--ep") if workers > 1 else ()
        [found] = run([latent], "--ascend", "main", *options)
        assert found["kernels"] == [["kernel AscendFusedMoEMethod"] * 2] * workers
        assert_same_up_to_ties(found, expected, EXACT)


def test_quantised_any_engine_runs_without_the_plugin(
    cores: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_tiny_family(tmp_path / "dense", "qwen3_moe", neurons=96))
    text = write_text(tmp_path / "text.txt", 4000)
    size = ("--keep", "0.67", "--refine", "0", "--target", "any-engine", "--quantize", cores)
    calibration = ("--calibration", text, "--calibration-tokens", "2048")
    narrow = decompose(model, tmp_path / "out", *size, *calibration)
    stock, dense = reconstruct(narrow), tmp_path / "dequantised"
    assert json.loads((stock / "config.json").read_text())["moe_intermediate_size"] == 64
    monkeypatch.setenv("VLLM_PLUGINS", "")
    [found] = run([stock], "--reference-kernels")
    assert found["kernels"] == [[METHODS[cores]] * 2]
    monkeypatch.delenv("VLLM_PLUGINS")
    succeed("reconstruct", narrow, "--dequantize", "--output", dense)
    assert_as_in_transformers(found, dense)
