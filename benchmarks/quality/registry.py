"""The methods that are compared, by the names of the tables."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.layer import Method
from benchmarks.quality.methods import low_rank, mobe, parser, pruning, slbf, slimming, tucker

METHODS: dict[str, Method] = {
    "per-expert SVD": low_rank.svd,
    "whitened SVD": low_rank.whitened_svd,
    "TensorLy Tucker": tucker.tensorly,
    "TD-MoE": tucker.td_moe,
    "MoLAE": tucker.molae,
    "MoBE": mobe.mobe,
    "SLBF": slbf.slbf,
    "D2-MoE": low_rank.d2_moe,
    "REAP": pruning.reap,
    "neuron pruning": pruning.neurons,
    "neuron pruning, compensated": pruning.compensated_neurons,
    "neuron elimination": pruning.eliminated_neurons,
    "HEAPr": pruning.heapr,
    "MoE-Slimming": slimming.moe_slimming,
    "PARSER": parser.parser,
}
"""Competitors."""

NEED_SENSITIVITY = {"D2-MoE", "HEAPr"}
"""Those that use derivatives of the loss on the calibration text."""

TEXT, OTHER_TEXT = "{calibration}", "{other}"
"""Stand for the calibration texts of the model's domain and of another one."""


def _calibrated(*texts: str, **settings: object) -> dict[str, Any]:
    return {"calibration": {"texts": texts or (TEXT,), **settings}}


def _unrefined(**settings: object) -> dict[str, Any]:
    return _calibrated(refine=0, **settings)


OURS: dict[str, dict[str, Any]] = {
    "tuckerize": _calibrated(),
    "tuckerize, both domains": _calibrated(TEXT, OTHER_TEXT),
    "tuckerize, data-free": {},
    "unrefined": _unrefined(),
    "unrefined, one-shot": _unrefined(sequential=False),
    "unrefined, no random tokens": _unrefined(random_share=0),
    "unrefined, uniform budget": _unrefined(allocate="uniform"),
    "unrefined, latent only": _unrefined(shape="latent"),
    "unrefined, neurons only": _unrefined(shape="neurons"),
    "unrefined, equal widths": _unrefined(equal_widths=True),
    "unrefined, full Tucker": _unrefined(shape="full"),
    "unrefined, no weighted sweeps": {**_unrefined(), "max_sweeps": 0},
    "unrefined, groups of 4": {**_unrefined(), "group_size": 4},
}
"""Keys of the recipe of `tuckerize decompose` besides its rule, which says `keep`."""
