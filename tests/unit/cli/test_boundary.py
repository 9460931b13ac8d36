from __future__ import annotations

import signal

import pytest

from tuckerize import errors
from tuckerize.cli.boundary import BUG, INTERRUPTED, USER_ERROR, boundary
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
