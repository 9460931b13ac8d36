"""The healed checkpoint: a copy with the trained tensors in their places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tuckerize.checkpoint.files import FileRecord, describe_file, write_json
from tuckerize.checkpoint.other_files import copy_other_files
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import TORCH_DTYPES, WeightFile, read_tensors
from tuckerize.checkpoint.weight_set import CONFIG, INDEX
from tuckerize.checkpoint.writer import copy_tensors, write_index, write_tensors
from tuckerize.domain import cores_of
from tuckerize.format.card import restore_card, write_hub_files
from tuckerize.format.manifest import sealed
from tuckerize.format.records import HealRecord
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.names import CorePart, TensorName
from tuckerize.runtime.trained import encode
from tuckerize.version import __version__

LOG = "tuckerize-heal.jsonl"
"""File with a line of JSON for every step and validation."""


def write_result(
    tucker: TuckerCheckpoint,
    folder: OutputFolder,
    trained: Mapping[str, Tensor],
    healed: HealRecord,
) -> None:
    """Write the healed checkpoint.

    Args:
        tucker: The checkpoint before.
        folder: The new folder, with the log.
        trained: Whole tensors in float32, by their names; those of codes before rounding.
        healed: Its record in the manifest.
    """
    output, old = folder.folder, tucker.manifest
    files = tuple(
        _write_file(tucker, file, folder, trained) for file in tucker.checkpoint.files.values()
    )
    others = copy_other_files(tucker.folder, output)
    write_json(output / CONFIG, tucker.config)
    restore_card(output)
    manifest = old.model_copy(
        update={
            "tuckerize_version": __version__,
            "stacks": tuple(replace(s, relative_residual=math.nan) for s in old.stacks),
            "calibrated": tuple(
                r.model_copy(update={"output_error": None}) for r in old.calibrated
            ),
            "healed": healed,
            "files": files,
        }
    )
    others += write_hub_files(output, output, manifest, tucker.config)
    write_index(output, [WeightFile.open(output / file.name) for file in files])
    names = sorted({name for name in (*others, CONFIG, INDEX, LOG) if (output / name).exists()})
    recorded = tuple(describe_file(output / name, name=name) for name in names)
    folder.finish(sealed(manifest.model_copy(update={"other_files": recorded})))


def _write_file(
    tucker: TuckerCheckpoint,
    file: WeightFile,
    folder: OutputFolder,
    trained: Mapping[str, Tensor],
) -> FileRecord:
    """Write one weight file: a copy, if nothing in it was trained."""
    path = folder.folder / file.path.name
    if not trained.keys() & file.tensors.keys():
        return copy_tensors(path, file, file.tensors)
    tensors = {
        name: _stored(tucker, name, trained[name], file) if name in trained else tensor
        for name, tensor in read_tensors(file.path, file.tensors)
    }
    return write_tensors(path, tensors)


def _stored(tucker: TuckerCheckpoint, name: str, trained: Tensor, file: WeightFile) -> Tensor:
    """A trained tensor as it is stored."""
    factored = TensorName.find(name)
    if factored is not None and factored.part in (CorePart.CODES, CorePart.PACKED_CODES):
        layer = tucker.family.layer_of(name)
        core_type = None if layer is None else cores_of(tucker.manifest.cores, layer)
        if core_type is None:
            raise TypeError(f"{name} is of a core that is not quantised")
        return encode(trained, core_type)
    return trained.to(TORCH_DTYPES[file.tensors[name].header.dtype])
