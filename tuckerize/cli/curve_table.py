"""The table of `plan`: predicted cost of every budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tuckerize.cli.printing import make_table, print_all, size_text
from tuckerize.domain import Cores
from tuckerize.report.plans import CurvePoint, CurveReport

# Heads of a plan's columns.
_WAYS = {"none": "16 bits", "w8": "w8", "w4": "w4", "w3": "w3", "best": "best"}
# Sizes at which 3 bits and nothing truncated are an alternative: docs/how-to/choosing.md.
_THREE_BITS_FROM, _THREE_BITS_BELOW = 3.0, 4.5


def show_curve(report: CurveReport) -> None:
    """Print the predicted cost of every budget: a column for every encoding, or for each target."""
    targets = list(dict.fromkeys(point.target for point in report.points))
    compared = len(targets) > 1
    named = {
        (point.bits, str(point.target) if compared else point.encodings): point
        for point in report.points
        if not compared or point.encodings == "best"
    }
    columns = list(dict.fromkeys(name for _, name in named))
    rows = []
    for bits in dict.fromkeys(bits for bits, _ in named):
        own = [named.get((bits, name)) for name in columns]
        best = min((point for point in own if point is not None), key=lambda point: point.kl)
        rows.append(
            (
                f"{bits:g}",
                size_text(best.total_bytes),
                *("-" if point is None else f"{math.exp(point.kl):.4f}" for point in own),
                _cores(best.cores),
                f"{best.routed_parameters / report.before.routed_parameters:.0%}",
            )
        )
    heads = columns if compared else [_WAYS[name] for name in columns]
    header = ("bits", "all bytes", *heads, "cores", "kept")
    print_all(
        make_table(header, rows),
        "bits per routed weight; predicted perplexity over that of the source, the exponential of "
        "the KL divergence; bytes, cores and kept parameters are those of the smallest",
        *(_advice(report.points, target, compared=compared) for target in targets),
    )
    if any(_THREE_BITS_FROM <= point.bits < _THREE_BITS_BELOW for point in report.points):
        print_all(
            "from 3 to 4.5 bits per weight, 3-bit weights with nothing truncated lost less than w4 "
            "on the largest model that was measured, and have kernels on CUDA; Ascend and CPUs "
            "have none below 4 bits: truncate there"
        )


def _cores(cores: Cores) -> str:
    """Encodings of the layers, short: a terminal has 80 columns."""
    if not isinstance(cores, dict):
        return cores or "16 bits"
    counts = Counter(cores.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _advice(points: Sequence[CurvePoint], target: str, *, compared: bool) -> str:
    """Down to which size quantisation alone is the better choice, in words."""
    own = [point for point in points if point.target == target]
    where = f"{target}: " if compared else ""
    alone = [p.bits for p in own if p.encodings == "best" and not p.truncated]
    if all(point.truncated for point in own):
        return f"{where}no encoding here stores whole experts in so few bits"
    if not alone:
        return f"{where}quantisation alone is predicted to lose more at these sizes"
    return (
        f"{where}from {min(alone):g} bits per weight, quantisation alone loses least, or nearly: "
        "truncate above that for fewer multiply-adds, not for bytes"
    )
