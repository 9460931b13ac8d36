"""A model streamed layer by layer: only the weights of the open part are in memory.

The layers are transformers' own, so every family it knows runs as it should. The model is built
without weights; `embedding`, `layer` and `head` load their part from the checkpoint and release it
again. The arguments of a layer (positions, masks) are captured from the model's own forward with
layers that do nothing; they must depend on the shape of the windows only, not on their tokens.
Routed experts are never read here: the caller computes them.

Letters at the end of tensor names: S windows, L tokens of a window, T = S L tokens, I hidden size,
k experts per token, V vocabulary.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.errors import CheckpointError
from tuckerize.moe.family import Family

ExpertsCall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Routed output y_TI of tokens x_TI, from their experts_Tk and weights_Tk."""

Step = Callable[[Tensor], Tensor]
"""A part of the model, on its device."""


class _Call(NamedTuple):
    """Arguments of a layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Experts(nn.Module):
    """Stand-in for the routed experts of a layer."""

    def __init__(self, experts: ExpertsCall) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Routed output, shape (T, I)."""
        return self.experts(x_TI, experts_Tk, weights_Tk)


@dataclass(frozen=True, eq=False)
class StreamedModel:
    """A causal language model whose parts are in memory while they are open.

    Attributes:
        device: Where the open part is; tensors that go in must be there.
        dtype: Type of its weights.
    """

    device: torch.device
    dtype: torch.dtype
    _source: Checkpoint
    _model: Any
    _empty: dict[str, Tensor]
    _on_disk: dict[str, str]
    _experts: dict[int, str]
    _calls: dict[torch.Size, list[_Call]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: Checkpoint,
        family: Family,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> StreamedModel:
        """Build the model without weights; only those outside of its parts are read.

        Args:
            source: The checkpoint, dense or Tucker; not quantized.
            family: Its family.
            device: Where to compute.
            dtype: Type of the weights; by default float32 on the cpu, elsewhere config.json's.

        Raises:
            CheckpointError: transformers cannot build the model, or a tensor is missing.
        """
        model = _build(source, device, dtype)
        rename = _renaming(model)
        on_disk = {rename(name): name for name in source.tensors if family.layer_of(name) is None}
        for one, other in model.all_tied_weights_keys.items():
            on_disk.setdefault(one, on_disk.get(other, other))
            on_disk.setdefault(other, on_disk[one])
        modules = {name for name, _ in model.named_modules()}
        # Renamings look at what is below a module.
        within = [rename(f"{family.experts_prefix(i)}.0") for i in range(len(_layers(model)))]
        paths = {layer: path.removesuffix(".0") for layer, path in enumerate(within)}
        experts = {layer: path for layer, path in paths.items() if path in modules}
        routed = tuple(f"{path}." for path in experts.values())
        empty = {n: t for n, t in model.state_dict().items() if not n.startswith(routed)}
        _check_fusions(model, [name for name in empty if on_disk.get(name) not in source.tensors])
        _check_tensors(source, empty, on_disk)
        streamed = cls(device, model.dtype, source, model, empty, on_disk, experts)
        streamed._open_rest()
        return streamed

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(_layers(self._model))

    @property
    def vocabulary(self) -> int:
        """Number of embeddings."""
        return int(self._model.get_input_embeddings().num_embeddings)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(self._experts)

    @contextmanager
    def embedding(self) -> Iterator[Step]:
        """Step from tokens_SL to the hidden states_SLI before the first layer."""

        @torch.no_grad()
        def embed(tokens_SL: Tensor) -> Tensor:
            seen: list[Tensor] = []

            def look(_: int, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Tensor:
                seen.append(hidden_states)
                return hidden_states

            with self._layers_as(look):
                self._run_decoder(input_ids=tokens_SL)
            return seen[0]

        with self._filled(self._below(self._model.get_input_embeddings())):
            yield embed

    @contextmanager
    def layer(self, index: int, experts: ExpertsCall | None = None) -> Iterator[Step]:
        """Step from the hidden states_SLI before a layer to those after it.

        Args:
            index: Index of the layer.
            experts: Computes the routed experts; a layer without them does not call it.

        Raises:
            ValueError: The layer has routed experts, and `experts` is None.
        """
        layer = _layers(self._model)[index]

        @torch.no_grad()
        def run(hidden_SLI: Tensor) -> Tensor:
            args, kwargs = self._calls_of(hidden_SLI)[index]
            with self._explained():
                output = layer(hidden_SLI, *args, **kwargs)
            if not isinstance(output, Tensor):
                raise self._no_streaming("its layers return more than their hidden states")
            return output

        with self._experts_as(index, experts), self._filled(self._below(layer)):
            yield run

    @contextmanager
    def head(self) -> Iterator[Step]:
        """Step from the hidden states_SLI after the last layer to logits_SLV."""

        @torch.no_grad()
        def logits(hidden_SLI: Tensor) -> Tensor:
            def stand(*_args: object, **_kwargs: object) -> Tensor:
                return hidden_SLI

            with self._layers_as(stand):
                result: Tensor = self._model(inputs_embeds=hidden_SLI, use_cache=False).logits
            return result

        names = self._below(self._model.get_output_embeddings())
        if self._model.config is not self._model.config.get_text_config():
            # Models of images look for the embeddings of their placeholders.
            names += self._below(self._model.get_input_embeddings())
        with self._filled(names):
            yield logits

    @torch.no_grad()
    def _calls_of(self, hidden_SLI: Tensor) -> list[_Call]:
        """Arguments of every layer for windows of this shape."""
        shape = hidden_SLI.shape
        if shape not in self._calls:
            calls: list[_Call] = []

            def note(_: int, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
                calls.append(_Call(args, kwargs))
                return hidden_states

            with self._layers_as(note):
                self._run_decoder(inputs_embeds=hidden_SLI)
            self._calls[shape] = calls
        return self._calls[shape]

    def _run_decoder(self, **inputs: Tensor) -> None:
        """Run the model around layers that do nothing."""
        with self._explained():
            self._model.get_decoder()(**inputs, use_cache=False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say that a model cannot be streamed where its own code refuses what streaming does."""
        try:
            yield
        except ValueError as error:
            raise self._no_streaming(str(error)) from error

    def _no_streaming(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"models of type '{self._source.config.get('model_type')}' cannot be run layer by "
            f"layer: {why}",
            hint="decompose without calibration",
        )

    @contextmanager
    def _layers_as(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Replace the forward pass of every layer; `forward` gets its index first."""
        layers = _layers(self._model)
        for index, layer in enumerate(layers):
            layer.forward = partial(forward, index)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    @contextmanager
    def _experts_as(self, index: int, experts: ExpertsCall | None) -> Iterator[None]:
        """Replace the routed experts of a layer, if it has any, by the caller's."""
        path = self._experts.get(index)
        if path is None:
            yield
            return
        if experts is None:
            raise ValueError(f"layer {index} has routed experts: give what computes them")
        original = self._model.get_submodule(path)
        self._model.set_submodule(path, _Experts(experts))
        try:
            yield
        finally:
            self._model.set_submodule(path, original)

    def _below(self, module: nn.Module) -> list[str]:
        """Names of the tensors of a part of the model."""
        (path,) = (name for name, found in self._model.named_modules() if found is module)
        return [name for name in self._empty if name.startswith(f"{path}.")]

    def _open_rest(self) -> None:
        """Read the tensors outside of the parts, such as the final norm: they are small."""
        model = self._model
        parts = (model.get_input_embeddings(), model.get_output_embeddings(), *_layers(model))
        elsewhere = {name for part in parts for name in self._below(part)}
        self._fill(name for name in self._empty if name not in elsewhere)

    @contextmanager
    def _filled(self, names: list[str]) -> Iterator[None]:
        try:
            self._fill(names)
            yield
        finally:
            empty = {name: self._empty[name] for name in names}
            self._model.load_state_dict(empty, strict=False, assign=True)

    def _fill(self, names: Iterable[str]) -> None:
        """Read tensors of the model, one at a time, to the device."""
        wanted: dict[str, list[str]] = {}
        for name in names:  # several where they are tied
            wanted.setdefault(self._on_disk[name], []).append(name)
        plan = self._model._get_dtype_plan(self.dtype)  # types that the family insists on
        state = {}
        for place, tensor in self._source.read(wanted):
            for name in wanted[place]:
                own = next((plan[key] for key in plan if key in name), self._empty[name].dtype)
                state[name] = tensor.to(self.device, own)
        self._model.load_state_dict(state, strict=False, assign=True)


def _build(source: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> Any:  # noqa: ANN401
    """The model without weights; buffers that no checkpoint has are computed."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else config.dtype
        with torch.device("meta"), warnings.catch_warnings():
            # Of a model without shared experts, which has empty tensors in their place.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            auto: Any = AutoModelForCausalLM
            if type(config) not in auto._model_mapping:  # a model of texts and images
                auto = AutoModelForImageTextToText
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers cannot build the model of {source.folder}: {error}",
            hint="repair config.json, or install the release of transformers that it names"
            if sys.flags.optimize < 2
            else "transformers needs its docstrings: unset PYTHONOPTIMIZE, or set it to 1",
        ) from error
    _compute_buffers(model, device)
    return model.eval()


@torch.no_grad()
def _compute_buffers(model: Any, device: torch.device) -> None:  # noqa: ANN401
    """Compute the buffers that are not in checkpoints, such as rotary frequencies.

    transformers builds every model without memory and has each family's `_init_weights` compute
    them; parameters are empty here, so it leaves them alone.
    """
    for path, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set)
        names = [name for name in names if module._buffers[name] is not None]
        for name in names:
            buffer = torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = buffer
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)  # to see below whether it has been computed
        if names:
            model._init_weights(module)
        for name in names:
            if module._buffers[name].isnan().any():
                raise CheckpointError(
                    f"transformers does not say how to compute the buffer {path}.{name}",
                    hint="streaming does not support this family",
                )
            module._buffers[name] = module._buffers[name].to(device)


def _layers(model: Any) -> nn.ModuleList:  # noqa: ANN401
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def _renaming(model: Any) -> Callable[[str], str]:  # noqa: ANN401
    """Map of names in checkpoints to names in the model, where transformers uses others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0]


def _check_fusions(model: Any, missing: list[str]) -> None:  # noqa: ANN401
    """Refuse tensors that transformers makes of several, other than of experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_model_conversion_mapping(model)
    fused = [
        p for entry in mapping if isinstance(entry, WeightConverter) for p in entry.target_patterns
    ]
    made = [name for name in missing if any(re.search(pattern, name) for pattern in fused)]
    if made:
        raise CheckpointError(
            f"transformers makes {made[0]} of several tensors, which streaming does not support",
            hint="decompose without calibration",
        )


def _check_tensors(source: Checkpoint, wanted: dict[str, Tensor], on_disk: dict[str, str]) -> None:
    """Check that a checkpoint has every tensor of the model, in its shape."""
    missing = [name for name in wanted if on_disk.get(name) not in source.tensors]
    architectures = source.config.get("architectures")
    kind = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if missing and kind and not kind.endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise CheckpointError(
            f"{source.folder} holds a {kind}, which predicts no text: it lacks {missing[0]}",
            hint="decompose it without --calibration",
        )
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensors of the model: {', '.join(missing[:5])}",
            hint="the checkpoint is incomplete: fetch it again",
        )
    for name, tensor in wanted.items():
        shape = source.tensors[on_disk[name]].shape
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"the tensor {on_disk[name]} has shape {list(shape)}, "
                f"expected {list(tensor.shape)}",
                hint="check the sizes in config.json",
            )
