"""Expand a Tucker checkpoint to an ordinary dense one, for engines without Tucker support."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.other_files import copy_other_files
from tuckerize.checkpoint.output import OutputFolder, refuse_overlap
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, WeightFile, measure_size
from tuckerize.checkpoint.space import require_space
from tuckerize.checkpoint.weight_set import CONFIG
from tuckerize.checkpoint.writer import write_dense, write_index, write_tensors
from tuckerize.domain import Coupling, Projection, coupling_name, group_experts
from tuckerize.format.card import restore_card
from tuckerize.format.config import without_quantization
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.linalg.tucker import with_zero_rows
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report import ReconstructReport
from tuckerize.version import __version__

RECORD = "tuckerize-reconstruct.json"
"""File in the dense folder that records its origin, in place of a manifest."""


def output_folder(output: Path) -> OutputFolder:
    """The folder of a reconstruction."""
    return OutputFolder(output, RECORD)


def provenance(tucker: TuckerCheckpoint) -> dict[str, Any]:
    """JSON values that determine every byte of a reconstruction."""
    return {
        "tuckerize_version": __version__,
        "tucker_manifest_sha256": tucker.manifest_sha256,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructRequest:
    """A dense checkpoint to write.

    Attributes:
        folder: The Tucker checkpoint.
        output: The new folder.
        overwrite: Begin anew: replace an earlier reconstruction, finished or not.
    """

    folder: str | Path
    output: str | Path
    overwrite: bool = False


def reconstruct(request: ReconstructRequest, progress: Progress | None = None) -> ReconstructReport:
    """Expand a Tucker checkpoint to an ordinary dense one, which any engine loads.

    Args:
        request: The reconstruction.
        progress: Shows how far the work is.

    Raises:
        CheckpointError: The folder is not a finished Tucker checkpoint.
        OutputError: The output folder holds something else.

    Example:
        >>> reconstruct(ReconstructRequest(folder="OUT", output="DENSE"))  # doctest: +SKIP
    """
    tucker, output = TuckerCheckpoint.open(Path(request.folder)), Path(request.output)
    refuse_overlap(output, tucker.folder)
    return expand(
        tucker, output, overwrite=request.overwrite, progress=progress or SilentProgress()
    )


def expand(
    tucker: TuckerCheckpoint, output: Path, *, overwrite: bool, progress: Progress
) -> ReconstructReport:
    """Write the dense checkpoint that a Tucker checkpoint stands for.

    Expert weights are expanded in float32 and rounded to the type of the factors; stacks without a
    truncated mode come out bit for bit. Neurons that were not kept come out as zeros.

    Args:
        tucker: The Tucker checkpoint.
        output: The new folder.
        overwrite: Begin anew: replace an earlier reconstruction, finished or not.
        progress: Shows how far the work is.

    Raises:
        OutputError: The folder holds something else.
    """
    folder = output_folder(output)
    with folder.claim(provenance(tucker), overwrite=overwrite, read=progress.advance):
        if folder.is_finished:  # by a run that was killed at its very end
            folder.tidy()
        else:
            _write_all(tucker, folder, progress)
            folder.finish(provenance(tucker))
    size = measure_size(Checkpoint.open(output).tensors, is_routed=tucker.family.is_routed)
    return ReconstructReport(str(output), size, tucker.manifest.layers)


def _write_all(tucker: TuckerCheckpoint, folder: OutputFolder, progress: Progress) -> None:
    """Write everything but the record of the origin; weight files that are there stay."""
    output = folder.folder
    require_space(output, tucker.manifest.before.total_bytes)
    untouched = {
        file: [
            name
            for name in tucker.checkpoint.names_in(file)
            if tucker.family.layer_of(name) not in tucker.manifest.layers
        ]
        for file in tucker.checkpoint.files
    }
    copies = [name for name, tensors in untouched.items() if tensors]
    together = tucker.family.storage.together
    places = [(layer, own) for layer in tucker.manifest.layers for own in together]
    count = len(copies) + len(places)
    written = [output / f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    progress.start(count)
    for path, name in zip(written, copies, strict=False):
        if folder.record(path.stem) is None:
            copied = write_dense(path, tucker.checkpoint, name, untouched[name])
            folder.write_record(path.stem, {}, [copied])
        progress.advance(1, name)
    for path, (layer, projections) in zip(written[len(copies) :], places, strict=True):
        if folder.record(path.stem) is None:
            expanded = write_tensors(path, _expand(tucker, layer, projections))
            folder.write_record(path.stem, {}, [expanded])
        progress.advance(1, f"layer {layer}, {coupling_name(projections)}")
    progress.close()
    copy_other_files(tucker.folder, output)
    restore_card(output)
    config = without_quantization(tucker.config)
    config.pop("auto_map", None)
    if tucker.manifest.source.auto_map is not None:
        config["auto_map"] = tucker.manifest.source.auto_map
    write_json(output / CONFIG, config)
    write_index(output, [WeightFile.open(path) for path in written])


def _expand(tucker: TuckerCheckpoint, layer: int, projections: Coupling) -> dict[str, Tensor]:
    """The dense weights of projections of all experts of a layer, by checkpoint name."""
    return tucker.family.stored(layer).write(
        tucker.manifest.shape,
        projections,
        (
            (projection, expert, matrix_HI)
            for projection in projections
            for expert, matrix_HI in _expand_experts(tucker, layer, projection)
        ),
        TORCH_DTYPES[tucker.manifest.dtype],
    )


def _expand_experts(
    tucker: TuckerCheckpoint, layer: int, projection: Projection
) -> Iterator[tuple[int, Tensor]]:
    """The experts of a layer and their dense matrices (H, I)."""
    wide = torch.promote_types(TORCH_DTYPES[tucker.manifest.dtype], torch.float32)
    rows = tucker.manifest.shape.intermediate
    for group in range(tucker.manifest.groups):
        factors = tucker.read_factors(layer, group)[projection]
        experts = group_experts(tucker.manifest.shape, tucker.manifest.group_size, group)
        kept = tucker.kept(layer, group)
        slices = zip(experts, factors.expand_slices(wide), strict=True)
        for place, (expert, slice_HI) in enumerate(slices):
            if kept is None:
                yield expert, slice_HI
            else:
                yield expert, with_zero_rows(slice_HI, kept.places_EK[place], rows)
