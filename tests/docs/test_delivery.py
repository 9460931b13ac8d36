"""Workflows, images and the notebook: they name what is there, and the notebook runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT
from tuckerize.ascend.environment import CANN_BY_TORCH_NPU

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "examples" / "spectra.ipynb"


def steps(workflow: str) -> list[str]:
    """Commands of a workflow, one for each value of its matrix."""
    path = ROOT / ".github" / "workflows" / workflow
    found = []
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        runs = [step["run"] for step in job["steps"] if "run" in step]
        found += [run.replace("${{ matrix.target }}", name) for run in runs for name in targets]
    return found


@pytest.mark.parametrize("workflow", ["test.yml", "heavy.yml"])
def test_workflows_run_targets_that_are_there(workflow: str) -> None:
    commands = steps(workflow)
    assert commands
    for command in commands:
        target = re.fullmatch(r"make ([a-z-]+)", command)
        assert target, command
        assert re.search(rf"^{target[1]}:", MAKEFILE, flags=re.MULTILINE), command


def test_heavy_targets_of_the_tests_are_all_run_weekly() -> None:
    tests = set(re.findall(r"^(test-[a-z-]+|fuzz):", MAKEFILE, flags=re.MULTILINE))
    assert {f"make {target}" for target in tests} == set(steps("heavy.yml"))


@pytest.mark.parametrize("image", sorted(path.name for path in (ROOT / "docker").iterdir()))
def test_images_copy_what_is_there(image: str) -> None:
    text = (ROOT / "docker" / image).read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]]
    assert "tuckerize" in copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert name not in ignored
    pins = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, flags=re.MULTILINE))
    if pins:
        assert pins["CANN"].startswith(CANN_BY_TORCH_NPU[pins["TORCH_NPU"]])
        assert pins["TORCH_NPU"].startswith(pins["TORCH"])
    torch = re.search(r"torch==(\d\S+)", text)
    if torch:
        assert f"torch=={torch[1]}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), namespace)  # noqa: S102
    # De Lathauwer et al. 2000: no less than the largest tail, no more than all tails together.
    assert max(namespace["each"]) <= namespace["residual"] <= namespace["bound"]
