from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tuckerize import errors
from tuckerize.checkpoint.files import write_text
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.cli.boundary import BUG, INTERRUPTED, PIPE_CLOSED, USER_ERROR, boundary
from tuckerize.cli.printing import print_all
from tuckerize.errors import CheckpointError, LeaderFailedError

USER_ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not LeaderFailedError
]


def _exit_code(error: Exception, *, interrupt: bool) -> int:
    @boundary
    def command() -> None:
        try:
            if interrupt:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass  # as torch does while it looks at an object
        raise error

    with pytest.raises(SystemExit) as left:
        command()
    return int(str(left.value.code))


@pytest.mark.parametrize("error", [TypeError("no shape"), CheckpointError("damaged"), OSError("?")])
def test_interrupt_that_a_library_made_another_error_of_is_an_interrupt(error: Exception) -> None:
    assert _exit_code(error, interrupt=True) == INTERRUPTED


@pytest.mark.parametrize(
    ("error", "code"), [(TypeError("no shape"), BUG), (CheckpointError("damaged"), USER_ERROR)]
)
def test_error_without_interrupt_keeps_its_code(error: Exception, code: int) -> None:
    assert _exit_code(error, interrupt=False) == code
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert _exit_code(TypeError("no shape"), interrupt=True) == BUG
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", USER_ERRORS)
@pytest.mark.parametrize(
    ("hint", "text"),
    [("use 4", "error: 3 is odd\n\nhint: use 4\n"), ("", "error: 3 is odd\n")],
)
def test_every_error_of_a_user_is_printed_with_its_hint_and_without_a_traceback(
    kind: type[errors.TuckerizeError], hint: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(kind("3 is odd", hint=hint), interrupt=False) == USER_ERROR
    assert capsys.readouterr().err == text


def test_processes_that_follow_a_failed_leader_say_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _exit_code(LeaderFailedError(), interrupt=False) == USER_ERROR
    assert capsys.readouterr() == ("", "")


def _told(command: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a command that must end as the user's to mend."""

    @boundary
    def run() -> None:
        command()

    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == USER_ERROR
    return capsys.readouterr().err


@pytest.mark.parametrize("command", [lambda: torch.empty(2**48), lambda: bytearray(2**60)])
def test_memory_that_cannot_be_had_is_told_with_its_size(
    command: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "error: there is not enough memory" in _told(command, capsys)


def test_limit_on_file_sizes_is_told_with_file_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file_limit: None
) -> None:
    tensors = {"a": torch.zeros(10_000)}
    for write in (
        lambda: write_tensors(tmp_path / "a.safetensors", tensors),
        lambda: write_text(tmp_path / "a.json", "x" * 10_000),
    ):
        told = _told(write, capsys)
        assert "error: File too large (" in told
        assert str(tmp_path / "a.") in told
        assert "ulimit -f" in told
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def file_limit() -> Iterator[None]:
    """A limit of the system on the size of files, in the place of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_full_standard_output_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        told = _told(lambda: print_all("result"), capsys)
    assert "the standard output cannot be written: No space left on device" in told


def test_reader_that_went_away_ends_the_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)

    @boundary
    def run() -> None:
        print_all("result")

    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as left:
            run()
    assert left.value.code == PIPE_CLOSED
    assert capsys.readouterr().err == ""
