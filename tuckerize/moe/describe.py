"""Description of a checkpoint: its family, and the check that its routed experts are complete."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuckerize.checkpoint.quantized import FLOATS
from tuckerize.domain import StackShape, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.moe.families import UNSUPPORTED
from tuckerize.moe.family import (
    Config,
    Family,
    FamilyRow,
    MoeModel,
    model_types,
    positive,
    text_config,
)
from tuckerize.moe.inferred import infer_family
from tuckerize.moe.lookup import FURTHER_LAYERS, LAYERS, row_of

# Index of a layer or an expert.
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def describe_moe(config: Config, tensors: Mapping[str, TensorHeader]) -> MoeModel:
    """Identify the family of a checkpoint and check that its routed experts are complete.

    Args:
        config: Contents of config.json.
        tensors: Headers of all tensors, with quantized weights as dense ones.

    Raises:
        CheckpointError: The family is not supported, or routed weights are missing or have another
            shape or type than the configuration says.
    """
    family = _with_further(describe_family(config, tensors), config, tensors)
    row = family.row
    text = text_config(config)
    layers = family.moe_layers(config, tensors)
    if not layers:
        raise CheckpointError(
            f"no tensor is named like the routed experts of {family.model_type} "
            f"({next(iter(family.stored(0).tensors(StackShape(1, 1, 1))))}); there is "
            f"{min(tensors, key=lambda name: ('expert' not in name, name), default='no tensor')}",
            hint="the checkpoint may be incomplete, or saved in another layout, or with a prefix "
            "of the tool that wrapped the model: save the model itself",
        )
    shape = StackShape(
        positive(text, *row.experts_keys),
        positive(text, *row.intermediate_keys),
        positive({key: own for key, own in text.items() if own is not None}, *row.hidden_keys),
    )
    if len(counts := {text[key] for key in row.experts_keys if isinstance(text.get(key), int)}) > 1:
        shape = _fitting(
            [shape._replace(experts=n) for n in sorted(counts)], family, layers[0], tensors
        )
    first = next(iter(family.stored(layers[0]).tensors(shape)))
    model = MoeModel(
        family=family,
        layers=layers,
        shape=shape,
        shared_experts=family.shared_experts(config),
        routing=family.routing(config),
        glus=tuple(family.glu(config, layer) for layer in layers),
        dtype=tensors[first].dtype if first in tensors else "",
    )
    _check_weights(model, tensors, text)
    further = tuple(
        layer
        for layer in family.further_layers(config, tensors)
        if _is_alike(model, layer, config, tensors)
    )
    return replace(model, further=further)


def _with_further(family: Family, config: Config, tensors: Mapping[str, TensorHeader]) -> Family:
    """The family with the module of the layers that predict further tokens, if it has its own."""
    depth = text_config(config).get("num_hidden_layers")
    modules = (own for own in FURTHER_LAYERS if any(n.startswith(f"{own}.") for n in tensors))
    found = next(modules, None)
    return replace(family, further=found, depth=depth) if found and depth else family


def _is_alike(
    model: MoeModel, layer: int, config: Config, tensors: Mapping[str, TensorHeader]
) -> bool:
    """Whether the experts of a layer have the layout, sizes and type of the model's."""
    known = model.family.stored(layer).tensors(model.shape)
    own = {name for name in tensors if model.family.layer_of(name) == layer}
    try:
        model.family.glu(config, layer)
    except CheckpointError:  # config.json describes the model's layers only
        return False
    return own == known.keys() and all(
        tensors[name].shape == shape and tensors[name].dtype == model.dtype
        for name, shape in known.items()
    )


def _fitting(
    shapes: Sequence[StackShape], family: Family, layer: int, tensors: Mapping[str, TensorHeader]
) -> StackShape:
    """The shape that the tensors of a layer have, where config.json names several."""
    own = {name for name in tensors if family.layer_of(name) == layer}
    stored = [(shape, family.stored(layer).tensors(shape)) for shape in shapes if shape.experts > 0]
    for shape, known in stored:
        fit = [name in own and tensors[name].shape == size for name, size in known.items()]
        if all(fit) and len(fit) == len(own):
            return shape
    return shapes[0]


def describe_family(config: Config, tensors: Mapping[str, TensorHeader]) -> Family:
    """Identify the family of a checkpoint and the layout of its experts.

    Raises:
        CheckpointError: The family is not supported.
    """
    types = model_types(config)
    if row := row_of(config):
        return _resolve(row, tensors)
    for model_type in types:
        if model_type in UNSUPPORTED:
            raise CheckpointError(
                f"models of type '{model_type}' cannot be decomposed: {UNSUPPORTED[model_type]}",
                hint="docs/reference/models.md lists the supported families",
            )
    is_moe = any("expert" in key for key in text_config(config))
    if is_moe and (family := infer_family(types[0], config, tensors)):
        return family
    why = "" if is_moe else ": the configuration names no experts"
    raise CheckpointError(
        f"model_type '{types[0]}' in config.json is not a supported MoE family{why}",
        hint="docs/reference/models.md lists the supported families",
    )


def _resolve(row: FamilyRow, tensors: Mapping[str, TensorHeader]) -> Family:
    """The family with the layout that the tensors have; the row's first if they have none."""
    numbered = {_INDEX.sub("0", name): name for name in tensors}
    for layers in LAYERS:
        for storage in row.storages:
            first = f"{layers}.0.{storage.names[0]}".format(expert=0).removesuffix(".weight")
            for name, example in numbered.items():
                if name.startswith(first):
                    layer = example.removeprefix(f"{layers}.").partition(".")[0]
                    return Family(row, layers, storage.oriented(tensors, f"{layers}.{layer}"))
    return Family(row, LAYERS[0], row.storages[0])


def _check_weights(model: MoeModel, tensors: Mapping[str, TensorHeader], config: Config) -> None:
    family = model.family
    known = {
        name: shape
        for layer in model.layers
        for name, shape in family.stored(layer).tensors(model.shape).items()
    }
    for name, expected in known.items():
        _check_weight(name, tensors.get(name), expected, model.dtype)
    for name in sorted(tensors):
        layer = family.layer_of(name)
        if layer in model.layers and name not in known:
            keys = [key for key in family.row.experts_keys if key in config]
            raise CheckpointError(
                f"layer {layer} has the tensor {name}, which the family {family.model_type} with "
                f"{model.shape.experts} experts does not know",
                hint=f"check {' or '.join(keys)} in config.json",
            )


def _check_weight(
    name: str, header: TensorHeader | None, expected: tuple[int, ...], dtype: str
) -> None:
    if header is None:
        raise CheckpointError(
            f"the tensor {name} is missing", hint="the checkpoint is incomplete: fetch it again"
        )
    if header.shape != expected:
        raise CheckpointError(
            f"the tensor {name} has shape {list(header.shape)}, expected {list(expected)}",
            hint="check the sizes in config.json",
        )
    if header.dtype not in FLOATS or header.dtype != dtype:
        raise CheckpointError(
            f"the tensor {name} has type {header.dtype}, expected one of "
            f"{', '.join(FLOATS)} and the same for all routed experts",
            hint="convert the checkpoint to bf16 first",
        )
