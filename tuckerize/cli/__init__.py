"""The command line: options, tables, progress, and the one place where errors become exit codes."""

from tuckerize.cli.app import app


def main() -> None:
    """Run the command line."""
    app()
