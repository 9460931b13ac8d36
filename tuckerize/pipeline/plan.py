"""The `plan` command: predict the cost of every budget before anything is decomposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.tokens import fewest_tokens
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.domain import Device, Target
from tuckerize.errors import UsageError
from tuckerize.linalg.gram import solving_at_once
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.backends import choose_device
from tuckerize.parallel.processes import process_group
from tuckerize.pipeline.memory import fit_memory, most_bytes
from tuckerize.planning.curve import BITS, kl_curve, needs_spectra
from tuckerize.planning.duration import profiles_of
from tuckerize.planning.estimate import Need
from tuckerize.planning.plan import make_plan
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe_files import Texts
from tuckerize.recipe_reader import recipe_of_options
from tuckerize.report.plans import CurveReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A model and the text that budgets are predicted for.

    Attributes:
        model: Folder, Hugging Face id in the local cache, or short name.
        calibration: Text or JSONL file, or several, or the `calibration` keys of a recipe.
        targets: Engines to compare: of "free", "fused-kernels" and "any-engine"; that of
            `calibration` by default.
        bits: Bits per routed weight; sizes from 14 to 1.5 by default.
        group_size: Experts that share a decomposition; all of a layer by default.
        device: Where the products run: auto, npu, cuda or cpu.
        max_memory: Memory that a process may take, as "16GiB": hidden states in temporary files,
            dense experts that are read again whenever they are used, fewer threads, or a refusal
            with the figure; what is free by default.
    """

    model: str | Path
    calibration: Texts | Mapping[str, Any]
    targets: Sequence[str] = ()
    bits: float | None = None
    group_size: int | None = None
    device: str = Device.AUTO
    max_memory: str | None = None


def plan(request: PlanRequest, progress: Progress | None = None) -> CurveReport | None:
    """Predict what every budget of a calibrated decomposition costs; decomposes nothing.

    One pass over the text; its result is kept in the cache, where `decompose` finds it. Under
    torchrun the processes share the experts of each layer.

    Args:
        request: The model and the text.
        progress: Shows how far the profile is.

    Returns:
        The curve, on process 0; None on the other processes of a torchrun run.

    Raises:
        TuckerizeError: The model or the text cannot be used; the message says why.

    Example:
        >>> request = PlanRequest(model="DeepSeek-V2-Lite", calibration="text.txt")
        >>> for point in plan(request).points:  # doctest: +SKIP
        ...     print(point.bits, point.encodings, point.total_bytes, point.kl)
    """
    recipe = recipe_of_options(
        None,
        sizes={"keep": 1.0} if request.bits is None else {"bits": request.bits},
        where={},
        how={"group_size": request.group_size, "calibration": request.calibration},
    )
    choice, most = Device.parse(request.device), most_bytes(request.max_memory)
    targets = [Target.parse(target) for target in request.targets]
    group = process_group(lambda local: choose_device(choice, local_rank=local))
    with group as (processes, device), ExitStack() as held:

        def begin() -> tuple[CalibrationPass, Need]:
            source = SourceModel.open(resolve_model(str(request.model)))
            made = make_plan(source, recipe)  # refuse an impossible recipe before reading the text
            opened = CalibrationPass.open(source, recipe, device, processes)
            spectra = needs_spectra(opened.settings, targets)
            need = fit_memory(made, processes, device, most, profile_of=spectra)
            if opened.has_validation:
                return opened, need
            raise UsageError(
                f"{opened.windows_SL.numel()} calibration tokens leave none for validation, and "
                "nothing can be predicted",
                hint=f"give a text of at least {fewest_tokens()} tokens, and leave "
                "--calibration-tokens out",
            )

        held.callback(torch.set_num_threads, torch.get_num_threads())
        held.enter_context(solving_at_once(processes.local_size))
        opened, need = processes.together(begin)
        opened = opened.with_held(experts=need.profile_held, states=need.states_held)
        spectra = needs_spectra(opened.settings, targets)
        profiles = profiles_of(opened, progress or SilentProgress(), spectra=spectra)
        curve = kl_curve(
            recipe,
            opened,
            profiles,
            targets=targets,
            bits=BITS if request.bits is None else (request.bits,),
        )
        return curve if processes.is_leader else None
