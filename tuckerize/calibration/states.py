"""States of windows between two decoder layers: all that one hands to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuckerize.calibration.rows import Rows


@dataclass(frozen=True, slots=True)
class States:
    """All that a layer gets of windows.

    Attributes:
        hidden_SLI: Hidden states, shape (S, L, I), with a further dimension in families that have
            several residual streams.
        tokens_SL: The tokens: some layers look at them (DeepSeek-V4, Qwen4).
        attended_SLN: Tokens that each attends to, found by an earlier layer, where the next layer
            does not find its own (GLM-5); None elsewhere.
        earlier_SLNI: Hidden states before some of the earlier layers, shape (S, L, n, I), where
            layers read them (Inkling 2); None elsewhere.
    """

    hidden_SLI: Tensor
    tokens_SL: Tensor
    attended_SLN: Tensor | None = None
    earlier_SLNI: Tensor | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.tokens_SL)

    def __getitem__(self, windows: slice | Sequence[int]) -> States:
        """The same of some windows."""
        own: list[Any] = [getattr(self, field.name) for field in fields(self)]
        parts: list[Any] = [None if tensor is None else tensor[windows] for tensor in own]
        return States(*parts)

    def to(self, device: torch.device) -> States:
        """The same on a device."""
        own = [getattr(self, field.name) for field in fields(self)]
        parts: list[Any] = [None if tensor is None else tensor.to(device) for tensor in own]
        return States(*parts)

    def split(self, windows: int) -> list[States]:
        """The states of so many windows at a time."""
        return [self[start : start + windows] for start in range(0, len(self), windows)]

    @classmethod
    def joined(cls, parts: Iterable[States], count: int, folder: Path | None = None) -> States:
        """The states of so many windows from those of some at a time; see `Rows`."""
        whole: dict[str, Rows] = {}
        for part in parts:
            for name in (own.name for own in fields(cls)):
                if (tensor := getattr(part, name)) is not None:
                    whole.setdefault(name, Rows(count, folder)).add(tensor)
        found: dict[str, Any] = {name: rows.whole for name, rows in whole.items()}
        return cls(**found)

    def named(self, name: str) -> dict[str, Tensor]:
        """The tensors by a name of theirs, for a file."""
        found = {own.name: getattr(self, own.name) for own in fields(self)}
        return {f"{name}.{own}": tensor for own, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> dict[str, States]:
        """All states of a file by name; tensors that are none are left out."""
        names = {name.rpartition(".")[0] for name in tensors if "." in name}
        return {
            name: cls(*(tensors.get(f"{name}.{own.name}") for own in fields(cls)))  # type: ignore[arg-type]
            for name in sorted(names)
        }
