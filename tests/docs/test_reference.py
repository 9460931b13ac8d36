"""Pages that are made from the code are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.reference import PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_what_the_code_says(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page](), "run: python -m tests.docs.reference"
