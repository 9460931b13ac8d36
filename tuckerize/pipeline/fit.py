"""Sizes that fit onto devices: the part of the `plan` command that reads headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.hub import resolve_model
from tuckerize.domain import Device
from tuckerize.errors import UsageError
from tuckerize.moe.source import SourceModel
from tuckerize.pipeline.plan import PlanRequest, plan
from tuckerize.planning.fit import Devices, Workload, fit_devices
from tuckerize.progress import Progress
from tuckerize.recipe_files import Texts
from tuckerize.report.plans import FitReport


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """A model and the devices that shall serve it.

    Attributes:
        model: Folder, Hugging Face id in the local cache, or short name.
        devices: Number and memory of the devices: "4x32GiB".
        context: Tokens of a sequence.
        sequences: Sequences that are served at the same time.
        calibration: Text or JSONL file, or several, or the `calibration` keys of a recipe, to
            predict what the size costs; nothing is predicted by default.
        targets: Engines to compare in this prediction; that of `calibration` by default.
        group_size: Experts that share a decomposition; all of a layer by default.
        device: Where that is computed: auto, npu, cuda or cpu.
    """

    model: str | Path
    devices: str
    context: int = 8192
    sequences: int = 8
    calibration: Texts | Mapping[str, Any] | None = None
    targets: Sequence[str] = ()
    group_size: int | None = None
    device: str = Device.AUTO


def fit(request: FitRequest, progress: Progress | None = None) -> FitReport:
    """Find the most bits per routed weight that fit onto devices, from headers alone.

    Args:
        request: The model and the devices.
        progress: Shows how far the profile is, with a calibration text.

    Raises:
        UsageError: Nothing fits; the message says what needs the memory.

    Example:
        >>> fit(FitRequest(model="DeepSeek-V2-Lite", devices="2x24GiB")).bits  # doctest: +SKIP
    """
    devices = Devices.parse(request.devices)
    for name, count in (("context", request.context), ("sequences", request.sequences)):
        if count < 1:
            raise UsageError(f"--{name} {count} is not a number of them", hint="use 1 or more")
    source = SourceModel.open(resolve_model(str(request.model)))
    found = fit_devices(source, devices, Workload(request.context, request.sequences))
    if request.calibration is None or found.bits >= found.source_bits:
        return found
    curve = plan(
        PlanRequest(
            model=request.model,
            calibration=request.calibration,
            bits=found.bits,
            targets=request.targets,
            group_size=request.group_size,
            device=request.device,
        ),
        progress,
    )
    return replace(found, curve=curve)
