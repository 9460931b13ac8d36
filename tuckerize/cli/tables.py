"""Reports as tables for people, on stdout."""

from __future__ import annotations

import json
import math
import sys

from tuckerize.cli.curve_table import show_curve
from tuckerize.cli.evaluate_table import show_evaluate
from tuckerize.cli.fit_table import show_fit
from tuckerize.cli.printing import (
    amount_text,
    cores_text,
    count_text,
    duration_text,
    make_table,
    print_all,
    size_table,
    size_text,
    write_out,
)
from tuckerize.cli.recipe_table import show_recipes
from tuckerize.cli.verify_table import show_check, show_verify
from tuckerize.domain import CoreType, Size, StackShape
from tuckerize.report.checkpoint import CheckReport, InspectReport, PushReport
from tuckerize.report.evaluation import EvaluateReport
from tuckerize.report.json_form import to_json
from tuckerize.report.machine import DoctorReport
from tuckerize.report.plans import CurveReport, FitReport, PlanReport, RecipesReport
from tuckerize.report.results import (
    DecomposeReport,
    FoldReport,
    HealReport,
    QuantizeReport,
    ReconstructReport,
    ShardReport,
)
from tuckerize.report.verification import VerifyReport

Report = (
    InspectReport
    | CurveReport
    | FitReport
    | PlanReport
    | DecomposeReport
    | ShardReport
    | CheckReport
    | VerifyReport
    | QuantizeReport
    | PushReport
    | HealReport
    | ReconstructReport
    | FoldReport
    | RecipesReport
    | EvaluateReport
    | DoctorReport
)

# Stacks of a model with many layers are summed up to this many lines.
_MOST_ROWS = 100
_CORE_SIZES = "* core sizes of the expert, the intermediate and the hidden mode: r_E,r_H,r_I"


def show(report: Report, *, as_json: bool) -> None:  # noqa: C901, PLR0912 one case per report
    """Print a report to stdout: as JSON, or as tables after its notes, which go to stderr."""
    if as_json:
        write_out(json.dumps(to_json(report), indent=2) + "\n")
        return
    for note in getattr(report, "notes", ()):
        sys.stderr.write(f"note: {note}\n")
    match report:
        case InspectReport():
            _show_inspect(report)
        case CurveReport():
            show_curve(report)
        case FitReport():
            show_fit(report)
        case PlanReport():
            _show_plan(report)
        case DecomposeReport():
            _show_decompose(report)
        case ShardReport():
            _show_shard(report)
        case CheckReport():
            show_check(report)
        case VerifyReport():
            show_verify(report)
        case QuantizeReport():
            _show_quantize(report)
        case HealReport():
            _show_heal(report)
        case ReconstructReport():
            _show_reconstruct(report)
        case FoldReport():
            _show_fold(report)
        case PushReport():
            _show_push(report)
        case EvaluateReport():
            show_evaluate(report)
        case RecipesReport():
            show_recipes(report)
        case DoctorReport():
            _show_doctor(report)


def _show_inspect(report: InspectReport) -> None:
    layers = report.layers
    rows = [
        ("model", report.model),
        ("family", report.family),
        ("MoE layers", f"{len(layers)} ({layers[0]} to {layers[-1]})"),
        ("routed experts", f"{report.shape.experts} per layer, top-{report.top_k}"),
        ("shared experts", str(report.shared_experts)),
        ("stack (E, H, I)", _shape_text(report.shape)),
        ("type", f"{report.coding}, read as {report.dtype}" if report.coding else report.dtype),
        ("routed parameters", amount_text(report.size.routed_parameters, report.size.routed_bytes)),
        ("all parameters", amount_text(report.size.total_parameters, report.size.total_bytes)),
        ("share of routed", f"{report.size.routed_parameters / report.size.total_parameters:.1%}"),
    ]
    if report.tucker:
        facts = report.tucker
        residual = "not known: the weights may have been trained"
        if facts.largest_residual is not None:
            residual = f"{facts.largest_residual:.4f} (relative, of a stack's weights)"
        kept = report.size.routed_parameters / facts.before.routed_parameters
        trusted = " or trust_remote_code=True" if facts.carries_loader else ""
        rows += [
            ("decomposed from", facts.source or "not known: transformers has saved it again"),
            ("decomposed layers", ", ".join(map(str, facts.layers))),
            ("kept", f"{kept:.2%} of the routed parameters"),
            (
                "bits per weight",
                f"{report.size.bits_per_weight(facts.before):.2f} per routed weight of the dense "
                f"model, cores {cores_text(facts.cores)}",
            ),
            ("largest residual", residual),
            ("sharded for", ", ".join(facts.shardings) or "nothing yet"),
            ("transformers", f"needs 'import tuckerize'{trusted}: random experts without"),
            ("vLLM", "needs tuckerize installed beside it"),
            (
                "hashes of files",
                f"not checked: run 'tuckerize check {report.model}'"
                if facts.source
                else "not known",
            ),
        ]
    print_all(make_table(("", ""), rows, text_columns=2))
    print_all(
        *(f"warning: {warning}" for warning in (report.tucker.warnings if report.tucker else ()))
    )


