from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tuckerize.checkpoint.files import describe_file
from tuckerize.checkpoint.output import MANIFEST, OutputFolder, _difference
from tuckerize.errors import CheckpointError, OutputError

PLAN = {"model": "a", "sizes": [1, 2]}
OTHER = {"model": "b", "sizes": [1, 2]}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def claim(output: OutputFolder, plan: Mapping[str, Any], *, overwrite: bool) -> None:
    """Claim a folder and let go of it, as a run that is killed."""
    with output.claim(plan, overwrite=overwrite):
        pass


def make(state: str, folder: Path) -> OutputFolder:
    """A folder in a state, with a weight file where a run of a plan has been."""
    output = OutputFolder(folder)
    if state == "empty":
        folder.mkdir()
    elif state == "foreign":
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
    elif state == "a file":
        folder.write_text("text")
    elif state in ("unfinished", "finished", "finished uncleanly"):
        claim(output, PLAN, overwrite=False)
        (folder / "model-1.safetensors").write_text("numbers")
        (folder / "model.safetensors.index.json").write_text("{}")
        written = describe_file(folder / "model-1.safetensors")
        output.write_record("piece", {"error": 0.5}, [written])
        if state == "finished":
            output.finish({"made": "yes"})
        elif state == "finished uncleanly":
            (folder / MANIFEST).write_text("{}")
    return output


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", ["absent", "empty"])
def test_claim_of_a_free_folder_takes_it(tmp_path: Path, state: str, overwrite: bool) -> None:
    output = make(state, tmp_path / "out")
    claim(output, PLAN, overwrite=overwrite)
    expected = [".tuckerize", ".tuckerize/lock", ".tuckerize/plan.json"]
    assert sorted(contents(output.folder)) == expected


def test_claim_of_a_nested_folder_makes_its_parents(tmp_path: Path) -> None:
    claim(OutputFolder(tmp_path / "a" / "b" / "c"), PLAN, overwrite=False)
    assert (tmp_path / "a" / "b" / "c" / ".tuckerize").is_dir()


@pytest.mark.parametrize("state", ["unfinished", "finished uncleanly"])
def test_claim_of_an_interrupted_run_with_the_same_plan_continues(
    tmp_path: Path, state: str
) -> None:
    output = make(state, tmp_path / "out")
    before = contents(output.folder)
    claim(output, {"model": "a", "sizes": (1, 2)}, overwrite=False)
    assert contents(output.folder) == before
    assert output.record("piece") == {"error": 0.5}


@pytest.mark.parametrize(
    ("state", "plan", "overwrite", "message"),
    [
        ("foreign", PLAN, False, "is not empty and was not written by tuckerize"),
        ("foreign", PLAN, True, "is not empty and was not written by tuckerize"),
        ("a file", PLAN, False, "is a file"),
        ("a file", PLAN, True, "is a file"),
        (
            "unfinished",
            OTHER,
            False,
            "already holds another unfinished run: it was started with another model (a)",
        ),
        ("finished", PLAN, False, "already holds a finished result"),
        ("finished", OTHER, False, "already holds a finished result"),
        ("finished uncleanly", OTHER, False, "already holds a finished result"),
    ],
)
def test_claim_of_a_folder_that_holds_something_else_is_refused_and_changes_nothing(
    tmp_path: Path, state: str, plan: dict[str, Any], overwrite: bool, message: str
) -> None:
    output = make(state, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OutputError) as checked:
        output.check(plan, overwrite=overwrite)
    with pytest.raises(OutputError) as claimed:
        claim(output, plan, overwrite=overwrite)
    for caught in (checked, claimed):
        assert caught.value.message == f"{tmp_path}/out {message}"
        assert caught.value.hint
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("state", "plan"),
    [
        ("unfinished", OTHER),
        ("unfinished", PLAN),
        ("finished", PLAN),
        ("finished", OTHER),
        ("finished uncleanly", OTHER),
    ],
)
def test_claim_with_overwrite_replaces_a_result_but_no_foreign_file(
    tmp_path: Path, state: str, plan: dict[str, Any]
) -> None:
    output = make(state, tmp_path / "out")
    (output.folder / "notes.txt").write_text("my own")
    shards = OutputFolder(output.folder / "tp2")
    claim(shards, PLAN, overwrite=False)
    (shards.folder / "layer.safetensors").write_text("numbers")
    claim(output, plan, overwrite=True)
    assert set(contents(output.folder)) == {
        ".tuckerize",
        ".tuckerize/plan.json",
        ".tuckerize/lock",
        "notes.txt",
    }
    assert output.record("piece") is None


@pytest.mark.parametrize("state", ["absent", "empty", "unfinished", "finished"])
def test_check_of_a_folder_that_may_be_written_changes_nothing(tmp_path: Path, state: str) -> None:
    output = make(state, tmp_path / "out")
    before = contents(tmp_path)
    output.check(PLAN, overwrite=True)
    assert contents(tmp_path) == before


def test_finish_leaves_the_manifest_and_no_work_folder_or_leftovers(tmp_path: Path) -> None:
    output = make("unfinished", tmp_path / "out")
    (output.folder / ".weights.123.tmp").touch()
    output.finish({"made": "yes"})
    left = ["model-1.safetensors", "model.safetensors.index.json", MANIFEST]
    assert sorted(contents(output.folder)) == left


