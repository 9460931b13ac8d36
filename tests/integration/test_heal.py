"""Recovery training: what is kept is better, is what was measured, and does not depend on kills."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.running import files_of, succeed
from tests.tiny_models import make_tiny_model, write_text
from tuckerize import (
    DecomposeRequest,
    HealRequest,
    ReportRequest,
    VerifyRequest,
    check,
    decompose,
    heal,
    inspect,
    verify,
    write_report,
)
from tuckerize.calibration.text import TextSource, read_split_windows, read_windows
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import Part
from tuckerize.errors import OutputError, TuckerizeError
from tuckerize.format.cores import quantised_matrices
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.healing.objective import Windows
from tuckerize.healing.objective import losses as losses_of
from tuckerize.healing.result import LOG
from tuckerize.healing.setup import Spread, check_parts, make_ready
from tuckerize.healing.training import Schedule
from tuckerize.names import CorePart, TensorKind, TensorName
from tuckerize.pipeline.report.charts import chart
from tuckerize.progress import SilentProgress

SIZES: dict[str, Any] = {"tokens": 3072, "window": 32, "batch": 8, "learning_rate": 1e-1}
STEPS = 12
HOW: dict[str, dict[str, Any]] = {
    "truncated": {"rank": "4,20,50%", "group_size": 4, "joint": "gate_up"},
    "w4": {"keep": 0.6, "quantize": "w4", "calibration": {"tokens": 4096, "refine": 0}},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 4,000 tokens."""
    return write_text(tmp_path_factory.mktemp("words") / "words.txt", 4000)


