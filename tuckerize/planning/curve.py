"""Predicted KL divergence at every budget, to choose from before hours of work."""

from __future__ import annotations

from collections.abc import Sequence

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.domain import Size, Target, cores_by_layer, encodings_for
from tuckerize.errors import UsageError
from tuckerize.moe.source import SourceModel
from tuckerize.planning.budget import Budget
from tuckerize.planning.calibrated import CalibratedModel, Encodings, best_choices
from tuckerize.planning.knapsack import Choice, predicted_kl
from tuckerize.planning.plan import stored_type
from tuckerize.recipe import CalibrationSettings, Recipe
from tuckerize.report.plans import CurvePoint, CurveReport

BITS = (14.0, 12.0, 10.0, 8.0, 7.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5)
"""Budgets of the curve, in bits per routed weight."""


def _ways(target: Target) -> dict[str, Encodings]:
    """Encodings that a budget may be spent on, by the names of `CurvePoint`."""
    every = encodings_for(Target.FREE)
    alone: dict[str, Encodings] = {own.value if own else "none": (own,) for own in every}
    return {**alone, "best": encodings_for(target)}


def kl_curve(
    recipe: Recipe,
    calibration: CalibrationPass,
    profiles: Sequence[LayerProfile],
    *,
    targets: Sequence[Target] = (),
    bits: Sequence[float] = BITS,
) -> CurveReport:
    """Predicted KL divergence of every budget that the sizes allow, for all encodings.

    Args:
        recipe: Recipe of the calibration; its rules do not matter.
        calibration: The model and its text.
        profiles: Of all its layers.
        targets: Engines to compare; that of the recipe by default.
        bits: Budgets in bits per routed weight, the largest first.
    """
    source = calibration.source
    before = source.size
    shape = source.moe.shape._replace(experts=calibration.group_size)
    groups, weights = source.moe.shape.experts // shape.experts, stored_type(recipe, source.moe)
    points = []
    for target in targets or (calibration.settings.target,):
        settings = _made_for(target, calibration.settings)
        model = CalibratedModel(settings, shape, groups, weights)
        for way, encodings in _ways(target).items():
            allocators = model.allocators(profiles, encodings)
            for size in bits:
                budget = Budget.of_bits(size, dense_bits=weights.bits)
                try:
                    choices = best_choices(allocators, budget)
                except UsageError:
                    break
                points.append(_point(source, before, model, choices, size, way))
    points.sort(key=lambda point: -point.bits)
    return CurveReport(str(source.checkpoint.folder), before, tuple(points), calibration.notes)


def needs_spectra(settings: CalibrationSettings, targets: Sequence[Target]) -> bool:
    """Whether modes may be truncated for one of the engines; those of the settings by default."""
    made_for = [_made_for(target, settings) for target in targets] or [settings]
    return any(own.has_factors for own in made_for)


def _made_for(target: Target, settings: CalibrationSettings) -> CalibrationSettings:
    """The same settings for other engines."""
    if target == settings.target:
        return settings
    return CalibrationSettings(texts=settings.texts, target=target, multiple=settings.multiple)


def _point(
    source: SourceModel,
    before: Size,
    model: CalibratedModel,
    choices: Sequence[Choice],
    bits: float,
    encodings: str,
) -> CurvePoint:
    space = model.space(None)
    routed_bytes = sum(choice.bytes for choice in choices)
    return CurvePoint(
        bits=bits,
        target=model.settings.target,
        encodings=encodings,
        cores=cores_by_layer(
            {
                layer: choice.target.cores
                for layer, choice in zip(source.moe.layers, choices, strict=True)
            }
        ),
        routed_parameters=sum(space.stored_parameters(choice.target) for choice in choices),
        routed_bytes=routed_bytes,
        total_bytes=before.total_bytes - before.routed_bytes + routed_bytes,
        kl=predicted_kl(choices),
        largest_error=max(choice.error for choice in choices) ** 0.5,
        truncated=any(not choice.target.is_dense(model.shape) for choice in choices),
    )
