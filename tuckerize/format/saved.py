"""A Tucker checkpoint that transformers has saved again, after training, say.

It has the tensors and config.json of a Tucker checkpoint and no manifest. What config.json and the
files tell is described; the source, the recipe, the residuals and the hashes are not known.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import numpy as np

from tuckerize.checkpoint.files import read_json_object, sha256_of
from tuckerize.checkpoint.output import MANIFEST, OutputFolder
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, measure_size
from tuckerize.checkpoint.weight_set import CONFIG, find_weight_files
from tuckerize.domain import Projection, Size, StackResult, StackShape, cores_by_layer
from tuckerize.errors import CheckpointError
from tuckerize.format.config import GroupShape, TuckerQuantization, find_quantization
from tuckerize.format.manifest import TuckerManifest, read_tucker_manifest
from tuckerize.format.records import LayerRecord, LayoutRecord, pack_neurons
from tuckerize.moe.describe import describe_family
from tuckerize.moe.family import Family, positive, text_config
from tuckerize.names import TensorName
from tuckerize.weight_types import WEIGHT_TYPES


def is_tucker_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a Tucker checkpoint, finished or saved again by transformers."""
    return (folder / MANIFEST).exists() or is_saved_again(folder)


def is_saved_again(folder: Path) -> bool:
    """Whether transformers has saved a Tucker checkpoint to a folder: it writes no manifest."""
    if (folder / MANIFEST).exists() or OutputFolder(folder).is_unfinished:
        return False
    config = folder / CONFIG
    return config.exists() and find_quantization(read_json_object(config)) is not None


def read_or_describe(folder: Path) -> TuckerManifest:
    """The manifest of a Tucker checkpoint; what it would say, if transformers has saved it again.

    Raises:
        CheckpointError: It is not a Tucker checkpoint, or config.json does not describe it.
    """
    if not is_saved_again(folder):
        return read_tucker_manifest(folder)
    checkpoint = Checkpoint.open(folder)
    try:
        value = find_quantization(checkpoint.config) or {}
        return _describe(checkpoint, TuckerQuantization.parse(value))
    except ValueError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: {error}", hint="save the model again, with save_pretrained"
        ) from error


def tucker_sha256(folder: Path) -> str:
    """Hash of everything in a Tucker checkpoint: of its manifest, which has the others' hashes.

    Of one that transformers has saved again, config.json and the weights are read.
    """
    if not is_saved_again(folder):
        return sha256_of(folder / MANIFEST)
    names = [CONFIG, *find_weight_files(folder)]
    text = "".join(f"{name} {sha256_of(folder / name)}\n" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(checkpoint: Checkpoint, quantization: TuckerQuantization) -> TuckerManifest:
    config = text_config(checkpoint.config)
    family = describe_family(checkpoint.config, checkpoint.tensors)
    layers, groups_of = _layers(family, quantization)
    family = Family(family.row, layers, family.storage)
    shape = StackShape(
        positive(config, *family.row.experts_keys),
        positive(config, *family.row.intermediate_keys),
        positive(config, "hidden_size"),
    )
    names = [name for name in checkpoint.tensors if TensorName.find(name)]
    dtype = next((d for n in names if (d := checkpoint.tensors[n].dtype) in TORCH_DTYPES), "")
    if not dtype or shape.experts != quantization.group_size * len(next(iter(groups_of.values()))):
        raise ValueError(f"its groups are not those of {shape.experts} experts")
    after = measure_size(checkpoint.tensors, is_routed=family.is_routed)
    stored = measure_size({n: checkpoint.tensors[n] for n in names}, is_routed=lambda _: True)
    dense = len(groups_of) * len(Projection) * shape.parameters
    dense_bytes = dense * WEIGHT_TYPES[dtype].bits // 8
    return TuckerManifest(
        tuckerize_version="",
        family=family.model_type,
        layout=LayoutRecord.of(family),
        source=None,
        recipe={},
        dtype=dtype,
        cores=cores_by_layer({layer: groups[0].core_type for layer, groups in groups_of.items()}),
        shape=shape,
        group_size=quantization.group_size,
        joint=quantization.joint,
        stacks=tuple(
            StackResult(layer, index, projection, rank, math.nan, 0)
            for layer, groups in groups_of.items()
            for index, group in enumerate(groups)
            for projection, rank in group.ranks.items()
        ),
        calibrated=tuple(
            record
            for layer, groups in groups_of.items()
            if (record := _widths(layer, groups, shape)) is not None
        ),
        before=Size(
            routed_parameters=after.routed_parameters - stored.routed_parameters + dense,
            routed_bytes=after.routed_bytes - stored.routed_bytes + dense_bytes,
            total_parameters=after.total_parameters - stored.routed_parameters + dense,
            total_bytes=after.total_bytes - stored.routed_bytes + dense_bytes,
        ),
        after=after,
        files=(),
    )


def _layers(
    family: Family, quantization: TuckerQuantization
) -> tuple[str, dict[int, tuple[GroupShape, ...]]]:
    """Module of the decoder layers, and the groups of every factored layer."""
    pattern = re.compile(rf"(.+)\.(\d+)\.{re.escape(family.row.experts)}")
    found = {module: pattern.fullmatch(module) for module in quantization.modules}
    unknown = [module for module, match in found.items() if match is None]
    if unknown or not found:
        raise ValueError(f"{unknown or 'nothing'} is not a module of experts of the family")
    matches = {module: match for module, match in found.items() if match is not None}
    (layers,) = {match[1] for match in matches.values()}
    groups = {int(match[2]): quantization.modules[module] for module, match in matches.items()}
    return layers, dict(sorted(groups.items()))


def _widths(layer: int, groups: tuple[GroupShape, ...], shape: StackShape) -> LayerRecord | None:
    """Widths of the experts of a layer as those of their first neurons; None if all are kept.

    Which neurons of the source they were is not known, and their order is of no effect.
    """
    widths = [np.array(group.widths) for group in groups]
    if all((own == shape.intermediate).all() for own in widths):
        return None
    places_H = np.arange(shape.intermediate)
    return LayerRecord(
        layer=layer,
        neurons=int(np.concatenate(widths).mean()),
        kept=tuple(pack_neurons(places_H < own_E[:, None]) for own_E in widths),
        output_error=None,
        predicted_error=None,
        refined=False,
    )
