"""The `decompose` command: compress the routed experts of a model into a Tucker checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.text import fingerprint
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.output import OutputFolder, refuse_overlap
from tuckerize.checkpoint.space import require_space
from tuckerize.domain import Device
from tuckerize.errors import UsageError
from tuckerize.linalg.gram import solving_at_once
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.backends import check_encoding, choose_device
from tuckerize.parallel.processes import Processes, process_group
from tuckerize.pipeline.inspect import bytes_to_write, describe_plan
from tuckerize.pipeline.left_alone import notes_on_what_stays
from tuckerize.pipeline.memory import fit_memory, most_bytes
from tuckerize.pipeline.run_plan import compress_model
from tuckerize.planning.duration import announce, plan_duration, profiles_of
from tuckerize.planning.estimate import Need, peak_need
from tuckerize.planning.plan import Plan, make_plan, output_fingerprint
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe import Recipe
from tuckerize.recipe_files import Texts
from tuckerize.recipe_reader import recipe_of_options
from tuckerize.report.plans import PlanReport
from tuckerize.report.results import DecomposeReport
from tuckerize.runtime.activations import activation_of


@dataclass(frozen=True, slots=True, kw_only=True)
class DecomposeRequest:
    """A decomposition to carry out. The size is exactly one of keep, bits, rank, tolerance, recipe.

    Attributes:
        model: Folder, Hugging Face id in the local cache, or short name of the source.
        output: The new folder; `preview` needs none.
        keep: Kept share of the routed parameters, in (0, 1], or a percentage: 0.75 or "75%".
        bits: Bits per routed weight of the dense model, everything that is stored counted: 3.1.
            Without `quantize`, the encoding of the cores is chosen as well.
        rank: Core sizes "r_E,r_H,r_I" (experts, intermediate, hidden): sizes, percentages or
            "full".
        tolerance: Relative residual that each stack may have, in (0, 1).
        recipe: YAML file, name of a shipped recipe, or the recipe's keys and values. It
            replaces the options from layers to calibration, which must be left out then.
        layers: Layers like "1-3,7,20-"; all MoE layers by default.
        projections: Of gate_proj, up_proj and down_proj, with commas or as a list; all by default.
        group_size: Experts that share a decomposition; all of a layer by default.
        joint: "gate_up": one U_I for gate_proj and up_proj.
        dtype: Type of stored factors: bfloat16, float16 or float32; the source's by default.
        quantize: Encoding of the cores: "w8" (int8), "w4" or "w3" (4 or 3 bits in groups of
            32), "w4-g128" or "w3-g128" (of 128) or "fp8" (float8); that of the factors by default.
        max_sweeps: Largest number of HOOI sweeps after the start; 10 by default.
        engine: "tuckerize", or "tensorly" as the slow reference.
        calibration: Text or JSONL file, or several, or the `calibration` keys of a recipe:
            {"texts": ["code.txt:0.7", "prose.txt:0.3"], "tokens": 65536}. Without it the
            decomposition is data-free.
        dequantize_rest: Write what is not compressed dense, in `dtype`, where the source has it
            quantized; by default it keeps its format.
        mtp: "copy": layers that predict further tokens stay as they are; by default they are
            compressed like the others, without calibration.
        device: Where the products run: auto, npu, cuda or cpu.
        collective_timeout: Seconds that a process waits for the others; by default 7200 on npu,
            otherwise 86400.
        max_memory: Memory that a process may take, as "16GiB": hidden states in temporary files,
            dense experts that are read again whenever they are used, fewer threads, or a refusal
            with the figure; what is free by default.
        overwrite: Begin anew: replace an earlier result, finished or not.
    """

    model: str | Path
    output: str | Path | None = None
    keep: float | str | None = None
    bits: float | None = None
    rank: str | None = None
    tolerance: float | None = None
    recipe: str | Path | Mapping[str, Any] | None = None
    layers: str | None = None
    projections: str | Sequence[str] | None = None
    group_size: int | None = None
    joint: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    max_sweeps: int | None = None
    engine: str | None = None
    calibration: Texts | Mapping[str, Any] | None = None
    dequantize_rest: bool | None = None
    mtp: str | None = None
    device: str = Device.AUTO
    collective_timeout: float | None = None
    max_memory: str | None = None
    overwrite: bool = False

    def to_recipe(self) -> Recipe:
        """The recipe that the request stands for.

        Raises:
            UsageError: No size is given, or options contradict each other.
            RecipeError: A value is not possible.
        """
        return recipe_of_options(
            self.recipe,
            sizes={
                "rank": self.rank,
                "keep": self.keep,
                "bits": self.bits,
                "tolerance": self.tolerance,
            },
            where={"layers": self.layers, "projections": self.projections},
            how={
                "group_size": self.group_size,
                "joint": self.joint,
                "dtype": self.dtype,
                "quantize": self.quantize,
                "max_sweeps": self.max_sweeps,
                "engine": self.engine,
                "calibration": self.calibration,
                "dequantize_rest": self.dequantize_rest,
                "mtp": self.mtp,
            },
        )


def decompose(
    request: DecomposeRequest, progress: Progress | None = None
) -> DecomposeReport | None:
    """Decompose the routed experts of a model into a Tucker checkpoint.

    An interrupted run continues when it is started again, and ends with the same bytes. Under
    torchrun the processes share out the stacks; or, with a calibration, the experts of each layer,
    and the last bits depend on their number.

    Args:
        request: The decomposition.
        progress: Shows how far the work is.

    Returns:
        Report of the run, on process 0; None on the other processes of a torchrun run.

    Raises:
        TuckerizeError: The request cannot be carried out; the message says why.

    Example:
        >>> request = DecomposeRequest(model="DeepSeek-V2-Lite", output="OUT", keep=0.75)
        >>> report = decompose(request)  # doctest: +SKIP
        >>> report.after.routed_parameters  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    recipe, most = request.to_recipe(), most_bytes(request.max_memory)
    if request.output is None:
        raise UsageError("--output is missing", hint="name a new folder, or add --dry-run")
    output = Path(request.output)
    with _processes_of(request, recipe) as (processes, device), ExitStack() as held:
        held.callback(torch.set_num_threads, torch.get_num_threads())

        source, calibration = processes.together(lambda: _open(request, recipe, device, processes))

        def begin() -> tuple[Plan, Need]:
            refuse_overlap(output, source.checkpoint.folder)
            folder = OutputFolder(output)
            text = fingerprint(calibration.windows_SL) if calibration else ""
            contents = output_fingerprint(source, recipe, text)
            if processes.is_leader:
                claim = folder.claim(contents, overwrite=request.overwrite, read=progress.advance)
                held.enter_context(claim)
            else:
                folder.join(contents)
            # Before a profile is made, by sizes that a budget pays for.
            plan = make_plan(source, recipe)
            return plan, fit_memory(plan, processes, device, most)

        plan, need = processes.leader_first(begin)
        profiled = calibration and calibration.with_held(
            experts=need.profile_held, states=need.states_held
        )
        profiles = _profiles(plan, profiled, progress)

        def prepare() -> Plan:
            plan = _plan(source, recipe, calibration, profiles)
            if processes.is_leader:
                _note(plan, progress)
                require_space(output, bytes_to_write(plan, calibration))
                announce(plan_duration(plan), "the decomposition", device, progress)
            return plan

        plan = processes.together(prepare)
        return compress_model(
            plan,
            output,
            model=str(request.model),
            device=device,
            processes=processes,
            progress=progress,
            calibration=calibration
            and calibration.with_held(experts=need.held, states=need.states_held),
        )