def _shape_text(shape: StackShape) -> str:
    return f"{shape.experts} experts x {shape.intermediate} intermediate x {shape.hidden} hidden"


def _show_plan(report: PlanReport) -> None:
    rows = [
        (
            str(stack.layer),
            str(stack.group),
            stack.projection,
            str(stack.multilinear_rank or f"residual ≤ {stack.tolerance:g}"),
            size_text(stack.bytes_before),
            size_text(stack.bytes_after),
        )
        for stack in report.stacks[:_MOST_ROWS]
    ]
    header = ("layer", "group", "projection", "core sizes*", "bytes before", "after")
    print_all(make_table(header, rows, text_columns=3))
    if len(report.stacks) > _MOST_ROWS:
        print_all(f"... and {len(report.stacks) - _MOST_ROWS} more; --json lists all")
    print_all(_CORE_SIZES)
    bound = any(stack.tolerance is not None for stack in report.stacks)
    print_all(
        size_table(report.before, report.after, bound=bound),
        f"estimated peak memory of a process: {size_text(report.peak_bytes)}",
        f"estimated time of one process: {report.duration.text}",
    )
    if report.predicted_kl is not None:
        print_all(_kl_line(report.predicted_kl))
    _warn_of_size(report.before, report.after)


def _show_decompose(report: DecomposeReport) -> None:
    rows = [
        (
            str(stack.layer),
            str(stack.group),
            str(stack.projection),
            str(stack.multilinear_rank),
            f"{stack.relative_residual:.4f}",
            str(stack.sweeps),
        )
        for stack in report.stacks[:_MOST_ROWS]
    ]
    header = ("layer", "group", "projection", "core sizes*", "relative residual", "sweeps")
    print_all(make_table(header, rows, text_columns=3))
    if len(report.stacks) > _MOST_ROWS:
        print_all(f"... and {len(report.stacks) - _MOST_ROWS} more; --json lists all")
    print_all(_CORE_SIZES)
    if report.calibrated:
        _show_calibrated(report)
    resumed = f", {report.resumed_pieces} pieces were done before" if report.resumed_pieces else ""
    print_all(
        size_table(report.before, report.after),
        "residuals are of weights; output errors are relative, on held-out calibration tokens"
        if report.calibrated
        else "data-free: residuals are of weights; no calibration text was used",
        *(f"warning: {warning}" for warning in report.warnings),
    )
    _warn_of_size(report.before, report.after)
    print_all(
        f"wrote {report.output} in {duration_text(report.seconds)}{resumed}",
    )


def _warn_of_size(before: Size, after: Size) -> None:
    """Warn of a result that is not smaller than its source."""
    if after.routed_bytes >= before.routed_bytes:
        less = "larger than" if after.routed_bytes > before.routed_bytes else "as large as"
        print_all(f"warning: the result is {less} the source; choose smaller core sizes")


def _show_calibrated(report: DecomposeReport) -> None:
    rows = [
        (
            str(layer.layer),
            str(layer.neurons),
            "-" if layer.predicted_error is None else f"{layer.predicted_error:.4f}",
            "-" if layer.output_error is None else f"{layer.output_error:.4f}",
        )
        for layer in report.calibrated
    ]
    header = ("layer", "neurons kept", "predicted output error", "measured")
    print_all(make_table(header, rows))
    if report.predicted_kl is not None:
        print_all(_kl_line(report.predicted_kl))


