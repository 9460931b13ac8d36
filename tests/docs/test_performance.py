from __future__ import annotations

from benchmarks.performance import PAGE, page


def test_tables_are_those_of_the_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "python -m benchmarks.performance"
