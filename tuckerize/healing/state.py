"""State of a run on disk: every process writes what it has, and any number of processes read it.

Not torch's distributed checkpoint: its metadata is a pickle, and it cuts a dimension evenly, which
whole groups of quantised cores do not allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuckerize.checkpoint.files import FileRecord
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import WeightFile, read_tensors
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.parallel.mesh import Axis
from tuckerize.parallel.processes import Processes

_PIECE = "state"
_WEIGHTS = "weights"


class SavedTensors(Mapping[str, Tensor]):
    """Whole tensors, each put together from its parts when it is asked for.

    Args:
        files: Files of the parts, in order.
        dimensions: Dimensions along which tensors are split; None for those that are not.
    """

    def __init__(self, files: Sequence[Path], dimensions: Mapping[str, int | None]) -> None:
        self._files = [WeightFile.open(path) for path in files]
        self._dimensions = {
            name: dimension
            for name, dimension in dimensions.items()
            if any(name in file.tensors for file in self._files)
        }

    @property
    def parameters(self) -> int:
        """Number of their values."""
        return sum(r.header.parameters for file in self._files for r in file.tensors.values())

    def __getitem__(self, name: str) -> Tensor:
        """The whole of a tensor, on the host."""
        dimension = self._dimensions[name]
        paths = [file.path for file in self._files if name in file.tensors]
        parts = [tensor for path in paths for _, tensor in read_tensors(path, [name])]
        return parts[0] if dimension is None else torch.cat(parts, dimension)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._dimensions)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._dimensions)


@dataclass(frozen=True, slots=True)
class SavedRun:
    """The state of a run, in the work folder of its output.

    It changes all at once: the record that names its files is written last.

    Attributes:
        output: The claimed output folder.
        processes: The processes of the run.
        parts: The processes that share tensors.
        writes: Whether this process writes its parts: not, if another has the same.
    """

    output: OutputFolder
    processes: Processes
    parts: Axis
    writes: bool

    def save(
        self,
        step: int,
        best_step: int,
        kinds: Mapping[str, Mapping[str, Tensor]],
        dimensions: Mapping[str, int | None],
        history: Mapping[str, Any],
    ) -> None:
        """Save the state, and forget the one before; all processes call it.

        Args:
            step: Steps before the state.
            best_step: Steps before the best state, of which the weights are kept.
            kinds: This process's parts of the weights, and of what the optimizer keeps, by name.
            dimensions: Dimensions along which tensors are split; None for those that are not.
            history: JSON values.
        """
        own: list[FileRecord] = []
        if self.writes:
            for kind, tensors in kinds.items():
                mine = {
                    name: tensor
                    for name, tensor in tensors.items()
                    if self.parts.rank == 0 or dimensions[name] is not None
                }
                path = self.output.work_file(f"{_name(kind, step)}{self.parts.rank}.safetensors")
                name = str(path.relative_to(self.output.folder))
                own.append(write_tensors(path, mine).model_copy(update={"name": name}))
        records = [record for part in self.processes.gather(own) for record in part]
        if not self.processes.is_leader:
            return
        if best_step != step:
            records += self._files(_WEIGHTS, best_step)
        files = [record.model_dump() for record in records]
        value = {"history": dict(history), "dimensions": dict(dimensions), "files": files}
        self.output.write_record(_PIECE, value, records)
        kept = {self.output.folder / record.name for record in records}
        for path in self.output.work_file("").glob(f"{_PIECE}-*.safetensors"):
            if path not in kept:
                path.unlink()

    def history(self) -> dict[str, Any] | None:
        """The history of the saved state; None if there is no state."""
        value = self.output.record(_PIECE)
        return None if value is None else dict(value["history"])

    def tensors(self, step: int, kind: str = _WEIGHTS) -> SavedTensors:
        """Whole tensors of one kind, of the state after some steps."""
        files = [self.output.folder / record.name for record in self._files(kind, step)]
        return SavedTensors(files, self.output.finished_record(_PIECE)["dimensions"])

    def _files(self, kind: str, step: int) -> list[FileRecord]:
        """The files of one kind of tensors, in the order of their parts."""
        files = [FileRecord(**file) for file in self.output.finished_record(_PIECE)["files"]]
        return [file for file in files if Path(file.name).name.startswith(_name(kind, step))]


def _name(kind: str, step: int) -> str:
    return f"{_PIECE}-{step}-{kind}-"
