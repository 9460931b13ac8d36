"""transformers: load a Tucker checkpoint as the stock model with factored routed experts.

transformers takes a checkpoint whose config.json has a `quantization_config` through a quantizer of
that name. Ours replaces the experts by modules of factors, in the shapes of the configuration,
before weights are loaded; transformers does the rest. `import tuckerize` registers it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from tuckerize.errors import CheckpointError
from tuckerize.format.config import METHOD, GroupShape, TuckerQuantization
from tuckerize.format.cores import part_dtype
from tuckerize.moe.family import Family
from tuckerize.moe.lookup import glu_of, is_further, row_of
from tuckerize.names import GROUP_PATTERN, TensorKind, TensorName
from tuckerize.runtime.activations import Activation, activation_of
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.runtime.quantised import QuantisedCore

# transformers' tensor-parallel style of rows: the dimension before the last is split.
_ROWS = "colwise"
# Its style of experts modules that give partial sums.
_PARTIAL_SUMS = "moe_tp_experts"
# Its name of the axis of a mesh, if it has names.
_TENSOR_PARALLEL = "tp"
# Methods of the quantizer of what is not factored that decide how its tensors are loaded. Some
# releases lack some.
_OF_THE_REST = (
    "validate_environment",
    "update_dtype",
    "update_device_map",
    "param_element_size",
    "adjust_max_memory",
    "param_needs_quantization",
    "get_new_dtype",
    "get_quantize_ops",
    "get_weight_conversions",
    "update_parallel_plan",
)
# Name of a tensor of a quantised core.
_CORE = rf"({GROUP_PATTERN.replace('?P<group>', '')}\..+\.weight(?:_packed|_scale)?)"
# Mark of a parameter whose gradient is summed over processes.
_SUMMED = "_tuckerize_summed"
# Parameters of the forward of experts that get tokens alone: self and the tokens.
_TOKENS_ALONE = 2
# Index of a layer, or of a matrix of a core: a star in its plans.
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class _AsStored(ConversionOps):
    """Loads a tensor of a quantised core as it is."""

    def convert(self, input_dict: dict[str, Any], *_: object, **given: Any) -> dict[str, Any]:  # noqa: ANN401
        """The one tensor, under its name in the model."""
        [tensor] = input_dict.values()
        return {given["full_layer_name"]: tensor[0] if isinstance(tensor, list) else tensor}


@register_quantization_config(METHOD)
class TuckerConfig(QuantizationConfigMixin):
    """`quantization_config` of a Tucker checkpoint, see docs/reference/format.md.

    Raises:
        ValueError: It is of another release, or malformed; the message names the key.
    """

    def __init__(self, **value: Any) -> None:  # noqa: ANN401
        self.tucker = TuckerQuantization.parse(value)
        self.quant_method = METHOD  # type: ignore[assignment]  # one that transformers ships

    def to_dict(self) -> dict[str, Any]:
        """Contents of `quantization_config`, as on disk."""
        return self.tucker.to_json()


@register_quantizer(METHOD)
class TuckerQuantizer(HfQuantizer):
    """Puts factored experts in the place of dense ones.

    What else is quantized, in a checkpoint made from a quantized source, is left to transformers'
    quantizer of that method.
    """

    requires_calibration = True
    is_trainable = True
    is_qat_trainable = True  # transformers' word for: without adapters, too

    def __init__(self, quantization_config: Any, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **settings)
        self.rest: Any = None
        if quantization_config.tucker.rest:
            described: Any = AutoQuantizationConfig.from_dict(dict(quantization_config.tucker.rest))
            if described.quant_method == QuantizationMethod.COMPRESSED_TENSORS:
                # It would be dequantized at the first forward in any case, and transformers loads
                # experts of layers that stayed as they were in no other way.
                described.dequantize, described.run_compressed = True, False
            self.rest = AutoHfQuantizer.from_config(described, pre_quantized=True)
            for name in _OF_THE_REST:
                if hasattr(self.rest, name):
                    setattr(self, name, getattr(self.rest, name))

    def update_weight_conversions(self, *given: Any) -> Any:  # noqa: ANN401
        """Converters of the rest, after one for quantised cores: they have names like its own."""
        if self.rest is None:
            return super().update_weight_conversions(*given)  # type: ignore[no-untyped-call]
        config: Any = self.quantization_config
        cores = (
            [WeightConverter([_CORE], [r"\1"], [_AsStored()])] if config.tucker.core_types else []
        )
        return [*cores, *self.rest.update_weight_conversions(*given)]

    def is_serializable(self, *_: object, **__: object) -> bool:
        """Whether `save_pretrained` works: factors are ordinary tensors."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> Any:  # noqa: ANN401
        """Replace the experts; no tensor of the model has memory yet.

        Raises:
            ValueError: The experts were to be shared out over processes, or quantised ones split.
        """
        parallel = getattr(model.config, "distributed_config", None)
        if getattr(parallel, "enable_expert_parallel", False):
            raise ValueError(
                "transformers cannot share out the experts of a Tucker checkpoint over processes: "
                "use tp_size, which splits every expert, in place of expert parallelism"
            )
        config: Any = self.quantization_config
        core_types = config.tucker.core_types
        whole = "quantised cores" if core_types else "experts with biases"
        is_whole = core_types or config.tucker.biased
        if is_whole and (getattr(parallel, "tp_size", None) or 1) > 1:
            raise ValueError(
                f"transformers cannot split {whole} over processes: load the checkpoint in every "
                "process without tp_size"
            )
        described = model.config.to_dict()
        factored, known = {}, row_of(described) is not None
        # transformers leaves out layers that predict further tokens, on loading and on saving.
        modules = {
            path: groups
            for path, groups in config.tucker.modules.items()
            if not is_further(described, path)
        }
        config.tucker = replace(config.tucker, modules=modules)
        for path, groups in modules.items():
            own = _path_in_model(model, path)
            activation = activation_of(glu_of(described, path))
            factored[own] = _factored(model.get_submodule(own), groups, activation, known=known)
        if self.rest is not None:  # before: it would take the factored experts for its own
            self.rest._process_model_before_weight_loading(model, **given)
        for own, module in factored.items():
            model.set_submodule(own, module)
        _plan_parallel(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:  # noqa: ANN401
        """Freeze quantised cores; train what tensor parallelism does not split."""
        if self.rest is not None:
            self.rest._process_model_after_weight_loading(model, **given)
            if getattr(self.rest.quantization_config, "dequantize", False):
                self._forget_rest(model)
            else:
                model._weight_conversions = [
                    own for own in model._weight_conversions if own.source_patterns != [_CORE]
                ]
        for module in model.modules():
            if isinstance(module, QuantisedCore):
                module.requires_grad_(requires_grad=False)
        mesh = getattr(model, "_device_mesh", None)
        names = getattr(mesh, "mesh_dim_names", None) or (_TENSOR_PARALLEL,)
        if mesh is not None and _TENSOR_PARALLEL in names:
            group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group(_TENSOR_PARALLEL)
            for module in model.modules():
                if isinstance(module, TuckerExperts):
                    _sum_gradients(module, group)
        return model

    def _forget_rest(self, model: Any) -> None:  # noqa: ANN401
        """Make `save_pretrained` write dense tensors, and a config.json that says so."""
        config: Any = self.quantization_config
        config.tucker = replace(config.tucker, rest=None)
        model._weight_conversions = None  # those of the dense model, when it is saved


def _plan_parallel(model: Any) -> None:  # noqa: ANN401
    """Tensor parallelism: every process owns some neurons of every expert.

    Outputs are then partial sums, which the family's style of the whole module adds up. 5.14
    announces expert parallelism only later, finds no plan for it and refuses.
    """
    dense = [key for key, style in model._tp_plan.items() if style == _PARTIAL_SUMS]
    kept = {
        key: style for key, style in model._tp_plan.items() if key.rpartition(".")[0] not in dense
    }
    own = {
        _NUMBER.sub(".*", f"{path}.{name}"): _ROWS
        for path, module in model.named_modules()
        if isinstance(module, TuckerExperts)
        for name in _split_rows(module)
    }
    model._tp_plan = own | kept  # 5.14 takes the first rule that a name begins with
    model._ep_plan = {}


def _split_rows(module: TuckerExperts) -> list[str]:
    """Parameters whose rows are neurons: cores, or U_H where the intermediate mode is truncated."""
    names = [TensorName.parse(name) for name, _ in module.named_parameters()]
    truncated = {(name.group, name.owner) for name in names if name.kind == TensorKind.U_H}
    return [
        str(name)
        for name in names
        if name.kind == TensorKind.U_H
        or (name.kind == TensorKind.CORE and (name.group, name.owner) not in truncated)
    ]


def _sum_gradients(module: TuckerExperts, group: Any) -> None:  # noqa: ANN401
    """Sum the gradients of replicated parameters: each process has those of its own neurons.

    A hook sums them in every backward, before they are accumulated. Every forward looks up which
    parameters are trained: they may have been frozen, replaced or copied.
    """
    split = {*_split_rows(module)}

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=group)
        return total

    def before_forward(own: TuckerExperts, _: object) -> None:
        for name, parameter in own.named_parameters():
            if parameter.requires_grad and name not in split and not hasattr(parameter, _SUMMED):
                parameter.register_hook(summed)  # type: ignore[no-untyped-call]
                setattr(parameter, _SUMMED, True)  # copies of a tensor have neither

    module.register_forward_pre_hook(before_forward)


