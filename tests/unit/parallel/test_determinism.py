from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tuckerize.parallel.determinism import make_deterministic


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HCCL_DETERMINISTIC", "strict")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # to be restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


def test_make_deterministic_sets_what_is_not_set_and_keeps_the_users_settings() -> None:
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["HCCL_DETERMINISTIC"] == "strict"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
