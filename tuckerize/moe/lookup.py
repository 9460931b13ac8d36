"""Look-ups in the table of families by a config.json, and by the path of a module of experts."""

from __future__ import annotations

import re

from tuckerize.moe.families import FAMILIES
from tuckerize.moe.family import Config, FamilyRow, Glu, model_types, plain_glu, text_config

LAYERS = (
    "model.layers",
    "backbone.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "model.text_model.layers",
    "model.llm.layers",
    "layers",
)
"""Modules of the decoder layers in checkpoints, the first that has experts counts."""

FURTHER_LAYERS = ("mtp.layers",)
"""Modules of layers that predict further tokens, where decoder layers do not have them."""


def row_of(config: Config) -> FamilyRow | None:
    """Row of the table for a config.json; None if its family is not in the table."""
    names = model_types(config)
    known = (name for own in names for name in (own, own.removesuffix("_text")) if name in FAMILIES)
    return FAMILIES.get(next(known, ""))


def glu_of(config: Config, experts: str) -> Glu:
    """Gated linear unit of one module of experts.

    Args:
        config: Contents of config.json.
        experts: Path of the module, `model.layers.3.mlp.experts` say.
    """
    row = row_of(config)
    read = plain_glu if row is None else row.glu
    return read(text_config(config), _layer_in(experts))


def is_further(config: Config, experts: str) -> bool:
    """Whether a module of experts belongs to a layer that predicts further tokens."""
    beside = experts.startswith(tuple(f"{module}." for module in FURTHER_LAYERS))
    return beside or is_after_last(config, experts)


def is_after_last(config: Config, experts: str) -> bool:
    """Whether a module of experts belongs to a layer after the last one of the decoder."""
    depth = text_config(config).get("num_hidden_layers")
    return isinstance(depth, int) and _layer_in(experts) >= depth


def _layer_in(module: str) -> int:
    """Index of the layer of a module, by its path."""
    layer = re.search(r"\.(\d+)\.", f".{module}.")
    return int(layer[1]) if layer else 0