def _kl_line(kl: float) -> str:
    return (
        f"predicted KL divergence from the source: {kl:.4f} nats/token, "
        f"perplexity times about {math.exp(kl):.3f}"
    )


def _show_shard(report: ShardReport) -> None:
    rows = [
        (
            cost.layout + (" (written)" if cost.layout == report.layout else ""),
            size_text(cost.bytes_per_process),
            size_text(cost.traffic_per_token),
        )
        for cost in report.costs
    ]
    rows.append(("dense, as Megatron splits it", "", size_text(report.dense_traffic_per_token)))
    print_all(make_table(("layout", "bytes per process", "sent per token and process"), rows))
    if report.uneven:
        print_all(
            f"{len(report.uneven)} tensors are not divided evenly by {report.tp_size}: "
            "the first processes own one row or column more"
        )
    print_all(f"wrote {report.files} files to {report.folder}")


def _show_quantize(report: QuantizeReport) -> None:
    before, after = report.before, report.after
    rows = [
        (
            "bits per weight",
            f"{before.bits_per_weight(report.dense):.2f}",
            f"{after.bits_per_weight(report.dense):.2f}",
        ),
        ("all bytes", size_text(before.total_bytes), size_text(after.total_bytes)),
        (
            "largest residual",
            "-" if (old := report.largest_residual_before) is None else f"{old:.4f}",
            f"{report.largest_residual:.4f}",
        ),
    ]
    print_all(make_table(("", "before", "after"), rows))
    print_all(f"wrote {report.output}, cores {report.cores}, rounded to nearest")


def _show_heal(report: HealReport) -> None:
    rows = [
        (
            str(step),
            f"{nats:.4f}",
            f"{math.exp(nats):.3f}",
            "kept" if step == report.best_step else "",
        )
        for step, nats in report.curve
    ]
    print_all(make_table(("steps", "nats per token", "perplexity", ""), rows))
    print_all(
        f"wrote {report.output}: {count_text(report.parameters)} parameters trained "
        f"({', '.join(report.trained)}) on {report.tokens:,} tokens; the text that decides was not "
        "trained on"
    )


def _show_reconstruct(report: ReconstructReport) -> None:
    size = amount_text(report.size.total_parameters, report.size.total_bytes)
    print_all(f"wrote {report.output}: {size}")
    if report.cores is not None:
        print_all(f"experts stay {report.cores}, as compressed-tensors stores them")
    if report.cores == CoreType.W8:
        print_all("transformers reads no int8 experts: for it, run the command with --dequantize")
    if report.dequantised_because is not None:
        print_all(f"experts were dequantised: {report.dequantised_because}")


def _show_fold(report: FoldReport) -> None:
    print_all(size_table(report.before, report.after))
    rows = [
        (str(own.layer), f"{own.input_error:.4f}", f"{own.output_error:.4f}")
        for own in report.layers
    ]
    print_all(make_table(("layer", "input error *", "output error *"), rows))
    print_all("* relative residuals of what the experts read and write")
    print_all(f"latent size {report.latent_before} → {report.latent_size}")
    print_all(f"wrote {report.output}")


def _show_push(report: PushReport) -> None:
    if report.url is None:
        print_all(*(f"would upload {name}" for name in report.files), "", report.card)
    done = "would be uploaded to" if report.url is None else "uploaded to"
    where = report.url or report.repository
    print_all(f"{len(report.files)} files, {size_text(report.bytes)}, {done} {where}")


def _show_doctor(report: DoctorReport) -> None:
    rows = [(name, version or "not found") for name, version in report.versions.items()]
    if report.versions["torch_npu"]:
        rows.append(("CANN of this torch_npu", report.cann_expected or "not in our table"))
    if report.device is not None:
        device = report.device
        free, total = size_text(device.free_bytes), size_text(device.total_bytes)
        name = ", ".join(filter(None, (device.name, device.generation)))
        rows += [
            ("device", f"{device.count} x {device.kind} ({name})"),
            ("free memory", f"{free} of {total}"),
            ("collectives", device.backend),
            ("float32 products", device.float32_products),
        ]
    rows += [(v.name, v.value or f"not set: {v.default}") for v in report.variables]
    print_all(make_table(("", ""), rows, text_columns=2))
    for problem in report.problems:
        print_all(f"wrong: {problem.message}", f"   do: {problem.hint}")
    if report.passed:
        print_all("nothing is wrong")