@pytest.fixture(scope="module", params=HOW)
def healed(
    request: pytest.FixtureRequest,
    model: Path,
    words: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A Tucker checkpoint before and after."""
    work, how = tmp_path_factory.mktemp("heal"), dict(HOW[request.param])
    if "calibration" in how:
        how["calibration"] = {**how["calibration"], "texts": [str(words)]}
    decompose(DecomposeRequest(model=model, output=work / "out", **how))
    parts = "cores,factors,routers,norms" + ",scales" * ("quantize" in how)
    heal(HealRequest(folder=work / "out", data=words, output=work / "healed", train=parts, **SIZES))
    return work / "out", work / "healed"


def stored(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return dict(checkpoint.read(checkpoint.tensors))


@torch.no_grad()
def nats(folder: Path, tokens_SL: Tensor) -> float:
    """The oracle: transformers, on what was written."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(tokens_SL).logits[:, :-1]
    return float(cross_entropy(logits.flatten(0, 1), tokens_SL[:, 1:].flatten()))


def validation_set(folder: Path, words: Path) -> Tensor:
    """The last sixteenth of the text, as it has one document."""
    text = words.read_text()
    tail = words.with_name("tail.txt")
    tail.write_text(text[-math.ceil(len(text) / 16) :])
    return read_windows([TextSource(str(tail))], folder, tokens=192, window=32, seed=0).tokens_SL


def test_result_predicts_text_that_it_was_not_trained_on_as_well_as_it_says(
    healed: tuple[Path, Path], words: Path
) -> None:
    out, new = healed
    record = json.loads((new / MANIFEST).read_text())["healed"]
    held_out_SL = validation_set(out, words)
    assert record["nats_before"] == pytest.approx(nats(out, held_out_SL), abs=2e-5)
    assert record["nats_after"] == pytest.approx(nats(new, held_out_SL), abs=2e-5)
    assert record["nats_after"] < record["nats_before"] - 0.1
    lines = [json.loads(line) for line in (new / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(STEPS)]


def test_all_parts_are_trained_and_nothing_else(healed: tuple[Path, Path]) -> None:
    before, after = (stored(folder) for folder in healed)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        changed = not torch.equal(tensor, before[name])
        in_layers = name.startswith("model.layers.") or name == "model.norm.weight"
        trained = TensorName.find(name) is not None or name.endswith("mlp.gate.weight")
        assert changed == (trained or (in_layers and "norm" in name)), name


def test_factors_are_orthonormal_and_codes_in_range(healed: tuple[Path, Path]) -> None:
    parts: dict[TensorName, dict[CorePart, Tensor]] = {}
    for text, tensor in stored(healed[1]).items():
        name = TensorName.find(text)
        if name is not None and name.kind != TensorKind.CORE:
            torch.testing.assert_close(
                tensor.mT @ tensor, torch.eye(tensor.shape[1]), rtol=0, atol=1e-4
            )
        elif name is not None and name.part is not None:
            parts.setdefault(name.core_name, {})[name.part] = tensor
    for own in parts.values():
        assert quantised_matrices(own).codes.abs().max() > 0


def test_every_command_takes_the_result(healed: tuple[Path, Path], tmp_path: Path) -> None:
    _, new = healed
    assert check(new).passed
    report = verify(VerifyRequest(folder=new))
    assert report.passed
    assert {layer.residual_difference for layer in report.layers} == {None}
    assert any("trained after the decomposition" in note for note in report.notes)
    facts = inspect(new).tucker
    assert facts is not None
    assert facts.largest_residual is None
    assert facts.warnings == ()
    succeed("shard", new, "--tp", "1")
    page = write_report(ReportRequest(folder=new, html=tmp_path / "new.html")).read_text()
    assert page.partition("Recovery training")[2].count("<svg") == 1
    succeed("reconstruct", new, "--output", tmp_path / "dense")
    assert not (tmp_path / "dense" / LOG).exists()
    ids = torch.arange(3, 43)[None]
    assert nats(tmp_path / "dense", ids) == pytest.approx(nats(new, ids), rel=1e-4)


def test_report_draws_the_curve_of_the_log(
    healed: tuple[Path, Path], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}

    def note(label: str, x: list[int], series: dict[str, list[float]], **how: Any) -> str:  # noqa: ANN401
        drawn[label] = dict(zip(x, series.get("validation", ()), strict=False))
        return chart(label, x, series, **how)

    monkeypatch.setattr("tuckerize.pipeline.report.command.chart", note)
    out, new = healed
    write_report(ReportRequest(folder=new, html=tmp_path / "new.html"))
    curve = drawn["nats per token"]
    assert [*curve] == [*range(STEPS + 1)]
    held_out_SL = validation_set(out, words)
    assert curve[0] == pytest.approx(nats(out, held_out_SL), abs=2e-5)
    assert min(curve.values()) == pytest.approx(nats(new, held_out_SL), abs=2e-5)


class Stop(SilentProgress):
    """Interrupts the run after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, amount: float, note: str) -> None:
        del amount
        self.left -= note.startswith("loss")
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heal") / "out"
    decompose(DecomposeRequest(model=model, output=folder, rank="full,full,50%", quantize="w4"))
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("validation_loss"))) for line in lines]


def test_interrupted_runs_end_with_the_same_bits(
    out: Path, words: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuckerize.healing.training._VALIDATIONS", 4)  # every third step
    how = {"folder": out, "data": words, "teacher": model, **SIZES}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    heal(HealRequest(output=whole, **how))
    for steps in (1, 4, 5):
        with pytest.raises(KeyboardInterrupt):
            heal(HealRequest(output=resumed, **how), Stop(steps))
    heal(HealRequest(output=resumed, **how))
    assert losses(resumed) == losses(whole)
    found, expected = files_of(resumed), files_of(whole)
    for files in (found, expected):  # which hold the seconds
        del files[LOG], files[MANIFEST]
    assert found == expected
    with pytest.raises(OutputError, match="already holds a finished result"):
        heal(HealRequest(output=resumed, **how))


def test_run_is_not_continued_with_another_text_or_teacher(
    out: Path, words: Path, model: Path, tmp_path: Path
) -> None:
    """Even one of the same shapes, under the same name."""
    teacher, output = tmp_path / "teacher", tmp_path / "healed"
    shutil.copytree(model, teacher)
    how = {"folder": out, "data": words, "output": output, "teacher": teacher, **SIZES}
    with pytest.raises(KeyboardInterrupt):
        heal(HealRequest(**how), Stop(2))
    other = write_text(tmp_path / "other.txt", 5000)
    with pytest.raises(OutputError, match="it was started with another text"):
        heal(HealRequest(**{**how, "data": other}))
    make_tiny_model(teacher, seed=1)
    with pytest.raises(OutputError, match="teacher"):
        heal(HealRequest(**how))


def test_parts_are_chosen(out: Path, words: Path, tmp_path: Path) -> None:
    before = stored(out)
    for part in (Part.SCALES, Part.CORES, Part.ROUTERS):
        new = tmp_path / part
        report = heal(HealRequest(folder=out, data=words, output=new, train=part, **SIZES))
        assert report.trained == (part,)
        assert report.nats_after < report.nats_before
        changed = {name for name, own in stored(new).items() if not torch.equal(own, before[name])}
        ends = {
            Part.SCALES: ".weight_scale",
            Part.CORES: ".weight_packed",
            Part.ROUTERS: "mlp.gate.weight",
        }
        assert changed
        assert all(name.endswith(ends[part]) for name in changed)


def test_default_trains_what_compression_wrote_codes_as_well(
    out: Path, words: Path, model: Path, tmp_path: Path
) -> None:
    how = {**SIZES, "learning_rate": 1e-3}
    report = heal(
        HealRequest(folder=out, data=words, output=tmp_path / "new", teacher=model, **how)
    )
    assert set(report.trained) == {Part.CORES, Part.FACTORS, Part.SCALES}
    before, after = stored(out), stored(tmp_path / "new")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert all(TensorName.find(name) for name in changed)
    assert any(name.endswith(".weight_packed") for name in changed)


def test_run_ends_after_half_of_its_validations_without_a_better_state(
    out: Path, words: Path, tmp_path: Path
) -> None:
    how = {**SIZES, "tokens": 32 * 8 * 40, "learning_rate": 30.0}
    report = heal(
        HealRequest(folder=out, data=words, output=tmp_path / "new", train="norms", **how)
    )
    assert (report.best_step, report.steps) == (0, 20)
    before, after = stored(out), stored(tmp_path / "new")
    assert all(torch.equal(after[name], before[name]) for name in before)


def divergence(folder: Path, teacher: Path, tokens_SL: Tensor) -> float:
    """The oracle: both models whole in transformers, all of the vocabulary."""
    with torch.no_grad():
        own, known = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens_SL)
            .logits[:, :-1]
            .double()
            .log_softmax(-1)
            for f in (folder, teacher)
        )
    return float((known.exp() * (known - own)).sum(-1).mean())


def test_teacher_is_learned(
    out: Path, words: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"folder": out, "data": words, "train": "cores,scales", "teacher": model, **SIZES}
    held_out_SL = validation_set(out, words)
    before = divergence(out, model, held_out_SL)
    heal(HealRequest(output=tmp_path / "kl", teacher_share=1.0, **how))
    assert losses(tmp_path / "kl")[0][1] == pytest.approx(before, rel=1e-4)
    assert divergence(tmp_path / "kl", model, held_out_SL) < 0.95 * before
    monkeypatch.setattr("tuckerize.pipeline.teacher._KEPT", 8)
    heal(HealRequest(output=tmp_path / "less", teacher_share=1.0, **how))
    assert losses(tmp_path / "less")[0][1] < 0.99 * before
    assert divergence(tmp_path / "less", model, held_out_SL) < 0.99 * before


def test_predictions_of_the_teacher_are_found_once(
    out: Path, words: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"folder": out, "data": words, "output": tmp_path / "new", "teacher": model, **SIZES}
    with pytest.raises(KeyboardInterrupt):
        heal(HealRequest(**how), Stop(1))
    monkeypatch.delattr("tuckerize.pipeline.teacher.StreamedModel")
    heal(HealRequest(**how))


def test_wrong_requests_are_refused(out: Path, words: Path, model: Path, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 72}))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    known["3"], known["4"] = known["4"], known["3"]
    renamed = tmp_path / "renamed"
    shutil.copytree(model, renamed)
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    decompose(DecomposeRequest(model=model, output=plain, rank="full,full,50%", layers="2"))
    cases = (
        ({"train": "factor"}, "'factor' is not one of"),
        ({"folder": plain, "train": "scales"}, "has no scales to train"),
        ({"tp": 2}, "1 processes are not a multiple of --tp 2"),
        ({"fsdp": True}, "--fsdp splits the model over replicas"),
        ({"teacher": out, "teacher_share": 0.0}, "is not in (0, 1]"),
        ({"teacher": other}, "has a vocabulary of 72 tokens"),
        ({"teacher": renamed}, "has another tokenizer than"),
        ({"learning_rate": math.nan}, "--learning-rate nan is not a positive number"),
        ({"window": 512}, "a window has 512"),
        ({"output": out / "below"}, "lie in one another"),
    )
    for given, message in cases:
        how = {"folder": out, "data": words, "output": tmp_path / "new", **SIZES, **given}
        with pytest.raises(TuckerizeError) as error:
            heal(HealRequest(**how))
        assert message in error.value.message
    with pytest.raises(TuckerizeError, match="the loss is"):
        heal(
            HealRequest(
                folder=out, data=words, output=tmp_path / "wild", **{**SIZES, "learning_rate": 1e30}
            )
        )


def by_hand(folder: Path, learned_SL: Tensor, largest: float) -> list[tuple[float, float]]:
    """The oracle: transformers' model in a loop of torch's parts; losses and gradients' norms."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = [
        own
        for name, own in model.named_parameters()
        if name.endswith(("norm.weight", "mlp.gate.weight"))
    ]
    size = SIZES["learning_rate"]
    groups = [
        {"params": [own], "lr": size * float(own.detach().square().mean().sqrt())}
        for own in trained
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 1)
    schedule, found = Schedule(STEPS, SIZES["batch"], 4, size, seed=0), []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens_SL = learned_SL[schedule.windows(step, len(learned_SL))]
        loss = model(tokens_SL, labels=tokens_SL).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, largest)
        found.append((float(loss.detach()), float(norm)))
        optimizer.step()
        if step:  # the first is the warm-up
            rates.step()
    return found


