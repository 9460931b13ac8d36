"""Damaged files are read or refused: nothing but a TuckerizeError leaves, soon, in little memory.

`make fuzz` searches (FUZZ_SECONDS for each reader); what it found lies in `cases` and is replayed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.readers import READERS, make_work, read_changed
from tests.fuzz.search import CASES, Search, read_or_refuse
from tests.running import ROOT

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
IS_GUIDED = os.environ.get("FUZZ_ENGINE") == "atheris"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", READERS)
def test_undamaged_file_is_read(work: Path, name: str) -> None:
    read_changed(work, READERS[name], READERS[name].path(work).read_bytes())


@pytest.mark.parametrize("case", sorted(CASES.glob("*")), ids=lambda case: case.name)
def test_case_that_was_found_stays_mended(work: Path, case: Path) -> None:
    read_or_refuse(work, case.name.rpartition("-")[0], case.read_bytes())


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.skipif(IS_GUIDED, reason="atheris searches")
@pytest.mark.parametrize("name", READERS)
def test_damaged_file_is_read_or_refused(work: Path, name: str) -> None:
    one = Search(work, name)
    end = time.monotonic() + SECONDS

    @settings(
        max_examples=200,  # a call that is past its end must end soon
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(one.inputs)
    def search(damaged: bytes) -> None:
        if time.monotonic() < end:
            one.try_one(damaged)

    while time.monotonic() < end:
        search()
    print(one.told)  # noqa: T201


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.skipif(not IS_GUIDED, reason="FUZZ_ENGINE=atheris")
@pytest.mark.parametrize("name", READERS)
def test_file_that_reaches_new_lines_is_read_or_refused(name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    print(done.stdout)  # noqa: T201
