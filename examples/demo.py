"""The main job on the shipped model: inspect, decompose, shard, verify, reconstruct, compare.

Run it with `make demo`. Every command is printed as a user would type it; the last table says what
came out. The held-out text is cut in two: the first part is the validation text, and the rest
calibrates the decomposition.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
MODEL = HERE / "tiny-moe"
OUTPUT = Path("demo-output")
KEEP = "0.75"
# Few, to be done in two minutes; the defaults are 65,536 tokens and 300 steps.
TOKENS, REFINEMENT_STEPS = "8192", "30"
PROCESSES = "2"
PROMPT = "def main() -> None:\n"
NEW_TOKENS = 48
VALIDATION_CHARACTERS = 40_000

console = Console(highlight=False, markup=False)


def run(*words: str) -> None:
    """Print a command as it is typed, and run it."""
    console.print("\n$ " + " ".join(words), style="bold")
    folder = Path(sys.executable).parent
    # torchrun would set the same number of threads, and say so at length.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if words[0] == "torchrun" else None
    with subprocess.Popen([str(folder / words[0]), *words[1:]], env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the command has it too, and says what to do
            code = process.wait()
    if code:
        raise SystemExit(code)


def sample(model: Path) -> str:
    """Greedy continuation of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = network.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.2
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def summary(manifest: dict[str, Any], *, passed: bool) -> Table:
    """Size and output error before and after, and the verdict."""
    before, after = manifest["before"], manifest["after"]
    table = Table("", "before", "after", title="tiny-moe, keep " + KEEP)
    for name, key in (
        ("routed parameters", "routed_parameters"),
        ("bytes of all tensors", "total_bytes"),
    ):
        share = after[key] / before[key]
        table.add_row(name, f"{before[key]:,}", f"{after[key]:,} ({share:.1%})")
    for layer in manifest["calibrated"]:
        table.add_row(f"layer {layer['layer']}: output error", "0", f"{layer['output_error']:.4f}")
    table.add_section()
    table.add_row("verdict", "", "passed" if passed else "FAILED")
    return table


def main() -> None:
    """Run the demonstration."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    shutil.rmtree(OUTPUT, ignore_errors=True)
    tucker, dense = OUTPUT / "tucker", OUTPUT / "dense"
    model = str(MODEL.relative_to(Path.cwd())) if MODEL.is_relative_to(Path.cwd()) else str(MODEL)
    OUTPUT.mkdir()
    text = (HERE / "held_out.txt").read_text(encoding="utf-8")
    calibration, validation = OUTPUT / "text.txt", OUTPUT / "validation.txt"
    calibration.write_text(text[VALIDATION_CHARACTERS:], encoding="utf-8")
    validation.write_text(text[:VALIDATION_CHARACTERS], encoding="utf-8")
    on_text = ("--calibration", str(calibration), "--calibration-tokens", TOKENS)
    how = ("--keep", KEEP, *on_text, "--refine", REFINEMENT_STEPS)
    run("tuckerize", "inspect", model)
    run("tuckerize", "plan", "--model", model, *on_text)
    run("tuckerize", "decompose", "--model", model, *how, "--output", str(tucker))
    run("tuckerize", "shard", str(tucker), "--tp", PROCESSES)
    run("torchrun", "--nproc-per-node", PROCESSES, "-m", "tuckerize", "verify", str(tucker))
    run("tuckerize", "reconstruct", str(tucker), "--output", str(dense))
    run("tuckerize", "evaluate", str(tucker), "--text", str(validation), "--against", model)
    for title, folder in (("before", MODEL), ("after", dense)):
        console.print(f"\n{title}, continuing {PROMPT!r}:", style="bold")
        console.print(sample(folder))
    report = json.loads((tucker / f"tp{PROCESSES}" / "verify.json").read_text())
    manifest = json.loads((tucker / "tuckerize.json").read_text())
    console.print(summary(manifest, passed=report["passed"]))


if __name__ == "__main__":
    main()
