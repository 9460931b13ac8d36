"""A model streamed layer by layer: only the weights of the open part are in memory.

The layers are transformers' own, so every family it knows runs as it should. The model is built
without weights; `embedding`, `layer` and `head` load their part from the checkpoint and release it
again. The arguments of a layer (positions, masks) are captured from the model's own forward with
layers that do nothing; they depend on the shape of the windows only, or are the tokens themselves
or what the layer before has handed on. Routed experts are never read here: the caller computes
them.

Letters at the end of tensor names: S windows, L tokens of a window, T = S L tokens, I hidden size,
k experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tuckerize.calibration.attention import FusedAttention
from tuckerize.calibration.skeleton import (
    NamesOnDisk,
    OnDisk,
    build_empty,
    check_tensors,
    decoder_of,
    text_parts,
)
from tuckerize.calibration.states import States
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.errors import CheckpointError
from tuckerize.moe.family import Family

ExpertsCall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Routed output y_TI of tokens x_TI, from their experts_Tk and weights_Tk."""

Step = Callable[[States], States]
"""A layer, on its device."""

# Stand-ins for arguments of a layer that are of its windows.
_TOKENS = object()
_ATTENDED = object()
_EARLIER = object()


class _Call(NamedTuple):
    """Arguments of a layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, states: States) -> _Call:
        """The arguments for some windows."""

        def own(value: Any) -> Any:  # noqa: ANN401
            if value is _ATTENDED:
                return states.attended_SLN
            if value is _EARLIER:
                return states.earlier_SLNI
            return states.tokens_SL if value is _TOKENS else value

        return _Call(tuple(map(own, self.args)), {k: own(v) for k, v in self.kwargs.items()})


class _Experts(nn.Module):
    """Stand-in for the routed experts of a layer."""

    def __init__(self, experts: ExpertsCall, count: int) -> None:
        super().__init__()
        self.experts = experts
        self.count = count

    def forward(self, x_TI: Tensor, *routes: Tensor) -> Tensor:
        """Routed output, shape (T, I)."""
        return self.experts(x_TI, *routes) if routes else self._of_scaled(x_TI)

    def _of_scaled(self, x_NI: Tensor) -> Tensor:
        """Output (E T, I) of all tokens for each expert, scaled by 0 but for one (Llama 4)."""
        x_ETI = x_NI.view(self.count, -1, x_NI.shape[1])
        experts_T = x_ETI.any(2).int().argmax(0)
        tokens_T = torch.arange(len(experts_T), device=x_NI.device)
        own_TI, experts_T1 = x_ETI[experts_T, tokens_T], experts_T[:, None]
        output_ETI = torch.zeros_like(x_ETI)
        ones_T1 = own_TI.new_ones(experts_T1.shape)
        output_ETI[experts_T, tokens_T] = self.experts(own_TI, experts_T1, ones_T1)
        return output_ETI.flatten(0, 1)


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
    _on_disk: dict[str, OnDisk]
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
        model = build_empty(source, device, dtype)
        names = NamesOnDisk(model)
        on_disk = names.of(n for n in source.tensors if family.layer_of(n) is None)
        modules = {name for name, _ in model.named_modules()}
        paths = [names.module(family.experts_prefix(i)) for i in range(len(_layers(model)))]
        experts = {layer: path for layer, path in enumerate(paths) if path in modules}
        routed = tuple(f"{path}." for path in experts.values())
        text = text_parts(model)
        empty = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(text) and not name.startswith(routed)
        }
        check_tensors(source, empty, on_disk, names)
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
    def embedding(self) -> Iterator[Callable[[Tensor], States]]:
        """Step from tokens_SL to the states before the first layer."""

        @torch.no_grad()
        def embed(tokens_SL: Tensor) -> States:
            seen: list[Tensor] = []

            def look(_: int, hidden_states: Tensor, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401
                seen.append(hidden_states)
                return self._as_output(hidden_states)

            with self._layers_as(look):
                self._run_decoder(tokens_SL)
            earlier = seen[0][..., None, :][..., :0, :] if self._read_again else None
            return States(seen[0], tokens_SL, earlier_SLNI=earlier)

        with self._filled(self._below(self._model.get_input_embeddings())):
            yield embed

    @contextmanager
    def layer(self, index: int, experts: ExpertsCall | None = None) -> Iterator[Step]:
        """Step from the states before a layer to those after it.

        Args:
            index: Index of the layer.
            experts: Computes the routed experts; a layer without them does not call it.

        Raises:
            ValueError: The layer has routed experts, and `experts` is None.
        """
        layer = _layers(self._model)[index]

        @torch.no_grad()
        def run(states: States) -> States:
            args, kwargs = self._calls_of(states)[index].of(states)
            with self._explained(), FusedAttention():
                output = layer(states.hidden_SLI, *args, **kwargs)
            attended = None
            if self._indexers:
                output, attended = output
                if self._indexers[index + 1 : index + 2] != ["shared"]:
                    attended = None
            if not isinstance(output, Tensor):
                raise self._no_streaming("its layers return more than their hidden states")
            earlier = states.earlier_SLNI
            if earlier is not None and index in self._read_again:
                earlier = torch.cat([earlier, states.hidden_SLI[..., None, :]], -2)
            return States(output, states.tokens_SL, attended, earlier)

        with self._experts_as(index, experts), self._filled(self._below(layer)):
            yield run

    @contextmanager
    def head(self) -> Iterator[Callable[[States], Tensor]]:
        """Step from the states after the last layer to logits_SLV."""

        @torch.no_grad()
        def logits(states: States) -> Tensor:
            before = dict.fromkeys(range(self.layers + 1), states.hidden_SLI)
            if states.earlier_SLNI is not None:
                before |= zip(self._read_again, states.earlier_SLNI.unbind(-2), strict=True)

            def stand(index: int, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401
                return self._as_output(before[index + 1])

            with self._layers_as(stand), self._embedded_as(before[0]):
                result: Tensor = self._model(input_ids=states.tokens_SL, use_cache=False).logits
            return result

        with self._filled(self._below(self._model.get_output_embeddings())):
            yield logits

    @torch.no_grad()
    def _calls_of(self, states: States) -> list[_Call]:
        """Arguments of every layer for windows of this shape."""
        shape = states.hidden_SLI.shape
        if shape not in self._calls:
            calls: list[_Call] = []
            order: list[int] = []

            def noted(value: object) -> object:
                return _TOKENS if value is states.tokens_SL else value

            def note(index: int, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
                order.append(index)
                named = {name: noted(value) for name, value in kwargs.items()}
                if self._read_again:
                    args = (_EARLIER, *args[1:])
                calls.append(_Call(tuple(map(noted, args)), named))
                return self._as_output(hidden_states, _ATTENDED)

            unknown_SLI = torch.full_like(states.hidden_SLI, torch.nan)
            with self._layers_as(note), self._embedded_as(unknown_SLI):
                self._run_decoder(states.tokens_SL)
            if order != [*range(self.layers)]:
                raise self._no_streaming("its layers run more than once")
            found = [leaf for leaf in tree_leaves(calls) if isinstance(leaf, Tensor)]
            if any(bool(tensor.isnan().any()) for tensor in found):
                raise self._no_streaming("its layers read the hidden states of several before them")
            self._calls[shape] = calls
        return self._calls[shape]

    @property
    def _indexers(self) -> list[str] | None:
        """Kind of every layer that hands on the tokens it attends to; None if none does."""
        found: list[str] | None = getattr(
            self._model.config.get_text_config(), "indexer_types", None
        )
        return found

    @property
    def _read_again(self) -> list[int]:
        """Layers whose inputs later layers read (Inkling 2)."""
        layers = enumerate(_layers(self._model))
        return [index for index, own in layers if getattr(own, "is_block_boundary", False)]

    def _as_output(self, hidden_SLI: Tensor, attended: object = None) -> Any:  # noqa: ANN401
        """Hidden states as a layer returns them."""
        return (hidden_SLI, attended) if self._indexers else hidden_SLI

    def _run_decoder(self, tokens_SL: Tensor) -> None:
        """Run the model around layers that do nothing."""
        with self._explained():
            decoder_of(self._model)(input_ids=tokens_SL, use_cache=False)

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
    def _embedded_as(self, hidden_SLI: Tensor) -> Iterator[None]:
        """Let hidden states, of which the first residual stream counts, stand for embeddings."""
        embedding = self._model.get_input_embeddings()
        size = self._model.config.get_text_config().hidden_size
        embedding.forward = lambda _: hidden_SLI.flatten(2)[..., :size]
        try:
            yield
        finally:
            del embedding.forward

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
        self._model.set_submodule(path, _Experts(experts, getattr(original, "num_experts", 0)))
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
            for place in self._on_disk[name].names:
                wanted.setdefault(place, []).append(name)
        plan = self._model._get_dtype_plan(self.dtype)  # types that the family insists on
        found: dict[str, dict[str, Tensor]] = {}
        for place, tensor in self._source.read(wanted):
            for name in wanted[place]:
                own = next((plan[key] for key in plan if key in name), self._empty[name].dtype)
                found.setdefault(name, {})[place] = tensor.to(self.device, own)
        state = {name: self._on_disk[name].joined(parts) for name, parts in found.items()}
        self._model.load_state_dict(state, strict=False, assign=True)


def _layers(model: Any) -> nn.ModuleList:  # noqa: ANN401
    layers: nn.ModuleList = decoder_of(model).layers
    return layers
