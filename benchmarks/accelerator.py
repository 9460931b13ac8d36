"""Everything of ours that an accelerator changes, in one run of a few minutes without a network.

    python -m benchmarks.accelerator --write

Runs, each part on its own, so that one which fails does not take the others along:

* ``rates``: what the device multiplies and copies in a second;
* ``shipped``: the shipped model calibrated on the device and on the CPU, verified, evaluated;
* ``hooi``: a data-free stack of DeepSeek-V2-Lite's size, as a share of the device's rate;
* ``layer``: plan and calibrated decomposition of one MoE layer of a real model's width;
* ``forward``: tokens a second of Tucker experts against transformers' dense ones.

``--tiny`` has the same parts with sizes for a test. Weights are generated. Results: the card,
versions, and what each part measured or how it failed.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import platform
import pstats
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import tuckerize
from benchmarks.forward import Contest
from benchmarks.full_width import lite_config, write_checkpoint
from tuckerize.domain import MultilinearRank
from tuckerize.linalg.hooi import hooi
from tuckerize.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "accelerator.json"
MODEL = Path(__file__).parents[1] / "examples" / "tiny-moe"
HELD_OUT = MODEL.parent / "held_out.txt"
TEXT = Path(__file__).parent / "quality" / "trained" / "python_calibration.txt"


@dataclass(frozen=True)
class Sizes:
    """How much work the parts do.

    Attributes:
        product: Side of the square matrices whose product is timed.
        stack: Sizes (E, H, I) of the data-free stack; the core has half of each.
        layers: Sizes (E, H, I, experts per token) of the calibrated layer, by model.
        tokens: Calibration tokens of that layer.
        steps: Refinement steps.
        batches: Sequences of the forward contest.
    """

    product: int
    stack: tuple[int, int, int]
    layers: dict[str, tuple[int, int, int, int]]
    tokens: int
    steps: int
    batches: tuple[int, ...]


FULL = Sizes(
    product=8192,
    stack=(64, 1408, 2048),
    layers={"DeepSeek-V2-Lite": (64, 1408, 2048, 6), "Qwen3-30B-A3B": (128, 768, 2048, 8)},
    tokens=65_536,
    steps=300,
    batches=(1, 8, 32),
)
TINY = Sizes(
    product=256,
    stack=(8, 24, 32),
    layers={"tiny": (8, 24, 32, 2)},
    tokens=8192,
    steps=2,
    batches=(1,),
)


class Clock(SilentProgress):
    """Progress that keeps the seconds at which each stage began."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun = device, time.perf_counter()
        self.stages: list[tuple[float, str]] = []

    def stage(self, name: str) -> None:
        """Record when a stage begins."""
        self.stages.append((round(time.perf_counter() - self.begun, 2), name))

    def advance(self, amount: float, note: str) -> None:  # noqa: ARG002
        """Record when a part ends."""
        self.stage(f"done: {note}")


