"""Perplexity of checkpoints on a text, and how far apart their predictions are, layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import experts_call
from tuckerize.calibration.states import States
from tuckerize.calibration.stream import ExpertsCall, StreamedModel
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.calibration.tokens import DenseGroup
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.reader import Checkpoint, measure_size
from tuckerize.domain import Device, Projection, Size
from tuckerize.errors import CheckpointError
from tuckerize.format.saved import is_tucker_checkpoint
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.moe.family import Family
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.parallel.backends import check_encoding, choose_device
from tuckerize.parallel.memory import require_memory
from tuckerize.pipeline.divergence import (
    PredictionSums,
    estimate,
    experts_changed,
    exponential,
)
from tuckerize.pipeline.evaluation_record import keep_evaluation
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe_files import Texts, list_of_texts
from tuckerize.report.evaluation import Divergence, EvaluateReport, Evaluation
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.experts import TuckerExperts

_WINDOWS_AT_ONCE = 8
_SEED = 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A checkpoint that can be streamed.

    Attributes:
        checkpoint: Its tensors.
        family: Its family.
        tucker: Its factored layers; None if there are none.
        dense: Its dense layers; None if there are none.
    """

    checkpoint: Checkpoint
    family: Family
    tucker: TuckerCheckpoint | None
    dense: SourceModel | None

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        if self.tucker is not None:
            return self.tucker.manifest.shape.experts
        return 0 if self.dense is None else self.dense.moe.shape.experts

    @property
    def size(self) -> Size:
        """Its parameters and bytes."""
        if self.tucker is not None:
            return self.tucker.manifest.after
        return measure_size(self.checkpoint.tensors, is_routed=self.family.is_routed)

    def module(self, layer: int, device: torch.device) -> TuckerExperts:
        """The routed experts of a layer, factored or dense, in float32 besides quantised cores.

        Raises:
            CheckpointError: There are none, or they cannot be read.
        """
        if self.tucker is not None and layer in self.tucker.manifest.layers:
            size = self.tucker.manifest.group_size
            groups = [
                self.tucker.read_group(layer, group) for group in range(self.tucker.manifest.groups)
            ]
        elif self.dense is not None:
            size = self.dense.moe.shape.experts
            groups = [_as_group(self.dense, layer)]
        else:
            raise CheckpointError(
                f"{self.checkpoint.folder} has no routed experts of layer {layer}",
                hint="fetch or write the folder again",
            )
        activation = activation_of(self.family.glu(self.checkpoint.config, layer))
        experts = TuckerExperts(groups, group_size=size, activation=activation)
        return experts.to(device, torch.float32)


def _as_group(source: SourceModel, layer: int) -> dict[TensorName, Tensor]:
    """Dense experts as the tensors of a group of which every mode is full."""
    stacks = {p: source.stack(layer, p, dtype=torch.float32) for p in Projection}
    experts = range(source.moe.shape.experts)
    return DenseGroup(stacks, experts, source.biases(layer, dtype=torch.float32)).as_tensors()


def open_evaluated(folder: Path) -> Evaluated:
    """Open a dense or a Tucker checkpoint; reads headers only.

    Raises:
        CheckpointError: It is neither, unfinished or damaged, or its family or activation is not
            known.
    """
    if is_tucker_checkpoint(folder):
        tucker = TuckerCheckpoint.open(folder)
        return Evaluated(tucker.checkpoint, tucker.family, tucker, tucker.dense_layers())
    source = SourceModel.open(folder)
    return Evaluated(source.checkpoint, source.moe.family, None, source)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRequest:
    """A perplexity to measure.

    Attributes:
        model: A dense model or a Tucker checkpoint: folder, Hugging Face id or short name.
        text: Text or JSONL file, PATH or PATH:WEIGHT, or several.
        against: Another of the same kind, on the same text: it comes first in the report, and the
            divergence is from it.
        tokens: Tokens in all windows, evenly spread over the texts.
        window: Tokens per window; all but its first are predicted.
        chat_template: Render conversations by the tokenizer's chat template, if it has one.
        device: Where to compute: auto, npu, cuda or cpu.
    """

    model: str | Path
    text: Texts
    against: str | Path | None = None
    tokens: int = 65536
    window: int = 512
    chat_template: bool = True
    device: str = Device.AUTO


