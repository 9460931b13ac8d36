"""Damaged files are read or refused: nothing but a TuckerizeError leaves, soon, in little memory.

`make fuzz` searches (FUZZ_SECONDS for each reader); what it found lies in `cases` and is replayed.
"""

from __future__ import annotations

import hashlib
import os
import resource
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutated
from tests.fuzz.readers import READERS, make_work, read_changed
from tuckerize.errors import TuckerizeError

CASES = Path(__file__).parent / "cases"
MOST_SECONDS = 20.0
MOST_BYTES = 2**30


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("fuzz"))


def read_or_refuse(work: Path, name: str, content: bytes) -> None:
    before, started = _peak_bytes(), time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, on what they are given
            read_changed(work, READERS[name], content)
    except TuckerizeError:
        pass
    assert time.monotonic() - started < MOST_SECONDS
    assert _peak_bytes() - before < MOST_BYTES


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", READERS)
def test_undamaged_file_is_read(work: Path, name: str) -> None:
    read_changed(work, READERS[name], READERS[name].path(work).read_bytes())


@pytest.mark.parametrize("case", sorted(CASES.glob("*")), ids=lambda case: case.name)
def test_case_that_was_found_stays_mended(work: Path, case: Path) -> None:
    read_or_refuse(work, case.name.rpartition("-")[0], case.read_bytes())


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_read_or_refused(work: Path, name: str) -> None:
    content = READERS[name].path(work).read_bytes()
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "60"))
    count = 0

    @settings(
        max_examples=200,  # a call that is past its end must end soon
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        mutated(content) if READERS[name].file != "recipe.yaml" else mutated(content) | st.binary()
    )
    def search(damaged: bytes) -> None:
        nonlocal count
        if time.monotonic() > end:
            return
        count += 1
        try:
            read_or_refuse(work, name, damaged)
        except BaseException:
            CASES.mkdir(exist_ok=True)
            last.clear()
            last.append(damaged)
            raise

    last: list[bytes] = []
    while time.monotonic() < end:
        try:
            search()
        except Exception:
            if not last:  # a fault of the search itself
                raise
            digest = hashlib.sha256(last[0]).hexdigest()[:8]
            (CASES / f"{name}-{digest}").write_bytes(last[0])
            raise
    print(f"{name}: {count} inputs")  # noqa: T201
