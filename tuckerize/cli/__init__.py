"""The command line: options, tables, progress, and the one place where errors become exit codes."""

import io
import os
import sys

from tuckerize.cli.app import app


def main() -> None:
    """Run the command line."""
    _open_streams()
    app()


def _open_streams() -> None:
    """Give the process all three streams, and an output that takes any name.

    Where a stream was closed (`2>&-`), the next file that is opened would get its number, and with
    it whatever a library prints.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # noqa: FBT003
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
