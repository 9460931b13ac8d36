"""transformers' model of a checkpoint, whole in memory, to be trained or to teach."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

import tuckerize.engines.transformers  # noqa: F401  transformers learns the format
from tuckerize.errors import CheckpointError


class Model:
    """A causal language model of transformers.

    Args:
        folder: The checkpoint, dense or Tucker.
        dtype: Type of its parameters; "auto" is that of the checkpoint.

    Raises:
        CheckpointError: transformers cannot load it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | str) -> None:
        if not sys.stderr.isatty():
            disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.module: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise CheckpointError(
                f"transformers cannot load {folder}: {error}",
                hint="check it with: tuckerize verify",
            ) from error
        self.module.train(mode=False)  # without dropout, and routed as it will be when it is used
        self.module.requires_grad_(requires_grad=False)
        mapping = get_model_conversion_mapping(self.module)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]

    @property
    def vocabulary(self) -> int:
        """Number of embeddings."""
        return int(self.module.get_input_embeddings().num_embeddings)

    def logits(self, tokens_SL: Tensor) -> Tensor:
        """Logits of windows of tokens, shape (S, L, V)."""
        logits: Tensor = self.module(input_ids=tokens_SL, use_cache=False).logits
        return logits

    def path(self, stored: str) -> str:
        """Path in the model of a module or tensor, by its name in the checkpoint."""
        return str(rename_source_key(stored, self._renamings, [])[0])

    def parameters(self, stored: Iterable[str]) -> dict[str, nn.Parameter]:
        """Parameters by their names in the checkpoint, of those that the model has unchanged."""
        own = dict(self.module.named_parameters())
        paths = {name: self.path(name) for name in stored}
        return {name: own[path] for name, path in paths.items() if path in own}

    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return [m for m in self.module.modules() if isinstance(m, GradientCheckpointingLayer)]

    def recompute(self) -> None:
        """Keep no activations within a layer: the backward computes them again."""
        self.module.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self.layers():
            layer.training = True  # of the layer alone: its parts stay as they are