def check_experts(folder: Path, family: Family, layers: Iterable[int]) -> None:
    """Check that transformers' experts of a model compute what ours do; builds it without memory.

    Args:
        folder: The dense checkpoint.
        family: Its family.
        layers: Indices of the layers with routed experts.

    Raises:
        CheckpointError: They do not, or transformers does not know the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind: Any = AutoModelForCausalLM
        if type(config) not in kind._model_mapping:
            kind = AutoModelForImageTextToText
        with torch.device("meta"):
            model = kind.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"model_type '{family.model_type}' is neither in the table of MoE families nor known "
            f"to transformers {transformers_version}: {error}",
            hint="install the release of transformers that the model's card names",
        ) from error
    for layer in layers:
        path = _path_in_model(model, family.experts_prefix(layer))
        try:
            why = _not_standard(model.get_submodule(path), known=False)
        except AttributeError:
            why = "it has no such module"
        if why:
            raise CheckpointError(
                f"the experts of model_type '{family.model_type}' cannot be factored: {why} "
                f"({path} in transformers)",
                hint="docs/reference/models.md lists the supported families",
            )


def _not_standard(experts: Any, *, known: bool) -> str | None:  # noqa: ANN401
    """Reason why an experts module does not compute what `TuckerExperts` does, if it does not.

    Args:
        experts: The module.
        known: Whether its activation is that of a family in the table.
    """
    if not getattr(experts, "has_gate", True):
        return "they have no gate"
    if getattr(experts, "has_bias", False) and not known:
        return "they have biases"
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm follows them"
    if _hidden_size(experts) is None:
        return f"{type(experts).__name__} is not of transformers' standard form"
    gate = getattr(type(experts), "_apply_gate", None)
    own_gate = gate is not None and gate.__module__ == type(experts).__module__
    if (own_gate or not hasattr(experts, "act_fn")) and not known:
        return "their gate is not an activation times up"
    return None


class _Replicated(TuckerExperts):
    """Experts that get all tokens once for each expert, scaled by routing weights (Llama 4)."""

    def forward(self, x_NI: Tensor) -> Tensor:  # type: ignore[override]
        """Outputs of tokens, shape (E T, I): those of the first expert come first."""
        experts = self.group_size * len(self.groups)
        experts_E = torch.arange(experts, device=x_NI.device)
        experts_N1 = experts_E.repeat_interleave(len(x_NI) // experts)[:, None]
        return super().forward(x_NI, experts_N1, x_NI.new_ones(experts_N1.shape))


def _takes_routes(dense: nn.Module) -> bool:
    """Whether a module of experts gets the routes of tokens, and not tokens that are routed."""
    return len(inspect.signature(type(dense).forward).parameters) > _TOKENS_ALONE


def _hidden_size(experts: Any) -> int | None:  # noqa: ANN401
    """Hidden size of a module of experts; None if it is not of transformers' standard form."""
    found: int | None = getattr(experts, "hidden_dim", getattr(experts, "hidden_size", None))
    return found


