"""Plans of published models from their configurations alone: shapes by transformers, no weights.

python -m tests.published    # writes what the shipped recipes plan into recipes/*.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mistral4ForCausalLM
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from tuckerize.checkpoint.quantization_config import QuantizationDescription
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.domain import Joint, StackShape, TensorHeader
from tuckerize.moe.describe import describe_moe
from tuckerize.moe.lookup import row_of
from tuckerize.moe.source import SourceModel
from tuckerize.moe.storage import Packed
from tuckerize.pipeline.inspect import describe_plan
from tuckerize.planning.plan import make_plan
from tuckerize.recipe import Recipe
from tuckerize.recipe_files import read_documents, shipped_recipes
from tuckerize.recipe_reader import read_recipe

LAYERS = "model.layers"
FILE = "model.safetensors"
_EXPERTS = re.compile(r"(?:\w+\.)*layers\.(\d+)\.(?:\w+\.)?experts\.(gate_up_proj|down_proj)")
# transformers' name of a family that it does not know by its own.
_ALIASES = {"kimi_k2": "deepseek_v3"}
# Models that transformers maps to parts of models with images only, some without a head.
_PARTS = {
    "mistral4": Mistral4ForCausalLM,
    "step3p5": Step3p7TextModel,
    "glm5_next_text": Glm5NextTextModel,
}


def published(name: str) -> dict[str, Any]:
    """What is shipped of the model of a recipe."""
    path = shipped_recipes()[name].with_suffix(".json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


MODELS = [name for name, path in shipped_recipes().items() if path.with_suffix(".json").exists()]
"""Names of the recipes of published models."""


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a model, by the names of transformers."""
    own = {key: value for key, value in config.items() if key != "quantization_config"}
    kind = own.pop("model_type")
    shape: Any = AutoConfig.for_model(_ALIASES.get(kind, kind), **own)
    make: Any = _PARTS.get(kind, AutoModelForCausalLM.from_config)
    with torch.device("meta"):
        model = make(shape)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if kind in _PARTS:
        found["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return found


def planned_source(config: dict[str, Any]) -> SourceModel:
    """The model of a configuration, as if its checkpoint were there; experts lie together."""
    row = row_of(config)
    assert row is not None
    headers: dict[str, TensorHeader] = {}
    experts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes(config).items():
        match = _EXPERTS.fullmatch(name)
        if match:
            experts.setdefault(f"{LAYERS}.{match[1]}", {})[match[2]] = shape
        elif name.endswith("_proj.weight") and ".layers." in name and len(shape) == 2:
            headers |= _stored(name, shape, config)
        else:
            headers[name] = _header("BF16", shape)
    for layer, own in experts.items():
        stack, transposed = _stack_shape(own["gate_up_proj"], own["down_proj"])
        storage = row.storages[-1].within(layer)
        if isinstance(storage, Packed):
            storage = replace(storage, transposed=transposed)
        for name, shape in storage.tensors(stack).items():
            headers |= _stored(name, shape, config)
    file_of = dict.fromkeys(headers, FILE)
    stored = Checkpoint(Path("published"), config, {}, headers, file_of)
    dense = stored.dense(QuantizationDescription.of(config))
    return SourceModel(dense, describe_moe(config, dense.tensors))


def _stack_shape(gate_up: tuple[int, ...], down: tuple[int, ...]) -> tuple[StackShape, bool]:
    """Sizes of a layer's stacks, and whether its weights lie as (in, out)."""
    experts, first, second = down
    transposed = gate_up == (experts, second, 2 * first)
    assert transposed or gate_up == (experts, 2 * second, first)
    hidden, intermediate = (second, first) if transposed else (first, second)
    return StackShape(experts, intermediate, hidden), transposed


def _header(kind: str, shape: tuple[int, ...]) -> TensorHeader:
    count = torch.Size(shape).numel()
    return TensorHeader(kind, shape, count * {"BF16": 2, "F32": 4, "I32": 4, "I64": 8}.get(kind, 1))


def _stored(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> dict[str, TensorHeader]:
    """Headers of a linear layer, or of those of all experts, in the format of the release."""
    described = config.get("quantization_config", {})
    method, routed = described.get("quant_method"), ".experts." in name
    *lead, rows, columns = shape
    if method == "mxfp4" and routed and not name.endswith("_bias"):  # transposed, as gpt-oss is
        return {
            f"{name}_blocks": _header("U8", (*lead, columns, rows // 32, 16)),
            f"{name}_scales": _header("U8", (*lead, columns, rows // 32)),
        }
    if method == "fp8" and described.get("scale_fmt") == "ue8m0":  # DeepSeek-V4: experts in MXFP4
        if routed:
            scales = _header("F8_E8M0", (*lead, rows, columns // 32))
            return {name: _header("I8", (*lead, rows, columns // 2)), f"{name}_scale": scales}
        blocks = (*lead, -(-rows // 128), -(-columns // 128))
        scales = _header("F8_E8M0", blocks)
        return {name: _header("F8_E4M3", shape), f"{name}_scale_inv": scales}
    if method == "fp8":
        blocks = (*lead, -(-rows // 128), -(-columns // 128))
        return {name: _header("F8_E4M3", shape), f"{name}_scale_inv": _header("F32", blocks)}
    if method == "compressed-tensors" and routed:
        groups = _header("BF16", (*lead, rows, columns // 32))
        return {
            f"{name}_packed": _header("I32", (*lead, rows, columns // 8)),
            f"{name}_scale": groups,
            f"{name}_shape": _header("I64", (*lead, 2)),
        }
    return {name: _header("BF16", shape)}


def recipes_of(name: str) -> Iterator[Recipe]:
    """The recipes of a shipped file, one for each target."""
    path = shipped_recipes()[name]
    for value in read_documents(path):
        if "calibration" in value:
            target = value["calibration"]["target"]
            yield read_recipe(path, {"texts": ["text.txt"], "target": target})
        else:
            yield read_recipe(path)


def planned(name: str) -> dict[str, Any]:
    """Sizes before and after by target: those of the budget, whose share the profile decides."""
    source = planned_source(published(name)["config"])
    size, moe = source.size, source.moe
    after = {}
    for recipe in recipes_of(name):
        target = str(recipe.calibration.target) if recipe.calibration else "free"
        data_free = recipe.model_copy(update={"calibration": None, "joint": Joint.GATE_UP})
        found = describe_plan(make_plan(source, data_free), peak=0).after
        after[target] = {
            "routed_bytes": found.routed_bytes,
            "total_bytes": found.total_bytes,
            "bits_per_weight": round(found.bits_per_weight(size), 2),
        }
    return {
        "layers": len(moe.layers),
        "shape": list(moe.shape),
        "routed_parameters": size.routed_parameters,
        "parameters": size.total_parameters,
        "before": {
            "routed_bytes": size.routed_bytes,
            "total_bytes": size.total_bytes,
            "bits_per_weight": round(size.bits_per_weight(size), 2),
        },
        "after": after,
    }


def main() -> None:
    """Write the plans."""
    for name in MODELS:
        path = shipped_recipes()[name].with_suffix(".json")
        text = json.dumps({**published(name), "plan": planned(name)}, indent=2)
        path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
