"""KL divergence that `tuckerize plan` predicts for our rows, beside the measured one.

    python -m benchmarks.quality.predictions --models FOLDER

The prediction is for the text of the calibration, so it stands beside the one in domain.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality.equal_bytes import CALIBRATION_TOKENS, OURS, RESULTS, read
from benchmarks.quality.equal_bytes_tables import name
from benchmarks.quality.tucker_rows import request
from tuckerize.pipeline.decompose import preview

Row = dict[str, Any]


def predicted_kl(row: Row, models: Path) -> float:
    """Nats per token that the plan of one of our rows predicts."""
    found = preview(
        request(
            models / row["model"],
            models / "python_calibration.txt",
            CALIBRATION_TOKENS,
            keep=row["keep"],
            encoding=row["encoding"],
            target=row["target"],
        )
    )
    if found is None or found.predicted_kl is None:
        raise ValueError(f"nothing is predicted for {row}")
    return found.predicted_kl


def table(rows: Iterable[tuple[Row, float]]) -> str:
    """Rows and predictions as Markdown."""
    lines = [
        "| model | what | bits | predicted KL, 10⁻³ nats | measured | measured over predicted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row, predicted in rows:
        kl, error = row["in_domain"]["kl"], row["in_domain"]["kl_error"]
        cells = (
            row["model"],
            name(row).removeprefix("tuckerize "),
            f"{row['bits']:.2f}",
            f"{1e3 * predicted:.1f}",
            f"{1e3 * kl:.1f} ± {1e3 * error:.1f}",
            f"{kl / predicted:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of all our rows; profiles that are not in the cache are made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for row in read(options.results) if row["structure"] == OURS]
    rows.sort(key=lambda row: (row["model"], row["target"], -row["bits"]))
    print(table((row, predicted_kl(row, options.models)) for row in rows))


if __name__ == "__main__":
    main()
