"""Runs that are started again: with the same bytes at the end, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import files_of, run_here
from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize import (
    DecomposeRequest,
    QuantizeRequest,
    ReconstructRequest,
    ShardRequest,
    decompose,
    quantize,
    reconstruct,
    shard,
)
from tuckerize.checkpoint import output as output_module
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.errors import CheckpointError, OutputError

Command = Callable[..., object]


class Stop(KeyboardInterrupt):
    """The run is interrupted here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of equal config and shapes."""
    folder = tmp_path_factory.mktemp("resume")
    return {
        name: add_tokenizer(make_tiny_model(folder / name, seed=seed, shards=True))
        for seed, name in enumerate(("base", "chat"))
    }


def of_kind(kind: str, models: dict[str, Path], text: Path) -> dict[str, Any]:
    """Options of a decomposition."""
    if kind == "data-free":
        return {"rank": "full,full,50%"}
    settings = {"texts": [str(text)], "tokens": 1024, "refine": 0}
    return {"rank": "full,16,20", "calibration": settings}


def stopped(run: Command, after: int, **request: Any) -> None:  # noqa: ANN401
    """Run a command that is interrupted before its n-th record."""
    original, calls = OutputFolder.write_record, []

    def counted(*arguments: Any) -> None:  # noqa: ANN401
        calls.append(1)
        if len(calls) > after:
            raise Stop
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "write_record", counted)
        with pytest.raises(Stop):
            run(**request)


def decomposed(**request: Any) -> object:  # noqa: ANN401
    return decompose(DecomposeRequest(**request))


@pytest.fixture(params=["data-free", "calibrated"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_other_weights_of_the_same_shapes_are_refused(
    kind: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = of_kind(kind, models, text)
    out = tmp_path / "out"
    stopped(decomposed, 2, model=models["base"], output=out, **options)
    before = files_of(out)
    with pytest.raises(OutputError, match="it was started with another weights") as caught:
        decomposed(model=models["chat"], output=out, **options)
    assert "model-00001-of-" in caught.value.message
    assert "to continue it, start it with what it was started with" in caught.value.hint
    assert files_of(out) == before
    decomposed(model=models["chat"], output=out, overwrite=True, **options)
    decomposed(model=models["chat"], output=tmp_path / "whole", **options)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_weights_that_are_replaced_in_place_are_refused(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models["base"], model)
    options = of_kind("data-free", models, text)
    stopped(decomposed, 2, model=model, output=out, **options)
    last = sorted(model.glob("*.safetensors"))[-1].name
    shutil.copy(models["chat"] / last, model / last)
    with pytest.raises(OutputError, match=rf"another weights \({last}\)"):
        decomposed(model=model, output=out, **options)
    shutil.copy(models["base"] / last, model / last)  # a copy is the same file
    decomposed(model=model, output=out, **options)


def test_weights_that_are_replaced_while_they_are_read_end_the_run(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models["base"], model)
    original = OutputFolder.write_record

    def replacing(*arguments: Any) -> None:  # noqa: ANN401
        for file in model.glob("*.safetensors"):
            shutil.copy(models["chat"] / file.name, file)
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "write_record", replacing)
        with pytest.raises(CheckpointError, match="was changed while it was being decomposed"):
            decomposed(model=model, output=out, **of_kind("data-free", models, text))
    assert not (out / "tuckerize.json").exists()


def pieces_of(out: Path) -> Iterator[Path]:
    yield from sorted(out.glob("*.safetensors"))
    yield from sorted((out / ".tuckerize").glob("[!p]*.json"))
    yield from sorted((out / ".tuckerize").glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["deleted", "emptied", "flipped"])
def test_damage_between_runs_is_found_and_made_again(
    kind: str, damage: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = {"model": models["base"], **of_kind(kind, models, text)}
    decomposed(output=tmp_path / "whole", **options)
    stopped(decomposed, 3 if kind == "data-free" else 2, output=tmp_path / "stopped", **options)
    places = [path.relative_to(tmp_path / "stopped") for path in pieces_of(tmp_path / "stopped")]
    assert len(places) >= 4
    for place in places:
        out = tmp_path / "out"
        shutil.copytree(tmp_path / "stopped", out)
        data = bytearray((out / place).read_bytes())
        data[len(data) // 2] ^= 4
        (out / place).unlink()
        if damage != "deleted":
            (out / place).write_bytes(data if damage == "flipped" else b"")
        decomposed(output=out, **options)
        assert files_of(out) == files_of(tmp_path / "whole"), place
        shutil.rmtree(out)


def test_shards_and_reconstructions_that_were_damaged_are_made_again(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    tucker = tmp_path / "tucker"
    decomposed(model=models["base"], output=tucker, **of_kind("data-free", models, text))

    def sharded(**request: Any) -> None:  # noqa: ANN401
        shard(ShardRequest(**request))

    def expanded(**request: Any) -> None:  # noqa: ANN401
        reconstruct(ReconstructRequest(folder=tucker, **request))

    dense = tmp_path / "dense"
    commands: list[tuple[Command, dict[str, Any], Path]] = [
        (sharded, {"folder": tucker, "tp": 2}, tucker / "tp2"),
        (expanded, {"output": dense}, dense),
    ]
    for command, request, folder in commands:
        command(**request)
        whole = files_of(folder)
        shutil.rmtree(folder)
        stopped(command, 1, **request)
        path = sorted(folder.glob("*.safetensors"))[0]
        path.write_bytes(bytes(path.stat().st_size))
        command(**request)
        assert files_of(folder) == whole


@pytest.mark.parametrize("command", ["shard", "reconstruct", "quantize"])
def test_run_is_not_continued_with_another_checkpoint(
    command: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """One of the same shapes and names, in the same folder; `--overwrite` begins anew with it."""
    tucker, other, new = (tmp_path / name for name in ("tucker", "other", "new"))
    options = of_kind("data-free", models, text)
    decomposed(model=models["base"], output=tucker, **options)
    decomposed(model=models["chat"], output=other, **options)
    run, output = following(command, tucker, new)
    stopped(run, 1)
    before = files_of(output)
    for path in other.iterdir():
        shutil.copy(path, tucker)
    with pytest.raises(OutputError, match="it was started with another tucker manifest"):
        run()
    assert files_of(output) == before
    run(overwrite=True)
    whole = files_of(output)
    run, output = following(command, other, tmp_path / "undisturbed")
    run()
    assert files_of(output) == whole


def following(command: str, tucker: Path, output: Path) -> tuple[Command, Path]:
    """A command on a Tucker checkpoint, and where it writes."""
    if command == "shard":
        return lambda **more: shard(ShardRequest(folder=tucker, tp=2, **more)), tucker / "tp2"
    if command == "quantize":
        return lambda **more: quantize(
            QuantizeRequest(folder=tucker, output=output, **more)
        ), output
    return lambda **more: reconstruct(
        ReconstructRequest(folder=tucker, output=output, **more)
    ), output


def test_source_of_other_weights_is_not_quantised_against(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Files of the same names and sizes; nothing is written, and a run that began stays."""
    tucker, out = tmp_path / "tucker", tmp_path / "out"
    decomposed(model=models["base"], output=tucker, **of_kind("data-free", models, text))
    run, _ = following("quantize", tucker, out)
    for begun in (False, True):
        if begun:
            stopped(run, 1)
            before = files_of(out)
        with pytest.raises(CheckpointError, match="is not the model that") as caught:
            run(model=models["chat"])
        assert "was changed: its SHA-256 is not the manifest's" in caught.value.message
        assert (files_of(out) == before) if begun else not out.exists()
    run()


