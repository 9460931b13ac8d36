"""The `push` command: publish a finished result on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.hub import upload_files
from tuckerize.checkpoint.output import MANIFEST, RECONSTRUCTED
from tuckerize.errors import CheckpointError
from tuckerize.format.card import CARD, card_with
from tuckerize.format.check import take_inventory, take_inventory_of_reconstruction
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.pipeline.evaluation_record import evaluation_rows, find_evaluation
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report.checkpoint import PushReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """A result to publish.

    Attributes:
        folder: A Tucker checkpoint, or what `reconstruct` wrote. Shards stay here.
        repository: Id of the repository, "owner/name"; it is made if there is none.
        base_model: Id of the source on the Hub, for the card; by default what decompose was given,
            where that was no folder.
        private: Make a new repository private.
        dry_run: Show what would be uploaded; needs no network.
    """

    folder: str | Path
    repository: str
    base_model: str | None = None
    private: bool = False
    dry_run: bool = False


def push(request: PushRequest, progress: Progress | None = None) -> PushReport:
    """Upload a result to the Hugging Face Hub, its model card with what `evaluate` measured.

    All files are hashed before: nothing damaged is published.

    Args:
        request: The result.
        progress: Shows how far the hashing is.

    Raises:
        CheckpointError: A file is not as it was written.
        OutputError: The Hub refused it, or was not reached.

    Example:
        >>> push(PushRequest(folder="OUT", repository="me/small", dry_run=True))  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    folder = Path(request.folder)
    is_dense = (folder / RECONSTRUCTED).exists()
    tucker = None if is_dense else TuckerCheckpoint.open(folder)
    inventory = take_inventory_of_reconstruction(folder) if is_dense else take_inventory(folder, ())
    progress.start(inventory.bytes)
    faults, _ = inventory.verdict(inventory.hash(inventory.files, progress.advance))
    progress.close()
    if faults:
        raise CheckpointError(
            f"{folder} is not as it was written: {'; '.join(map(str, faults))}",
            hint="write it again with --overwrite, or fetch it again",
        )
    names = sorted({file.name for file in inventory.files} | {_manifest(folder)} | {CARD})
    facts: dict[str, Any] = {"tags": ["tuckerize"]}
    if request.base_model is not None:
        facts["base_model"] = request.base_model
        if tucker is not None and tucker.manifest.cores:
            facts["base_model_relation"] = "quantized"
    card = card_with(_read(folder / CARD), _measured(tucker), facts)
    url = None
    if not request.dry_run:
        url = upload_files(folder, names, {CARD: card}, request.repository, private=request.private)
    present = [folder / name for name in names if (folder / name).exists()]
    return PushReport(
        folder=str(folder),
        repository=request.repository,
        files=tuple(names),
        bytes=sum(path.stat().st_size for path in present),
        card=card,
        url=url,
        notes=_notes(tucker, card),
    )


def _manifest(folder: Path) -> str:
    return RECONSTRUCTED if (folder / RECONSTRUCTED).exists() else MANIFEST


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _measured(tucker: TuckerCheckpoint | None) -> str:
    found = find_evaluation(tucker) if tucker is not None else None
    if found is None:
        return ""
    rows = "".join(f"| {name} | {value} |\n" for name, value in evaluation_rows(found))
    return f"## Measured\n\n| | |\n| --- | --- |\n{rows}"


def _notes(tucker: TuckerCheckpoint | None, card: str) -> tuple[str, ...]:
    notes = []
    if "base_model:" not in card:
        notes.append("the card names no base_model: add --base-model owner/name")
    if "license:" not in card:
        notes.append("the card names no license: write that of the source into README.md")
    if tucker is not None and find_evaluation(tucker) is None:
        notes.append(
            "the card has no measured quality: run 'tuckerize evaluate FOLDER --text FILE "
            "--against SOURCE' first"
        )
    return tuple(notes)
