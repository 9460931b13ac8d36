from __future__ import annotations

from pathlib import Path

import pytest

from tuckerize.checkpoint.output import MANIFEST, OutputFolder
from tuckerize.errors import OutputError

PLAN = {"model": "a", "sizes": [1, 2]}
OTHER = {"model": "b", "sizes": [1, 2]}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


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
        output.claim(PLAN, overwrite=False)
        (folder / "model-1.safetensors").write_text("numbers")
        (folder / "model.safetensors.index.json").write_text("{}")
        output.write_record("piece", {"file": "model-1.safetensors"})
        if state == "finished":
            output.finish({"made": "yes"})
        elif state == "finished uncleanly":
            (folder / MANIFEST).write_text("{}")
    return output


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", ["absent", "empty"])
def test_claim_of_a_free_folder_takes_it(tmp_path: Path, state: str, overwrite: bool) -> None:
    output = make(state, tmp_path / "out")
    output.claim(PLAN, overwrite=overwrite)
    assert list(contents(output.folder)) == [".tuckerize", ".tuckerize/plan.json"]


def test_claim_of_a_nested_folder_makes_its_parents(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "a" / "b" / "c").claim(PLAN, overwrite=False)
    assert (tmp_path / "a" / "b" / "c" / ".tuckerize").is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("state", ["unfinished", "finished uncleanly"])
def test_claim_of_an_interrupted_run_with_the_same_plan_continues(
    tmp_path: Path, state: str, overwrite: bool
) -> None:
    output = make(state, tmp_path / "out")
    before = contents(output.folder)
    output.claim({"model": "a", "sizes": (1, 2)}, overwrite=overwrite)
    assert contents(output.folder) == before
    assert output.record("piece") == {"file": "model-1.safetensors"}


@pytest.mark.parametrize(
    ("state", "plan", "overwrite", "message"),
    [
        ("foreign", PLAN, False, "is not empty and was not written by tuckerize"),
        ("foreign", PLAN, True, "is not empty and was not written by tuckerize"),
        ("a file", PLAN, False, "is a file"),
        ("a file", PLAN, True, "is a file"),
        ("unfinished", OTHER, False, "already holds another unfinished run"),
        ("finished", PLAN, False, "already holds a finished result"),
        ("finished", OTHER, False, "already holds a finished result"),
        ("finished uncleanly", OTHER, False, "already holds a finished result"),
    ],
)
def test_claim_of_a_folder_that_holds_something_else_is_refused_and_changes_nothing(
    tmp_path: Path, state: str, plan: object, overwrite: bool, message: str
) -> None:
    output = make(state, tmp_path / "out")
    before = contents(tmp_path)
    for act in (output.check, output.claim):
        with pytest.raises(OutputError) as caught:
            act(plan, overwrite=overwrite)
        assert caught.value.message == f"{tmp_path}/out {message}"
        assert caught.value.hint
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("state", "plan"),
    [
        ("unfinished", OTHER),
        ("finished", PLAN),
        ("finished", OTHER),
        ("finished uncleanly", OTHER),
    ],
)
def test_claim_with_overwrite_replaces_a_result_but_no_foreign_file(
    tmp_path: Path, state: str, plan: object
) -> None:
    output = make(state, tmp_path / "out")
    (output.folder / "notes.txt").write_text("my own")
    shards = OutputFolder(output.folder / "tp2")
    shards.claim(PLAN, overwrite=False)
    (shards.folder / "layer.safetensors").write_text("numbers")
    output.claim(plan, overwrite=True)
    assert set(contents(output.folder)) == {".tuckerize", ".tuckerize/plan.json", "notes.txt"}
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
    output.claim(PLAN, overwrite=False)
    output.finish({})
    assert sorted(contents(output.folder)) == ["own.json"]
    with pytest.raises(OutputError, match="a finished result"):
        output.claim(PLAN, overwrite=False)
    with pytest.raises(OutputError, match="was not written by tuckerize"):
        OutputFolder(tmp_path / "out").claim(PLAN, overwrite=True)


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
