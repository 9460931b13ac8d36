"""Profile a model: one pass over the calibration text, through the dense model.

For every layer the curves of `layer_profile`, and the KL divergence of the model's prediction that
an error of the layer causes. It is measured: on a few windows, spread over all of the text, the
quarter of the neurons with the least energy is pruned in this layer alone, and the divergence of
the logits is compared with the output error; and again with a part of this change of the output. A
small error causes more than its square says, as later layers send some tokens to other experts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass, SavedStates, experts_call
from tuckerize.calibration.group_statistics import GroupStatistics, spread
from tuckerize.calibration.layer_profile import LayerProfile, profile_layer, two_orders
from tuckerize.calibration.probes import (
    PARTS,
    divergences,
    name_of,
    num_probe_windows,
    probe_layer,
    pruned,
)
from tuckerize.calibration.states import States
from tuckerize.calibration.text import fingerprint
from tuckerize.checkpoint.output import remove_temporaries
from tuckerize.checkpoint.sealed_tensors import read_sealed, write_sealed
from tuckerize.progress import LayerProgress, Progress, scaled
from tuckerize.version import __version__

# What a profile holds beside its curves.
_NUMBERS = ("sensitivity", "small_sensitivity", "switching")
# Version of the contents of profiles.
_PROFILE_VERSION = 19
_STATES = "hidden.safetensors"
# Names of states that are carried along.
_HIDDEN = "hidden"
_ERROR = "error "


@dataclass(slots=True)
class ProfileCache:
    """Profiles of one model and text, on disk where that is possible.

    A file that is damaged, or was put in the place of another, is as if it were not there. Where
    the folder cannot be written, the profiles are those of this run alone, and a note says so.

    Attributes:
        folder: Where they are; None if nowhere.
        key: Hash of all that they depend on.
        note: Receives the note.
        spectra: Whether modes may be truncated.
        known: Those of this run, by layer.
    """

    folder: Path | None
    key: str
    note: Callable[[str], object]
    spectra: bool = True
    known: dict[int, LayerProfile] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run: CalibrationPass,
        note: Callable[[str], object] = lambda _: None,
        *,
        spectra: bool = True,
    ) -> Self:
        """The cache of a model, text and settings, in `$XDG_CACHE_HOME/tuckerize`.

        Args:
            run: The model, its text and settings.
            note: Receives a note.
            spectra: Whether profiles must have spectra; those that have do for all.
        """
        if not spectra and (whole := cls.of(run, note)).complete(run.source.moe.layers):
            return whole
        key = {
            "version": [__version__, _PROFILE_VERSION],
            "config": run.source.checkpoint.config,
            "weights": run.source.identities,
            "windows": fingerprint(run.windows_SL),
            "group_size": run.group_size,
            "dtype": str(run.model.dtype),
        }
        if not spectra:
            key["spectra"] = spectra
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        cache = cls(None, digest, note, spectra)
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # an unknown user without HOME
            cache._give_up("this user has no home folder")
            return cache
        cache.folder = base / "tuckerize" / digest[:32]
        return cache

    def load_states(self) -> tuple[int, dict[str, Tensor]]:
        """The next layer of an interrupted pass, and tensors; (0, {}) at the start."""
        if self.folder is None:
            return 0, {}
        return SavedStates(self.folder / _STATES).load()

    def save_states(self, next_layer: int, states: dict[str, Tensor]) -> None:
        """Keep what is known before a layer, for an interrupted pass."""
        self._write(lambda folder: SavedStates(folder / _STATES).save(next_layer, states))

    def finish(self) -> None:
        """Remove what an interrupted pass would need."""
        self._write(lambda folder: SavedStates(folder / _STATES).remove())
        self._write(remove_temporaries)

    def load(self, layer: int) -> LayerProfile | None:
        """The profile of a layer, or None."""
        if layer in self.known or self.folder is None:
            return self.known.get(layer)
        tensors = read_sealed(self._path(self.folder, layer), self._label(layer))
        if tensors is None:
            return None
        values = {name: tensor.numpy() for name, tensor in tensors.items()}
        sensitivity, small, switching = (float(values.pop(name)) for name in _NUMBERS)
        return LayerProfile(layer, sensitivity, small, switching, **values)

    def complete(self, layers: Sequence[int]) -> list[LayerProfile] | None:
        """The profiles of all layers; None where a pass has not come to its end."""
        known = [profile for layer in layers if (profile := self.load(layer)) is not None]
        open_ = len(known) < len(layers) or any(math.isnan(own.sensitivity) for own in known)
        return None if open_ else known

    def save(self, profile: LayerProfile) -> None:
        """Keep the profile of a layer."""
        self.known[profile.layer] = profile
        arrays = {
            own.name: torch.from_numpy(np.ascontiguousarray(getattr(profile, own.name)))
            for own in fields(profile)
            if own.name not in ("layer", *_NUMBERS)
        }
        for name in _NUMBERS:
            arrays[name] = torch.tensor(getattr(profile, name), dtype=torch.float64)
        layer = profile.layer
        self._write(
            lambda folder: write_sealed(self._path(folder, layer), self._label(layer), arrays)
        )

    def _write(self, act: Callable[[Path], object]) -> None:
        """Write to the folder, if there is one; it is given up where that fails."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            act(self.folder)
        except OSError as error:
            self._give_up(f"{error.strerror}: {error.filename}")

    def _give_up(self, why: str) -> None:
        self.folder = None
        self.note(
            f"the profile of the model cannot be kept for other budgets ({why}); set "
            "XDG_CACHE_HOME to a folder that can be written"
        )

    def _label(self, layer: int) -> str:
        return f"profile {self.key}, layer {layer}"

    def _path(self, folder: Path, layer: int) -> Path:
        return folder / f"layer-{layer:05d}.safetensors"


