"""Memory and time of one calibrated layer of DeepSeek-V3's width, from an FP8 source.

Writes a model of one layer with generated weights: experts of 2048 x 7168 in FP8 with blocks of
128 x 128, DeepSeek-V3's router, and little else. Then it plans or decomposes it within a limit, and
watches the process.

    python -m benchmarks.wide_layer --experts 16 --max-memory 12GiB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

EXAMPLE = Path(__file__).parents[1] / "examples"
RESULTS = Path(__file__).parent / "results" / "wide_layer.json"
INTERMEDIATE, HIDDEN, BLOCK = 2048, 7168, 128
_EXPERTS_PER_FILE = 32


def write_model(folder: Path, experts: int, narrow: int = 1) -> None:
    """Write the model: its experts in FP8, expert by expert, all else in bfloat16.

    Its hidden and intermediate sizes are divided by `narrow`.
    """
    torch.manual_seed(0)
    neurons, hidden = INTERMEDIATE // narrow, HIDDEN // narrow
    config = DeepseekV3Config(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=256,
        moe_intermediate_size=neurons,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: Any = DeepseekV3ForCausalLM(config)
    folder.mkdir(parents=True)
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    AutoTokenizer.from_pretrained(EXAMPLE / "tiny-moe").save_pretrained(folder)
    rest = {
        name: _like(name, tensor)
        for name, tensor in model.state_dict().items()
        if ".mlp.experts." not in name
    }
    places = _save(folder, "model-rest.safetensors", rest)
    for first in range(0, experts, _EXPERTS_PER_FILE):
        some = range(first, min(first + _EXPERTS_PER_FILE, experts))
        routed = dict(part for e in some for part in _fp8_expert(e, neurons, hidden))
        places |= _save(folder, f"model-experts-{first:03d}.safetensors", routed)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _like(name: str, tensor: Tensor) -> Tensor:
    """Generated values of a tensor that is not routed."""
    if name.endswith(("norm.weight", "layernorm.weight")):
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    if name.endswith("correction_bias"):
        return torch.zeros(tensor.shape)
    values: Tensor = torch.randn(tensor.shape) / max(tensor.shape[-1], 1) ** 0.5
    return values.bfloat16()


def _fp8_expert(expert: int, neurons: int, hidden: int) -> list[tuple[str, Tensor]]:
    """Codes and scales of one expert."""
    found = []
    for name, shape in (
        ("gate_proj", (neurons, hidden)),
        ("up_proj", (neurons, hidden)),
        ("down_proj", (hidden, neurons)),
    ):
        prefix = f"model.layers.0.mlp.experts.{expert}.{name}"
        rows, columns = shape
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        codes[codes & 0x7F >= 0x78] = 0x70  # neither NaN nor the very largest
        scale = torch.rand(rows // BLOCK, columns // BLOCK) * 4e-4 + 1e-5
        found += [(f"{prefix}.weight", codes.view(torch.float8_e4m3fn))]
        found += [(f"{prefix}.weight_scale_inv", scale)]
    return found


def _save(folder: Path, file: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    save_file(tensors, folder / file)
    return dict.fromkeys(tensors, file)


def watch(words: list[str]) -> dict[str, Any]:
    """Run a command; its clock, and the most that one of its processes takes.

    That is its processor seconds and its peak memory, resident and its own: resident memory holds
    mapped pages of the source too, which the system can take away.
    """
    print("$", " ".join(words), file=sys.stderr, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(words)
    most = {"processor_seconds": 0.0, "resident_gib": 0.0, "own_gib": 0.0}
    while process.poll() is None:
        for pid in _family(process.pid):
            with suppress(OSError, KeyError):  # it has ended
                for name, value in _taken(pid).items():
                    most[name] = max(most[name], value)
        time.sleep(0.2)
    return {
        "command": " ".join(Path(word).name if "/" in word else word for word in words),
        "code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        **{name: round(value, 2) for name, value in most.items()},
    }


def _family(pid: int) -> list[int]:
    """A process and those that it has started, and theirs."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        own = []
    return [pid, *(other for child in own for other in _family(child))]


def _taken(pid: int) -> dict[str, float]:
    """Processor seconds of a process, and its memory in GiB."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    peak, own = (int(lines[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon"))
    seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return {"processor_seconds": seconds, "resident_gib": peak, "own_gib": own}


def commands(model: Path, output: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """The plan, and the decomposition, of the model."""
    python = [sys.executable, "-m"]
    if arguments.processes > 1:
        python += ["torch.distributed.run", "--nproc-per-node", str(arguments.processes), "-m"]
    text = EXAMPLE / "held_out.txt"
    options = ["--model", str(model), "--calibration", str(text), "--target", arguments.target]
    options += ["--max-memory", arguments.max_memory]
    options += ["--calibration-tokens", str(arguments.tokens)]
    plan = [*python, "tuckerize", "plan", *options]
    decompose = [*python, "tuckerize", "decompose", *options, "--output", str(output)]
    decompose += ["--refine", "0"]
    decompose += ["--keep", str(arguments.keep)]
    if arguments.quantize:
        decompose += ["--quantize", arguments.quantize]
    both = {"plan": plan, "decompose": decompose}
    return [both[name] for name in arguments.commands]


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--narrow", type=int, default=1, help="divisor of both sizes")
    parser.add_argument("--tokens", type=int, default=8192, help="plan needs 7681 at least")
    parser.add_argument("--processes", type=int, default=1, help="that share the experts")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--quantize", help="w4, for example; rounding takes most of the time")
    parser.add_argument("--target", default="any-engine")
    parser.add_argument("--max-memory", default="12GiB")
    parser.add_argument("--commands", nargs="+", default=["plan", "decompose"])
    parser.add_argument(
        "--folder", type=Path, help="of the model, which stays; otherwise temporary"
    )
    parser.add_argument("--write", action="store_true", help=f"add to {RESULTS.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wide-layer-", dir=Path.cwd()) as temporary:
        model = arguments.folder or Path(temporary, "model")
        if not model.exists():
            write_model(model, arguments.experts, arguments.narrow)
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary, "cache"))
        runs = [watch(words) for words in commands(model, Path(temporary, "out"), arguments)]
    for run in runs:
        run |= {name: getattr(arguments, name) for name in ("experts", "narrow", "processes")}
        print(json.dumps(run))
    if arguments.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*known, *runs], indent=2) + "\n")


if __name__ == "__main__":
    main()