def evaluate(request: EvaluateRequest, progress: Progress | None = None) -> EvaluateReport:
    """Measure perplexities on a text, and with `against` how far the predictions are apart.

    One decoder layer is in memory at a time, and of all tokens their hidden states. A Tucker
    checkpoint keeps its comparison with a dense model, for `report` and `push`.

    Args:
        request: The checkpoints and the text.
        progress: Shows how far the work is.

    Raises:
        TuckerizeError: A checkpoint or a text cannot be used; the message says why.

    Example:
        >>> request = EvaluateRequest(model="OUT", text="text.txt", against="DeepSeek-V2-Lite")
        >>> [result.perplexity for result in evaluate(request).results]  # doctest: +SKIP
    """
    names = [name for name in (request.against, request.model) if name is not None]
    folders = [resolve_model(str(name)) for name in names]
    report = measure_perplexity(
        folders,
        list_of_texts(request.text),
        tokens=request.tokens,
        window=request.window,
        chat_template=request.chat_template,
        device=choose_device(Device.parse(request.device)),
        progress=progress or SilentProgress(),
    )
    own = open_evaluated(folders[-1]).tucker
    if own is None or len(folders) == 1 or is_tucker_checkpoint(folders[0]):
        return report
    return keep_evaluation(own, report)


def measure_perplexity(
    folders: Sequence[Path],
    texts: Sequence[str],
    *,
    tokens: int,
    window: int,
    chat_template: bool = True,
    device: torch.device,
    progress: Progress,
) -> EvaluateReport:
    """Perplexity of one or two checkpoints on the same windows of text.

    Args:
        folders: Checkpoints, dense or Tucker, with the tokenizer of the first.
        texts: Sources of text, as a user types them.
        tokens: Tokens in all windows, evenly spread over the texts.
        window: Tokens per window; all but its first are predicted.
        chat_template: Whether conversations are rendered by the chat template.
        device: Where to compute.
        progress: Shows how far the work is.

    Raises:
        UsageError: A text cannot be read.
        CheckpointError: A checkpoint cannot be streamed, or has another vocabulary than the first.
    """
    opened = [open_evaluated(folder) for folder in folders]
    for own in opened:
        check_encoding(device, own.tucker.manifest.cores if own.tucker else None)
    sizes = [own.checkpoint.config.get("vocab_size") for own in opened]
    if len(set(sizes)) > 1:
        raise CheckpointError(
            f"{folders[-1]} has a vocabulary of {sizes[-1]} tokens, {folders[0]} one of {sizes[0]}",
            hint="compare checkpoints of the same model: they read the same tokens",
        )
    sources = [parse_source(text) for text in texts]
    models = [StreamedModel.open(own.checkpoint, own.family, device=device) for own in opened]
    windows = read_windows(
        sources,
        folders[0],
        tokens=tokens,
        window=window,
        seed=_SEED,
        vocabulary=models[0].vocabulary,
        chat_template=chat_template,
    )
    if device.type == "cpu":
        _require_memory(opened, windows.tokens_SL.numel())
    tokens_SL = windows.tokens_SL.to(device)
    progress.start(sum(model.layers for model in models) + 1)
    passes = [
        run_layers(own, model, tokens_SL, progress)
        for own, model in zip(opened, models, strict=True)
    ]
    sums = _predict(models, passes, tokens_SL)
    progress.advance(1, "head")
    progress.close()
    count, length = tokens_SL.shape
    return EvaluateReport(
        tuple(
            _evaluation(own, done, nats)
            for own, done, nats in zip(opened, passes, sums.nats, strict=False)
        ),
        count * (length - 1),
        tuple(texts),
        length,
        _divergence(opened, passes, sums) if len(passes) > 1 else None,
        windows.messages,
    )


