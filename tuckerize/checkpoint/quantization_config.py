"""`quantization_config` of a source checkpoint: what its tensors do not say themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuckerize.errors import CheckpointError

FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale of FP8, where nothing else is said."""

WORD_BITS = 32
"""Bits of the words that integer codes are packed into."""


@dataclass(frozen=True, slots=True)
class QuantizationDescription:
    """`quantization_config` of a checkpoint.

    Attributes:
        value: Its contents; empty if there is none.
    """

    value: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> QuantizationDescription:
        """The description in a config.json.

        Raises:
            CheckpointError: It is not a JSON object.
        """
        nested = config.get("text_config")
        found = config.get("quantization_config")
        if found is None and isinstance(nested, Mapping):
            found = nested.get("quantization_config")
        if found is not None and not isinstance(found, Mapping):
            raise CheckpointError(
                f"config.json has quantization_config = {found!r}, expected an object",
                hint="fetch config.json again",
            )
        return cls(found or {})

    @property
    def method(self) -> str:
        """`quant_method`; empty if there is none."""
        return str(self.value.get("quant_method", "unknown")) if self.value else ""

    def bits(self, module: str) -> int:
        """Bits of the integer codes of a module.

        Raises:
            CheckpointError: They are not described.
        """
        found = self.value.get("bits")
        groups = [g for g in self._groups() if g["weights"].get("type") == "int"]
        if groups:
            sizes = {group["weights"].get("num_bits") for group in groups}
            if len(sizes) > 1:
                groups = [group for group in groups if _targets(group, module)] or groups
            found = groups[0]["weights"].get("num_bits")
        if not isinstance(found, int) or not 1 <= found <= 8:
            raise CheckpointError(
                f"config.json does not say how many bits the weights of {module} have: "
                f"quantization_config gives {found!r}",
                hint="fetch config.json again",
            )
        return found

    def block(self, module: str) -> tuple[int, int]:
        """Rows and columns of the blocks of a module that share a scale."""
        found = self.value.get("weight_block_size")
        groups = [g for g in self._groups() if g["weights"].get("block_structure")]
        own = [group for group in groups if _targets(group, module)] or groups
        if own:
            found = own[0]["weights"]["block_structure"]
        if not isinstance(found, list) or len(found) != 2:
            return FP8_BLOCK
        return int(found[0]), int(found[1])

    def _groups(self) -> list[Mapping[str, Any]]:
        groups = self.value.get("config_groups")
        found = groups.values() if isinstance(groups, Mapping) else ()
        return [g for g in found if isinstance(g, Mapping) and isinstance(g.get("weights"), dict)]

    def without(self, modules: list[str]) -> dict[str, Any]:
        """The description without some modules, for what else remains quantized."""
        value = dict(self.value)
        if self.method == "compressed-tensors":
            own = [f"re:{re.escape(module)}(\\..*)?$" for module in modules]
            value["ignore"] = [*(value.get("ignore") or ()), *own]
        for key in ("modules_to_not_convert", "ignored_layers"):
            if isinstance(value.get(key), list):
                value[key] = [*value[key], *modules]
        return value


def _targets(group: Mapping[str, Any], module: str) -> bool:
    """Whether a group of compressed-tensors names a module, not only its class."""
    for target in group.get("targets") or ():
        pattern = str(target)
        if pattern == module or (pattern[:3] == "re:" and re.match(pattern[3:], module)):
            return True
    return False
