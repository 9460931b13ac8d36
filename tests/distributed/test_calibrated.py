"""Calibrated decompositions over processes equal those of one, and either continues the other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.calibrated_runs import run, same
from tests.running import torchrun
from tests.tiny_families import make_family
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize.calibration import tokens

# Groups of 3 experts, and 17 windows: one process has more experts, the other a window twice.
PROCESSES = 2
CASES: dict[str, dict[str, Any]] = {
    "all modes, groups": {"rank": "2,16,20", "group_size": 3, "joint": "gate_up"},
    "4 bits, uneven widths": {"bits": 3.0, "quantize": "w4"},
    "biases": {"rank": "full,8,8", "model": "biased"},
}
CONTINUED = ("one, two", "two, one")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, and those that either has continued for the other."""
    work = tmp_path_factory.mktemp("calibrated")
    add_tokenizer(make_tiny_model(work / "model", experts=6, dtype=torch.float32))
    add_tokenizer(make_family(work / "biased", "gpt_oss"))
    write_text(work / "text.txt", 2000)

    def settings(case: str, output: str, **how: object) -> dict[str, Any]:
        calibration = {"texts": [str(work / "text.txt")], "tokens": 1088, "window": 64, "refine": 5}
        options = {"model": "model", **CASES[case], **how}
        model = str(work / options.pop("model"))
        return {"model": model, "output": str(work / output), "calibration": calibration, **options}

    first = [settings(case, f"one/{case}") for case in CASES]
    many = [settings(case, f"many/{case}", files=case == "biases") for case in CASES]
    stop = {"stop": "layer 2: tokens"}
    case = "all modes, groups"
    first.append(settings(case, "one, two", **stop))
    many.append(settings(case, "one, two", continued=1))
    many.append(settings(case, "two, one", **stop))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "HELD_OUT_BLOCK", tokens.HELD_OUT_BLOCK)  # `run` changes it
        patch.setenv("XDG_CACHE_HOME", str(work / "cache of one"))
        run(first)
        patch.setenv("XDG_CACHE_HOME", str(work / "cache of many"))
        (work / "many.json").write_text(json.dumps(many))
        script = Path(__file__).with_name("calibrated_runs.py")
        result = torchrun(PROCESSES, script, work / "many.json")
        assert result.returncode == 0, result.stderr
        run([settings(case, "two, one", continued=1)])
    return work


@pytest.mark.parametrize("case", CASES)
def test_processes_write_what_one_does_but_for_rounding(case: str, work: Path) -> None:
    same(work / "many" / case, work / "one" / case)


@pytest.mark.parametrize("case", CONTINUED)
def test_other_number_of_processes_continues(case: str, work: Path) -> None:
    same(work / case, work / "one" / "all modes, groups")
