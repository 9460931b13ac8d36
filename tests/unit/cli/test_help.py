"""`--help` of every command against golden files.

`TUCKERIZE_WRITE_GOLDEN=1 python -m pytest tests/unit/cli/test_help.py` writes them anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.reference import commands

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "help"
COMMANDS = list(commands())
WRITE = "TUCKERIZE_WRITE_GOLDEN"


def shown(command: str) -> str:
    """What a terminal of 100 columns shows, without colours and without blanks at line ends."""
    words = [] if command == "tuckerize" else command.split()
    script = "import sys; from tuckerize.cli import app; app(sys.argv[1:], prog_name='tuckerize')"
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


@pytest.mark.parametrize("command", ["tuckerize", *COMMANDS])
def test_help_is_that_of_the_golden_file(command: str) -> None:
    file = GOLDEN / f"{command.replace(' ', '-')}.txt"
    found = shown(command)
    if os.environ.get(WRITE):
        GOLDEN.mkdir(parents=True, exist_ok=True)
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8"), f"write it anew with {WRITE}=1"


def test_golden_files_are_those_of_the_commands() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == {
        "tuckerize",
        *(command.replace(" ", "-") for command in COMMANDS),
    }


def test_no_help_is_cut() -> None:
    assert not [file.stem for file in GOLDEN.iterdir() if "…" in file.read_text(encoding="utf-8")]
