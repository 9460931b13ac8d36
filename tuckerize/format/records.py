"""Parts of a manifest: source, calibration, layout and training; masks of neurons as text."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tuckerize.checkpoint.files import Count, FileRecord, Record, Sha256
from tuckerize.domain import Part, StackShape
from tuckerize.moe.family import Family
from tuckerize.moe.inferred import InferredNames
from tuckerize.moe.storage import Packed, PerExpert

Mask = npt.NDArray[np.bool_]


class SourceRecord(Record):
    """The checkpoint that was decomposed.

    Attributes:
        model: What the user gave as `--model`.
        config_sha256: Hash of its config.json.
        auto_map: The classes that its config.json names, if any.
        files: Its weight files.
    """

    model: str
    config_sha256: Sha256
    auto_map: dict[str, Any] | None = None
    files: tuple[FileRecord, ...]


class LayerRecord(Record):
    """Result of calibration for one layer.

    Attributes:
        layer: Index of the layer.
        neurons: Mean width: neurons kept per expert, averaged over its group.
        kept: Kept neurons of every group: E x H bits, row by row, the first in the highest bit of
            the first byte, as base64; empty if all are kept.
        output_error: Relative output error (unitless) on the validation set, each token relative
            to the norm of its hidden state after the layer.
        predicted_error: Its prediction; None where core sizes were given.
        refined: Whether gradient steps were made and kept.
    """

    layer: Count
    neurons: Annotated[int, Field(ge=1)]
    kept: tuple[str, ...] = ()
    output_error: float | None
    predicted_error: float | None
    refined: bool


class LayoutRecord(Record):
    """Layout of the dense model's routed experts on disk, and of a reconstruction.

    Attributes:
        layers: Module of the decoder layers.
        storage: Names of the experts' tensors below a layer.
        inferred: Names of what is beside them, of a family that is not in the table.
        further: Module of the layers that predict further tokens, if it is another.
        depth: Number of decoder layers, where `further` is given.
    """

    layers: str
    storage: PerExpert | Packed
    inferred: InferredNames | None = None
    further: str | None = None
    depth: Count = 0

    @classmethod
    def of(cls, family: Family) -> LayoutRecord:
        """Record the layout of a source."""
        names = InferredNames.of(family.row) if family.row.inferred else None
        return cls(
            layers=family.layers,
            storage=family.storage,
            inferred=names,
            further=family.further,
            depth=family.depth,
        )


class HealRecord(Record):
    """Training of a Tucker checkpoint after its decomposition.

    Attributes:
        checkpoint: The checkpoint before, as the user gave it.
        tucker_manifest_sha256: Hash of its manifest.
        trained: Parts of the model that were trained.
        texts: Sources of the text.
        teacher: The model whose predictions were learned, as the user gave it; None for the text
            alone.
        parameters: Number of trained parameters.
        steps: Steps that were made.
        best_step: Steps before the state that was kept; 0 if none was better than the first.
        tokens: Tokens that were predicted in these.
        nats_before: Negative log-likelihood on the validation set before, nats per token.
        nats_after: The same of the result.
    """

    checkpoint: str
    tucker_manifest_sha256: Sha256
    trained: tuple[Part, ...]
    texts: tuple[str, ...]
    teacher: str | None
    parameters: Count
    steps: Count
    best_step: Count
    tokens: Count
    nats_before: float
    nats_after: float


def pack_neurons(kept_EH: Mask) -> str:
    """Encode the mask of a group's kept neurons as the text of a `LayerRecord`."""
    return base64.b64encode(np.packbits(kept_EH).tobytes()).decode()


def unpack_neurons(text: str, shape: StackShape) -> Mask:
    """Decode the mask of a group's kept neurons, shape (E, H), from the text of a `LayerRecord`.

    Args:
        text: Result of `pack_neurons`.
        shape: Sizes (E, H, I) of one stack of the group.

    Raises:
        ValueError: The text is not of such a group.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8))
    count = shape.experts * shape.intermediate
    if len(bits) != -(-count // 8) * 8:
        raise ValueError(f"{len(bits)} bits are not {shape.experts} x {shape.intermediate}")
    return bits[:count].reshape(shape.experts, shape.intermediate).astype(bool)