def test_folder_with_another_manifest_name_is_finished_by_that_name(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out", "own.json")
    claim(output, PLAN, overwrite=False)
    output.finish({})
    assert sorted(contents(output.folder)) == ["own.json"]
    with pytest.raises(OutputError, match="a finished result"):
        claim(output, PLAN, overwrite=False)
    with pytest.raises(OutputError, match="was not written by tuckerize"):
        claim(OutputFolder(tmp_path / "out"), PLAN, overwrite=True)


@pytest.mark.parametrize("state", ["absent", "empty", "foreign", "finished"])
def test_join_of_a_folder_that_is_not_claimed_is_refused_and_changes_nothing(
    tmp_path: Path, state: str
) -> None:
    output = make(state, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="is not the folder that process 0 has claimed"):
        output.join(PLAN)
    assert contents(tmp_path) == before


def test_join_of_a_claimed_folder_takes_part(tmp_path: Path) -> None:
    make("unfinished", tmp_path / "out").join(PLAN)
    with pytest.raises(OutputError):
        OutputFolder(tmp_path / "out").join({"another": "plan"})


@pytest.mark.parametrize("left", [(), ("lock",), ("lock", ".plan.json.77.tmp"), ("plan.json",)])
def test_folder_of_a_run_that_was_killed_before_it_had_a_plan_is_claimed(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    output = OutputFolder(tmp_path / "out")
    work = output.folder / ".tuckerize"
    work.mkdir(parents=True)
    for name in left:
        (work / name).write_text("{}" if name == "plan.json" else "")
    claim(output, PLAN, overwrite=False)
    output.finish({})
    assert sorted(contents(output.folder)) == [MANIFEST]


@pytest.mark.parametrize("text", ["", "[]", '{"model":'])
def test_plan_that_is_damaged_is_refused_and_overwritten(tmp_path: Path, text: str) -> None:
    output = make("unfinished", tmp_path / "out")
    (output.folder / ".tuckerize" / "plan.json").write_text(text)
    with pytest.raises(OutputError, match="unfinished run: its plan cannot be read") as caught:
        claim(output, PLAN, overwrite=False)
    assert "to begin anew, add --overwrite" in caught.value.hint
    claim(output, PLAN, overwrite=True)
    assert output.record("piece") is None
    assert not (output.folder / "model-1.safetensors").exists()


def test_difference_of_plans_names_the_keys_and_the_files() -> None:
    output = {"recipe": {"keep": 1}, "weights": {"a": "1", "b": "2"}, "text_sha256": "0" * 64}
    now = {"recipe": {"keep": 2}, "weights": {"a": "1", "b": "3"}, "text_sha256": "1" * 64}
    assert _difference(output, now) == (
        "it was started with another recipe (keep) and another weights (b) and another text"
    )


@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped", "record cut", "record flipped"])
def test_piece_that_was_damaged_between_runs_is_made_again(tmp_path: Path, damage: str) -> None:
    output = make("unfinished", tmp_path / "out")
    is_record = damage.startswith("record")
    name = ".tuckerize/piece.json" if is_record else "model-1.safetensors"
    path = output.folder / name
    data = bytearray(path.read_bytes())
    if damage.endswith("deleted"):
        path.unlink()
    elif damage.endswith("cut"):
        path.write_bytes(data[:5])
    else:
        path.write_bytes(
            data.replace(b"0.5", b"0.7") if is_record else bytes([data[0] ^ 4]) + data[1:]
        )
    claim(output, PLAN, overwrite=False)
    assert output.record("piece") is None


def test_record_or_plan_that_is_lost_during_a_run_ends_it(tmp_path: Path) -> None:
    """Its place is named, no value is made up: the result would hold null or miss a piece."""
    output = OutputFolder(tmp_path / "out")
    with output.claim(PLAN, overwrite=False):
        assert output.claimed("model") == "a"
        output.write_record("piece", {"n": 1}, [])
        assert output.finished_record("piece") == {"n": 1}
        for file in output.work_file("").rglob("*.json"):
            file.write_text("{")
        with pytest.raises(CheckpointError, match=r"piece.*cannot be read any more"):
            output.finished_record("piece")
        with pytest.raises(CheckpointError, match="cannot be read any more"):
            output.claimed("model")


def test_run_that_was_killed_after_its_manifest_is_known_as_finished(tmp_path: Path) -> None:
    output = make("unfinished", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: None)
        output.finish({"made": "yes"})
    with pytest.raises(OutputError, match="already holds a finished result"):
        claim(output, OTHER, overwrite=False)
    with output.claim(PLAN, overwrite=False):
        assert output.is_finished
        output.tidy()
    left = ["model-1.safetensors", "model.safetensors.index.json", MANIFEST]
    assert sorted(contents(output.folder)) == left


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("plan", [PLAN, OTHER])
def test_second_run_in_a_folder_is_refused_while_the_first_runs(
    tmp_path: Path, plan: dict[str, Any], overwrite: bool
) -> None:
    output = OutputFolder(tmp_path / "out")
    with output.claim(PLAN, overwrite=False):
        before = contents(output.folder)
        message = "already holds another" if plan == OTHER and not overwrite else "another run is"
        with pytest.raises(OutputError, match=message):
            claim(OutputFolder(tmp_path / "out"), plan, overwrite=overwrite)
        assert contents(output.folder) == before
    claim(output, PLAN, overwrite=False)


def test_lock_of_a_run_that_was_killed_is_free(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with output.claim(PLAN, overwrite=False):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    with pytest.raises(OutputError, match="another run is writing to"):
        claim(output, PLAN, overwrite=False)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    claim(output, PLAN, overwrite=False)


def test_folder_on_a_file_system_without_locks_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    claim(OutputFolder(tmp_path / "out"), PLAN, overwrite=False)
