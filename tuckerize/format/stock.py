"""Quantised experts of an ordinary checkpoint, in the format of compressed-tensors.

Where nothing but the width of experts was truncated, the quantised cores of a Tucker checkpoint are
the experts' matrices, and engines that read compressed-tensors have kernels for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuckerize.domain import CoreType, Coupling, StackShape, cores_of
from tuckerize.format.cores import stock_scheme
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.moe.storage import PerExpert
from tuckerize.names import CorePart, TensorKind

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class StockExperts:
    """The quantised experts of a Tucker checkpoint as those of an ordinary one.

    Attributes:
        tucker: The Tucker checkpoint.
        core_type: Encoding of all its cores.
        shape: Sizes (E, H, I) of a layer's stacks.
    """

    tucker: TuckerCheckpoint
    core_type: CoreType
    shape: StackShape

    @classmethod
    def of(cls, tucker: TuckerCheckpoint, width: int) -> StockExperts | str:
        """Find them, or the reason why an ordinary checkpoint cannot have them.

        Args:
            tucker: A Tucker checkpoint with quantised cores.
            width: Neurons of every expert of the ordinary checkpoint.
        """
        manifest, storage = tucker.manifest, tucker.family.storage
        core_type, *others = {cores_of(manifest.cores, layer) for layer in manifest.layers}
        if core_type is None or others:
            return "the encoding of the cores differs between layers"
        if not isinstance(storage, PerExpert) or storage.is_stacked:
            return "the model's experts are not stored one by one"
        shape = manifest.shape._replace(intermediate=width)
        for size in (shape.intermediate, shape.hidden):
            if size % (core_type.group_size or 1):
                return f"{size} is not a multiple of {core_type.group_size}, the inputs of a scale"
        return _misfit(tucker, width) or cls(tucker, core_type, shape)

    def tensors(self, layer: int, projections: Coupling) -> dict[str, Tensor]:
        """Codes, scales and shapes of projections of all experts of a layer, by name."""
        tucker = self.tucker
        groups = [tucker.read_group(layer, group) for group in range(tucker.manifest.groups)]
        found: dict[str, Tensor] = {}
        for projection in projections:
            parts_E = {
                part: torch.cat([group[name] for group in groups])
                for name in groups[0]
                if name.owner == projection and (part := name.part)
            }
            weights = tucker.family.stored(layer).tensors(self.shape, (projection,))
            for expert, (name, shape) in enumerate(weights.items()):
                module = name.removesuffix(_WEIGHT)
                found |= {
                    f"{module}.{part}": _in_words(own_E[expert]) for part, own_E in parts_E.items()
                }
                if CorePart.PACKED_CODES in parts_E:  # words do not tell the number of columns
                    found[f"{name}_shape"] = torch.tensor(shape)
        return found

    @property
    def description(self) -> dict[str, Any]:
        """`quantization_config` of the ordinary checkpoint."""
        return stock_scheme(self.core_type)


def _in_words(own: Tensor) -> Tensor:
    """Codes as compressed-tensors has them, those of 3 bits in int32 too."""
    return own.contiguous().view(torch.int32) if own.dtype == torch.uint8 else own


def _misfit(tucker: TuckerCheckpoint, width: int) -> str | None:
    """Reason why cores are not those of narrow experts of an ordinary checkpoint, or None."""
    manifest = tucker.manifest
    for name in tucker.checkpoint.tensors:
        dense = tucker.family.layer_of(name)
        if dense is not None and dense not in manifest.layers:
            return f"layer {dense} is not compressed"
    for layer in manifest.layers:
        for group in range(manifest.groups):
            names = tucker.group_headers(layer, group)
            factors = [str(name) for name in names if name.kind != TensorKind.CORE]
            if factors:
                return f"layer {layer} has the factor {factors[0]}"
            if {*manifest.widths(layer, group)} != {width}:
                return f"some experts of layer {layer} are not {width} wide"
    return None
