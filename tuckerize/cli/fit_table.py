"""The table of `plan --fit`."""

from __future__ import annotations

import math

from tuckerize.cli.curve_table import show_curve
from tuckerize.cli.printing import cores_text, make_table, print_all, size_text
from tuckerize.report.plans import FitReport


def show_fit(report: FitReport) -> None:
    """Print what a device holds, the largest experts of every encoding, and what to type."""
    left = report.device_bytes - report.reserved_bytes - report.rest_bytes - report.cache_bytes
    tokens = f"{report.sequences} x {report.context} tokens"
    rows = [
        ("memory", size_text(report.device_bytes)),
        ("overhead: left alone, activations", size_text(report.reserved_bytes)),
        ("all but the routed experts", size_text(report.rest_bytes)),
        (f"key-value cache, {tokens}", size_text(report.cache_bytes)),
        ("left for the routed experts", size_text(left)),
    ]
    print_all(make_table((f"each of {report.devices} devices", "bytes"), rows))
    header = ("target", "cores", "kept", "bits per weight", "experts per device", "all bytes")
    print_all(
        make_table(
            header,
            [
                (
                    str(choice.target),
                    cores_text(choice.cores),
                    f"{choice.kept:.0%}",
                    f"{choice.bits:.2f}",
                    size_text(choice.device_bytes),
                    size_text(choice.total_bytes),
                )
                for choice in report.choices
            ],
            text_columns=2,
        ),
        "the largest experts that fit, by encoding; an estimate: engines differ in overhead",
    )
    if report.bits >= report.source_bits:
        print_all(f"the model fits as it is, with {report.source_bits:.4g} bits per weight")
        return
    bits = math.floor(100 * report.bits) / 100
    whole = [str(choice.cores) for choice in report.choices if choice.cores and choice.kept == 1]
    if whole:
        print_all(f"{whole[0]} fits whole: for bytes alone, quantise and truncate nothing")
    if report.curve is not None:
        show_curve(report.curve)
    print_all(
        "next: tuckerize decompose "
        f"--model {report.model} --bits {bits:g} --calibration TEXT --output OUT"
    )