def test_two_runs_in_one_folder_are_refused(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = of_kind("data-free", models, text)
    out = tmp_path / "out"
    stopped(decomposed, 1, model=models["base"], output=out, **options)
    plan = (out / ".tuckerize" / "plan.json").read_text()
    with OutputFolder(out).claim(json.loads(plan), overwrite=False):
        arguments = ("--model", models["base"], "--rank", options["rank"], "--output", out)
        result = run_here("decompose", *arguments)
        assert result.returncode == 2
        assert f"error: another run is writing to {out}" in result.stderr
    assert run_here("decompose", *arguments).returncode == 0


def test_overwrite_removes_the_small_files_of_the_earlier_result(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Files that only the first source has go; those of the user stay."""
    richer = tmp_path / "model"
    shutil.copytree(models["base"], richer)
    (richer / "chat_template.jinja").write_text("{{ messages }}")
    options = of_kind("data-free", models, text)
    out, whole = tmp_path / "out", tmp_path / "whole"
    decomposed(model=models["chat"], output=whole, **options)
    decomposed(model=richer, output=out, **options)
    assert (out / "chat_template.jinja").exists()
    (out / "notes.txt").write_text("mine")
    # Killed while the earlier result is removed, it still knows what to remove.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_module, "remove_temporaries", stop)
        patch.setattr(output_module, "_small_files", lambda _: [])
        with pytest.raises(Stop):
            decomposed(model=models["chat"], output=out, overwrite=True, **options)
    decomposed(model=models["chat"], output=out, **options)
    assert files_of(out) == {**files_of(whole), "notes.txt": b"mine"}


def stop(*_: object) -> None:
    raise Stop
