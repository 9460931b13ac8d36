"""Make an ordinary checkpoint of a Tucker checkpoint, for engines without Tucker support."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuckerize.checkpoint.files import describe_file, write_json
from tuckerize.checkpoint.other_files import copy_other_files
from tuckerize.checkpoint.output import RECONSTRUCTED, OutputFolder, refuse_overlap
from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, WeightFile, measure_size
from tuckerize.checkpoint.space import require_space
from tuckerize.checkpoint.weight_set import CONFIG, INDEX
from tuckerize.checkpoint.writer import write_dense, write_index, write_tensors
from tuckerize.domain import Coupling, Projection, coupling_name, group_experts
from tuckerize.format.card import CARD, restore_card
from tuckerize.format.config import without_quantization
from tuckerize.format.manifest import checksum
from tuckerize.format.stock import StockExperts
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.linalg.tucker import with_zero_rows
from tuckerize.moe.narrow import (
    can_narrow,
    narrow_config,
    narrow_count,
    shared_expert_names,
    with_zero_neurons,
)
from tuckerize.parallel.memory import require_memory
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report.results import ReconstructReport
from tuckerize.version import __version__

# Grouped GEMMs need rows of multiples of 16 bytes.
_ALIGNED = 8


def output_folder(output: Path) -> OutputFolder:
    """The folder of a reconstruction."""
    return OutputFolder(output, RECONSTRUCTED)


def provenance(tucker: TuckerCheckpoint, *, dequantize: bool) -> dict[str, Any]:
    """JSON values that determine every byte of a reconstruction."""
    return {
        "tuckerize_version": __version__,
        "tucker_manifest_sha256": tucker.manifest_sha256,
        **({"dequantize": True} if dequantize else {}),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructRequest:
    """An ordinary checkpoint to write.

    Attributes:
        folder: The Tucker checkpoint.
        output: The new folder.
        dequantize: Write experts in the type of the factors, even where an ordinary checkpoint can
            have the quantised ones.
        overwrite: Begin anew: replace an earlier reconstruction, finished or not.
    """

    folder: str | Path
    output: str | Path
    dequantize: bool = False
    overwrite: bool = False


def reconstruct(request: ReconstructRequest, progress: Progress | None = None) -> ReconstructReport:
    """Make an ordinary checkpoint of a Tucker checkpoint, which any engine loads.

    Expert weights are expanded in float32 and rounded to the type of the factors; stacks without a
    truncated mode come out bit for bit. All experts are as wide as the widest one: others get zero
    neurons, in the places of those that were not kept if nothing became narrower. Experts whose
    cores are quantised stay so where they have no factor and one width.

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
    progress = progress or SilentProgress()
    refuse_overlap(output, tucker.folder)
    folder, width = output_folder(output), _width(tucker)
    stock: StockExperts | str | None = None
    if tucker.manifest.cores is not None and not request.dequantize:
        stock = StockExperts.of(tucker, width)
    if not isinstance(stock, StockExperts):
        _require_memory(tucker, width)
    made_of = provenance(tucker, dequantize=request.dequantize)
    with folder.claim(made_of, overwrite=request.overwrite, read=progress.advance):
        finished = folder.is_finished  # by a run that was killed at its very end
        if not finished:
            quantised = stock if isinstance(stock, StockExperts) else None
            record = made_of | _write_all(tucker, folder, width, quantised, progress)
        # Before the end: the same command still continues where this cannot be read.
        written = Checkpoint.open(output)
        tensors = written.dense(QuantizationDescription.of(written.config)).tensors
        if finished:
            folder.tidy()
        else:
            folder.finish(record | {"checksum": checksum(record)})
    return ReconstructReport(
        str(output),
        measure_size(tensors, is_routed=tucker.family.is_routed),
        tucker.manifest.layers,
        width,
        cores=stock.core_type if isinstance(stock, StockExperts) else None,
        dequantised_because=stock if isinstance(stock, str) else None,
    )


