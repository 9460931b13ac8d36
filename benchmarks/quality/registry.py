"""The methods that are compared, by the names of the tables."""

from __future__ import annotations

from benchmarks.quality.layer import Method
from benchmarks.quality.methods import low_rank, mobe, pruning, tucker

METHODS: dict[str, Method] = {
    "per-expert SVD": low_rank.svd,
    "whitened SVD": low_rank.whitened_svd,
    "TensorLy Tucker": tucker.tensorly,
    "TD-MoE": tucker.td_moe,
    "MoLAE": tucker.molae,
    "MoBE": mobe.mobe,
    "D2-MoE": low_rank.d2_moe,
    "REAP": pruning.reap,
    "neuron pruning": pruning.neurons,
    "neuron pruning, compensated": pruning.compensated_neurons,
    "neuron elimination": pruning.eliminated_neurons,
    "HEAPr": pruning.heapr,
}
"""Competitors."""

NEED_SENSITIVITY = {"D2-MoE", "HEAPr"}
"""Those that use derivatives of the loss on the calibration text."""

_CALIBRATED = ("--calibration", "{calibration}", "--calibration-tokens", "{tokens}")

_BOTH = ("--calibration", "{calibration}", "--calibration", "{other}", *_CALIBRATED[2:])
_UNREFINED = (*_CALIBRATED, "--refine", "0")

OURS: dict[str, tuple[str, ...]] = {
    "tuckerize": _CALIBRATED,
    "tuckerize, both domains": _BOTH,
    "tuckerize, data-free": (),
    "unrefined": _UNREFINED,
    "unrefined, one-shot": (*_UNREFINED, "--one-shot"),
    "unrefined, no random tokens": (*_UNREFINED, "--random-share", "0"),
    "unrefined, uniform budget": (*_UNREFINED, "--allocate", "uniform"),
    "unrefined, latent only": (*_UNREFINED, "--shape", "latent"),
    "unrefined, neurons only": (*_UNREFINED, "--shape", "neurons"),
    "unrefined, equal widths": (*_UNREFINED, "--equal-widths"),
    "unrefined, full Tucker": (*_UNREFINED, "--shape", "full"),
    "unrefined, no weighted sweeps": (*_UNREFINED, "--max-sweeps", "0"),
    "unrefined, groups of 4": (*_UNREFINED, "--group-size", "4"),
}
"""Options of `tuckerize decompose` besides `--model`, `--keep` and `--output`."""
