"""Memory of a calibrated decomposition at a part of DeepSeek-V2-Lite's width: estimate and measure.

Writes a model of one MoE layer with generated weights, whose sizes are those of
`benchmarks/full_width.py` divided by `--narrow`, decomposes it, and watches the process. Core sizes
are given, so that nothing is profiled before.

    python -m benchmarks.calibrated_memory --narrow 2 --write
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.full_width import CALIBRATION_TOKENS, EXAMPLE, lite_config, write_checkpoint
from benchmarks.wide_layer import watch
from tuckerize import DecomposeRequest, preview

RESULTS = Path(__file__).parent / "results" / "calibrated_memory.json"


def main() -> None:
    """Measure, print, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--narrow", type=int, default=2, help="divisor of both sizes")
    parser.add_argument("--rank", default="full,full,75%")
    parser.add_argument("--refine", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"add to {RESULTS.name}")
    arguments = parser.parse_args()
    text = str(EXAMPLE / "held_out.txt")
    with tempfile.TemporaryDirectory(prefix="calibrated-memory-", dir=Path.cwd()) as temporary:
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary, "cache"))
        model, output = Path(temporary, "model"), Path(temporary, "out")
        write_checkpoint(model, lite_config(2, dense_layers=1, narrow=arguments.narrow))
        settings = {
            "texts": [text],
            "tokens": CALIBRATION_TOKENS,
            "refine": arguments.refine,
        }
        planned = preview(
            DecomposeRequest(model=model, rank=arguments.rank, calibration=settings, device="cpu")
        )
        words = [sys.executable, "-m", "tuckerize", "decompose", "--model", str(model)]
        words += ["--calibration", text, "--calibration-tokens", str(CALIBRATION_TOKENS)]
        words += ["--rank", arguments.rank, "--refine", str(arguments.refine), "--device", "cpu"]
        measured = watch([*words, "--output", str(output)])
    if planned is None:
        return
    row = {"narrow": arguments.narrow, "estimated_gib": round(planned.peak_bytes / 2**30, 2)}
    row |= measured
    print(json.dumps(row))
    if arguments.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*known, row], indent=2) + "\n")


if __name__ == "__main__":
    main()
