"""Every block of README and docs is run, in order, or says why it is not; see pages.py.

A page runs in a folder of its own that holds `MODEL` (the shipped model), `text.txt` and
`validation.txt` (two parts of its held-out text), and the checkout's `examples` and `recipes`.
`torchrun` starts real processes. Calibration takes fewer tokens than the pages say: `SHORTER`. The
pages that take longest run in `make test-long`; of all pages `make test` reads the options.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from tests.docs.pages import (
    PAGES,
    REASONS,
    ROOT,
    Block,
    commands,
    indented_code,
    matches,
    read_blocks,
)
from tests.running import run_here
from tuckerize.cli.app import app
from tuckerize.calibration import tokens as tokens_module

LANGUAGES = {"bash", "python", "text", "yaml", "json"}
# A command that starts so gets the options as well, unless it has them.
SHORTER = {
    "tuckerize plan": ("--calibration-tokens 2048",),
    "tuckerize decompose": ("--calibration-tokens 2048",),
}
SHELL = re.compile(r"[|&;<>$`*]")
SECONDS = 240

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
LONG = {"calibrate.md", "heal.md", "parallel.md", "quantise-cores.md"}
RUN_PAGES = [
    pytest.param(page, marks=pytest.mark.long) if page.name in LONG else page
    for page in PAGES
    if any(b.language in {"bash", "python"} and b.reason is None for b in read_blocks(page))
]


def test_blocks_are_fenced_and_are_run_or_say_why_not() -> None:
    problems = [
        f"{page.relative_to(ROOT)}:{line}: indented code"
        for page in PAGES
        for line in indented_code(page)
    ]
    before: Block | None = None
    for block in BLOCKS:
        if block.language not in LANGUAGES:
            problems.append(f"{block.place}: language '{block.language}'")
        elif block.reason is not None and block.reason not in REASONS:
            problems.append(f"{block.place}: '{block.reason}' is not one of the reasons")
        elif block.language in {"yaml", "json"} and not (block.reason or block.file):
            problems.append(f"{block.place}: neither a file nor marked as not run")
        elif block.language == "text" and not block.reason:
            shown = before and before.page == block.page and block.follows
            if not (shown and before and before.language in {"bash", "python"}):
                problems.append(f"{block.place}: text that is no output, and not marked")
        before = block
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    wrong = [
        f"{block.place}: {word}"
        for block in read_blocks(page)
        if block.language == "bash"
        for command in commands(block.text)
        for word in unknown_words(shlex.split(command))
    ]
    assert not wrong


def unknown_words(words: list[str]) -> list[str]:
    """The command of ours that there is not, or its options that there are not."""
    known = get_command(app)
    assert isinstance(known, TyperGroup)
    ours = words[words.index("tuckerize") + 1 :] if "tuckerize" in words else []
    name, *rest = ours or ["-"]
    if name.startswith("-"):
        return []
    if name not in known.commands:
        return [name]
    options = {option for param in known.commands[name].params for option in param.opts}
    return [word for word in rest if word.startswith("--") and word.split("=")[0] not in options]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, monkeypatch)
    namespace: dict[str, Any] = {"__name__": "page"}
    output: str | None = None
    for block in read_blocks(page):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
            output = None
        elif block.reason is not None:
            output = None
        elif block.language == "text":
            assert output is None or matches(block.text, output), f"{block.place}:\n{output}"
        else:
            run = run_python if block.language == "python" else run_shell
            output = run(block, namespace)


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the folder of a page and go there."""
    for name, target in {
        "MODEL": ROOT / "examples" / "tiny-moe",
        "examples": ROOT / "examples",
        "recipes": ROOT / "recipes",
    }.items():
        (folder / name).symlink_to(target)
    text = (ROOT / "examples" / "held_out.txt").read_text(encoding="utf-8")
    (folder / "validation.txt").write_text(text[:40_000], encoding="utf-8")
    (folder / "text.txt").write_text(text[40_000:], encoding="utf-8")
    monkeypatch.chdir(folder)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PET_STANDALONE", "1")  # torchrun: any free port
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(tokens_module, "HELD_OUT_BLOCK", 64)  # some are left for validation


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """Run a Python block in the page's namespace; returns what it prints."""
    printed = io.StringIO()
    code = compile(block.text, block.place, "exec")
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("default")
        exec(code, namespace)
    return printed.getvalue()


def run_shell(block: Block, _namespace: dict[str, Any]) -> str:
    """Run the commands of a block; returns what they print. Ours run in this process."""
    printed = []
    for command in commands(block.text):
        words = shlex.split(shortened(command))
        if words[0] == "tuckerize" and not SHELL.search(command):
            result = run_here(*words[1:])
        else:
            result = subprocess.run(
                ["bash", "-ec", shortened(command)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        told = f"{block.place}: {command}\n{result.stdout}{result.stderr}"
        assert result.returncode == block.exit, told
        printed.append(result.stderr if block.exit else result.stdout)
    return "".join(printed)


def shortened(command: str) -> str:
    """The command with fewer tokens, if it calibrates."""
    if "--calibration " not in command:
        return command
    options = next((more for name, more in SHORTER.items() if command.startswith(name)), ())
    return " ".join([command, *(more for more in options if more.split()[0] not in command)])


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
    return {heading.strip().replace(" ", "-") for heading in kept}
