"""Sizes, counts and tables on the terminal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table

from tuckerize.domain import Cores, Size

STDOUT = "the standard output"
_WIDEST = 10_000
# Characters between two columns.
_GAP = 3


def size_text(count: float) -> str:
    """Bytes in binary units.

    >>> size_text(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def count_text(count: float) -> str:
    """A count with its unit.

    >>> count_text(14_400_000_000)
    '14.40 billion'
    """
    for limit, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return f"{count:.0f}"


def amount_text(parameters: int, count: int) -> str:
    """Parameters and bytes."""
    return f"{count_text(parameters)}, {size_text(count)}"


def duration_text(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _naming_stdout() -> Iterator[None]:
    """Give errors of the block the name of the standard output as their file."""
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


@_naming_stdout()
def write_out(text: str) -> None:
    """Write a text to the standard output now.

    Raises:
        OSError: It cannot be written; the error's `filename` is `STDOUT`.
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def print_all(*renderables: Table | str) -> None:
    """Print texts and tables; a table may be wider than the terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    terminal = console.width
    for renderable in renderables:
        table = isinstance(renderable, Table)
        options = console.options.update(width=_WIDEST)
        needed = Measurement.get(console, options, renderable).maximum if table else 0
        console.width = max(terminal, needed)
        # By itself rich would end the program where nobody reads.
        with _naming_stdout(), console.capture() as captured:
            console.print(renderable)
        write_out(captured.get())


def make_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1
) -> Table:
    """A table as wide as the terminal, or wider where words are: a broken path cannot be copied."""
    body = [*rows]
    table = Table(box=SIMPLE, pad_edge=False, show_header=any(header))
    texts = [[name, *(row[place] for row in body)] for place, name in enumerate(header)]
    narrowest = []
    for place, (name, *cells) in enumerate(texts):
        # A number stays beside its unit.
        whole = (
            cells if place >= text_columns else [word for text in cells for word in text.split()]
        )
        narrowest.append(max(map(cell_len, [*name.split(), *whole]), default=0))
    spare = Console().width - sum(narrowest) - _GAP * len(header)
    for place, (name, own) in enumerate(zip(header, texts, strict=True)):
        wanted = max(map(cell_len, own)) - narrowest[place]
        grown = max(0, min(wanted, spare))
        spare -= grown
        justify: JustifyMethod = "left" if place < text_columns else "right"
        table.add_column(name, justify=justify, width=narrowest[place] + grown)
    for row in body:
        table.add_row(*row)
    return table


def size_table(before: Size, after: Size, *, bound: bool = False) -> Table:
    """Sizes before and after; `bound`: at most these."""
    at_most = "≤ " if bound else ""
    rows = []
    for name, old, new, text in (
        ("routed parameters", before.routed_parameters, after.routed_parameters, count_text),
        ("routed bytes", before.routed_bytes, after.routed_bytes, size_text),
        ("all parameters", before.total_parameters, after.total_parameters, count_text),
        ("all bytes", before.total_bytes, after.total_bytes, size_text),
    ):
        rows.append((name, text(old), at_most + text(new), f"{at_most}{new / old:.2%}"))
    old_bits, new_bits = before.bits_per_weight(before), after.bits_per_weight(before)
    share = f"{at_most}{new_bits / old_bits:.2%}"
    rows.append(("bits per weight", f"{old_bits:.2f}", f"{at_most}{new_bits:.2f}", share))
    return make_table(("", "before", "after", "kept"), rows)


def cores_text(cores: Cores) -> str:
    """Encodings of a model's cores in words."""
    if not isinstance(cores, dict):
        return cores or "not quantised"
    counts = Counter(cores.values())
    first, *others = [f"{kind} in {count}" for kind, count in sorted(counts.items())]
    return ", ".join([f"{first} layers", *others])
