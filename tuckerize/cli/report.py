"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuckerize.cli import options
from tuckerize.cli.boundary import boundary
from tuckerize.cli.printing import write_out


@boundary
def write_report(
    folder: options.TuckerFolder,
    html: Annotated[
        Path, typer.Option(metavar="FILE", help="File of the page.", rich_help_panel=options.OUTPUT)
    ] = Path("report.html"),
    against: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Another Tucker checkpoint, shown beside it."),
    ] = None,
) -> None:
    """Write an HTML page on a Tucker checkpoint.

    Shows what its files record: sizes, errors of layers, shards, verification, training, recipe;
    and predictions and spectra of a calibrated one, whose source, text and profile are here.

    Example: tuckerize report OUT
    """
    from tuckerize.pipeline.report import ReportRequest
    from tuckerize.pipeline.report import write_report as run

    write_out(f"wrote {run(ReportRequest(folder=folder, html=html, against=against))}\n")
