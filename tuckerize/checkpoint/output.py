"""Output folders: claimed for one plan, locked, resumable, and never overwritten by accident.

OUT/.tuckerize/        of an unfinished run: lock, plan.json, a record of every finished piece
OUT/.tuckerize-done-…  the same folder, while it is removed after the manifest was written
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.files import (
    TEMPORARY_SUFFIX,
    FileRecord,
    check_plain_name,
    read_json_object,
    sha256_of,
    write_json,
)
from tuckerize.checkpoint.sealed import json_sha256, read_sealed_json, write_sealed_json
from tuckerize.checkpoint.weight_set import INDEX
from tuckerize.errors import CheckpointError, OutputError

MANIFEST = "tuckerize.json"
"""Name of both manifests, in the folder of a checkpoint and in the folder of its shards."""

RECONSTRUCTED = "tuckerize-reconstruct.json"
"""Name of the record of a reconstruction's origin and files, in place of a manifest."""

REPORT = "verify.json"
"""Name of the report of `verify`, in the verified folder."""

EVALUATION = "tuckerize-evaluation.json"
"""Name of the comparison with the source that `evaluate` keeps in a Tucker checkpoint."""

_WORK = ".tuckerize"
_DONE = f"{_WORK}-done-"
_LOCK = "lock"
_PLAN = "plan.json"
_REPLACED = "replaced.json"  # the manifest of the result that a run begins to remove
_CLAIM = (_PLAN, _LOCK, _REPLACED)
# Files that describe the weights, and must be removed with them.
_RESULTS = (INDEX, REPORT, EVALUATION)

