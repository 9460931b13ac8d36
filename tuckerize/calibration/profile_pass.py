"""Profile a model: one pass over the calibration text, through the dense model.

For every layer the curves of `layer_profile`, and the sensitivity: the KL divergence of the model's
prediction that an error of the layer causes. It is measured: on a few windows, spread over all of
the text, the quarter of the neurons with the least energy is pruned in this layer alone, and the
divergence of the logits is compared with the output error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass, SavedStates, experts_call
from tuckerize.calibration.layer_profile import LayerProfile, profile_layer
from tuckerize.calibration.moments import GroupMoments, gather_moments
from tuckerize.calibration.text import fingerprint
from tuckerize.calibration.tokens import DenseGroup
from tuckerize.checkpoint.reader import WeightFile, read_tensors
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import Projection
from tuckerize.names import TensorName
from tuckerize.progress import Progress
from tuckerize.version import __version__

# Windows of text that the sensitivity is measured on, and the share of neurons that is pruned.
_PROBE_WINDOWS = 8
_PRUNED_SHARE = 0.25
# Version of the contents of profiles.
_PROFILE_VERSION = 6
# Names of hidden states that are carried along.
_CLEAN = "clean"
_ERROR = "error "


@dataclass(frozen=True, slots=True)
class ProfileCache:
    """Profiles of one model and text on disk, keyed by a hash of all that they depend on.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    @classmethod
    def of(cls, run: CalibrationPass) -> ProfileCache:
        """The cache of a model, text and settings, in `$XDG_CACHE_HOME/tuckerize`."""
        files = [
            (name, file.path.stat().st_size, file.path.stat().st_mtime_ns)
            for name, file in sorted(run.source.checkpoint.files.items())
        ]
        key = {
            "version": [__version__, _PROFILE_VERSION],
            "config": run.source.checkpoint.config,
            "files": files,
            "windows": fingerprint(run.windows_SL),
            "group_size": run.group_size,
            "dtype": str(run.model.dtype),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(base / "tuckerize" / digest[:32])

    @property
    def states(self) -> SavedStates:
        """Hidden states of an interrupted pass."""
        return SavedStates(self.folder / "hidden.safetensors")

    def load(self, layer: int) -> LayerProfile | None:
        """The profile of a layer, or None."""
        path = self._path(layer)
        if not path.exists():
            return None
        values = {
            name: tensor.numpy()
            for name, tensor in read_tensors(path, WeightFile.open(path).tensors)
        }
        sensitivity = float(values.pop("sensitivity"))
        return LayerProfile(layer=layer, sensitivity=sensitivity, **values)

    def save(self, profile: LayerProfile) -> None:
        """Keep the profile of a layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            field.name: torch.from_numpy(np.ascontiguousarray(getattr(profile, field.name)))
            for field in fields(profile)
            if field.name not in ("layer", "sensitivity")
        }
        sensitivity = torch.tensor(profile.sensitivity, dtype=torch.float64)
        write_tensors(self._path(profile.layer), {**arrays, "sensitivity": sensitivity})

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"


def profile_model(run: CalibrationPass, progress: Progress) -> list[LayerProfile]:
    """Profiles of all layers with routed experts, from the cache or from a pass over the text.

    An interrupted pass continues after the last finished layer.

    Args:
        run: The model and its text.
        progress: Shows how far the pass is.
    """
    cache = ProfileCache.of(run)
    known = [
        profile for layer in run.source.moe.layers if (profile := cache.load(layer)) is not None
    ]
    if len(known) == len(run.source.moe.layers) and not any(
        math.isnan(p.sensitivity) for p in known
    ):
        return known
    progress.start(run.model.layers)
    start, states = cache.states.load(run.model.device)
    hidden_SLI = states.pop("hidden") if states else run.embed()
    errors = {name: states.pop(name) for name in list(states) if name.startswith(_ERROR)}
    probes = states or {_CLEAN: hidden_SLI[_spread(run.text_windows, _PROBE_WINDOWS)]}
    progress.advance(start, "continued")
    for layer in range(start, run.model.layers):
        if layer in run.source.moe.layers:
            hidden_SLI, errors[f"{_ERROR}{layer}"] = _profile_layer(
                run, layer, hidden_SLI, probes, cache
            )
        else:
            probes.update({k: run.run_layer(layer, v, None) for k, v in probes.items()})
            hidden_SLI = run.run_layer(layer, hidden_SLI, None)
        cache.states.save(layer + 1, {"hidden": hidden_SLI, **probes, **errors})
        progress.advance(1, f"profile of layer {layer}")
    divergences = _divergences(run, probes)
    profiles = []
    for layer in run.source.moe.layers:
        profile = cache.load(layer)
        if profile is None:
            raise TypeError(f"layer {layer} has no profile")
        error = max(float(errors[f"{_ERROR}{layer}"]), 1e-30)
        profiles.append(replace(profile, sensitivity=divergences[layer] / error))
    for profile in profiles:
        cache.save(profile)
    cache.states.remove()
    progress.close()
    return profiles


def _profile_layer(
    run: CalibrationPass,
    layer: int,
    hidden_SLI: Tensor,
    probes: dict[str, Tensor],
    cache: ProfileCache,
) -> tuple[Tensor, Tensor]:
    """Profile a layer and carry all hidden states through it.

    Returns the hidden states of the calibration set after it, and the relative squared output
    error of the pruned layer. The sensitivity stays open until the end of the pass.
    """
    groups = run.groups(layer)
    dense = run.module([group.as_tensors() for group in groups])
    tokens, after_SLI = run.capture(layer, hidden_SLI, experts_call(dense))
    moments = [gather_moments(group, tokens, activation=run.activation) for group in groups]
    pruned = run.module([_pruned(group, own) for group, own in zip(groups, moments, strict=True)])
    clean_SLI = probes.pop(_CLEAN)
    for name, states in probes.items():
        probes[name] = run.run_layer(layer, states, experts_call(dense))
    seen, probes[_CLEAN] = run.capture(layer, clean_SLI, experts_call(dense))
    probes[str(layer)] = run.run_layer(layer, clean_SLI, experts_call(pruned))
    exact_TI = dense(*seen)
    missed = (pruned(*seen) - exact_TI).square().sum()
    energy = float(dense(*tokens).square().sum())
    profile = profile_layer(
        layer,
        groups,
        moments,
        tokens,
        activation=run.activation,
        output_energy=energy,
        sensitivity=math.nan,
    )
    cache.save(profile)
    return after_SLI, missed / exact_TI.square().sum()


def _pruned(group: DenseGroup, moments: GroupMoments) -> dict[TensorName, Tensor]:
    """The tensors of a group without the neurons of least output energy."""
    down_EHI = group.stacks[Projection.DOWN]
    energy_EH = moments.neurons_EHH.diagonal(dim1=1, dim2=2) * down_EHI.square().sum(2)
    count = max(1, round(_PRUNED_SHARE * group.shape.intermediate))
    least_EM = energy_EH.topk(count, dim=1, largest=False).indices
    places = least_EM[:, :, None].expand(-1, -1, group.shape.hidden)
    return {
        **group.as_tensors(),
        TensorName.core(Projection.DOWN): down_EHI.scatter(1, places, 0.0),
    }


def _spread(length: int, count: int) -> list[int]:
    """Middles of `count` equal parts of a range, or all indices of a shorter one."""
    count = min(count, length)
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]


def _divergences(run: CalibrationPass, probes: dict[str, Tensor]) -> dict[int, float]:
    """Mean Kullback-Leibler divergence (nats per token) from the clean prediction, by layer."""
    totals = dict.fromkeys(run.source.moe.layers, 0.0)
    count = 0
    with run.model.head() as head:
        for window in range(len(probes[_CLEAN])):
            clean_LV = head(probes[_CLEAN][window : window + 1])[0].float().log_softmax(-1)
            count += len(clean_LV)
            for layer in run.source.moe.layers:
                other_LV = head(probes[str(layer)][window : window + 1])[0].float().log_softmax(-1)
                difference_LV = clean_LV.exp() * (clean_LV - other_LV)
                totals[layer] += float(difference_LV.sum())
    return {layer: max(0.0, total / count) for layer, total in totals.items()}
