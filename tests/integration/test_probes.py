"""What probes of a profile find, against the model of transformers with the same neurons pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tuckerize.calibration import profile_pass
from tuckerize.calibration.calibration_pass import CalibrationPass, token_norms
from tuckerize.calibration.group_statistics import spread
from tuckerize.calibration.layer_profile import two_orders
from tuckerize.calibration.probes import (
    PARTS,
    divergences,
    name_of,
    num_probe_windows,
    probe_layer,
)
from tuckerize.calibration.profile_pass import profile_model
from tuckerize.domain import Projection
from tuckerize.moe.source import SourceModel
from tuckerize.progress import SilentProgress
from tuckerize.recipe import CalibrationSettings, Recipe, Rule


class Forward:
    """Logits of windows, and what a layer's routed experts and the layer itself give."""

    def __init__(self, model: torch.nn.Module, layer: int, windows_SL: Tensor) -> None:
        block: Any = model.get_submodule(f"model.layers.{layer}")
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:  # noqa: ANN401
            def hook(_module: torch.nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401
                found[name] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [
            block.mlp.experts.register_forward_hook(keep("experts")),
            block.register_forward_hook(keep("after")),
        ]
        with torch.no_grad():
            self.logits: Tensor = model(windows_SL).logits
        for hook in hooks:
            hook.remove()
        self.output_TI = found["experts"].flatten(0, -2)
        self.norms_T1 = token_norms(found["after"])


@pytest.mark.parametrize("layer", [1, 2])
def test_probes_are_of_the_pruned_model(
    layer: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = CalibrationSettings(texts=(str(text),), tokens=2048, window=64)
    recipe = Recipe(rules=(Rule(keep=0.5),), calibration=settings)
    run = CalibrationPass.open(SourceModel.open(model), recipe, torch.device("cpu"))
    changed: dict[int, tuple[Tensor, float]] = {}

    def spied(run_: Any, own: int, *args: Any) -> Any:  # noqa: ANN401
        states, error = probe_layer(run_, own, *args)
        (group,) = args[-1]
        changed[own] = group.stacks[Projection.DOWN], float(error)
        return states, error

    found: dict[str, float] = {}

    def kept(*args: Any) -> dict[str, float]:  # noqa: ANN401
        found.update(divergences(*args))
        return found

    monkeypatch.setattr(profile_pass, "probe_layer", spied)
    monkeypatch.setattr(profile_pass, "divergences", kept)
    profile = next(own for own in profile_model(run, SilentProgress()) if own.layer == layer)
    down_EHI, error = changed[layer]
    assert ((down_EHI == 0).all(2).sum(1) == round(0.25 * down_EHI.shape[1])).all()

    windows_SL = run.windows_SL[spread(run.text_windows, num_probe_windows(2))]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    dense = Forward(network, layer, windows_SL)
    down: Any = network.get_submodule(f"model.layers.{layer}.mlp.experts").down_proj
    exact_EIH = down.detach().clone()
    down.data = down_EHI.mT.contiguous()
    pruned = Forward(network, layer, windows_SL)
    missed_TI, exact_TI = (
        output_TI / dense.norms_T1
        for output_TI in (pruned.output_TI - dense.output_TI, dense.output_TI)
    )
    expected = float(missed_TI.square().sum() / exact_TI.square().sum())
    assert error == pytest.approx(expected, rel=1e-3)

    for part in PARTS:
        # Outputs are linear in down: a part of the way is that of a part of the change.
        down.data = exact_EIH.lerp(down_EHI.mT, part)
        logits = Forward(network, layer, windows_SL).logits
        kl = functional.kl_div(
            logits.log_softmax(-1).flatten(0, 1),
            dense.logits.log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        assert found[name_of(layer, part)] == pytest.approx(float(kl), rel=1e-3)
    large, small = ((part * error**0.5, found[name_of(layer, part)]) for part in PARTS)
    assert profile.sensitivity == pytest.approx(large[1] / error, rel=1e-6)
    slopes = profile.small_sensitivity, profile.switching
    assert slopes == pytest.approx(two_orders(large, small), rel=1e-4)
