"""Language of the source; ruff's D rules see to it that every public name has a docstring."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tuckerize

FILES = sorted(Path(tuckerize.__file__).parent.rglob("*.py"))
QUESTION = re.compile(r"(What|Whatever|How|Where|From|By)\b")
IDIOM = re.compile(
    r"\b(in front of|behind|number of numbers|(experts|bits|bytes|nats) a (token|value|weight))\b"
)


def docstrings(source: str) -> Iterator[str]:
    """Docstrings, also those below constants."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(ast.Constant(str(text))):
                yield text


def test_docstrings_begin_with_a_noun_or_an_imperative() -> None:
    found = [
        (file.name, text.splitlines()[0])
        for file in FILES
        for text in docstrings(file.read_text(encoding="utf-8"))
        if QUESTION.match(text)
    ]
    assert not found


def test_source_is_free_of_foreign_idiom() -> None:
    found = [
        (file.name, phrase.group())
        for file in FILES
        for phrase in IDIOM.finditer(" ".join(file.read_text(encoding="utf-8").split()))
    ]
    assert not found
