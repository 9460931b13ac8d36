"""The `quantize` command: quantise the cores of a finished Tucker checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tuckerize.calibration.tokens import DenseGroup
from tuckerize.checkpoint.files import FileRecord
from tuckerize.checkpoint.output import OutputFolder, refuse_overlap
from tuckerize.checkpoint.reader import WeightFile
from tuckerize.checkpoint.space import require_space
from tuckerize.checkpoint.writer import copy_tensors
from tuckerize.compression.factors import GroupFactors, LayerFactors, compress
from tuckerize.compression.quantise import round_cores
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.compression.write import write_piece
from tuckerize.domain import (
    DOWN,
    GATE_UP,
    CoreType,
    Projection,
    StackResult,
    cores_of,
    group_experts,
)
from tuckerize.errors import CheckpointError, UsageError
from tuckerize.format.manifest import TuckerManifest, read_tucker_manifest
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, check_source_weights, open_source
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.parallel.memory import require_memory
from tuckerize.pipeline.finish import finish_checkpoint, size_of_files
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report.results import QuantizeReport
from tuckerize.version import __version__
from tuckerize.weight_types import WEIGHT_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """A Tucker checkpoint whose cores are to be quantised.

    Attributes:
        folder: The Tucker checkpoint.
        output: The new folder.
        cores: Encoding of the cores: "w4" or "w3" (4 or 3 bits in groups of 32), "w4-g128" or
            "w3-g128" (of 128), "w8" (int8) or "fp8" (float8).
        model: The source model; by default the one that decompose was given.
        overwrite: Replace an earlier result.
    """

    folder: str | Path
    output: str | Path
    cores: str = CoreType.W4
    model: str | Path | None = None
    overwrite: bool = False


def quantize(request: QuantizeRequest, progress: Progress | None = None) -> QuantizeReport:
    """Quantise the cores of a finished Tucker checkpoint, rounding to nearest.

    `decompose` with a calibration and `quantize` rounds for the inputs of every expert, which
    loses less. The source is read to record the residuals of what is stored.

    Args:
        request: The checkpoint and the encoding.
        progress: Shows how far the work is.

    Raises:
        UsageError: The cores are quantised already.
        CheckpointError: The checkpoint is unfinished, or its source is not at hand or another.
        OutputError: The output folder holds something else.

    Example:
        >>> quantize(QuantizeRequest(folder="OUT", output="OUT4"))  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    cores = CoreType.parse(request.cores)
    tucker, output = TuckerCheckpoint.open(Path(request.folder)), Path(request.output)
    old = tucker.manifest
    if old.cores is not None:
        kinds = {kind for layer in old.layers if (kind := cores_of(old.cores, layer))}
        raise UsageError(
            f"the cores of {tucker.folder} are quantised already, as {' and '.join(sorted(kinds))}",
            hint="quantise the checkpoint that it was made from",
        )
    if old.source is None:
        raise UsageError(
            f"transformers has saved {tucker.folder} again: which neurons of the source it kept is "
            "not known, and cores are quantised against the source",
            hint="quantise the checkpoint that decompose wrote",
        )
    source = open_source(str(request.model or old.source.model), tucker)
    refuse_overlap(output, tucker.folder)
    refuse_overlap(output, source.checkpoint.folder)
    stack = source.moe.shape._replace(experts=old.group_size).parameters * source.dtype.itemsize
    require_memory(stack, "a projection of the experts of a group", "end other programs")
    progress.start(sum(file.bytes for file in old.source.files))
    progress.stage("source: hashes")
    check_source_weights(source, tucker, progress.advance)
    progress.close()
    folder = OutputFolder(output)
    provenance = {
        "tuckerize_version": __version__,
        "tucker_manifest_sha256": tucker.manifest_sha256,
        "cores": cores,
    }
    with folder.claim(provenance, overwrite=request.overwrite, read=progress.advance):
        if folder.is_finished:  # by a run that was killed at its very end
            new = read_tucker_manifest(output)
            folder.tidy()
        else:
            new = _write_all(tucker, source, folder, cores, progress)
    return QuantizeReport(
        output=str(output),
        cores=cores,
        dense=old.before,
        before=old.after,
        after=new.after,
        largest_residual_before=old.largest_residual,
        largest_residual=max(stack.relative_residual for stack in new.stacks),
    )


