"""The results as Markdown tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def tables(results: dict[str, Any]) -> str:
    """Markdown: for every model the perplexities, what was stored and missed, and what it cost."""
    lines: list[str] = []
    for name, model in results["models"].items():
        rows = _ordered([row for row in results["rows"] if row["model"] == name])
        if rows:
            lines += [f"### {name}", "", _about(model), ""]
            lines += ["Perplexity over the dense model's, in domain · out of domain:", ""]
            lines += _grid(rows, _perplexities)
            lines += ["Stored numbers over dense ones · mean relative output error:", ""]
            lines += _grid(rows, _stored)
            lines += ["Seconds · peak memory of compression in MiB:", ""]
            lines += _grid(rows, lambda row: f"{row['seconds']:.1f} · {row['peak_mib']}")
    return "\n".join(lines)


def _ordered(rows: list[Row]) -> list[Row]:
    """Ours, then the others, the best at the smallest share first, then what is switched off."""

    def place(row: Row) -> tuple[int, float]:
        own = [r for r in rows if r["method"] == row["method"]]
        smallest = min(own, key=lambda r: float(r["keep"]))
        kind = 0 if row["method"].startswith("tuckerize") else 1
        kind = 2 if row["method"].startswith("unrefined") else kind
        return kind, float(smallest["in_domain"])

    return sorted(rows, key=place)


def _about(model: dict[str, Any]) -> str:
    python, english = model["perplexity"]
    silent = model["without_routed_experts"][0] / python
    other = "" if english is None else f", {english:.2f} out of domain"
    return (
        f"{model['moe_layers']} MoE layers of {model['experts']} experts of {model['intermediate']}"
        f" × {model['hidden']}, top-{model['top_k']}. Dense perplexity {python:.2f} in domain"
        f"{other}; {silent:.2f} times that without the routed experts."
        f" {model['calibration_tokens']} calibration tokens."
    )


def _perplexities(row: Row) -> str:
    outside = row["out_of_domain"]
    return f"{row['in_domain']:.3f}" + ("" if outside is None else f" · {outside:.3f}")


def _stored(row: Row) -> str:
    errors = row["output_errors"]
    return f"{row['stored']:.4f} · {sum(errors) / len(errors):.3f}"


def _grid(rows: list[Row], cell: Callable[[Row], str]) -> list[str]:
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["keep"]): cell(row) for row in rows}
    lines = ["| method | " + " | ".join(f"{keep:g}" for keep in keeps) + " |"]
    lines.append("|" + " --- |" * (len(keeps) + 1))
    for method in methods:
        cells = " | ".join(found.get((method, keep), "–") for keep in keeps)
        lines.append(f"| {method} | {cells} |")
    return [*lines, ""]


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw the rise in perplexity over the kept share: a row of panels a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [n for n in results["models"] if any(r["model"] == n for r in results["rows"])]
    figure, axes = plt.subplots(
        len(names),
        2,
        figsize=(13, 4.5 * len(names)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    colours = mpl.colormaps["tab20"](range(20))
    for name, panels in zip(names, axes, strict=True):
        for panel, key in zip(panels, ("in_domain", "out_of_domain"), strict=True):
            panel.set_prop_cycle(color=colours)
            _draw(panel, [row for row in results["rows"] if row["model"] == name], key)
            panel.set_title(f"{name}, {key.replace('_', ' ')}")
            panel.set_xlabel("stored numbers of the routed experts over dense")
        panels[0].set_ylabel("rise in perplexity, %")
        panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=130)


def _draw(panel: Any, rows: list[Row], key: str) -> None:  # noqa: ANN401
    methods = dict.fromkeys(row["method"] for row in rows)
    for index, method in enumerate(m for m in methods if not m.startswith("unrefined")):
        of_method = [r for r in rows if r["method"] == method and r[key] is not None]
        points = sorted((row["stored"], 100 * (row[key] - 1)) for row in of_method)
        ours = method.startswith("tuckerize")
        panel.plot(
            *zip(*points, strict=True) if points else ((), ()),
            label=method,
            linewidth=2.4 if ours else 1.1,
            marker="osv^Dx"[index % 6],
            markersize=4,
            color="black" if method == "tuckerize" else None,
        )
    panel.set_yscale("log")
    panel.grid(visible=True, which="both", alpha=0.25)