def is_profiled(run: CalibrationPass, *, spectra: bool = True) -> bool:
    """Whether the cache has the profiles of all layers."""
    cache = ProfileCache.of(run, spectra=spectra)
    return cache.complete(run.source.moe.layers) is not None


def profile_model(
    run: CalibrationPass, progress: Progress, *, spectra: bool = True
) -> list[LayerProfile]:
    """Profiles of all layers with routed experts, from the cache or from a pass over the text.

    An interrupted pass continues after the last finished layer.

    Args:
        run: The model and its text.
        progress: Shows how far the pass is.
        spectra: Whether modes may be truncated; without, a profile of widths takes less.
    """
    sharing, device = run.sharing, run.model.device
    cache = (
        ProfileCache.of(run, progress.note, spectra=spectra)
        if sharing.is_first
        else ProfileCache(None, "", progress.note, spectra)
    )
    layers = run.source.moe.layers
    found = sharing.of_first(lambda: cache.complete(layers))
    if found is not None:
        cache.finish()
        return found
    progress.start(run.model.layers)
    known = sharing.of_first(lambda: [cache.load(layer) for layer in layers])
    start, saved = sharing.of_first(cache.load_states)
    if any(own is None for own in known[: sum(layer < start for layer in layers)]):
        start, saved = 0, {}
    saved = {name: tensor.to(device) for name, tensor in saved.items()}
    errors = {name: tensor for name, tensor in saved.items() if name.startswith(_ERROR)}
    probes = States.of(saved)
    whole = probes.pop(_HIDDEN) if probes else run.embed()
    windows = spread(run.text_windows, num_probe_windows(len(layers)))
    probes = {name: run.own(own) for name, own in probes.items()}
    progress.advance(start, "continued")
    for layer in range(start, run.model.layers):
        hidden = run.own(whole)
        if layer in layers:
            hidden, errors[f"{_ERROR}{layer}"] = _profile_layer(
                run,
                layer,
                hidden,
                run.own(whole[windows]),
                windows,
                probes,
                cache,
                LayerProgress(progress, layer, 10),
            )
        else:
            probes.update({k: run.run_layer(layer, v, None) for k, v in probes.items()})
            hidden = run.run_layer(layer, hidden, None)
            progress.advance(1, f"layer {layer}")
        whole = run.whole(hidden, len(run.windows_SL))
        named = {name: run.whole(own, len(windows)) for name, own in probes.items()}
        tensors = [own.named(name) for name, own in {**named, _HIDDEN: whole}.items()]
        cache.save_states(layer + 1, dict(ChainMap(errors, *tensors)))
    found_by_probe = divergences(run, run.own(whole[windows]), probes, len(windows))
    profiles = []
    known = sharing.of_first(lambda: [cache.load(layer) for layer in layers])
    for layer, profile in zip(layers, known, strict=True):
        if profile is None:
            raise TypeError(f"layer {layer} has no profile")
        error = max(float(errors[f"{_ERROR}{layer}"]), 1e-30) ** 0.5
        large, small = ((part * error, found_by_probe[name_of(layer, part)]) for part in PARTS)
        second, first = two_orders(large, small)
        profiles.append(
            replace(
                profile,
                sensitivity=large[1] / large[0] ** 2,
                small_sensitivity=second,
                switching=first,
            )
        )
    for profile in profiles:
        cache.save(profile)
    cache.finish()
    progress.close()
    return profiles


def _profile_layer(
    run: CalibrationPass,
    layer: int,
    hidden: States,
    clean: States,
    windows: Sequence[int],
    probes: dict[str, States],
    cache: ProfileCache,
    stages: LayerProgress,
) -> tuple[States, Tensor]:
    """Profile a layer and carry all states through it.

    Args:
        run: The model and its text.
        layer: Index of the layer.
        hidden: States of the calibration set before it.
        clean: Those of the windows that are probed.
        windows: Indices of these.
        probes: States of the same windows, of models with one earlier layer pruned.
        cache: Receives the profile, whose sensitivity stays open until the end of the pass.
        stages: Is told what begins.

    Returns:
        The states of the calibration set after the layer, and the relative squared output error of
        the pruned layer on the windows that are probed.
    """
    stages.stage("tokens")
    groups = run.groups(layer)
    dense = run.dense(layer, groups)
    seen = run.capture(layer, hidden, len(run.windows_SL), dense)
    stages.stage("moments and elimination", 1)
    activation = run.activation(layer)
    sharing = run.sharing
    gather = partial(
        GroupStatistics.gather,
        activation=activation,
        stage=scaled(stages.stage, 3 / len(groups)),
        sharing=sharing,
    )
    statistics = [gather(group, seen.tokens) for group in groups]
    for number, name in enumerate(probes):
        stages.stage(f"probe {number + 1} of {len(probes)}")
        probes[name] = run.run_layer(layer, probes[name], experts_call(dense))
    stages.stage("pruning for a probe")
    moments = [own.moments for own in statistics]
    found, error = probe_layer(run, layer, clean, windows, seen, pruned(groups, moments))
    probes.update(found)
    profile = profile_layer(
        layer,
        statistics,
        seen.tokens,
        activation=activation,
        output_energy=float(seen.output_TI.square().sum()),
        spectra=cache.spectra,
        stage=stages.stage,
        sharing=sharing,
    )
    stages.finish(f"profile of layer {layer}")
    cache.save(profile)
    return seen.after, error
