"""Processor time of `plan` and calibrated `decompose` in one process and shared by several.

A generated layer with DeepSeek-V2-Lite's experts (64 of 1408 x 2048, top-6), widths divided by
`--narrow`; 8,192 tokens, one thread per process. Of several processes the one that takes most
counts: what a wait for the others takes, who else runs on the machine decides.

    python -m benchmarks.shared_speed --write
    python -m benchmarks.shared_speed --narrow 1 --only-plan --write
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.full_width import CALIBRATION_TOKENS, EXAMPLE, lite_config, write_checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "shared_speed.json"


def seconds(processes: int, words: list[str], cache: Path) -> tuple[float, float]:
    """Processor seconds of the busiest of some processes, and seconds by the clock."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    if processes > 1:
        environment |= {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    started = time.monotonic()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tuckerize", *words],
            env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if processes > 1 else {}),
            stdout=sys.stderr,
        )
        for r in range(processes)
    ]
    used = []
    for child in children:
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{words[0]} failed")
        used.append(usage.ru_utime + usage.ru_stime)
    return max(used), time.monotonic() - started


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--narrow", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16, help="of refinement")
    parser.add_argument("--only-plan", action="store_true", help="measure `plan` alone")
    arguments = parser.parse_args()
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "model", lite_config(2, dense_layers=1, narrow=arguments.narrow))
        options = ["--model", str(folder / "model")]
        options += ["--calibration", str(EXAMPLE / "held_out.txt")]
        options += ["--calibration-tokens", str(CALIBRATION_TOKENS)]
        size = ["--keep", "0.75", "--refine", str(arguments.steps), "--overwrite"]
        commands = {
            "plan": ["plan", *options],
            "decompose": ["decompose", *options, *size, "--output", str(folder / "out")],
        }
        if arguments.only_plan:
            del commands["decompose"]
        for name, words in commands.items():  # decompose finds the profile in the cache
            one, one_clock = seconds(1, words, folder / "cache of one")
            many, many_clock = seconds(arguments.processes, words, folder / "cache of many")
            measured[name] = {
                "one": round(one, 1),
                "busiest": round(many, 1),
                "ratio": round(one / many, 2),
                "clock_of_one": round(one_clock, 1),
                "clock_of_all": round(many_clock, 1),
            }
            print(f"{name:10} {measured[name]}", flush=True)
    if arguments.write:
        result = {
            "command": " ".join(["python", "-m", "benchmarks.shared_speed", *sys.argv[1:]]),
            "narrow": arguments.narrow,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "processes": arguments.processes,
            "seconds": measured,
        }
        others = [
            own for own in json.loads(RESULTS.read_text()) if own["narrow"] != arguments.narrow
        ]
        RESULTS.write_text(json.dumps([*others, result], indent=2) + "\n")


if __name__ == "__main__":
    main()
