"""`make demo` prints what README shows: `make test-demo`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, matches, read_blocks

pytestmark = pytest.mark.demo


@pytest.mark.timeout(900)
def test_readme_shows_what_the_demo_prints(tmp_path: Path) -> None:
    blocks = read_blocks(ROOT / "README.md")
    command = next(place for place, block in enumerate(blocks) if "make demo" in block.text)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert matches(blocks[command + 1].text, done.stdout), done.stdout
