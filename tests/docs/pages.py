"""Markdown pages as lists of code blocks.

A page's blocks are fenced, and their language says what happens to them:

* `bash` and `python` are run, in order, in one folder; Python blocks of a page share a namespace;
* `text` right after a block that is run is its output, and is compared (see `matches`);
* any block after `<!-- file: NAME -->` is written to that file first;
* the commands of a block after `<!-- exit: 2 -->` must end with that code;
* any block after `<!-- not run: REASON -->` is shown only. `REASONS` lists the reasons.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

REASONS = {
    "another environment": "it installs packages, or needs some that are not ours",
    "another machine": "it needs NPUs, several nodes or a server",
    "download": "it fetches a large model, or uses one",
    "benchmark": "it takes minutes, and its figures are those of one machine",
    "make": "a target of the Makefile, which makes an environment of its own",
    "illustration": "a formula, a message or part of a file; not a command",
}

_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)\s*")
_COMMENT = re.compile(r"<!-- (?P<key>not run|file|exit): (?P<value>.+) -->\s*")
_TOKEN = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\.\.|[^\W\d]+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page's path below the project's root.
        line: Line of the opening fence, counted from 1.
        language: What stands behind the fence.
        text: The lines inside.
        reason: Why it is not run, or None.
        file: Name of the file that it is written to, or None.
        follows: Whether only blank lines separate it from the block before.
        exit: Exit code of its commands.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    file: str | None
    follows: bool
    exit: int = 0

    @property
    def place(self) -> str:
        """`page:line`, for messages."""
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    name = str(page.relative_to(ROOT))
    blocks: list[Block] = []
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    comment: dict[str, str] = {}
    follows = False
    for number, line in lines:
        if fence := _FENCE.fullmatch(line):
            inside = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                inside.append(inner.removeprefix(fence["indent"]))
            text = "".join(f"{inner}\n" for inner in inside)
            reason, file = comment.get("not run"), comment.get("file")
            code = int(comment.get("exit", 0))
            block = Block(name, number, fence["language"], text, reason, file, follows, code)
            blocks.append(block)
            comment, follows = {}, True
        elif found := _COMMENT.fullmatch(line):
            comment[found["key"]] = found["value"]
        elif line.strip():
            comment, follows = {}, False
    return blocks


def indented_code(page: Path) -> list[int]:
    """Lines that are code by their indentation alone, outside of fences and lists."""
    found = []
    fenced, in_list, blank = False, False, True
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.startswith("    ") and blank and not in_list:
            found.append(number)
        elif not fenced and line.strip() and not line.startswith(" "):
            in_list = bool(re.match(r"[-*] |\d+\. ", line))
        blank = not line.strip()
    return found


def commands(script: str) -> list[str]:
    r"""The commands of a shell block: comments dropped, continued lines joined.

    >>> commands("a  # first\nb \\\n  c\n\n# d\n")
    ['a', 'b c']
    """
    joined = script.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines())
    return [" ".join(line.split()) for line in lines if line]


def matches(expected: str, found: str) -> bool:
    """Whether an output is the one that a page shows.

    Spaces, line breaks and rules do not count, `...` stands for anything, and numbers with a
    decimal point may differ by 2 % or one unit of their last place.

    >>> matches("loss 3.785 ... done", "loss  3.79\\nmany lines\\ndone")
    True
    >>> matches("kept 24 of 30", "kept 25 of 30")
    False
    """
    parts: list[list[str]] = [[]]
    for token in _tokens(expected):
        if token == "...":
            parts.append([])
        else:
            parts[-1].append(token)
    rest = _tokens(found)
    first, *others = parts
    if not _equal(first, rest[: len(first)]):
        return False
    rest = rest[len(first) :]
    if not others:
        return not rest
    *middle, last = others
    for part in middle:
        starts = range(len(rest) - len(part) + 1)
        start = next((s for s in starts if _equal(part, rest[s : s + len(part)])), None)
        if start is None:
            return False
        rest = rest[start + len(part) :]
    return len(last) <= len(rest) and _equal(last, rest[len(rest) - len(last) :])


def _tokens(text: str) -> list[str]:
    return [token for token in _TOKEN.findall(text) if token.strip("─━")]


def _equal(expected: list[str], found: list[str]) -> bool:
    return len(expected) == len(found) and all(map(_same, expected, found))


def _same(expected: str, found: str) -> bool:
    if expected == found:
        return True
    if "." not in expected or "." not in found or not expected[0].isdigit():
        return False
    if not found[0].isdigit():
        return False
    wanted, value = (float(text.replace(",", "")) for text in (expected, found))
    unit = 10.0 ** -len(expected.partition(".")[2])
    return abs(wanted - value) <= max(0.02 * wanted, 1.01 * unit)
