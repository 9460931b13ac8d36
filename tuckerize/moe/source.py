"""The source model: a dense checkpoint, its MoE facts, and the only reader of its experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuckerize.checkpoint.identity import identities
from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, measure_size
from tuckerize.domain import Coupling, Projection, Size
from tuckerize.errors import CheckpointError, UsageError
from tuckerize.moe.describe import describe_moe
from tuckerize.moe.family import MoeModel
from tuckerize.moe.routing import Router, read_input_norm
from tuckerize.names import in_group


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A dense MoE checkpoint, whatever the layout of its experts on disk.

    Attributes:
        checkpoint: Its files and tensors.
        moe: Its MoE facts.
    """

    checkpoint: Checkpoint
    moe: MoeModel

    @classmethod
    def open(cls, source: Path | Checkpoint) -> SourceModel:
        """Open a folder or a checkpoint; reads headers only.

        Raises:
            CheckpointError: The family is not supported, the weights are quantized in a way that
                cannot be read, or routed weights are missing or of another shape or type than
                config.json says.
        """
        stored = Checkpoint.open(source) if isinstance(source, Path) else source
        if any(map(in_group, stored.tensors)):
            raise CheckpointError(
                f"{stored.folder} is a Tucker checkpoint: its experts are factored already",
                hint="give the model that it was made from, or 'tuckerize reconstruct' it first",
            )
        checkpoint = stored.dense(QuantizationDescription.of(stored.config))
        return cls(checkpoint, describe_moe(checkpoint.config, checkpoint.tensors))

    @property
    def coding(self) -> str | None:
        """Encoding of the routed experts on disk; None if they are not quantized."""
        found = {
            weight.coding.value
            for name, weight in self.checkpoint.quantized.items()
            if self.moe.is_routed(name)
        }
        return ", ".join(sorted(found)) or None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the checkpoint for the user."""
        method = QuantizationDescription.of(self.checkpoint.config).method
        if not method or self.checkpoint.quantized:
            return ()
        return (
            f"config.json announces weights quantized with '{method}', but none are: its "
            "quantization_config is ignored, and can be removed",
        )

    def rest(self, layers: Iterable[int]) -> dict[str, Any] | None:
        """`quantization_config` of what is quantized besides the experts of some layers, or None.

        Args:
            layers: Indices of the layers whose experts do not count.

        Raises:
            CheckpointError: config.json does not describe it.
        """
        own = set(layers)
        left = [n for n in self.checkpoint.quantized if self.moe.family.layer_of(n) not in own]
        if not left:
            return None
        description = QuantizationDescription.of(self.checkpoint.config)
        if not description.method:
            raise CheckpointError(
                f"{left[0]} is quantized, but config.json has no quantization_config to say so",
                hint="fetch config.json again, or add --dequantize-rest",
            )
        return description.without([self.moe.family.experts_prefix(layer) for layer in sorted(own)])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the routed experts."""
        return TORCH_DTYPES[self.moe.dtype]

    @property
    def identities(self) -> dict[str, str]:
        """Identities of the weight files by name: hashes that tell models apart."""
        return identities({name: file.path for name, file in self.checkpoint.files.items()})

    def identities_of_layer(self, layer: int) -> dict[str, str]:
        """Identities of the weight files that hold tensors of a layer."""
        own = {
            file
            for name, file in self.checkpoint.file_of.items()
            if self.moe.family.layer_of(name) == layer
        }
        return identities({name: self.checkpoint.files[name].path for name in own})

    @property
    def size(self) -> Size:
        """Parameters and bytes of the routed experts and of all tensors."""
        return measure_size(self.checkpoint.tensors, is_routed=self.moe.is_routed)

    def require_gates(self) -> None:
        """Refuse experts without a gate_proj, which have no place in a Tucker checkpoint.

        Raises:
            UsageError: They have none.
        """
        if self.moe.family.row.latent is not None:
            raise UsageError(
                f"experts of {self.moe.family.model_type} have no gate_proj to decompose",
                hint="make the latent space that they compute in smaller: "
                f"tuckerize fold {self.checkpoint.folder} --keep 0.75 --output OUT",
            )

    def routed_tensors(self, layer: int) -> list[str]:
        """Names of the tensors that hold the routed experts of a layer."""
        return list(self.moe.family.stored(layer).tensors(self.moe.shape))

    def stored_tensors(self, layer: int) -> list[str]:
        """Names of what the files hold of the routed experts of a layer."""
        return [
            part for name in self.routed_tensors(layer) for part in self.checkpoint.stored(name)
        ]

    def stored_bytes(self, layer: int, projections: Coupling) -> int:
        """Bytes that projections of a layer take on disk, in all of its experts."""
        storage, shape = self.moe.family.stored(layer), self.moe.shape
        total = 0.0
        for together in storage.together:
            own = set(together) & set(projections)
            sizes = (self.checkpoint.tensors[n].bytes for n in storage.tensors(shape, together))
            total += sum(sizes) * len(own) / len(together)
        return round(total)

    def stack(
        self,
        layer: int,
        projection: Projection,
        experts: range | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Stack of one projection of consecutive experts, shape (E, H, I).

        Args:
            layer: Index of the layer.
            projection: Which matrices.
            experts: The experts; all by default.
            dtype: Type of the stack; that of the checkpoint, which loses nothing, by default.

        Raises:
            CheckpointError: A tensor cannot be read.
        """
        experts = range(self.moe.shape.experts) if experts is None else experts
        stack_EHI = torch.empty((len(experts), *self.moe.shape[1:]), dtype=dtype or self.dtype)
        storage = self.moe.family.stored(layer)
        storage.read_into(stack_EHI, self.checkpoint, projection, experts)
        return stack_EHI

    def biases(
        self, layer: int, experts: range | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[Projection, Tensor]:
        """Biases of consecutive experts, shape (E, H), of down (E, I); none if there are none.

        Args:
            layer: Index of the layer.
            experts: The experts; all by default.
            dtype: Type of the biases; that of the stacks by default.
        """
        storage = self.moe.family.stored(layer)
        if not storage.biased:
            return {}
        own = slice(None) if experts is None else slice(experts.start, experts.stop)
        return {
            projection: storage.read_bias(self.checkpoint, projection)[own].to(dtype or self.dtype)
            for projection in Projection
        }

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of one expert, each (H, I)."""
        one = range(expert, expert + 1)
        gate_HI, up_HI, down_HI = (self.stack(layer, p, one)[0] for p in Projection)
        return gate_HI, up_HI, down_HI

    def router(self, layer: int) -> Router:
        """Router of a layer."""
        return Router.read(self.checkpoint, self.moe.family, layer)

    def input_norm(self, layer: int) -> Tensor:
        """Factors of the norm before the MoE block of a layer, float32, shape (I,)."""
        return read_input_norm(self.checkpoint, self.moe.family, layer)
