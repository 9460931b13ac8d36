"""lm-evaluation-harness on a Tucker checkpoint: `make test-lm-eval`.

The line that docs/how-to/evaluate.md gives, with a task on local text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, succeed

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.lm_eval

MODEL = ROOT / "examples" / "tiny-moe"
TASK = """
task: held_out
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


HARNESS = "import tuckerize; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


def perplexity(model: Path, tasks: Path) -> float:
    """Word perplexity by the harness."""
    output = tasks / f"{model.name}.json"
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    task = ["--device", "cpu", "--tasks", "held_out", "--include_path", str(tasks)]
    subprocess.run(
        [sys.executable, "-c", HARNESS, *arguments, *task, "--output_path", str(output)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tasks / "cache")},
    )
    [written] = tasks.glob(f"**/{model.name}*.json")
    return float(json.loads(written.read_text())["results"]["held_out"]["word_perplexity,none"])


def test_all_modes_full_has_the_score_of_the_dense_model(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "held_out.txt").read_text()
    pieces = [text[start : start + 800] for start in range(0, 8000, 800)]
    file = tmp_path / "held_out.jsonl"
    file.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces))
    (tmp_path / "held_out.yaml").write_text(TASK.replace("FILE", str(file)))
    for name, size in {"full": ("--rank", "full,full,full"), "half": ("--keep", "0.5")}.items():
        succeed("decompose", "--model", MODEL, *size, "--output", tmp_path / name)
    dense, full, half = (
        perplexity(path, tmp_path) for path in (MODEL, tmp_path / "full", tmp_path / "half")
    )
    assert full == pytest.approx(dense, rel=1e-3)
    assert half > 1.01 * dense
