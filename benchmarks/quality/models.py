"""A trained MoE model: its routed experts, the tokens that reach them, perplexity, replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.layer import Compressed, Layer, Sensitivity, Stacks, triple
from examples.fast_kernels import use_fast_kernels

WINDOW = 512
_WINDOWS_AT_ONCE = 8


class MoeModel:
    """A DeepSeek-V2 model of transformers in float32, run with the quick kernels of the examples.

    Attributes:
        model: The causal language model.
        blocks: The modules `mlp` of its MoE layers, with `gate` (the router) and `experts`.
        kept_experts: For every block the experts that are left, by their numbers; None for all.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()
        use_fast_kernels(model)
        self.blocks: list[Any] = [m for m in self.model.modules() if hasattr(m, "experts")]
        self._dense = [_own_tensors(block) for block in self.blocks]
        self.kept_experts: list[tuple[int, ...] | None] = [None] * len(self.blocks)

    @property
    def stacks(self) -> list[Stacks]:
        """Gate, up and transposed down of every MoE layer as they are now, (E, H, I) each."""
        return [_stacks(block.experts) for block in self.blocks]

    def tokens(self, text: str, most: int | None = None) -> Tensor:
        """The begin token and the tokens of a text, at most `most` of them to predict, (T + 1,)."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return torch.tensor([*start, *found][: None if most is None else most + 1])

    @torch.no_grad()
    def perplexity(self, tokens: Tensor) -> float:
        """Perplexity on a stream of tokens in windows that do not overlap; each is scored once."""
        total = 0.0
        for source, target in windows(tokens):
            logits = self.model(input_ids=source, use_cache=False).logits
            total += cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        return exp(total / (len(tokens) - 1))

    @contextmanager
    def recording(self, calls: list[list[tuple[Tensor, ...]]]) -> Iterator[None]:
        """Append to `calls`, a list for every block, what its experts get."""

        def recorder(into: list[tuple[Tensor, ...]]) -> Any:  # noqa: ANN401
            return lambda _module, inputs: into.append(tuple(t.detach() for t in inputs))

        hooks = [
            block.experts.register_forward_pre_hook(recorder(into))
            for block, into in zip(self.blocks, calls, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _recording_norms(self, norms: list[list[Tensor]]) -> Iterator[None]:
        """Append the norms of what the decoder layers of the blocks give."""

        def recorder(into: list[Tensor]) -> Any:  # noqa: ANN401
            return lambda _module, _inputs, output: into.append(output.norm(dim=-1).flatten())

        layers = [layer for layer in self.model.model.layers if hasattr(layer.mlp, "experts")]
        hooks = [
            layer.register_forward_hook(recorder(into))
            for layer, into in zip(layers, norms, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def layers(self, tokens: Tensor) -> list[Layer]:
        """The MoE layers with what a stream of tokens (T + 1,) gives them."""
        calls: list[list[tuple[Tensor, ...]]] = [[] for _ in self.blocks]
        norms: list[list[Tensor]] = [[] for _ in self.blocks]
        with self.recording(calls), self._recording_norms(norms):
            for source, _ in windows(tokens):
                self.model(input_ids=source, use_cache=False)
        return [
            replace(_layer(block, got), decoder_norms_T=torch.cat(own))
            for block, got, own in zip(self.blocks, calls, norms, strict=True)
        ]

    @torch.no_grad()
    def sequentially(self, tokens: Tensor, treat: Callable[[Layer], Stacks]) -> None:
        """Replace the experts layer after layer, each for what the layers before it give now.

        Args:
            tokens: A stream of tokens (T + 1,).
            treat: Gives the new stacks of an MoE layer.
        """
        decoder, layers = self.model.model, self.model.model.layers
        caught = _Catch()
        decoder.layers = nn.ModuleList([caught])
        for source, _ in windows(tokens):
            decoder(input_ids=source, use_cache=False)
        decoder.layers = layers
        states = caught.calls
        for layer in layers:
            if hasattr(layer.mlp, "experts"):
                index = self.blocks.index(layer.mlp)
                calls: list[list[tuple[Tensor, ...]]] = [[] for _ in self.blocks]
                with self.recording(calls):
                    for hidden, kwargs in states:
                        layer(hidden, **kwargs)
                _put(layer.mlp, treat(_layer(layer.mlp, calls[index])))
            states = [(layer(hidden, **kwargs), kwargs) for hidden, kwargs in states]

    def sensitivities(self, tokens: Tensor) -> list[Sensitivity]:
        """Derivatives of the loss on a stream of tokens, window by window, for every MoE layer."""
        self.model.requires_grad_(requires_grad=False)
        for block in self.blocks:
            block.experts.requires_grad_(requires_grad=True)
        sums = [_SensitivitySum(block.experts) for block in self.blocks]
        single = [pair for pairs in windows(tokens) for pair in zip(*pairs, strict=True)]
        for source, target in single:
            logits = self.model(input_ids=source[None], use_cache=False).logits[0]
            torch.autograd.backward(cross_entropy(logits, target, reduction="sum"))
            for total in sums:
                total.take_weight_gradients()
        self.model.requires_grad_(requires_grad=True)
        return [total.finish(len(single)) for total in sums]

    @torch.no_grad()
    def replace(self, compressed: Sequence[Compressed]) -> None:
        """Put compressed weights in the place of the experts; a router loses what is gone."""
        self.restore()
        self.kept_experts = [new.kept_experts for new in compressed]
        for block, new in zip(self.blocks, compressed, strict=True):
            experts = range(len(new.stacks[0]))
            kept = list(experts if new.kept_experts is None else new.kept_experts)
            _put(block, triple(stack[kept] for stack in new.stacks))
            block.gate.weight = nn.Parameter(block.gate.weight[kept])
            block.experts.num_experts = block.gate.num_experts = len(kept)

    def restore(self) -> None:
        """Put the dense weights back."""
        self.kept_experts = [None] * len(self.blocks)
        for block, (gate_up, down, router) in zip(self.blocks, self._dense, strict=True):
            block.experts.gate_up_proj, block.experts.down_proj = gate_up, down
            block.gate.weight = router
            block.experts.num_experts = block.gate.num_experts = len(router)

    @torch.no_grad()
    def outputs(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Routed output of every layer on its own tokens, with weights and routers as they are."""
        outputs = []
        for block, layer in zip(self.blocks, layers, strict=True):
            _, weights_Tk, experts_Tk = block.gate(layer.x_TI)
            outputs.append(block.experts(layer.x_TI, experts_Tk, weights_Tk))
        return outputs


