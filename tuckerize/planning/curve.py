"""Predicted KL divergence at every budget, to choose from before hours of work."""

from __future__ import annotations

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.profile_pass import profile_model
from tuckerize.errors import UsageError
from tuckerize.planning.allocation import allocate
from tuckerize.planning.plan import search_space, stored_type
from tuckerize.progress import Progress
from tuckerize.recipe import Recipe
from tuckerize.report import CurvePoint, CurveReport

KEEPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
"""Budgets of the curve."""


def kl_curve(recipe: Recipe, calibration: CalibrationPass, progress: Progress) -> CurveReport:
    """Predicted KL divergence at every budget of `KEEPS` that the sizes allow.

    Profiles the model if its profile is not in the cache; decomposes nothing.

    Args:
        recipe: Recipe of the calibration; its rules do not matter.
        calibration: The model and its text.
        progress: Shows how far the profile is.
    """
    source, settings = calibration.source, calibration.settings
    model, before = source.moe, source.size
    profiles = profile_model(calibration, progress)
    shape = model.shape._replace(experts=calibration.group_size)
    groups = model.shape.experts // calibration.group_size
    space = search_space(settings, shape, groups, stored_type(recipe, model))
    points = []
    for keep in KEEPS:
        try:
            choices = allocate(profiles, space, keep=keep, how=settings.allocate)
        except UsageError:
            break
        routed_bytes = sum(choice.bytes for choice in choices)
        points.append(
            CurvePoint(
                keep=keep,
                routed_parameters=sum(space.stored_parameters(choice.target) for choice in choices),
                total_bytes=before.total_bytes - before.routed_bytes + routed_bytes,
                kl=sum(choice.predicted_kl for choice in choices),
                largest_error=max(choice.error for choice in choices) ** 0.5,
            )
        )
    return CurveReport(str(source.checkpoint.folder), before, tuple(points), calibration.notes)