def _path_in_model(model: Any, path: str) -> str:  # noqa: ANN401
    """Path of a module in the model, where transformers renames what checkpoints hold."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    inside = ".group_0"  # renamings look at what is below a module
    found = rename_source_key(f"{path}{inside}", renamings, [])[0].removesuffix(inside)
    within = f"{model.base_model_prefix}.{found}"  # files may hold the decoder alone
    return within if any(name == within for name, _ in model.named_modules()) else found


def _factored(
    dense: Any,  # noqa: ANN401
    groups: Sequence[GroupShape],
    activation: Activation,
    *,
    known: bool,
) -> TuckerExperts:
    """The factored module that replaces a dense one, without memory.

    Raises:
        ValueError: The dense one computes something else.
    """
    if why := _not_standard(dense, known=known):
        raise ValueError(f"the experts cannot be replaced by factored ones: {why}")
    like = next(dense.parameters())
    tensors = [
        {
            name: torch.empty(
                shape, dtype=part_dtype(name.part, group.core_type, like.dtype), device=like.device
            )
            for name, shape in group.tensor_shapes(_hidden_size(dense) or 0).items()
        }
        for group in groups
    ]
    kind = TuckerExperts if _takes_routes(dense) else _Replicated
    module = kind(tensors, group_size=groups[0].experts, activation=activation)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dtype.itemsize > 1 and parameter.is_floating_point())
    return module
