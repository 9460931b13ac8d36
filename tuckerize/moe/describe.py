"""Description of a checkpoint: its family, and the check that its routed experts are complete."""

from __future__ import annotations

from collections.abc import Mapping

from tuckerize.domain import StackShape, TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.moe.families import FAMILIES
from tuckerize.moe.family import Config, Family, MoeModel, positive

# Types that can be decomposed, by safetensors' names.
DECOMPOSABLE_DTYPES = ("BF16", "F16", "F32", "F64")


def describe_moe(config: Config, tensors: Mapping[str, TensorHeader]) -> MoeModel:
    """Identify the family of a checkpoint and check that its routed experts are complete.

    Args:
        config: Contents of config.json.
        tensors: Headers of all tensors.

    Raises:
        CheckpointError: The family is not supported, the weights are quantized, or routed weights
            are missing or have another shape or type than the configuration says.
    """
    family = _family(config)
    quantization = config.get("quantization_config")
    if quantization is not None:
        known = isinstance(quantization, Mapping)
        method = quantization.get("quant_method", "unknown") if known else "unknown"
        raise CheckpointError(
            f"config.json announces weights quantized with '{method}', which cannot be decomposed",
            hint="start from a bf16, fp16 or fp32 checkpoint of the model",
        )
    found = {family.layer_of(name) for name in tensors}
    layers = tuple(sorted(layer for layer in found if layer is not None))
    if not layers:
        raise CheckpointError(
            f"no tensor is named like the routed experts of {family.model_type} "
            f"({next(iter(family.stored(0).tensors(StackShape(1, 1, 1))))})",
            hint="the checkpoint may be incomplete, or saved in another layout",
        )
    shape = StackShape(
        positive(config, *family.experts_keys),
        positive(config, family.intermediate_key),
        positive(config, "hidden_size"),
    )
    first = next(iter(family.stored(layers[0]).tensors(shape)))
    model = MoeModel(
        family=family,
        layers=layers,
        shape=shape,
        shared_experts=family.shared_experts(config),
        routing=family.routing(config),
        activation=str(config.get("hidden_act", "silu")),
        dtype=tensors[first].dtype if first in tensors else "",
    )
    _check_weights(model, tensors)
    return model


def _family(config: Config) -> Family:
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        is_moe = any("expert" in key for key in config)
        why = "" if is_moe else ": the configuration names no experts"
        raise CheckpointError(
            f"model_type '{model_type}' in config.json is not a supported MoE family{why}",
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def _check_weights(model: MoeModel, tensors: Mapping[str, TensorHeader]) -> None:
    for layer in model.layers:
        prefix = model.family.experts_prefix(layer) + "."
        known = model.family.stored(layer).tensors(model.shape)
        for name, expected in known.items():
            _check_weight(name, tensors.get(name), expected, model.dtype)
        extra = sorted(n for n in tensors if n.startswith(prefix) and n not in known)
        if extra:
            raise CheckpointError(
                f"layer {layer} has the tensor {extra[0]}, which the family "
                f"{model.family.model_type} with {model.shape.experts} experts does not know",
                hint=f"check {' or '.join(model.family.experts_keys)} in config.json",
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
    if header.dtype not in DECOMPOSABLE_DTYPES or header.dtype != dtype:
        raise CheckpointError(
            f"the tensor {name} has type {header.dtype}, expected one of "
            f"{', '.join(DECOMPOSABLE_DTYPES)} and the same for all routed experts",
            hint="convert the checkpoint to bf16 first",
        )
