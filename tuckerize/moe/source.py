"""The source model: a dense checkpoint, its MoE facts, and the only reader of its experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuckerize.checkpoint.identity import identities
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, measure_size
from tuckerize.domain import Projection, Size
from tuckerize.moe.describe import describe_moe
from tuckerize.moe.family import MoeModel
from tuckerize.moe.routing import Router, read_input_norm


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
            CheckpointError: The family is not supported, the weights are quantized, or routed
                weights are missing or of another shape or type than config.json says.
        """
        checkpoint = Checkpoint.open(source) if isinstance(source, Path) else source
        return cls(checkpoint, describe_moe(checkpoint.config, checkpoint.tensors))

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

    def routed_tensors(self, layer: int) -> list[str]:
        """Names of the tensors that hold the routed experts of a layer."""
        return list(self.moe.family.stored(layer).tensors(self.moe.shape))

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