class _SensitivitySum:
    """Adds up derivatives of the loss by one layer's experts and by their combined output."""

    def __init__(self, experts: Any) -> None:  # noqa: ANN401
        self.experts = experts
        count, _, hidden = experts.gate_up_proj.shape
        self.squared = [torch.zeros_like(stack) for stack in _stacks(experts)]
        self.output_EII = torch.zeros(count, hidden, hidden)
        self.tokens_E = torch.zeros(count)
        self.hook = experts.register_forward_hook(self._watch_output)

    def _watch_output(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def take(grad_TI: Tensor) -> None:
            self._take_output_gradient(inputs[1], grad_TI)

        output.register_hook(take)  # type: ignore[no-untyped-call]

    def _take_output_gradient(self, experts_Tk: Tensor, grad_TI: Tensor) -> None:
        for expert in range(len(self.tokens_E)):
            rows_NI = grad_TI[(experts_Tk == expert).any(-1)]
            self.output_EII[expert] += rows_NI.T @ rows_NI
            self.tokens_E[expert] += len(rows_NI)

    def take_weight_gradients(self) -> None:
        gradients = (self.experts.gate_up_proj.grad, self.experts.down_proj.grad)
        for total, gradient in zip(self.squared, _split(*gradients), strict=True):
            total.add_(gradient.square())
        self.experts.zero_grad(set_to_none=True)

    def finish(self, windows: int) -> Sensitivity:
        self.hook.remove()
        tokens_E11 = self.tokens_E.clamp_min(1)[:, None, None]
        fisher = triple(total / windows for total in self.squared)
        return Sensitivity(fisher, self.output_EII / tokens_E11)


class _Catch(nn.Module):
    """Stand-in for the decoder layers that keeps what the first of them gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        self.calls.append((hidden, kwargs))
        return hidden


def windows(tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sources and targets, (windows, tokens) each; a shorter window comes last and alone."""
    count = (len(tokens) - 1) // WINDOW
    whole = count * WINDOW
    if count:
        pairs = (tokens[:whole].view(count, -1), tokens[1 : whole + 1].view(count, -1))
        yield from zip(*(torch.split(part, _WINDOWS_AT_ONCE) for part in pairs), strict=True)
    if whole < len(tokens) - 1:
        yield tokens[None, whole:-1], tokens[None, whole + 1 :]


def _layer(block: Any, calls: list[tuple[Tensor, ...]]) -> Layer:  # noqa: ANN401
    x_TI, experts_Tk, weights_Tk = (torch.cat(part) for part in zip(*calls, strict=True))
    return Layer(_stacks(block.experts), x_TI, experts_Tk, weights_Tk)


def _put(block: Any, stacks: Stacks) -> None:  # noqa: ANN401
    gate_EHI, up_EHI, down_EHI = stacks
    block.experts.gate_up_proj = nn.Parameter(torch.cat((gate_EHI, up_EHI), dim=1))
    block.experts.down_proj = nn.Parameter(down_EHI.mT.contiguous())


def _stacks(experts: Any) -> Stacks:  # noqa: ANN401
    return _split(experts.gate_up_proj.detach(), experts.down_proj.detach())


def _split(gate_up_EGI: Tensor, down_EIH: Tensor) -> Stacks:
    gate_EHI, up_EHI = gate_up_EGI.chunk(2, dim=1)
    return gate_EHI, up_EHI, down_EIH.mT


def _own_tensors(block: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:  # noqa: ANN401
    return block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight
