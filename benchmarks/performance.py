"""Tables of docs/performance.md, from the results that the benchmarks have written.

    python -m benchmarks.performance    # writes them

Each table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def main() -> None:
    """Write the tables."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{table()}<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def _read(name: str) -> Any:  # noqa: ANN401  # each benchmark has its own form
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _calibrated() -> str:
    names = {
        "plan": "`plan`",
        "closed_form": "`decompose --refine 0` after it",
        "refinement_step": "a step of refinement",
    }
    rows = []
    for found in sorted(_read("calibrated_speed"), key=lambda own: own["narrow"]):
        width = _width(found["narrow"])
        both = found["before"], found["now"]
        figures = {name: tuple(own[key] for own in both) for key, name in names.items()}
        if found["now"]["steps"] is not None:
            figures["`decompose --refine 300`, of these"] = tuple(
                own["closed_form"] + own["steps"] * own["refinement_step"] for own in both
            )
        rows += [
            [width, name, f"{before:.1f}", f"{now:.1f}", f"{before / now:.1f}"]
            for name, (before, now) in figures.items()
            if now is not None
        ]
    return _table(["experts", "", "before, CPU s", "now, CPU s", "ratio"], rows)


def _shared() -> str:
    rows = []
    for found in sorted(_read("shared_speed"), key=lambda own: own["narrow"]):
        for name, own in found["seconds"].items():
            clock = own["clock_of_one"], own["clock_of_all"]
            seconds = [f"{value:.0f}" for value in (own["one"], own["busiest"], *clock)]
            ratios = [f"{value:.2f}" for value in (own["ratio"], clock[0] / clock[1])]
            command = [_width(found["narrow"]), f"`{name}`"]
            rows.append([*command, *seconds[:2], ratios[0], *seconds[2:], ratios[1]])
    of_processor = ["one process, CPU s", "busiest of two, CPU s", "ratio"]
    by_clock = ["one, by the clock", "two, by the clock", "ratio"]
    return _table(["experts", "", *of_processor, *by_clock], rows)


def _width(narrow: int) -> str:
    """DeepSeek-V2-Lite's experts, narrowed."""
    return f"{1408 // narrow} x {2048 // narrow}"


def _data_free() -> str:
    rows = []
    for row in _read("st_hosvd")["rows"]:
        share = row["share_of_rate"]
        sizes = ["(" + ", ".join(map(str, row[key])) + ")" for key in ("shape", "rank")]
        found = [f"{min(row['seconds']):.2f}", f"{row['relative_residual']:.5f}"]
        rows.append([row["method"], " to ".join(sizes), *found, f"{share:.0%}" if share else ""])
    return _table(["method", "stack", "seconds", "residual", "of the GEMM rate"], rows)


def _main_job() -> str:
    steps = [*_read("full_width")["steps"], *_read("full_width_calibrated")["steps"]]
    rows = [
        [f"`{step['command']}`", f"{step['seconds']:.0f}", f"{step['peak_gib']:.1f}"]
        for step in steps
        if step["layers"] == 2
    ]
    return _table(["command, 2 layers", "seconds", "GiB"], rows)


def _reading() -> str:
    found = _read("reading")
    rows = [
        [f"the {where}", *(f"{own[part]:.1f}" for part in ("read", "compute", "write"))]
        for where, own in found["rows"].items()
    ]
    return _table(["files in", "read, s", "compute, s", "write, s"], rows)


def _forward(capability: str) -> Callable[[], str]:
    """Table of tokens a second relative to the fastest dense experts."""

    def table() -> str:
        rows = _read(f"forward_{capability}")["rows"]
        methods = list(dict.fromkeys(row["method"] for row in rows if row["keep"] < 1))
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            if row["keep"] < 1:
                what = f"{row['what']}, {row['phase']}, {row['batch']}"
                lines.setdefault(what, {})[row["method"]] = f"{row['ratio']:.2f}"
        return _table(
            ["", *methods],
            [[what, *(own.get(method, "") for method in methods)] for what, own in lines.items()],
        )

    return table


TABLES: dict[str, Callable[[], str]] = {
    "calibrated": _calibrated,
    "shared": _shared,
    "data-free": _data_free,
    "main job": _main_job,
    "reading": _reading,
    "forward avx2": _forward("avx2"),
    "forward avx512": _forward("avx512"),
}


if __name__ == "__main__":
    main()
