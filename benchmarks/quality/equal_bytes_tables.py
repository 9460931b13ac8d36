"""Rows at equal bytes as Markdown tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.servable import WEIGHTS, is_servable, is_trellis

Row = dict[str, Any]

SIZES = (8.2, 7.0, 6.0, 5.0, 4.5, 4.1, 3.6, 3.2, 2.8, 2.5, 2.3)
"""Bits per weight that somebody may have room for."""

KINDS = ("in_domain", "out_of_domain")
"""Texts that are measured."""
_NOTHING = "–"
_NEAR = 0.1
"""Bits by which one of our rows may be larger than the largest that it is compared with."""


def tables(rows: Sequence[Row]) -> str:
    """Markdown: for every model the best choice at each size, then every row; then ours.

    The last tables compare with quantisation alone, and with other structures.
    """
    models = {
        model: [row for row in rows if row["model"] == model]
        for model in dict.fromkeys(row["model"] for row in rows)
    }
    lines: list[str] = []
    for model, own in models.items():
        lines += [f"### {model}", "", *_best_table(own), "", *_row_table(own), ""]
    on_ascend = _ratio_table(models, "Ascend")
    lines += [*_ratio_table(models), "", *on_ascend, "", *_trellis_table(models), ""]
    lines += [*_structure_table(models), ""]
    return "\n".join(lines)


def alone(rows: Iterable[Row], bits: float, kind: str) -> float | None:
    """KL divergence of quantisation alone at a size; None below its smallest.

    Weights of fewer and of more bits are mixed to the size, which their divergence follows
    linearly: the least of all mixtures of two rows, whichever way they were rounded.
    """
    points = [(float(r["bits"]), float(r[kind]["kl"])) for r in rows if r["structure"] == "dense"]
    found = [kl for size, kl in points if size <= bits]
    for (low, worse), (high, better) in product(points, repeat=2):
        if low < bits < high:
            found.append(worse + (better - worse) * (bits - low) / (high - low))
    return min(found, default=None)


def ours(rows: Iterable[Row], bits: float) -> list[dict[str, float]]:
    """Our KL divergences at a size, of experts of any width, by setting.

    They are those of rows that are no larger, and between two rows of one encoding and the same
    options, of which the logarithm is interpolated over the bits.
    """
    own = [row for row in rows if (row["structure"], row["target"]) == ("tuckerize", "free")]
    found = [{kind: row[kind]["kl"] for kind in KINDS} for row in own if row["bits"] <= bits]
    for low, high in product(own, repeat=2):
        if low["encoding"] == high["encoding"] and low["bits"] < bits < high["bits"]:
            share = (bits - low["bits"]) / (high["bits"] - low["bits"])
            found.append({
                kind: low[kind]["kl"] ** (1 - share) * high[kind]["kl"] ** share for kind in KINDS
            })  # fmt: skip
    return found


def _structure_table(models: Mapping[str, Sequence[Row]]) -> list[str]:
    """Other structures' divergence relative to ours at the same size."""
    lines = [
        "### Other structures and ours",
        "",
        "Their KL divergence over ours (`free`) at the same size (above 1: ours is less): in "
        "domain · out of domain. Ours are of one setting in both domains, the one whose smaller "
        "ratio is the largest: of rows that are no larger, or between two of one encoding and the "
        "same options.",
        "",
        "| model | bits | what | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for model, rows in models.items():
        for row in sorted(rows, key=lambda row: -float(row["bits"])):
            own = ours(rows, row["bits"])
            if row["structure"] in ("dense", "tuckerize") or is_trellis(row) or not own:
                continue
            ratios = max(([row[k]["kl"] / kls[k] for k in KINDS] for kls in own), key=min)
            ratio = " · ".join(f"{value:.2f}" for value in ratios)
            lines.append(f"| {model} | {row['bits']:.2f} | {name(row)} | {ratio} |")
    return lines


def _trellis_table(models: Mapping[str, Sequence[Row]]) -> list[str]:
    """Our divergence, with trellis codes too, relative to that of these codes alone."""
    lines = [
        "### Ours and trellis codes alone",
        "",
        "KL divergence over that of trellis codes alone (QTIP, EXL3) at the same size, of fewer "
        "and more bits mixed (below 1: less than theirs); in domain · out of domain. Of our own "
        "rows those of `free`; `rounded afterwards` is what `tuckerize decompose` gives in 16 "
        "bits, then in trellis codes, so that nothing is fitted to the rounding.",
        "",
        "| model | bits | what | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for model, rows in models.items():
        coded = [row for row in rows if is_trellis(row)]
        sizes = [row["bits"] for row in coded if row["structure"] == "dense"]
        if not sizes:
            continue
        ours = [row for row in rows if (row["structure"], row["target"]) == ("tuckerize", "free")]
        compared = [row for row in (*ours, *coded) if row["structure"] != "dense"]
        for row in sorted(compared, key=lambda row: -float(row["bits"])):
            theirs = [alone(coded, row["bits"], kind) for kind in KINDS]
            if row["bits"] > max(sizes) + _NEAR:
                continue
            ratios = [
                _NOTHING if kl is None else f"{row[kind]['kl'] / kl:.2f}"
                for kind, kl in zip(KINDS, theirs, strict=True)
            ]
            lines.append(f"| {model} | {row['bits']:.2f} | {name(row)} | {' · '.join(ratios)} |")
    return lines


def _ratio_table(models: Mapping[str, Sequence[Row]], platform: str = "") -> list[str]:
    """Our divergence relative to that of quantisation alone at the same size.

    Args:
        models: Rows by model.
        platform: Where quantisation alone must have kernels; by default any encoding but trellis
            codes, which are compared apart.
    """
    ours: dict[tuple[str, str, float], dict[str, str]] = {}
    for model, rows in models.items():
        others = [
            row for row in rows if (is_servable(row, platform) if platform else not is_trellis(row))
        ]
        for row in rows:
            if row["structure"] != "tuckerize":
                continue
            cells = []
            for kind in KINDS:
                other = alone(others, row["bits"], kind)
                cells.append(_NOTHING if other is None else f"{row[kind]['kl'] / other:.2f}")
            if platform and cells == [_NOTHING] * len(KINDS):
                continue
            key = (row["target"], row["encoding"], -float(row["keep"]))
            ours.setdefault(key, {})[model] = f"{row['bits']:.2f}: {' · '.join(cells)}"
    lines = [
        f"### Ours and quantisation alone{f' with kernels on {platform}' * bool(platform)}",
        "",
        "Our KL divergence over that of quantisation alone at the same size (below 1: ours is "
        "less), of weights of fewer and more bits mixed, the least of all rows but those of "
        "trellis codes; bits: in domain · out of domain. No ratio: quantisation alone has no row "
        "that is so small.",
        "",
        f"| target, encoding | keep | {' | '.join(models)} |",
        "|" + " --- |" * (len(models) + 2),
    ]
    for (target, encoding, keep), found in sorted(ours.items()):
        cells = [found.get(model, _NOTHING) for model in models]
        lines.append(f"| {target}, {encoding} | {-keep:g} | {' | '.join(cells)} |")
    return lines


def name(row: Row) -> str:
    """What a row is, in a few words."""
    if row["structure"] == "tuckerize":
        keep = "" if row["encoding"].startswith("-") else f"{row['keep']:g} × "
        return f"tuckerize {keep}{row['encoding']}, {row['target']}"
    structure = "" if row["structure"] == "dense" else f"{row['structure']} {row['keep']:g} × "
    return f"{structure}{row['rounding']} {row['encoding']}"


def best(rows: Iterable[Row], size: float, kind: str = "in_domain") -> Row | None:
    """The row of least KL divergence among those that are no larger than a size."""
    fitting = [row for row in rows if row["bits"] <= size]
    return min(fitting, key=lambda row: float(row[kind]["kl"]), default=None)


def _best_table(rows: Sequence[Row]) -> list[str]:
    platforms = ("any", *WEIGHTS)
    lines = [
        "Least KL divergence at each size, of everything and of what a platform has kernels for: "
        "rise of perplexity in domain · out of domain.",
        "",
        f"| bits | {' | '.join(platforms)} |",
        "|" + " --- |" * (len(platforms) + 1),
    ]
    for size in SIZES:
        cells = []
        for platform in platforms:
            able = [row for row in rows if platform == "any" or is_servable(row, platform)]
            found = best(able, size)
            cells.append(_NOTHING if found is None else f"{name(found)}: {_rises(found)}")
        lines.append(f"| ≤ {size:g} | {' | '.join(cells)} |")
    return lines


def _row_table(rows: Sequence[Row]) -> list[str]:
    head = (
        "bits",
        "what",
        "rise of perplexity",
        "KL, 10⁻³ nats",
        "same top token",
        "experts changed",
        "multiply-adds",
        "TP · EP traffic",
        "kernels",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in sorted(rows, key=lambda row: -float(row["bits"])):
        inside, outside = row["in_domain"], row.get("out_of_domain")
        kernels = [platform for platform in WEIGHTS if is_servable(row, platform)]
        cells = (
            f"{row['bits']:.2f}",
            name(row),
            _rises(row),
            _pair(f"{1e3 * inside['kl']:.1f}", outside and f"{1e3 * outside['kl']:.1f}"),
            _pair(f"{inside['top1']:.1%}", outside and f"{outside['top1']:.1%}"),
            f"{inside['experts_changed']:.0%}",
            f"{row['multiply_adds']:.2f}",
            f"{row['tp_traffic']:.2f} · {row['ep_traffic']:.2f}",
            ", ".join(kernels) or _NOTHING,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rises(row: Row) -> str:
    inside, outside = row["in_domain"], row.get("out_of_domain")
    return _pair(_rise(inside), outside and _rise(outside))


def _rise(measured: Row) -> str:
    return f"{100 * (measured['ratio'] - 1):.2f} ± {100 * measured['ratio_error']:.2f} %"


def _pair(inside: str, outside: str | None) -> str:
    return inside if not outside else f"{inside} · {outside}"


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that belong to one line of the plot, by falling bits."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -float(row["bits"])):
        if row["structure"] == "tuckerize":
            size = row["encoding"].startswith("-")
            encoding = row["encoding"].split(" ")[0] if size else row["encoding"]
            line = f"tuckerize {encoding}, {row['target']}"
        elif is_trellis(row):
            line = f"{row['structure'].replace('dense', 'alone')}, trellis codes"
        elif row["structure"] == "dense":
            zero = "zero points" if "zero" in row["encoding"] else "symmetric"
            group = row["encoding"].split(", ")[1]
            line = f"{row['rounding']} alone, {group}, {zero}"
        else:
            line = f"{row['structure']} × {row['encoding'].split(',')[0]}"
        found.setdefault(line, []).append(row)
    return found


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw the KL divergence over bits per weight: a row of panels a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    places = {line: place for place, line in enumerate(curves(rows))}  # alike in all panels
    size = (13, 4.5 * len(names))
    figure, axes = plt.subplots(len(names), 2, figsize=size, squeeze=False, layout="constrained")
    for model, panels in zip(names, axes, strict=True):
        lines = curves([row for row in rows if row["model"] == model])
        for panel, kind in zip(panels, KINDS, strict=True):
            for line, points in lines.items():
                ours = line.startswith("tuckerize")
                panel.plot(
                    [row["bits"] for row in points],
                    [row[kind]["kl"] for row in points],
                    label=line,
                    linewidth=2.4 if ours else 1.1,
                    color=f"C{places[line] % 10}",
                    marker="osv^Dx"[places[line] % 6],
                    markersize=4,
                )
            panel.set_yscale("log")
            panel.set_xlim(1.5, 8.3)
            panel.grid(visible=True, which="both", alpha=0.25)
            panel.set_title(f"{model}, {kind.replace('_', ' ')}")
            panel.set_xlabel("bits per routed weight")
        panels[0].set_ylabel("KL divergence, nats per token")
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110)
