"""The tables of `verify` and `check`."""

from __future__ import annotations

from collections.abc import Sequence

from tuckerize.cli.printing import make_table, print_all, size_text
from tuckerize.format.check import FileFault
from tuckerize.report.checkpoint import CheckReport
from tuckerize.report.verification import VerifyReport


def show_check(report: CheckReport) -> None:
    """Print the files that were changed, and the verdict."""
    _show_faults(report.faults)
    verdict = "passed" if report.passed else "FAILED"
    print_all(
        f"{verdict}: {report.folder} ({report.files} files, {size_text(report.bytes)}, hashed and "
        "compared with the manifests)"
    )


def _show_faults(faults: Sequence[FileFault]) -> None:
    if faults:
        print_all(*map(str, faults))
        print_all("fetch these files again, or write them again with --overwrite")


def show_verify(report: VerifyReport) -> None:
    """Print the findings of every layer, the traffic and the verdict."""
    _show_faults(report.damaged)
    rows = [
        (
            str(layer.layer),
            "-" if layer.sharding_error is None else f"{layer.sharding_error:.1e}",
            "-" if layer.output_error is None else f"{layer.output_error:.4f}",
            "-" if layer.residual_recorded is None else f"{layer.residual_recorded:.4f}",
            "-" if layer.residual_difference is None else f"{layer.residual_difference:.1e}",
            "failed" if layer.failures else "warning" if layer.warnings else "ok",
        )
        for layer in report.layers
    ]
    header = (
        "layer",
        "sharded vs unsharded",
        "output error vs dense",
        "recorded residual",
        "measured - recorded",
        "",
    )
    if rows:
        print_all(make_table(header, rows))
        if any(layer.output_error is not None for layer in report.layers):
            print_all("tokens are random: output errors are larger than on text")
    else:
        print_all("no layer was computed: files that decide what they are were changed")
    for layer in report.layers:
        for failure in layer.failures:
            print_all(f"layer {layer.layer}: {failure}")
        for warning in layer.warnings:
            print_all(f"warning: layer {layer.layer}: {warning}")
    _show_traffic(report)
    if report.device != "cpu":
        print_all(f"{report.device} multiplies float32 matrices in {report.float32_products}")
    if report.dispatch:
        why = f": {report.fused_unmet}" if report.fused_unmet else ""
        print_all(f"dispatch of tokens to experts: {report.dispatch}{why}")
    what = "unsharded" if report.layout == "unsharded" else f"{_mesh(report)}, {report.layout}"
    doubtful = sum(bool(layer.warnings) for layer in report.layers)
    warned = f" with warnings on {doubtful} layers" if doubtful else ""
    verdict = f"passed{warned}" if report.passed else "FAILED"
    how = f"{report.device}, {report.dtype}, {report.tokens} tokens per layer"
    unseen = report.not_verified
    missed = f"; NOT verified: the shards {', '.join(unseen)}" if unseen else ""
    print_all(f"{verdict}: {report.folder} ({what}, {how}){missed}")


def _mesh(report: VerifyReport) -> str:
    sizes = {"tp": report.tp_size, "ep": report.ep_size, "cp": report.cp_size}
    words = [f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "tp"]
    return ", ".join(words + ["sequence parallel"] * report.sequence_parallel)


def _show_traffic(report: VerifyReport) -> None:
    rows = [
        (one.kind, *(f"{value:,.1f}" for value in (one.counted, one.predicted, one.dense)))
        for one in report.traffic
    ]
    if rows:
        header = ("bytes sent per token and process", "counted", "predicted", "dense, Megatron")
        print_all(make_table(header, rows))
