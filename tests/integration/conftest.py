"""What several modules read: a model with a tokenizer, and a text for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import add_tokenizer, make_tiny_model, write_text


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 model with a tokenizer; layers 1 and 2 have routed experts."""
    folder = tmp_path_factory.mktemp("tokenized") / "model"
    return add_tokenizer(make_tiny_model(folder, dtype=torch.float32))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 9,000 tokens."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 9000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles of a module's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
