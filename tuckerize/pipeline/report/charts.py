"""Charts as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuckerize.errors import UsageError

# Colours that matplotlib writes, and what the page's style sheet sets in their place.
_INK, _SERIES = "#010203", ("#010301", "#010302")


def chart(
    label: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    bars: bool,
    along: str = "",
    marked: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Draw at most two series over the same x.

    Args:
        label: Title of the vertical axis, with its unit.
        x: Places: layers or steps.
        series: Values by name; None leaves a gap.
        bars: Bars side by side, or lines.
        along: Title of the horizontal axis.
        marked: Points (x, y) that stand out, by name.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UsageError(
            "a report needs matplotlib, which is not installed", hint="pip install matplotlib"
        ) from None
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inks, _INK),
        "svg.fonttype": "none",
        "svg.hashsalt": label,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.6, 2.4), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(label)
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            known = [(at, y) for at, y in zip(x, values, strict=True) if y is not None]
            places, heights = [at for at, _ in known], [y for _, y in known]
            if bars:
                shifted = [at + width * (index - (len(series) - 1) / 2) for at in places]
                axes.bar(shifted, heights, width, label=name, color=_SERIES[index])
            else:
                axes.plot(
                    places,
                    heights,
                    marker="o" if len(known) < 50 else "",
                    label=name,
                    color=_SERIES[index],
                )
        for shape, (name, point) in zip("*D", (marked or {}).items(), strict=False):
            axes.plot(
                *point, shape, color=_INK, fillstyle="none", markersize=11, label=name, zorder=3
            )
        axes.set_xlabel(along)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1 or marked:
            axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(_INK, "currentColor")
    for index, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--series-{index})")
    return svg
