"""Completion of a Tucker checkpoint whose weight files are written: everything else, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.files import FileRecord, describe_file, write_json
from tuckerize.checkpoint.other_files import copy_other_files
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import WeightFile, measure_size
from tuckerize.checkpoint.weight_set import CONFIG, INDEX
from tuckerize.checkpoint.writer import write_index
from tuckerize.domain import Cores, Size, StackResult, cores_of
from tuckerize.format.card import with_loader, write_hub_files
from tuckerize.format.config import TuckerQuantization, with_quantization
from tuckerize.format.manifest import TuckerManifest, sealed
from tuckerize.moe.source import SourceModel


def size_of_files(
    output: Path,
    files: Sequence[FileRecord],
    stacks: Sequence[StackResult],
    source: SourceModel,
    cores: Cores,
    *,
    dense: bool,
) -> Size:
    """Size of a checkpoint from the headers of its weight files.

    Args:
        output: Folder of the checkpoint.
        files: Its weight files.
        stacks: Its stacks.
        source: The dense model.
        cores: Encodings of the cores.
        dense: Whether what the source has quantised besides the experts was written dense.
    """
    stored = {
        name: place.header
        for file in files
        for name, place in WeightFile.open(output / file.name).tensors.items()
    }
    return measure_size(
        stored if dense else source.checkpoint.dense_headers(stored),
        is_routed=source.moe.is_routed,
        quantised_parameters=sum(
            math.prod(stack.multilinear_rank) for stack in stacks if cores_of(cores, stack.layer)
        ),
    )


def finish_checkpoint(
    folder: OutputFolder,
    source: SourceModel,
    manifest: TuckerManifest,
    rest: Mapping[str, Any] | None,
) -> TuckerManifest:
    """Write other files, config, index and manifest, in this order.

    Args:
        folder: Folder of the weight files.
        source: The dense model, whose other files are copied.
        manifest: The manifest without `other_files`.
        rest: `quantization_config` of what is quantised besides the experts, if anything.

    Returns:
        The manifest as written.
    """
    output, checkpoint = folder.folder, source.checkpoint
    others = copy_other_files(checkpoint.folder, output)
    config = checkpoint.config
    quantization = TuckerQuantization.of(manifest, source.moe.family, rest)
    write_json(output / CONFIG, with_quantization(with_loader(config), quantization))
    others += write_hub_files(checkpoint.folder, output, manifest, config)
    write_index(output, [WeightFile.open(output / file.name) for file in manifest.files])
    names = sorted({*others, CONFIG, INDEX})
    recorded = tuple(describe_file(output / name, name=name) for name in names)
    manifest = manifest.model_copy(update={"other_files": recorded})
    folder.finish(sealed(manifest))
    return manifest
