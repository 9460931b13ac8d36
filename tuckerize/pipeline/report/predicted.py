"""Predictions for a calibrated checkpoint, from the profile of its source: sizes and spectra."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.profile_pass import ProfileCache
from tuckerize.errors import TuckerizeError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, open_source
from tuckerize.pipeline.evaluation_record import find_evaluation
from tuckerize.pipeline.report.charts import chart
from tuckerize.pipeline.report.page import note, section
from tuckerize.planning.curve import kl_curve
from tuckerize.planning.plan import Plan, make_plan
from tuckerize.recipe_reader import parse_recipe


def predictions(tucker: TuckerCheckpoint, of: str) -> list[str]:
    """The section of a calibrated checkpoint; it says why where there is nothing to show.

    Args:
        tucker: The checkpoint.
        of: End of the heading.
    """
    manifest = tucker.manifest
    if not manifest.calibrated or manifest.source is None:
        return []
    heading = f"Predicted{of}"
    try:
        source = open_source(manifest.source.model, tucker)
        recipe = parse_recipe(manifest.recipe, place="the recipe of the manifest")
        run = CalibrationPass.open(source, recipe, torch.device("cpu"))
    except TuckerizeError as error:
        return [section(heading, note(f"Not shown: {error.message}."))]
    cache = ProfileCache.of(run, spectra=run.settings.has_factors)
    profiles = cache.complete(source.moe.layers) if run.has_validation else None
    if profiles is None:
        return [section(heading, note("Not shown: this machine's cache has no profile of it."))]
    curve = kl_curve(recipe, run, profiles)
    way = recipe.quantize or ("none" if recipe.rules[0].bits is None else "best")
    points = [point for point in curve.points if point.encodings == way]
    drawn = chart(
        "KL, nats per token",
        [point.bits for point in points],
        {"predicted": [point.kl for point in points]},
        bars=False,
        along="bits per routed weight",
        marked=_chosen(tucker, make_plan(source, recipe, profiles)),
    )
    spectra = _spectra(profiles) if run.settings.has_factors else []
    return [section(heading, drawn, *spectra)]


def _chosen(tucker: TuckerCheckpoint, plan: Plan) -> dict[str, tuple[float, float]]:
    """The checkpoint itself in the curve, as predicted and as `evaluate` measured it."""
    manifest, found = tucker.manifest, find_evaluation(tucker)
    bits = manifest.after.bits_per_weight(manifest.before)
    chosen = {}
    if plan.predicted_kl is not None:
        chosen["this checkpoint"] = (bits, plan.predicted_kl)
    if found is not None:
        chosen["this checkpoint, measured"] = (bits, found["divergence"]["kl"]["value"])
    return chosen


def _spectra(profiles: Sequence[LayerProfile]) -> list[str]:
    """Output error of truncating one mode alone, in the first and the last layer."""
    ends = {f"layer {own.layer}": own for own in (profiles[0], profiles[-1])}
    curves = {
        "values of the hidden mode, gate and up": [own.gate_up_KI[0] for own in ends.values()],
        "values of the hidden mode, down": [own.down_I for own in ends.values()],
        "neurons of an expert": [own.selection_H for own in ends.values()],
    }
    charts = []
    for title, squares in curves.items():
        errors = [np.sqrt(own).tolist() for own in squares]
        series, sizes = dict(zip(ends, errors, strict=True)), range(len(errors[0]))
        charts.append(
            chart("relative output error", sizes, series, bars=False, along=f"kept {title}")
        )
    return charts
