"""Lines for a log under torchrun, a bar on a terminal, nothing else."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from tuckerize.cli.progress import TerminalProgress, is_leader
from tuckerize.progress import LayerProgress, scaled, told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    left = r" \(40%, about 0 s left\)"
    assert re.fullmatch(rf" +\d+\.\d s: read\n +\d+\.\d s: write{left}\n", errors)


def test_single_process_writes_a_line_in_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    clock = iter([0.0, 0.0, 4.0, 30.0, 31.0])  # made, started, three stages
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with TerminalProgress() as progress:
        progress.start(2)
        layer = LayerProgress(progress, 7, effort=4)
        layer.stage("moments")
        layer.stage("neurons", 2)
        layer.stage("down", 1)
        layer.finish("layer 7")
    assert capsys.readouterr().err == "   30.0 s: layer 7: neurons (25%, about 90 s left)\n"


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_every_sixteenth_expert_begins_a_stage(count: int) -> None:
    stages = list[tuple[str, float]]()
    begin = scaled(lambda name, effort=0.0, /: stages.append((name, effort)), 6.0)
    assert list(told(range(count), count, begin, "moments")) == list(range(count))
    names, efforts = zip(*stages, strict=True)
    firsts = range(1, count + 1, 16)
    assert names == (*(f"moments, expert {first} of {count}" for first in firsts), "moments")
    assert sum(efforts) == pytest.approx(6.0)
    for place, effort in enumerate(efforts[1:-1]):
        assert effort == pytest.approx(6.0 * 16 / count), names[place]


def test_other_processes_write_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not is_leader()
    work()
    assert capsys.readouterr() == ("", "")


def test_clock_of_the_bar_goes_on_during_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with TerminalProgress() as progress:
        progress.start(10)
        progress.stage("read")
        deadline = time.monotonic() + 10
        while "00:01 elapsed" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "00:01 elapsed" in terminal.getvalue()


def test_terminal_shows_a_bar_with_the_note_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    work()
    shown = terminal.getvalue()
    assert "40%" in shown
    assert "write" in shown
    assert shown.endswith("\n")
