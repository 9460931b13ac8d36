from __future__ import annotations

import pytest

from tuckerize.errors import CheckpointError, NonFiniteError, located


def test_located_error_keeps_its_kind_and_hint_and_names_the_place() -> None:
    with pytest.raises(NonFiniteError) as caught, located("layer 3"):
        raise NonFiniteError("a NaN", hint="repair it")
    assert (caught.value.message, caught.value.hint) == ("layer 3: a NaN", "repair it")


def test_located_leaves_other_errors_alone() -> None:
    error = CheckpointError("missing")
    with pytest.raises(CheckpointError) as caught, located("layer 3"):
        raise error
    assert caught.value is error
