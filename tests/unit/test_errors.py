from __future__ import annotations

import pytest

from tuckerize import errors
from tuckerize.errors import (
    CheckpointError,
    LeaderFailedError,
    NonFiniteError,
    TuckerizeError,
    located,
)

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


def test_located_error_keeps_its_kind_and_hint_and_names_the_place() -> None:
    with pytest.raises(NonFiniteError) as caught, located("layer 3"):
        raise NonFiniteError("a NaN", hint="repair it")
    assert (caught.value.message, caught.value.hint) == ("layer 3: a NaN", "repair it")


def test_located_leaves_other_errors_alone() -> None:
    error = CheckpointError("missing")
    with pytest.raises(CheckpointError) as caught, located("layer 3"):
        raise error
    assert caught.value is error
