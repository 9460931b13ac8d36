"""The search of `test_fuzz`, led by atheris to inputs that reach new lines of the program.

    python -m tests.fuzz.guided READER SECONDS

Inputs are hypothesis's, drawn from bytes that libFuzzer mutates.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import atheris
from hypothesis import HealthCheck, given, settings

with atheris.instrument_imports(include=["tuckerize"]):
    from tests.fuzz.readers import make_work
    from tests.fuzz.search import Search

_LONGEST = 1024  # bytes that the mutations of an input are drawn from


def main(name: str, seconds: str) -> None:
    """Give a reader inputs for some seconds; ends the process, with an error where one is found."""
    folder = Path(tempfile.mkdtemp())
    seeds = folder / "seeds"
    seeds.mkdir()
    pick = random.Random(0)
    for number in range(64):
        (seeds / str(number)).write_bytes(pick.randbytes(pick.randrange(16, _LONGEST)))
    search = Search(make_work(folder), name)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(search.inputs)
    def one(content: bytes) -> None:
        search.try_one(content)

    end = time.monotonic() + float(seconds)
    give = one.hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def draw(data: bytes) -> None:
        if time.monotonic() > end:  # libFuzzer ends a process without a word to Python
            print(search.told, flush=True)  # noqa: T201
            os._exit(0)
        give(data)

    options = [f"-max_len={_LONGEST}", "-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], draw)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
