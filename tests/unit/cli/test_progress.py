"""Lines for a log under torchrun, a bar on a terminal, nothing else."""

from __future__ import annotations

import io
import re
import sys

import pytest

from tuckerize.cli.progress import TerminalProgress, is_leader


def work() -> None:
    """Two stages of some work."""
    with TerminalProgress() as progress:
        progress.start(10)
        progress.stage("read")
        progress.advance(4, "layer 1")
        progress.stage("write")


def test_single_process_without_a_terminal_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    work()
    assert capsys.readouterr() == ("", "")


def test_leader_of_several_processes_writes_a_line_per_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert is_leader()
    work()
    out, errors = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r" +\d+\.\d s: read\n +\d+\.\d s: write\n", errors)


def test_other_processes_write_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not is_leader()
    work()
    assert capsys.readouterr() == ("", "")


def test_terminal_shows_a_bar_with_the_note_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    work()
    shown = terminal.getvalue()
    assert "40%" in shown
    assert "write" in shown
    assert shown.endswith("\n")
