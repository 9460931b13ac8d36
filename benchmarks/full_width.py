"""Time and peak memory of the main job at DeepSeek-V2-Lite's real width, with generated weights.

Writes checkpoints with the real sizes (64 experts of 1408 x 2048, bf16, top-6) and few layers, then
runs decompose, shard and verify as a user would, each in its own process, and reads their peak
resident memory from the operating system. Memory of decompose must not grow with the layers.

    python benchmarks/full_width.py --write
    python benchmarks/full_width.py --calibrated --write

The second command measures the decomposition with a calibration text, which takes long on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

# Enough to show the memory of a layer; a CPU needs hours for the default of both.
CALIBRATION_TOKENS, REFINE_STEPS = 8192, 5
EXPERTS, INTERMEDIATE, HIDDEN, TOP_K = 64, 1408, 2048, 6
EXAMPLE = Path(__file__).parents[1] / "examples"
RESULTS = Path(__file__).parent / "results" / "full_width.json"
CALIBRATED_RESULTS = RESULTS.with_stem("full_width_calibrated")


@dataclass(frozen=True)
class Step:
    """One command: what it was, how long it took, and its peak memory.

    Attributes:
        command: As typed.
        layers: MoE layers of the checkpoint.
        seconds: Wall time.
        peak_gib: Peak resident memory of the largest process, GiB.
    """

    command: str
    layers: int
    seconds: float
    peak_gib: float


def lite_config(layers: int, *, dense_layers: int, narrow: int = 1) -> DeepseekV2Config:
    """DeepSeek-V2-Lite with few layers, the first of them dense, and the example's vocabulary.

    Its hidden and intermediate sizes are divided by `narrow`.
    """
    return DeepseekV2Config(
        vocab_size=2048,
        hidden_size=HIDDEN // narrow,
        intermediate_size=10944 // narrow,
        moe_intermediate_size=INTERMEDIATE // narrow,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=layers,
        first_k_dense_replace=dense_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        dtype=torch.bfloat16,
    )


def write_checkpoint(
    folder: Path, config: DeepseekV2Config, device: torch.device | None = None
) -> None:
    """Write a model with random weights by transformers, made on a device.

    Only its vocabulary is small: it is that of the shipped example, whose tokenizer it gets.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device or torch.device("cpu"):
        model: Any = DeepseekV2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE / "tiny-moe").save_pretrained(folder)


def measure(words: list[str], layers: int) -> Step:
    """Run a command and read its wall time and the peak memory of its largest process.

    The operating system reports the largest child ever waited for, so every command gets a helper
    process of its own, whose children are this command's processes only.
    """
    script = (
        "import json, resource, subprocess, sys, time; start = time.monotonic(); "
        "code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(json.dumps([code, time.monotonic() - start, usage.ru_maxrss / 2**20]))"
    )
    typed = " ".join(Path(word).name if "/" in word else word for word in words)
    print(f"$ {typed}", file=sys.stderr)
    result = subprocess.run(
        [sys.executable, "-c", script, *words], check=True, stdout=subprocess.PIPE
    )
    code, seconds, peak = json.loads(result.stdout)
    if code != 0:
        sys.exit(f"{typed} ended with {code}")
    return Step(typed, layers, round(seconds, 1), round(peak, 2))


def main_job(folder: Path, layers: int) -> list[Step]:
    """Decompose, shard over four processes and verify."""
    binaries = Path(sys.executable).parent
    tuckerize, torchrun = str(binaries / "tuckerize"), str(binaries / "torchrun")
    model, output = str(folder / "model"), str(folder / "out")
    decompose = [tuckerize, "decompose", "--model", model, "--output", output]
    verify = [torchrun, "--nproc-per-node", "4", "-m", "tuckerize", "verify", output]
    return [
        measure([*decompose, "--keep", "0.75"], layers),
        measure([tuckerize, "shard", output, "--tp", "4"], layers),
        measure(verify, layers),
        measure([*decompose, "--rank", "32,704,1024", "--max-sweeps", "0", "--overwrite"], layers),
        measure([*decompose, "--keep", "0.75", "--joint", "gate_up", "--overwrite"], layers),
    ]


def calibrated_job(folder: Path, layers: int) -> list[Step]:
    """Profile a model and decompose it with a calibration text."""
    tuckerize = str(Path(sys.executable).parent / "tuckerize")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    model, output, text = folder / "model", folder / "out", EXAMPLE / "held_out.txt"
    options = ["--model", str(model), "--calibration", str(text)]
    options += ["--calibration-tokens", str(CALIBRATION_TOKENS)]
    steps = [measure([tuckerize, "plan", *options], layers)]
    decompose = [tuckerize, "decompose", *options, "--output", str(output)]
    decompose += ["--keep", "0.75", "--refine", str(REFINE_STEPS)]
    return [*steps, measure(decompose, layers)]


def main() -> None:
    """Measure with one and two layers, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--calibrated", action="store_true", help="measure --calibration instead")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    job = calibrated_job if arguments.calibrated else main_job
    results = CALIBRATED_RESULTS if arguments.calibrated else RESULTS
    steps: list[Step] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(prefix="full-width-", dir=Path.cwd()) as temporary:
            folder = Path(temporary)
            write_checkpoint(folder / "model", lite_config(layers + 1, dense_layers=1))
            steps += job(folder, layers)
    for step in steps:
        print(
            f"{step.layers} layers  {step.seconds:7.1f} s  {step.peak_gib:5.2f} GiB  {step.command}"
        )
    if arguments.write:
        results.parent.mkdir(exist_ok=True)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "steps": [asdict(step) for step in steps],
        }
        results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
