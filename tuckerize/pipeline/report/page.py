"""Self-contained HTML: headings, tables, charts and preformatted text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

GENERATOR = '<meta name="generator" content="tuckerize">'
"""Line that tells our pages from other files."""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{generator}
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --series-0: #2563a8; --series-1: #c2691d; --line: #8885; }}
@media (prefers-color-scheme: dark) {{ :root {{ --series-0: #7ab3ef; --series-1: #f0a35e; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; }}
.warning {{ border-left: .3rem solid #d33; padding-left: .75rem; font-weight: 600; }}
svg {{ width: 100%; height: auto; }}
pre {{ overflow-x: auto; font-size: .85rem; border: 1px solid var(--line); padding: .75rem; }}
@media (max-width: 40rem) {{ th, td {{ white-space: normal; font-size: .85rem;
  padding-right: .5rem; }} }}
@media print {{ :root {{ color-scheme: light; }} body {{ max-width: none; }}
  svg, tr {{ break-inside: avoid; }} pre {{ white-space: pre-wrap; }} }}
</style></head><body>
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page."""
    head = _HEAD.format(generator=GENERATOR, title=escape(title))
    return f"{head}<h1>{escape(title)}</h1>\n{''.join(sections)}</body></html>\n"


def section(heading: str, *parts: str) -> str:
    """A section of HTML parts."""
    return f"<section><h2>{escape(heading)}</h2>\n{''.join(parts)}</section>\n"


def warning(text: str) -> str:
    """A warning."""
    return f'<p class="warning">Warning: {escape(text)}</p>\n'


def note(text: str) -> str:
    """A remark."""
    return f"<p>{escape(text)}</p>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>\n'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>\n"
