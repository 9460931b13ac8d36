"""The command line: options, tables, progress, and the one place where errors become exit codes."""

import os

from tuckerize.cli.app import app


def main() -> None:
    """Run the command line."""
    # Intel's MKL, where torch has it, reads this when it is loaded: products then give the same
    # bits with any number of threads, and decompositions with any number of processes.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    app()