def test_steps_are_those_of_a_plain_loop(
    out: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forwards a step, of which the gradients are accumulated, and clipped."""
    largest = 0.05
    monkeypatch.setattr("tuckerize.healing.training._LARGEST_NORM", largest)
    heal(
        HealRequest(folder=out, data=words, output=tmp_path / "new", train="routers,norms", **SIZES)
    )
    lines = [json.loads(line) for line in (tmp_path / "new" / LOG).read_text().splitlines()]
    found = [(line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]
    source = TextSource(str(words))
    learned, _ = read_split_windows([source], out, tokens=3072, window=32, seed=0, held_out=1 / 16)
    expected = by_hand(out, learned.tokens_SL, largest)
    assert max(norm for _, norm in expected) > 2 * largest
    assert found == [pytest.approx(line, rel=1e-4) for line in expected]


def test_products_are_of_16_bits_under_autocast_and_weights_are_not(out: Path, words: Path) -> None:
    windows = Windows(validation_set(out, words))
    tucker = TuckerCheckpoint.open(out)
    gradients = []
    for reduces in (False, True):
        ready = make_ready(tucker, check_parts(tucker, None), torch.device("cpu"), Spread())
        with torch.autocast("cpu", torch.bfloat16, enabled=reduces):
            found = losses_of(ready.model, windows, 0.0)
        (found.objective / len(windows)).backward()  # type: ignore[no-untyped-call]
        assert {own.parameter.dtype for own in ready.tensors} == {torch.float32}
        gradients.append({own.name: own.gradient for own in ready.tensors})
    whole, reduced = gradients
    for name, expected in whole.items():
        error = float((reduced[name] - expected).norm() / expected.norm())
        assert 1e-5 < error < 0.2, name
