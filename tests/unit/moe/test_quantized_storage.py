"""Every layout of every family in the source formats that docs/reference/models.md names for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.quantized_models import EXPERT_FORMATS, formats_of, mxfp4_blocks
from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.domain import Projection, StackShape
from tuckerize.moe.families import FAMILIES
from tuckerize.moe.storage import Packed, Storage

SHAPE = StackShape(2, 32, 64)


def as_released(storage: Storage) -> Storage:
    """The layout of a layer, transposed as gpt-oss', which only its tensors say."""
    if isinstance(storage, Packed) and storage.interleaved:
        storage = replace(storage, transposed=True)
    return storage.within("layers.0")


LAYOUTS = {
    as_released(storage): formats_of(storage)
    for row in FAMILIES.values()
    for storage in row.storages
    if formats_of(storage)
}


def quantize(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a weight, of one expert or of all, by name, and its dense value."""
    if kind == "mxfp4":
        parts, dense = mxfp4_blocks(weight)
        return {f"{name}{own}": part for own, part in parts.items()}, dense
    own_format = EXPERT_FORMATS[kind][0]
    if weight.ndim == 2:
        parts, dense = own_format(weight)
        return {f"{name.removesuffix('weight')}{own}": part for own, part in parts.items()}, dense
    each = [own_format(expert) for expert in weight]
    together = {own: torch.stack([parts[own] for parts, _ in each]) for own in each[0][0]}
    named = {name + own.removeprefix("weight"): part for own, part in together.items()}
    return named, torch.stack([dense for _, dense in each])


@pytest.mark.parametrize("storage", LAYOUTS, ids=lambda storage: storage.names[0])
def test_experts_are_the_dense_values_in_every_format(storage: Storage, tmp_path: Path) -> None:
    for kind in LAYOUTS[storage]:
        folder, description = tmp_path / kind, EXPERT_FORMATS[kind][1]
        folder.mkdir()
        stored: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for name, shape in storage.tensors(SHAPE).items():
            weight = torch.randn(shape)
            if name.endswith("_bias"):
                stored[name] = weight
                continue
            parts, dense[name] = quantize(name, weight, kind)
            stored |= parts
        save_file({name: part.contiguous() for name, part in stored.items()}, folder / SINGLE_FILE)
        config = {"dtype": "float32", "quantization_config": description}
        write_json(folder / CONFIG, config)
        checkpoint = Checkpoint.open(folder).dense(QuantizationDescription.of(config))
        assert set(dense) <= set(checkpoint.quantized)
        for projection in Projection:
            stack_EHI = torch.empty(SHAPE)
            storage.read_into(stack_EHI, checkpoint, projection, range(SHAPE.experts))
            for expert in range(SHAPE.experts):
                oracle = storage.matrix(dense, projection, expert)
                torch.testing.assert_close(stack_EHI[expert].double(), oracle, rtol=2**-7, atol=0)
