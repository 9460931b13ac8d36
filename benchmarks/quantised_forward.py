"""Tokens a second of a layer with quantised cores against the same one in bfloat16.

    python -m benchmarks.quantised_forward --threads 1 --write

Real sizes of DeepSeek-V2-Lite (64 experts of 1408 x 2048, top 6), random codes: what a product
takes does not depend on them. All alternate in one process, and the least of some runs counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

from benchmarks.forward import CAPABILITY, Call, Shape, best_seconds
from benchmarks.full_width import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K
from tuckerize.domain import CoreType, MultilinearRank, Projection
from tuckerize.format.config import GroupShape
from tuckerize.format.cores import part_dtype
from tuckerize.moe.family import Glu
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.experts import TuckerExperts

RESULTS = Path(__file__).parent / "results" / f"quantised_forward_{CAPABILITY.lower()}.json"
SHAPES = {"neurons 0.75": Shape(1056, HIDDEN), "latent 0.75": Shape(INTERMEDIATE, 1504)}
ENCODINGS = (None, CoreType.W8, CoreType.W4, CoreType.W3)
TOKENS = (1, 8, 32, 128, 1024)


def experts_of(shape: Shape, core_type: CoreType | None) -> TuckerExperts:
    """A layer of a shape, gate and up with one U_I, cores in an encoding."""
    ranks = dict.fromkeys(Projection, MultilinearRank(EXPERTS, shape.neurons, shape.rank))
    group = GroupShape((shape.neurons,) * EXPERTS, ranks, joint=True, core_type=core_type)
    tensors = {}
    for name, sizes in group.tensor_shapes(HIDDEN).items():
        dtype = part_dtype(name.part, core_type, torch.bfloat16)
        if dtype.is_floating_point:
            tensors[name] = torch.empty(sizes, dtype=dtype).normal_(std=0.02)
        else:
            least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            tensors[name] = torch.randint(least, most, sizes, dtype=dtype)
    return TuckerExperts([tensors], group_size=EXPERTS, activation=activation_of(Glu()))


def first_seconds(layer: TuckerExperts) -> float:
    """Seconds of the first token of a layer, which packs codes for torch's kernel for 4 bits."""
    operands = torch.randn(1, HIDDEN).bfloat16(), torch.arange(TOP_K)[None], torch.ones(1, TOP_K)
    start = time.perf_counter()
    layer(*operands)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            layers = {str(core or "bf16"): experts_of(shape, core) for core in ENCODINGS}
            for encoding, layer in layers.items():
                print(f"{name:13} first {encoding:5} {first_seconds(layer):9.2f} s", flush=True)
            for tokens in TOKENS:
                x_TI = torch.randn(tokens, HIDDEN).bfloat16()
                weights_Tk, experts_Tk = torch.rand(tokens, EXPERTS).softmax(1).topk(TOP_K)
                operands = x_TI, experts_Tk, weights_Tk.bfloat16()
                calls: dict[str, Call] = {
                    encoding: lambda layer=layer, operands=operands: layer(*operands)  # type: ignore[misc]
                    for encoding, layer in layers.items()
                }
                seconds = best_seconds(calls, options.runs)
                for encoding, own in seconds.items():
                    ratio = round(seconds["bf16"] / own, 3)
                    rows.append({
                        "shape": name, "tokens": tokens, "cores": encoding,
                        "milliseconds": round(1e3 * own, 2), "ratio": ratio,
                    })  # fmt: skip
                    print(
                        f"{name:13} {tokens:5} {encoding:5} {1e3 * own:9.2f} ms {ratio:6.2f}",
                        flush=True,
                    )
    if options.write:
        about = {
            "command": " ".join(["python", "-m", "benchmarks.quantised_forward", *sys.argv[1:]]),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "capability": CAPABILITY,
            "cores": os.cpu_count(),
            "threads": options.threads,
        }
        RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