def _require_memory(opened: Sequence[Evaluated], tokens: int) -> None:
    """Refuse what cannot fit: hidden states of all checkpoints, and dense experts of a layer."""
    shapes = [own.tucker.manifest.shape for own in opened if own.tucker is not None]
    dense = [own.dense.moe.shape for own in opened if own.dense is not None]
    layer = max((len(Projection) * shape.parameters for shape in dense), default=0)
    hidden = len(opened) * tokens * min(shape.hidden for shape in [*shapes, *dense])
    require_memory(
        (hidden + layer) * torch.float32.itemsize,
        "the hidden states of all tokens and the experts of a layer",
        "evaluate fewer --tokens",
    )


@dataclass(frozen=True, slots=True)
class Pass:
    """Results of the layers of a model on all windows.

    Attributes:
        states: States after the last layer, a few windows at a time.
        choices: Experts of every token by layer, on the host.
        seconds: Wall time.
    """

    states: list[States]
    choices: dict[int, Tensor]
    seconds: float


@torch.no_grad()
def run_layers(own: Evaluated, model: StreamedModel, tokens_SL: Tensor, progress: Progress) -> Pass:
    """Run all layers of a model on windows, with one of them in memory.

    Args:
        own: The checkpoint.
        model: Its model.
        tokens_SL: The windows, on the model's device.
        progress: Advances by one per layer.

    Raises:
        CheckpointError: Hidden states are not finite, or a layer cannot be read.
    """
    started = time.monotonic()
    name = str(own.checkpoint.folder)
    parts = torch.split(tokens_SL, _WINDOWS_AT_ONCE)
    with model.embedding() as embed:
        states = [embed(part) for part in parts]
    choices = {}
    for layer in range(model.layers):
        experts: ExpertsCall | None = None
        seen: list[Tensor] = []
        if layer in model.moe_layers:
            experts = _noting(experts_call(own.module(layer, model.device)), seen)
        with model.layer(layer, experts) as run:
            states = [run(part) for part in states]
        if not all(bool(part.hidden_SLI.isfinite().all()) for part in states):
            raise _not_finite(name, f"the hidden states after layer {layer}")
        if seen:
            choices[layer] = torch.cat(seen).view(*tokens_SL.shape, -1)
        progress.advance(1, f"{name}, layer {layer}")
    return Pass(states, choices, time.monotonic() - started)


def _noting(experts: ExpertsCall, seen: list[Tensor]) -> ExpertsCall:
    """The same experts; what the router chooses is appended to `seen`, on the host."""

    def call(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        seen.append(experts_Tk.to("cpu", torch.int16))
        return experts(x_TI, experts_Tk, weights_Tk)

    return call


@torch.no_grad()
def _predict(
    models: Sequence[StreamedModel], passes: Sequence[Pass], tokens_SL: Tensor
) -> PredictionSums:
    """Predictions of all models, window by window: the heads alone are in memory."""
    sums = PredictionSums()
    with ExitStack() as stack:
        heads = [stack.enter_context(model.head()) for model in models]
        windows = [chain.from_iterable(s.split(1) for s in own.states) for own in passes]
        for tokens_L, *states in zip(tokens_SL, *windows, strict=True):
            logits = [head(own)[0] for head, own in zip(heads, states, strict=True)]
            sums.add(tokens_L, logits)
    return sums


def _divergence(
    opened: Sequence[Evaluated], passes: Sequence[Pass], sums: PredictionSums
) -> Divergence:
    changed = None
    if len({own.num_experts for own in opened}) == 1:
        changed = experts_changed(*(done.choices for done in passes))
    return sums.divergence(changed)


def _evaluation(own: Evaluated, done: Pass, nats: list[Tensor]) -> Evaluation:
    folder = str(own.checkpoint.folder)
    mean = estimate(torch.stack(nats))
    if not math.isfinite(mean.value):
        raise _not_finite(folder, "the predictions")
    perplexity = exponential(mean)
    return Evaluation(
        folder, mean.value, perplexity.value, perplexity.error, own.size, done.seconds
    )


def _not_finite(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} of {name} hold NaN or infinity",
        hint="its weights are damaged or overflow: 'tuckerize check' tells for a Tucker "
        "checkpoint; fetch or write the weights again",
    )