Read = Callable[[int, str], object]


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that one plan is being written to.

    Finished pieces of work leave a record in a hidden work folder; a run that starts again with the
    same plan skips them. Without a manifest the folder is unfinished.
    """

    folder: Path
    manifest_name: str = MANIFEST

    def check(self, plan: Mapping[str, Any], *, overwrite: bool) -> None:
        """Check that the folder may be written to; changes nothing.

        Args:
            plan: JSON values that determine everything that will be written.
            overwrite: Whether a finished result, or an unfinished one, may be replaced.

        Raises:
            OutputError: The folder holds other files, or the result of another plan.
        """
        folder = self.folder
        if not folder.exists():
            return
        if not folder.is_dir():
            raise OutputError(f"{folder} is a file", hint="choose another --output")
        if not any(folder.iterdir()):
            return
        is_ours = self._work.exists() or any(self._done) or self._manifest.exists()
        if not is_ours:
            raise OutputError(
                f"{folder} is not empty and was not written by tuckerize",
                hint="choose an empty or new folder; --overwrite does not remove foreign files",
            )
        if overwrite or self._continues(plan):
            return
        if self._manifest.exists():
            raise OutputError(
                f"{folder} already holds a finished result",
                hint="choose another folder, or add --overwrite to replace it",
            )
        difference = _difference(self._plan(), _plain(plan))
        if difference:
            raise OutputError(
                f"{folder} already holds another unfinished run: {difference}",
                hint="to continue it, start it with what it was started with; to begin anew, add "
                "--overwrite; or choose another folder",
            )

    @contextmanager
    def claim(
        self, plan: Mapping[str, Any], *, overwrite: bool, read: Read = lambda *_: None
    ) -> Iterator[None]:
        """Claim the folder for a plan, and keep other runs out of it for the block.

        The folder is new, replaced, or that of an interrupted run, which continues: pieces whose
        files are not as they were recorded will be made again.

        Args:
            plan: JSON values that determine everything that will be written.
            overwrite: Whether to begin anew where there is a result, finished or not.
            read: Called with the bytes and the name of files that are hashed.

        Raises:
            OutputError: As `check`, or another run is writing to the folder.
        """
        self.check(plan, overwrite=overwrite)
        with self._locked():
            self.check(plan, overwrite=overwrite)
            if overwrite or not self._continues(plan):
                # Until the old result is removed, the folder is an unfinished run of no plan.
                write_json(self._work / _PLAN, {})
                self._remove_result()
                write_json(self._work / _PLAN, _plain(plan))
            elif not self.is_finished:
                self._drop_damaged(read)
            yield

    def join(self, plan: Mapping[str, Any]) -> None:
        """Join in writing a folder that another process has claimed for the plan.

        Raises:
            OutputError: It is not claimed, so it is another folder.
        """
        if not self._continues(plan):
            raise OutputError(f"{self.folder} is not the folder that process 0 has claimed")

    @property
    def is_unfinished(self) -> bool:
        """Whether a run has begun to write the folder and has not finished."""
        return self._work.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the manifest is there: all that may be left to do is to call `tidy`."""
        return self._manifest.exists()

    def claimed(self, key: str) -> Any:  # noqa: ANN401
        """A value of the plan that the folder is claimed for.

        Raises:
            CheckpointError: The plan cannot be read any more.
        """
        plan = self._plan()
        if not plan:
            raise _lost(self._work / _PLAN)
        return plan[key]

    def work_file(self, name: str) -> Path:
        """Path of a file of the run, removed when the folder is finished."""
        return self._work / name

    def record(self, piece: str) -> Any | None:  # noqa: ANN401
        """The record of a finished piece of work; None if there is none, or it is damaged."""
        found = read_sealed_json(self._record_file(piece))
        return None if found is None else found["value"]

    def finished_record(self, piece: str) -> Any:  # noqa: ANN401
        """The record of a piece that this run has finished.

        Raises:
            CheckpointError: It cannot be read any more.
        """
        found = self.record(piece)
        if found is None:
            raise _lost(self._record_file(piece))
        return found

    def write_record(self, piece: str, value: object, files: Iterable[FileRecord]) -> None:
        """Record that a piece of work is finished.

        Args:
            piece: Name of the piece.
            value: JSON values that the end of the run needs.
            files: The files that were written; they must be in place.
        """
        written = [file.model_dump() for file in files]
        write_sealed_json(self._record_file(piece), {"files": written, "value": value})

    def finish(self, manifest: object) -> None:
        """Write the manifest, and remove the work folder and leftovers of killed runs."""
        remove_temporaries(self.folder)
        write_json(self._manifest, manifest)
        self.tidy()

    def tidy(self) -> None:
        """Remove the work folder of a finished run.

        It is renamed first, to a name that tells the plan, so that the same command knows its
        result at every moment.
        """
        if self._work.exists():
            plan = json_sha256(self._plan() or {})[:16]
            self._work.rename(self.folder / f"{_DONE}{plan}")
        for done in self._done:
            shutil.rmtree(done)

    @property
    def _work(self) -> Path:
        return self.folder / _WORK

    @property
    def _done(self) -> list[Path]:
        return [*self.folder.glob(f"{_DONE}*")]

    @property
    def _manifest(self) -> Path:
        return self.folder / self.manifest_name

    def _record_file(self, piece: str) -> Path:
        return self._work / f"{piece}.json"

    def _plan(self) -> dict[str, Any] | None:
        """The plan that the folder is claimed for: empty where there is none yet, None if lost."""
        path = self._work / _PLAN
        try:
            return read_json_object(path) if path.exists() else {}
        except CheckpointError:
            return None

    def _continues(self, plan: Mapping[str, Any]) -> bool:
        """Whether the folder holds a run of the plan, unfinished or just finished."""
        if self._plan() == _plain(plan):
            return True
        name = f"{_DONE}{json_sha256(_plain(plan))[:16]}"
        return self._manifest.exists() and (self.folder / name).exists()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder, which ends with the process, however that ends."""
        path = self._work / _LOCK
        self._work.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file is gone where the other run has ended just now.
                is_taken = not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino
            except BlockingIOError:
                is_taken = True
            except OSError:  # a file system without locks
                is_taken = False
            if is_taken:
                raise OutputError(
                    f"another run is writing to {self.folder}",
                    hint="wait until it ends, or choose another folder",
                )
            yield

    def _drop_damaged(self, read: Read) -> None:
        """Remove the records of pieces whose files are not as they were written."""
        for path in self._work.glob("*.json"):
            if path.name in _CLAIM:
                continue
            record = read_sealed_json(path)
            files = [] if record is None else [FileRecord(**file) for file in record["files"]]
            if record is None or not all(self._is_whole(file, read) for file in files):
                path.unlink()

    def _is_whole(self, file: FileRecord, read: Read) -> bool:
        path = self.folder / file.name
        return (
            path.is_file()
            and path.stat().st_size == file.bytes
            and sha256_of(path, lambda count: read(count, file.name)) == file.sha256
        )

    def _remove_result(self) -> None:
        """Remove the files of an earlier run; foreign files stay."""
        replaced = self.work_file(_REPLACED)
        if self._manifest.exists():
            self._manifest.replace(replaced)
        for name in _small_files(replaced):
            (self.folder / name).unlink(missing_ok=True)
        remove_temporaries(self.folder)
        for done in self._done:
            shutil.rmtree(done)
        for path in [*self.folder.iterdir(), *self._work.iterdir()]:
            is_sharding = (path / MANIFEST).exists() or (path / _WORK).exists()
            is_record = path.parent == self._work and path.name not in _CLAIM
            if path.is_dir() and is_sharding:
                shutil.rmtree(path)
            elif is_record or path.name in _RESULTS or path.suffix == ".safetensors":
                path.unlink()
        replaced.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove files that killed runs were writing."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def refuse_overlap(output: Path, source: Path) -> None:
    """Refuse an output folder that is the source, lies in it or in a finished result, or holds it.

    Raises:
        OutputError: It does.
    """
    new, old = output.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise OutputError(
            f"the output {output} and the source {source} lie in one another",
            hint="choose an output folder elsewhere",
        )
    for parent in new.parents:
        if (parent / MANIFEST).exists():
            raise OutputError(
                f"the output {output} lies in {parent}, which is a finished result",
                hint="choose an output folder elsewhere",
            )


def _small_files(manifest: Path) -> list[str]:
    """Names that a manifest gives to files beside the weights; none if it is damaged."""
    try:
        files = read_json_object(manifest).get("other_files", []) if manifest.exists() else []
        names = [FileRecord(**file).name for file in files]
        for name in names:
            for part in name.split("/"):
                check_plain_name(part, found_in=manifest)
    except (CheckpointError, TypeError, ValueError):
        return []
    return names


def _plain(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan after a round trip through JSON."""
    value: dict[str, Any] = json.loads(json.dumps(plan))
    return value


def _difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Difference of two plans in words; empty if the first is of no run."""
    if before is None:
        return "its plan cannot be read"
    parts = []
    for key in {**before, **now} if before else ():
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        name = key.replace("_sha256", "").replace("_", " ")
        if isinstance(old, dict) and isinstance(new, dict):
            own = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            name += f" ({', '.join(own[:3])}{', ...' if len(own) > 3 else ''})"
        elif isinstance(old, str | int) and len(str(old)) < 40:
            name += f" ({old})"
        parts.append(name)
    return f"it was started with another {' and another '.join(parts)}" if parts else ""


def _lost(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} was written by this run and cannot be read any more",
        hint="start the same command again: it continues",
    )
