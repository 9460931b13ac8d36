"""A teacher, and its predictions: found once before training, with one of its layers in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tuckerize.calibration.stream import StreamedModel
from tuckerize.calibration.tokenizer import load_tokenizer
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import read_tensors
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.errors import CheckpointError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.healing.objective import Predictions
from tuckerize.parallel.processes import Processes
from tuckerize.pipeline.evaluate import Evaluated, open_evaluated, run_layers
from tuckerize.progress import Progress

# The rest of the vocabulary counts as one token, which is all that is lost.
_KEPT = 128
_PIECE = "teacher"


def bytes_of_predictions(tokens: int) -> int:
    """Bytes of the predictions of so many tokens, on disk and in each process's host memory."""
    return tokens * 4 * (2 * _KEPT + 1)


def open_teacher(name: str | Path, tucker: TuckerCheckpoint) -> Evaluated:
    """Open the teacher of a Tucker checkpoint.

    Args:
        name: Folder, Hugging Face id or short name.
        tucker: The checkpoint that learns from it.

    Raises:
        CheckpointError: It cannot be read, or its tokens are not those of the checkpoint.
    """
    teacher = open_evaluated(resolve_model(str(name)))
    sizes = [own.config.get("vocab_size") for own in (teacher.checkpoint, tucker.checkpoint)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{name} has a vocabulary of {sizes[0]} tokens, {tucker.folder} one of {sizes[1]}",
            hint="take the model that was compressed as the teacher",
        )
    folders = (teacher.checkpoint.folder, tucker.folder)
    if any(folders[0].glob("tokenizer*")):
        theirs, ours = (load_tokenizer(own).get_vocab() for own in folders)
        if other := next((t for t in ours if theirs.get(t, ours[t]) != ours[t]), None):
            raise CheckpointError(
                f"{name} has another tokenizer than {tucker.folder}: {other!r} is the token "
                f"{theirs[other]} of the one and {ours[other]} of the other",
                hint="take the model that was compressed as the teacher",
            )
    return teacher


def predictions(
    teacher: Evaluated,
    tokens_SL: Tensor,
    output: OutputFolder,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> Predictions:
    """Predictions of a teacher for windows of tokens, which the processes share.

    They are kept in the output's work folder: a run that continues reads them.

    Args:
        teacher: The teacher, dense or factored.
        tokens_SL: The windows.
        output: The claimed output folder.
        processes: The processes of the run, all of which call it.
        device: This process's device.
        progress: Shows how far the work is.

    Raises:
        CheckpointError: The teacher cannot be run layer by layer, or its values are not finite.
    """
    if output.record(_PIECE) is None:
        parts = tokens_SL.tensor_split(min(processes.size, len(tokens_SL)))
        record = None
        if processes.rank < len(parts):
            found = _predict(teacher, parts[processes.rank].to(device), device, progress)
            path = output.work_file(f"teacher-{processes.rank}.safetensors")
            name = str(path.relative_to(output.folder))
            record = write_tensors(path, found._asdict()).model_copy(update={"name": name})
        records = processes.gather(record)
        if processes.is_leader:
            files = [record for record in records if record is not None]
            output.write_record(_PIECE, [file.name for file in files], files)
        processes.barrier()
    read = [
        dict(read_tensors(output.folder / name, Predictions._fields))
        for name in output.finished_record(_PIECE)
    ]
    return Predictions(*(torch.cat([part[name] for part in read]) for name in Predictions._fields))


@torch.no_grad()
def _predict(
    teacher: Evaluated, tokens_SL: Tensor, device: torch.device, progress: Progress
) -> Predictions:
    model = StreamedModel.open(teacher.checkpoint, teacher.family, device=device)
    progress.start(model.layers + 1)
    progress.stage("predictions of the teacher")
    states = run_layers(teacher, model, tokens_SL, progress).states
    with model.head() as head:
        own = [
            Predictions.of_logits(head(window), _KEPT)
            for part in states
            for window in part.split(1)
        ]
    progress.close()
    return Predictions(*(torch.cat(parts).cpu() for parts in zip(*own, strict=True)))
