"""The table of `plan`: predicted cost of every budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tuckerize.cli.printing import make_table, print_all, size_text
from tuckerize.domain import Cores, CoreType, encodings_for
from tuckerize.report.plans import CurvePoint, CurveReport

# Heads of a plan's columns.
_WAYS = {"none": "16 bits", "w8": "w8", "w4": "w4", "w3": "w3", "best": "best"}
# Below this size cores of 3 bits lose less than those of 4: docs/how-to/choosing.md.
_THREE_BITS_BELOW = 4.0


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
    small = [point for point in report.points if point.bits < _THREE_BITS_BELOW]
    if any(CoreType.W3 not in encodings_for(point.target) for point in small):
        print_all(
            "engines have kernels for 3 bits on CUDA only, so 'best' leaves w3 out; where those "
            f"are at hand, decompose with --quantize w3 below {_THREE_BITS_BELOW:g} bits per weight"
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
