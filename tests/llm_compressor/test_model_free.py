"""llm-compressor quantises an any-engine checkpoint: `make test-llm-compressor`.

The line that docs/how-to/quantise-cores.md gives, in a process that does not import tuckerize.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, succeed

pytest.importorskip("llmcompressor")
pytestmark = pytest.mark.llm_compressor

MODEL = ROOT / "examples" / "tiny-moe"
TEXT = ROOT / "examples" / "held_out.txt"
QUANTISE = """
import sys
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import model_free_ptq

stock, output, scheme = sys.argv[1:]
if scheme == "W4A16":  # its groups of 128 do not divide 64 neurons
    groups = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=groups)
rest = ["lm_head", "re:.*embed_tokens.*", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*norm.*"]
model_free_ptq(stock, output, scheme=scheme, ignore=rest, device="cpu")
assert "tuckerize" not in sys.modules
"""
LOSSES = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, *folders = sys.argv[1:]
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(open(text).read()[:40_000], return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(part, labels=part).loss) for part in ids.split(512, 1)[:-1]]
    print("FOUND", json.dumps([model.config.moe_intermediate_size, sum(losses) / len(losses)]))
assert "tuckerize" not in sys.modules
"""


def run(program: str, *arguments: str | Path) -> str:
    """Output of a program in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary checkpoint whose experts have 64 neurons in place of 96."""
    folder = tmp_path_factory.mktemp("stock")
    succeed(
        *("decompose", "--model", MODEL, "--target", "any-engine", "--keep", "0.75"),
        *("--multiple", "32"),  # of 96 neurons; of 256 and more these are multiples of 32 anyway
        *("--calibration", TEXT, "--calibration-tokens", "4096", "--refine", "0"),
        *("--output", folder / "narrow"),
    )
    succeed("reconstruct", folder / "narrow", "--output", folder / "stock")
    return folder / "stock"


@pytest.mark.parametrize(("scheme", "most"), [("FP8_DYNAMIC", 0.01), ("W4A16", 0.05)])
def test_it_is_quantised_and_loads(scheme: str, most: float, stock: Path, tmp_path: Path) -> None:
    run(QUANTISE, stock, tmp_path / scheme, scheme)
    lines = run(LOSSES, TEXT, stock, tmp_path / scheme).splitlines()
    found = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("FOUND")]
    (width, before), (still, after) = found
    assert width == still == 64
    assert before < after < before + most
