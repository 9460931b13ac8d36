"""Time and peak memory of the main job at DeepSeek-V2-Lite's real width, with generated weights.

Writes checkpoints with the real sizes (64 experts of 1408 x 2048, bf16, top-6) and few layers, then
runs decompose, shard and verify as a user would, each in its own process, and reads their peak
resident memory from the operating system. Memory of decompose must not grow with the layers.

    python benchmarks/full_width.py --write
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

EXPERTS, INTERMEDIATE, HIDDEN, TOP_K = 64, 1408, 2048, 6
RESULTS = Path(__file__).parent / "results" / "full_width.json"


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


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write a checkpoint of the real width: generated routed experts, routers and norms only.

    Weights have a decaying spectrum on the hidden side that experts share, and noise.
    """
    folder.mkdir(parents=True)
    config = {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": layers + 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    decay_I = torch.logspace(0, -1, HIDDEN)
    for layer in range(1, layers + 1):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.mlp.gate.weight": torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.02,
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                matrix_HI = torch.randn(INTERMEDIATE, HIDDEN, generator=generator) * decay_I * 0.02
                weight = matrix_HI.T if name == "down_proj" else matrix_HI
                tensors[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = weight
        file = f"model-{layer:05d}-of-{layers:05d}.safetensors"
        stored = {name: value.bfloat16().contiguous() for name, value in tensors.items()}
        save_file(stored, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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


def main() -> None:
    """Measure with one and two layers, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    steps: list[Step] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(prefix="full-width-", dir=Path.cwd()) as temporary:
            folder = Path(temporary)
            write_checkpoint(folder / "model", layers)
            steps += main_job(folder, layers)
            shutil.rmtree(folder / "out")
    for step in steps:
        print(
            f"{step.layers} layers  {step.seconds:7.1f} s  {step.peak_gib:5.2f} GiB  {step.command}"
        )
    if arguments.write:
        RESULTS.parent.mkdir(exist_ok=True)
        result = {
            "command": "python benchmarks/full_width.py --write",
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "steps": [asdict(step) for step in steps],
        }
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
