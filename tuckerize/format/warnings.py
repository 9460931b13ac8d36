"""Warnings on a Tucker checkpoint that its manifest gives cause for: results not to be trusted."""

from __future__ import annotations

from tuckerize.format.manifest import TuckerManifest
from tuckerize.format.records import LayerRecord

# Above this ratio, and difference, of a measured and a predicted output error, the prediction of
# the whole model is not to be relied on. Without refinement, measured ones are up to 1.5 times.
_RATIO = 2.0
_DIFFERENCE = 0.05


def warnings_of(manifest: TuckerManifest) -> tuple[str, ...]:
    """Warnings for the user, one sentence each; none for a result as it should be."""
    calibrated = manifest.calibrated
    found = []
    measured = manifest.healed is None
    if measured and calibrated and all(record.output_error is None for record in calibrated):
        found.append(
            "no error was measured and nothing predicted: the calibration had too few tokens for "
            "a validation set"
        )
    for layer in manifest.layers:
        found += [f"layer {layer}: {cause}" for cause in worse_than_nothing(manifest, layer)]
    missed = [record for record in calibrated if _is_missed(record)]
    if missed:
        worst = max(missed, key=lambda record: record.output_error or 0.0)
        found.append(
            f"the output error of {len(missed)} of {len(calibrated)} layers is above "
            f"{_RATIO:g} times the predicted one (layer {worst.layer}: {worst.output_error:.3g}, "
            f"predicted {worst.predicted_error:.3g}): do not rely on the predicted KL divergence"
        )
    return tuple(found)


def worse_than_nothing(manifest: TuckerManifest, layer: int) -> list[str]:
    """Recorded errors of a layer above 1: zeros in its place would have less."""
    residual = max(s.relative_residual for s in manifest.stacks if s.layer == layer)
    errors = [record.output_error for record in manifest.calibrated if record.layer == layer]
    found = []
    if residual > 1:
        found.append(f"a stack has the relative residual {residual:.3g}: zeros would have 1")
    found += [
        f"the relative output error on the validation set is {error:.3g}: zeros would have 1"
        for error in errors
        if error is not None and error > 1
    ]
    return found


def is_worse_on_text(manifest: TuckerManifest, layer: int) -> bool:
    """Whether the error of a layer on the validation set is above 1.

    A residual above 1 is a warning: a calibrated layer that has one may be good.
    """
    errors = [record.output_error for record in manifest.calibrated if record.layer == layer]
    return any(error is not None and error > 1 for error in errors)


def _is_missed(record: LayerRecord) -> bool:
    measured, predicted = record.output_error, record.predicted_error
    if measured is None or predicted is None:
        return False
    return measured > max(_RATIO * predicted, predicted + _DIFFERENCE)