def _write_all(
    tucker: TuckerCheckpoint,
    source: SourceModel,
    folder: OutputFolder,
    cores: CoreType,
    progress: Progress,
) -> TuckerManifest:
    """Write the new checkpoint and return its manifest; weight files that are there stay."""
    old, output = tucker.manifest, folder.folder
    require_space(output, old.after.total_bytes)
    progress.start(len(old.files))
    records = []
    for file in old.files:
        record = folder.record(file.name)
        if record is None:
            record = _write_file(tucker, source, tucker.checkpoint.files[file.name], cores, output)
            folder.write_record(file.name, record, [FileRecord(**record["file"])])
        records.append(record)
        progress.advance(1, file.name)
    progress.close()
    files = tuple(FileRecord(**record["file"]) for record in records)
    read = TypeAdapter(list[StackResult]).validate_python
    stacks = [stack for record in records for stack in read(record["stacks"])]
    stacks.sort(key=lambda stack: (stack.layer, stack.group))
    dense = bool(old.recipe.get("dequantize_rest"))
    update = {
        "tuckerize_version": __version__,
        "recipe": {**old.recipe, "quantize": cores.value},
        "cores": cores,
        "stacks": tuple(stacks),
        # Errors on the validation set were those of the cores before.
        "calibrated": tuple(r.model_copy(update={"output_error": None}) for r in old.calibrated),
        "after": size_of_files(output, files, stacks, source, cores, dense=dense),
        "files": files,
    }
    rest = None if dense else source.rest(old.layers)
    return finish_checkpoint(folder, source, old.model_copy(update=update), rest)


def _write_file(
    tucker: TuckerCheckpoint, source: SourceModel, file: WeightFile, cores: CoreType, output: Path
) -> dict[str, Any]:
    """Write one weight file: a copy, or the stacks of a layer with quantised cores."""
    names = [name for name in map(TensorName.find, file.tensors) if name is not None]
    if not names:
        written = copy_tensors(output / file.path.name, file, file.tensors)
        return {"file": written.model_dump(), "stacks": []}
    layers = {tucker.family.layer_of(text) for text in file.tensors}
    if len(names) != len(file.tensors) or len(layers) != 1:
        raise CheckpointError(
            f"{file.path} holds more than the factored experts of one layer",
            hint="write the checkpoint again",
        )
    layer = layers.pop() or 0
    projections = {name.projection for name in names}
    groups = range(tucker.manifest.groups)
    targets = tuple(_target(tucker, layer, group, projections) for group in groups)
    piece = LayerPiece(layer, targets)
    steps = [round_cores(WEIGHT_TYPES[tucker.manifest.dtype], cores)]
    parts = (compress(part, steps) for part in _parts(tucker, source, piece))
    experts = tucker.family.experts_prefix(layer)
    return write_piece(output / file.path.name, piece, parts, experts)


def _target(
    tucker: TuckerCheckpoint, layer: int, group: int, projections: set[Projection]
) -> CompressionTarget:
    """Sizes of the stacks of a group, of some projections."""
    ranks = tucker.manifest.ranks(layer)[group]
    couplings = [GATE_UP, DOWN] if tucker.manifest.joint else [(p,) for p in Projection]
    own = {coupling: ranks[coupling[0]] for coupling in couplings if coupling[0] in projections}
    return CompressionTarget(tucker.manifest.stack_shape(layer).intermediate, own)


def _parts(
    tucker: TuckerCheckpoint, source: SourceModel, piece: LayerPiece
) -> Iterator[LayerFactors]:
    """The groups of a piece as they are stored, one in memory at a time."""
    manifest = tucker.manifest
    for index, target in enumerate(piece.targets):
        experts = group_experts(source.moe.shape, manifest.group_size, index)
        projections = [projection for coupling in target.couplings for projection in coupling]
        stacks = {p: source.stack(piece.layer, p, experts) for p in projections}
        factors = tucker.read_factors(piece.layer, index)
        sweeps = {
            stack.projection: stack.sweeps
            for stack in manifest.stacks
            if (stack.layer, stack.group) == (piece.layer, index)
        }
        group = GroupFactors(
            index,
            DenseGroup(stacks, experts),
            target,
            {projection: factors[projection] for projection in projections},
            tucker.kept(piece.layer, index),
            sweeps,
            biases={p: b for p, b in tucker.read_biases(piece.layer, index).items() if p in stacks},
        )
        yield LayerFactors(piece.layer, (group,))
