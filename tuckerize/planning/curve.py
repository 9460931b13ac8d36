"""What every budget is predicted to cost, so that a user can choose before hours of work."""

from __future__ import annotations

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.profile_pass import profile_model
from tuckerize.checkpoint.reader import TORCH_DTYPES
from tuckerize.errors import UsageError
from tuckerize.planning.plan import choose_sizes
from tuckerize.progress import Progress
from tuckerize.recipe import Recipe
from tuckerize.report import CurvePoint, CurveReport

KEEPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
"""Budgets of the curve."""


def damage_curve(recipe: Recipe, calibration: CalibrationPass, progress: Progress) -> CurveReport:
    """Predicted damage at every budget of `KEEPS` that the sizes allow.

    Profiles the model if its profile is not in the cache; decomposes nothing.

    Args:
        recipe: Settings of the calibration; its rules do not matter.
        calibration: The model and its text.
        progress: Shows how far the profile is.
    """
    run = calibration
    profiles = profile_model(run, progress)
    source, before = run.source, run.source.size
    dtype = TORCH_DTYPES[recipe.dtype.safetensors_name] if recipe.dtype else source.dtype
    number = dtype.itemsize
    points = []
    for keep in KEEPS:
        try:
            choices = choose_sizes(recipe, source.moe, run.group_size, profiles, keep)
        except UsageError:
            break
        stored = sum(choice.parameters for choice in choices)
        points.append(
            CurvePoint(
                keep=keep,
                routed_parameters=stored,
                total_bytes=before.total_bytes - before.routed_bytes + stored * number,
                damage=sum(choice.damage for choice in choices),
                largest_error=max(choice.error for choice in choices) ** 0.5,
            )
        )
    return CurveReport(str(source.checkpoint.folder), before, tuple(points), calibration.notes)
