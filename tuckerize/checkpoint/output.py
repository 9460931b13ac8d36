"""Output folders: claimed for one plan, resumable, and never overwritten by accident."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.files import TEMPORARY_SUFFIX, read_json_object, write_json
from tuckerize.errors import OutputError

MANIFEST = "tuckerize.json"
"""Name of both manifests, in the folder of a checkpoint and in the folder of its shards."""

REPORT = "verify.json"
"""Name of the report of `verify`, in the verified folder."""

_WORK = ".tuckerize"
_PLAN = "plan.json"
# Files that describe the weights, and must be removed with them.
_RESULTS = ("model.safetensors.index.json", REPORT)


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that one plan is being written to.

    Finished pieces of work leave a record in a hidden work folder; a run that starts again with the
    same plan skips them. Without a manifest the folder is unfinished.
    """

    folder: Path
    manifest_name: str = MANIFEST

    def check(self, plan: object, *, overwrite: bool) -> None:
        """Check that the folder may be written to; changes nothing.

        Args:
            plan: JSON values that determine everything that will be written.
            overwrite: Whether a finished result, or that of another plan, may be replaced.

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
        claimed = (self._work / _PLAN).exists()
        if not claimed and not (folder / self.manifest_name).exists():
            raise OutputError(
                f"{folder} is not empty and was not written by tuckerize",
                hint="choose an empty or new folder; --overwrite does not remove foreign files",
            )
        if overwrite or self._is_claimed(plan):
            return
        state = (
            "a finished result"
            if (folder / self.manifest_name).exists()
            else "another unfinished run"
        )
        raise OutputError(
            f"{folder} already holds {state}",
            hint="choose another folder, or add --overwrite to replace it",
        )

    def claim(self, plan: object, *, overwrite: bool) -> None:
        """Claim the folder for a plan: new, replaced, or resumed after an interrupted run.

        Raises:
            OutputError: As `check`.
        """
        self.check(plan, overwrite=overwrite)
        if self._is_claimed(plan):
            return
        claim = self._work / _PLAN
        self._work.mkdir(parents=True, exist_ok=True)
        # Until the old result is removed, the folder is an unfinished run of no plan.
        write_json(claim, {})
        self._remove_result()
        write_json(claim, _plain(plan))

    def join(self, plan: object) -> None:
        """Join in writing a folder that another process has claimed for the plan.

        Raises:
            OutputError: It is not claimed, so it is another folder.
        """
        if not self._is_claimed(plan):
            raise OutputError(f"{self.folder} is not the folder that process 0 has claimed")

    def _is_claimed(self, plan: object) -> bool:
        claim = self._work / _PLAN
        return claim.exists() and read_json_object(claim) == _plain(plan)

    @property
    def _work(self) -> Path:
        return self.folder / _WORK

    def _remove_result(self) -> None:
        """Remove the files of an earlier run; foreign files stay."""
        (self.folder / self.manifest_name).unlink(missing_ok=True)
        for path in [*self.folder.iterdir(), *self._work.iterdir()]:
            is_sharding = (path / MANIFEST).exists() or (path / _WORK).exists()
            is_record = path.parent == self._work and path.name != _PLAN
            if path.is_dir() and is_sharding:
                shutil.rmtree(path)
            elif is_record or path.name in _RESULTS or path.suffix == ".safetensors":
                path.unlink()

    def work_file(self, name: str) -> Path:
        """Path of a file of the run, removed when the folder is finished."""
        return self._work / name

    def record(self, piece: str) -> dict[str, Any] | None:
        """The record of a finished piece of work, or None."""
        path = self._work / f"{piece}.json"
        return read_json_object(path) if path.exists() else None

    def write_record(self, piece: str, value: object) -> None:
        """Record that a piece of work is finished; its output must be in place."""
        write_json(self._work / f"{piece}.json", value)

    def finish(self, manifest: object) -> None:
        """Write the manifest, and remove the work folder and leftovers of killed runs."""
        for leftover in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        write_json(self.folder / self.manifest_name, manifest)
        shutil.rmtree(self._work)


def refuse_overlap(output: Path, source: Path) -> None:
    """Refuse an output folder that is the source, lies in it, or contains it.

    Raises:
        OutputError: It does.
    """
    new, old = output.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise OutputError(
            f"the output {output} and the source {source} lie in one another",
            hint="choose an output folder elsewhere",
        )


def _plain(plan: object) -> dict[str, Any]:
    """The plan after a round trip through JSON."""
    value: dict[str, Any] = json.loads(json.dumps(plan))
    return value
