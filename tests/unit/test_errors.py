from __future__ import annotations

import pytest

from tuckerize import errors
from tuckerize.errors import LeaderFailedError, TuckerizeError

USER_ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, TuckerizeError)
]


@pytest.mark.parametrize("kind", USER_ERRORS)
def test_user_error_raised_keeps_message_and_hint(kind: type[TuckerizeError]) -> None:
    error = kind("what is wrong", hint="what to change")
    assert (str(error), error.message, error.hint) == ("what is wrong",) * 2 + ("what to change",)
    assert error.exit_code == 2


def test_user_error_without_hint_has_an_empty_one() -> None:
    assert TuckerizeError("wrong").hint == ""


def test_user_errors_are_the_whole_tree() -> None:
    assert len(USER_ERRORS) == 9


def test_leader_failed_is_not_reported_twice() -> None:
    assert not issubclass(LeaderFailedError, TuckerizeError)
