"""Probes: models with one layer changed, whose prediction tells what an error of it causes.

The quarter of the neurons with the least energy is pruned; another probe makes a part of this
change of the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass, Captured
from tuckerize.calibration.moments import GroupMoments
from tuckerize.calibration.sharing import num_own_windows, own_places
from tuckerize.calibration.states import States
from tuckerize.calibration.tokens import DenseGroup

# Windows of text that are probed: fewer where many layers make probes, each of which goes through
# all layers after its own. And the share of neurons that is pruned.
_WINDOWS = (4, 8)
_WINDOWS_OF_ALL_LAYERS = 128
_PRUNED_SHARE = 0.25
PARTS = (1.0, 0.25)
"""Parts of the change of the output that are probed: about the error of the sizes below 3 bits per
weight, and that of rounding to 4 bits."""


def num_probe_windows(layers: int) -> int:
    """Windows that each of so many layers is probed on."""
    least, most = _WINDOWS
    return max(least, min(most, _WINDOWS_OF_ALL_LAYERS // layers))


def name_of(layer: int, part: float) -> str:
    """Name of the states of a probe."""
    return f"{layer} of {PARTS.index(part)}"


def pruned(groups: Sequence[DenseGroup], moments: Sequence[GroupMoments]) -> list[DenseGroup]:
    """Groups without the neurons of least output energy."""
    found = []
    for group, own in zip(groups, moments, strict=True):
        count = max(1, round(_PRUNED_SHARE * group.shape.intermediate))
        energy_EH = own.energy_EH * own.row_norms_EH
        found.append(group.without_neurons(energy_EH.topk(count, dim=1, largest=False).indices))
    return found


def probe_layer(
    run: CalibrationPass,
    layer: int,
    clean: States,
    windows: Sequence[int],
    seen: Captured,
    changed: Sequence[DenseGroup],
) -> tuple[dict[str, States], Tensor]:
    """Carry the windows that are probed through a layer with changed experts.

    Args:
        run: The model and its text.
        layer: Index of the layer.
        clean: This process's states of the windows before it.
        windows: Indices of all of them in the calibration set.
        seen: What the dense layer did with the calibration set.
        changed: The changed experts.

    Returns:
        The states after the layer by the names of the probes, and the relative squared error of
        the changed output, where tokens are relative to the norms of their hidden states.
    """
    experts = run.dense(layer, changed)
    count = len(run.windows_SL)
    own = [windows[place] for place in own_places(len(windows), run.sharing)]
    exact_TI, norms_T1 = (
        rows.view(count, -1, rows.shape[1])[own].flatten(0, 1)
        for rows in (seen.output_TI, seen.norms_T1)
    )
    outputs = []

    def call(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        output_TI: Tensor = experts(x_TI.float(), experts_Tk, weights_Tk.float())
        outputs.append(output_TI)
        return output_TI.to(x_TI.dtype)

    after = {name_of(layer, PARTS[0]): run.run_layer(layer, clean, call)}
    missed_TI = torch.cat(outputs).div_(norms_T1).sub_(exact_TI)
    for part in PARTS[1:]:
        changed_TI = exact_TI.add(missed_TI, alpha=part).mul_(norms_T1)
        parts = iter(torch.split(changed_TI, [len(output_TI) for output_TI in outputs]))
        after[name_of(layer, part)] = run.run_layer(
            layer, clean, lambda x_TI, *_, parts=parts: next(parts).to(x_TI.dtype)
        )
    tokens = num_own_windows(len(windows), run.sharing) * clean.tokens_SL.shape[1]
    energies = torch.stack([own_TI[:tokens].square().sum() for own_TI in (missed_TI, exact_TI)])
    missed, energy = run.sharing.sum(energies)
    return after, missed / energy


def divergences(
    run: CalibrationPass, clean: States, probes: dict[str, States], windows: int
) -> dict[str, float]:
    """Mean Kullback-Leibler divergence (nats per token) from the clean prediction, by probe."""
    totals = dict.fromkeys(sorted(probes), 0.0)
    count = 0
    with run.model.head() as head:
        for window in range(num_own_windows(windows, run.sharing)):
            clean_LV = head(clean[window : window + 1])[0].float().log_softmax(-1)
            count += len(clean_LV)
            for name in totals:
                other_LV = head(probes[name][window : window + 1])[0].float().log_softmax(-1)
                difference_LV = clean_LV.exp() * (clean_LV - other_LV)
                totals[name] += float(difference_LV.sum())
    parts = run.sharing.of_all((totals, count))
    count = sum(own for _, own in parts)
    return {name: max(0.0, sum(own[name] for own, _ in parts) / count) for name in totals}