def preview(request: DecomposeRequest, progress: Progress | None = None) -> PlanReport | None:
    """Plan a decomposition without carrying it out; writes nothing.

    Reads weights only to profile the model, where a budget is calibrated.

    Args:
        request: The decomposition.
        progress: Shows how far a profile is.

    Returns:
        Core sizes, bytes, and estimates of memory and time, on process 0; None on others.

    Raises:
        TuckerizeError: The request cannot be carried out; the message says why.

    Example:
        >>> preview(DecomposeRequest(model="DeepSeek-V2-Lite", keep=0.75))  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    recipe, most = request.to_recipe(), most_bytes(request.max_memory)
    with _processes_of(request, recipe) as (processes, device), ExitStack() as held:
        held.callback(torch.set_num_threads, torch.get_num_threads())

        def begin() -> tuple[Plan, CalibrationPass | None, Need]:
            source, calibration = _open(request, recipe, device, processes)
            plan = make_plan(source, recipe)
            if calibration is None:
                return plan, None, peak_need(plan, torch.get_num_threads(), processes=1)
            return plan, calibration, fit_memory(plan, processes, device, most)

        plan, calibration, need = processes.together(begin)
        source = plan.source
        profiled = calibration and calibration.with_held(
            experts=need.profile_held, states=need.states_held
        )
        profiles = _profiles(plan, profiled, progress)
        plan = processes.together(lambda: _plan(source, recipe, calibration, profiles))
        if not processes.is_leader:
            return None
        _note(plan, progress)
        return describe_plan(plan, need.bytes)


def _note(plan: Plan, progress: Progress) -> None:
    """Say, before the work, what will not load everywhere."""
    for note in notes_on_what_stays(plan):
        progress.note(note)


@contextmanager
def _processes_of(
    request: DecomposeRequest, recipe: Recipe
) -> Iterator[tuple[Processes, torch.device]]:
    """Processes of the run, and the device of this one."""
    choice, seconds = Device.parse(request.device), request.collective_timeout
    with process_group(
        lambda local: choose_device(choice, local_rank=local),
        None if seconds is None else timedelta(seconds=seconds),
    ) as (processes, device):
        check_encoding(device, recipe.quantize)
        # Without calibration each has stacks of its own, in the bytes that one process writes.
        with solving_at_once(1 if recipe.calibration is None else processes.local_size):
            yield processes, device


def _open(
    request: DecomposeRequest, recipe: Recipe, device: torch.device, processes: Processes
) -> tuple[SourceModel, CalibrationPass | None]:
    """Source and calibration set, if any; refuses a recipe that cannot be planned."""
    source = SourceModel.open(resolve_model(str(request.model)))
    make_plan(source, recipe)  # before the text is read
    for glu in source.moe.glus:
        activation_of(glu)  # which a Tucker checkpoint is verified and run with
    if source.moe.family.row.inferred:
        from tuckerize.engines.transformers import check_experts

        check_experts(source.checkpoint.folder, source.moe.family, source.moe.layers)
    if recipe.calibration is None:
        return source, None
    return source, CalibrationPass.open(source, recipe, device, processes)


def _profiles(
    plan: Plan, calibration: CalibrationPass | None, progress: Progress
) -> Sequence[LayerProfile]:
    """Profiles that budgets wait for, or that predict errors; all processes call this."""
    if calibration is None or not plan.recipe.has_budget:
        return ()
    if not plan.waits and not calibration.has_validation:  # nothing is predicted
        return ()
    return profiles_of(calibration, progress, spectra=calibration.settings.has_factors)


def _plan(
    source: SourceModel,
    recipe: Recipe,
    calibration: CalibrationPass | None,
    profiles: Sequence[LayerProfile],
) -> Plan:
    plan = make_plan(source, recipe, profiles)
    is_validated = calibration is None or calibration.has_validation
    return plan if is_validated else plan.without_predictions()