def _write_all(
    tucker: TuckerCheckpoint,
    folder: OutputFolder,
    width: int,
    quantised: StockExperts | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write all but the record, and return its files; weight files that are there stay."""
    output = folder.folder
    require_space(output, tucker.manifest.before.total_bytes)
    shared = _shared_experts(tucker, width)
    widened = {name for names in shared.values() for name in names}
    untouched = {
        file: [
            name
            for name in tucker.checkpoint.names_in(file)
            if tucker.family.layer_of(name) not in tucker.manifest.layers and name not in widened
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
            folder.write_record(path.stem, copied.model_dump(), [copied])
        progress.advance(1, name)
    for path, (layer, projections) in zip(written[len(copies) :], places, strict=True):
        if folder.record(path.stem) is None:
            if quantised:
                tensors = quantised.tensors(layer, projections)
            else:
                tensors = _expand(tucker, layer, projections, width)
            for projection in projections:
                tensors |= _widen(tucker, shared.get((layer, projection), []), projection, width)
            expanded = write_tensors(path, tensors)
            folder.write_record(path.stem, expanded.model_dump(), [expanded])
        progress.advance(1, f"layer {layer}, {coupling_name(projections)}")
    progress.close()
    others = copy_other_files(tucker.folder, output)
    restore_card(output)
    config = without_quantization(tucker.config)
    if width < tucker.manifest.shape.intermediate:
        config = narrow_config(config, tucker.family, tucker.manifest.shape, width)
    config.pop("auto_map", None)
    source = tucker.manifest.source
    if source is not None and source.auto_map is not None:
        config["auto_map"] = source.auto_map
    if quantised:
        config["quantization_config"] = quantised.description
    write_json(output / CONFIG, config)
    write_index(output, [WeightFile.open(path) for path in written])
    small = sorted(name for name in {*others, CONFIG, INDEX, CARD} if (output / name).exists())
    return {
        "files": [folder.finished_record(path.stem) for path in written],
        "other_files": [describe_file(output / name, name=name).model_dump() for name in small],
    }


def _width(tucker: TuckerCheckpoint) -> int:
    """Width of all experts: that of the widest one left, as grouped GEMMs of engines need it."""
    manifest = tucker.manifest
    layers = {None, *manifest.layers}
    dense_are_left = any(tucker.family.layer_of(n) not in layers for n in tucker.checkpoint.tensors)
    if dense_are_left or not can_narrow(tucker.family):
        return manifest.shape.intermediate
    widest = max(
        max(manifest.widths(layer, group))
        for layer in manifest.layers
        for group in range(manifest.groups)
    )
    return min(math.ceil(widest / _ALIGNED) * _ALIGNED, manifest.shape.intermediate)


def _require_memory(tucker: TuckerCheckpoint, width: int) -> None:
    """Refuse what cannot be expanded: the projections of a layer that are stored together."""
    together = max(map(len, tucker.family.storage.together))
    stack = tucker.manifest.shape._replace(intermediate=width).parameters
    needed = together * stack * TORCH_DTYPES[tucker.manifest.dtype].itemsize
    require_memory(needed, "the experts of a layer that one file holds", "end other programs")


def _shared_experts(
    tucker: TuckerCheckpoint, width: int
) -> dict[tuple[int, Projection], list[str]]:
    """Names of the weights of shared experts that become wider, by layer and projection."""
    if width == tucker.manifest.shape.intermediate:
        return {}
    present = tucker.checkpoint.tensors
    return {
        (layer, projection): shared_expert_names(tucker.family, layer, projection, present)
        for layer in tucker.manifest.layers
        for projection in Projection
    }


def _widen(
    tucker: TuckerCheckpoint, names: list[str], projection: Projection, width: int
) -> dict[str, Tensor]:
    """Weights of shared experts with zero neurons appended, by checkpoint name."""
    shape = tucker.manifest.shape
    widened = {}
    for name, weight in tucker.checkpoint.read(names):
        neurons = weight.shape[1 if projection == Projection.DOWN else 0]
        count = narrow_count(neurons // shape.intermediate, shape, width)
        widened[name] = with_zero_neurons(weight, projection, count * width)
    return widened


def _expand(
    tucker: TuckerCheckpoint, layer: int, projections: Coupling, width: int
) -> dict[str, Tensor]:
    """The dense weights of projections of all experts of a layer, by checkpoint name."""
    return tucker.family.stored(layer).write(
        tucker.manifest.shape._replace(intermediate=width),
        projections,
        (
            (projection, expert, matrix_HI)
            for projection in projections
            for expert, matrix_HI in _expand_experts(tucker, layer, projection, width)
        ),
        TORCH_DTYPES[tucker.manifest.dtype],
        _expand_biases(tucker, layer, projections, width),
    )


def _expand_biases(
    tucker: TuckerCheckpoint, layer: int, projections: Coupling, width: int
) -> dict[Projection, Tensor]:
    """The biases of projections of all experts of a layer."""
    found: dict[Projection, list[Tensor]] = {}
    for group in range(tucker.manifest.groups):
        kept = tucker.kept(layer, group)
        for projection, bias in tucker.read_biases(layer, group).items():
            if projection not in projections:
                continue
            own = bias
            if kept is not None and projection != Projection.DOWN:
                own = bias.new_zeros(len(bias), width)
                if width < tucker.manifest.shape.intermediate:
                    own[:, : bias.shape[1]] = bias
                else:
                    own.scatter_(1, kept.places_EK, bias)
            found.setdefault(projection, []).append(own)
    return {projection: torch.cat(own) for projection, own in found.items()}


def _expand_experts(
    tucker: TuckerCheckpoint, layer: int, projection: Projection, width: int
) -> Iterator[tuple[int, Tensor]]:
    """The experts of a layer and their dense matrices (width, I)."""
    wide = torch.promote_types(TORCH_DTYPES[tucker.manifest.dtype], torch.float32)
    for group in range(tucker.manifest.groups):
        factors = tucker.read_factors(layer, group)[projection]
        experts = group_experts(tucker.manifest.shape, tucker.manifest.group_size, group)
        kept = tucker.kept(layer, group)
        slices = zip(experts, factors.expand_slices(wide), strict=True)
        for place, (expert, slice_HI) in enumerate(slices):
            if kept is None:
                yield expert, slice_HI
            elif width == tucker.manifest.shape.intermediate:
                yield expert, with_zero_rows(slice_HI, kept.places_EK[place], width)
            else:
                yield expert, pad(slice_HI, (0, 0, 0, width - len(slice_HI)))