def device_name(device: torch.device) -> str:
    """The card's name."""
    if device.type == "cpu":
        return device.type
    return str(torch.get_device_module(device).get_device_name())


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(call: Callable[[], object], device: torch.device, runs: int = 3) -> float:
    """Least seconds of some runs, after one that is not counted."""
    call()
    synchronize(device)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def rates(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Tera-operations a second of square products by type, and GB a second of a copy."""
    side = sizes.product
    found: dict[str, float] = {}

    def tflops(a: Tensor, b: Tensor) -> float:
        return 2 * len(a) ** 3 / seconds(lambda: a @ b, device) / 1e12

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"{name}_tflops"] = tflops(a, b)
    if device.type == "cuda":
        a, b = (torch.randn(side, side, device=device) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32_tflops"] = tflops(a, b)
        torch.backends.cuda.matmul.allow_tf32 = False
        a, b = (t.double()[: side // 2, : side // 2].contiguous() for t in (a, b))
        found["float64_tflops"] = tflops(a, b)
        symmetric = (a[:2048, :2048] @ a[:2048, :2048].mT).float()
        found["eigh_2048_float32_s"] = seconds(lambda: torch.linalg.eigh(symmetric), device, 2)
        double = symmetric.double()
        found["eigh_2048_float64_s"] = seconds(lambda: torch.linalg.eigh(double), device, 2)
    source = torch.randn(side, side, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    found["copy_gb_per_s"] = copied / seconds(lambda: target.copy_(source), device) / 1e9
    return {name: round(value, 4) for name, value in found.items()}


def shipped(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The main job on the shipped model, calibrated on the device and on the CPU."""
    found: dict[str, Any] = {}
    tokens = min(sizes.tokens, 16_384)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = temporary
        for where in dict.fromkeys((device.type, "cpu")):
            output = Path(temporary) / where
            start = time.perf_counter()
            report = tuckerize.decompose(
                tuckerize.DecomposeRequest(
                    model=MODEL,
                    output=output,
                    keep=0.75,
                    calibration={
                        "texts": [str(TEXT)],
                        "tokens": min(sizes.tokens, 32_768),
                        "refine": sizes.steps,
                    },
                    device=where,
                )
            )
            synchronize(device)
            took = time.perf_counter() - start
            request = tuckerize.EvaluateRequest(
                model=output, text=str(HELD_OUT), against=MODEL, tokens=tokens, device=where
            )
            dense, tucker = (result.perplexity for result in tuckerize.evaluate(request).results)
            if report is None:  # only other processes than the first have none
                continue
            found[where] = {
                "decompose_s": round(took, 2),
                "routed_parameters": report.after.routed_parameters,
                "perplexity_dense": dense,
                "perplexity_tucker": tucker,
            }
        result = Path(temporary) / device.type
        tuckerize.shard(tuckerize.ShardRequest(folder=result, tp=1))
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        run += ["-m", "tuckerize", "verify", str(result), "--device", device.type]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        found["verify"] = {"exit": done.returncode, "last": (done.stdout or done.stderr)[-600:]}
    return found


def data_free(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Seconds of HOOI on one stack to half of every size, and of its products at full rate."""
    experts, intermediate, hidden = sizes.stack
    stack = torch.randn(sizes.stack, device=device)
    rank = MultilinearRank(experts // 2, intermediate // 2, hidden // 2)
    found = {}
    for sweeps in (0, 2):
        took = seconds(partial(hooi, [stack], rank, max_sweeps=sweeps), device, 1)
        found[f"sweeps_{sweeps}_s"] = round(took, 3)
    # The least that a sweep does: each Gram matrix, and each projection on the other two factors.
    values = experts * intermediate * hidden
    project = 2 * values * (hidden // 2) + values * (intermediate // 2)
    grams = values * (hidden + intermediate) / 2
    found["sweep_tflop"] = round((2 * project + grams) / 1e12, 3)
    return found


def layer(device: torch.device, sizes: Sizes, width: tuple[int, int, int, int]) -> dict[str, Any]:
    """Plan and decompose one calibrated MoE layer of a width; seconds, stages and peak memory."""
    experts, intermediate, hidden, chosen = width
    found: dict[str, Any] = {"sizes": width, "tokens": sizes.tokens, "steps": sizes.steps}
    calibration: dict[str, Any] = {"texts": [str(TEXT)], "tokens": sizes.tokens}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        config = lite_config(2, dense_layers=1)
        config.n_routed_experts, config.num_experts_per_tok = experts, chosen
        config.moe_intermediate_size, config.hidden_size = intermediate, hidden
        if hidden < 1024:
            config.num_attention_heads = config.num_key_value_heads = 2
            config.intermediate_size = 4 * hidden
        write_checkpoint(folder / "model", config, device)
        plan = tuckerize.PlanRequest(
            model=folder / "model", calibration=calibration, device=device.type
        )
        decompose = tuckerize.DecomposeRequest(
            model=folder / "model",
            output=folder / "out",
            keep=0.75,
            calibration=calibration | {"refine": sizes.steps},
            device=device.type,
        )
        for name, call in (
            ("plan", lambda clock: tuckerize.plan(plan, clock)),
            ("decompose", lambda clock: tuckerize.decompose(decompose, clock)),
        ):
            if device.type != "cpu":
                torch.accelerator.reset_peak_memory_stats()
            clock, profile = Clock(device), cProfile.Profile()
            failed = None
            with profile:
                try:
                    call(clock)
                    synchronize(device)
                except Exception:  # noqa: BLE001
                    failed = traceback.format_exc()[-3000:]
            found[name] = {
                "seconds": round(time.perf_counter() - clock.begun, 2),
                "stages": clock.stages,
                "profile": _longest(profile),
            }
            if device.type != "cpu":
                peak = torch.accelerator.max_memory_allocated() / 2**30
                found[name]["peak_device_gib"] = round(peak, 2)
            print(name, found[name]["seconds"], found[name].get("peak_device_gib"), flush=True)
            if failed is not None:
                return found | {"failed": failed}
    return found


def _longest(profile: cProfile.Profile) -> list[str]:
    """The functions with the most time, own and with what they call, as the profiler prints."""
    lines = []
    for order, count in (("cumulative", 45), ("tottime", 25)):
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats(order).print_stats(count)
        rows = [row for row in text.getvalue().splitlines() if row.strip()[:1].isdigit()]
        lines += [order, *(row.replace(str(Path.cwd()), "") for row in rows[1:])]
    return lines


def forward(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of the forward contest in bfloat16."""
    with torch.inference_mode(), device:
        contest = Contest(torch.bfloat16, 1)
        rows = contest.rows(sizes.batches, 5, torch.bfloat16, sys.maxsize)
        return [asdict(row) | {"ratio": round(row.ratio, 3)} for row in rows]


def _shortened(result: Any) -> Any:  # noqa: ANN401
    """A result without the lists that fill pages."""
    if isinstance(result, dict):
        return {k: _shortened(v) for k, v in result.items() if k not in ("stages", "profile")}
    return result


def _too_long(_signal: int, _frame: object) -> None:
    raise TimeoutError("the part takes longer than --limit allows")


def main() -> None:
    """Run the parts, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--only", nargs="+", help="names of parts")
    parser.add_argument("--write", nargs="?", const=RESULTS, type=Path, help="write the results")
    parser.add_argument("--limit", type=int, default=600, help="seconds that a part may take")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_long)
    sizes = TINY if options.tiny else FULL
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    parts: dict[str, Callable[[], Any]] = {
        "rates": lambda: rates(device, sizes),
        "shipped": lambda: shipped(device, sizes),
        "hooi": lambda: data_free(device, sizes),
    }
    if not options.tiny:  # its sizes are DeepSeek-V2-Lite's
        parts["forward"] = lambda: forward(device, sizes)
    for name, width in sizes.layers.items():
        parts[f"layer {name}"] = partial(layer, device, sizes, width)
    results: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tuckerize": tuckerize.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, part in parts.items():
        if options.only and not any(name.startswith(own) for own in options.only):
            continue
        start = time.perf_counter()
        signal.alarm(options.limit)
        try:
            results[name] = part()
        except Exception:  # noqa: BLE001
            results[name] = {"failed": traceback.format_exc()[-3000:]}
        took = time.perf_counter() - start
        print(f"== {name}: {took:.1f} s", json.dumps(_shortened(results[name])), flush=True)
        if options.write:
            options.write.write_text(json.dumps(results, indent=1) + "\n")
    if any(isinstance(part, dict) and "failed" in part for part in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
