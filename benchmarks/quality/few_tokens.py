"""Output error of a layer whose experts are fitted to few tokens each, on other tokens.

    python -m benchmarks.quality.few_tokens

Closed form alone, of the middle layer of each benchmark model: 25 % of the hidden mode, 30 % of the
neurons, or some of both truncated. Columns are the tokens per expert, over max(H, I).
"""

from __future__ import annotations

from pathlib import Path

import torch

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.compression.closed_form import closed_form, group_output
from tuckerize.compression.factors import GroupFactors
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, GATE_UP, MultilinearRank
from tuckerize.moe.source import SourceModel
from tuckerize.recipe import CalibrationSettings, Recipe, Rule

TRAINED = Path(__file__).parent / "trained"
TOKENS, TEST_TOKENS = 24576, 6144
SHARES = (0.25, 0.5, 1, 1.5, 2.5, 4, 6)
# Kept shares of the neurons and of the hidden mode.
TRUNCATED = {"hidden": (1, 0.75), "neurons": (0.7, 1), "both": (0.8, 0.85)}


def measure(name: str) -> None:
    """Print the errors of one model."""
    text = str(TRAINED / "python_calibration.txt")
    calibration = CalibrationSettings(texts=[text], tokens=TOKENS, random_share=0)
    recipe = Recipe(rules=[Rule(keep=0.75)], calibration=calibration)
    source = SourceModel.open(TRAINED / name)
    run = CalibrationPass.open(source, recipe, torch.device("cpu"))
    hidden, middle = run.embed(), source.moe.layers[len(source.moe.layers) // 2]
    for layer in range(middle + 1):
        if layer not in source.moe.layers:
            hidden = run.run_layer(layer, hidden, None)
            continue
        groups = run.groups(layer)
        dense = run.module(layer, [group.as_tensors() for group in groups])
        tokens, _, _, hidden = run.capture(layer, hidden, len(run.windows_SL), dense)
    (group,) = groups
    shape, activation = group.shape, run.activation(middle)
    test = tokens.part(torch.arange(TOKENS - TEST_TOKENS, TOKENS))
    exact_TI = group_output(group.as_tensors(), group.experts, test, activation)
    unknowns, top_k = max(shape.intermediate, shape.hidden), tokens.experts_Tk.shape[1]
    print(f"{name}: {shape}, top {top_k}")
    for what, (neurons, hidden_share) in TRUNCATED.items():
        rank = MultilinearRank(
            shape.experts, _share(shape.intermediate, neurons), _share(shape.hidden, hidden_share)
        )
        target = CompressionTarget(
            rank.intermediate, {GATE_UP: rank, DOWN: rank._replace(hidden=shape.hidden)}
        )
        errors = []
        for share in SHARES:
            count = int(share * unknowns * shape.experts / top_k)
            if count > TOKENS - TEST_TOKENS:
                break
            fit = tokens.part(torch.arange(count))
            found = closed_form(fit, activation=activation, max_sweeps=10)(
                GroupFactors.of(0, group, target)
            )
            missed = group_output(found.tensors(), group.experts, test, activation) - exact_TI
            errors.append(f"{share:g}: {float(missed.norm() / exact_TI.norm()):.3f}")
        print(f"  {what:8} {'  '.join(errors)}")


def _share(size: int, share: float) -> int:
    return size if share == 1 else int(size * share) // 8 * 8


if __name__ == "__main__":
    for folder in ("fine", "coarse", "large"):
        measure(folder)
