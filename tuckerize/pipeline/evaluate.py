"""Perplexity of a dense or a Tucker checkpoint on a text, one decoder layer in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tuckerize.calibration.calibration_pass import experts_call
from tuckerize.calibration.stream import ExpertsCall, StreamedModel
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.reader import Checkpoint, measure_size
from tuckerize.domain import Device, Projection, Size
from tuckerize.errors import CheckpointError
from tuckerize.format.saved import is_tucker_checkpoint
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.moe.family import Family
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.parallel.backends import choose_device
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe_files import Texts, list_of_texts
from tuckerize.report import EvaluateReport, Evaluation
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.experts import TuckerExperts

_WINDOWS_AT_ONCE = 8
_SEED = 0
# Its exponential is finite.
_MOST_NATS = 700.0


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
    return {
        TensorName.core(projection): source.stack(layer, projection, dtype=torch.float32)
        for projection in Projection
    }


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
        against: Another of the same kind, on the same text; it comes first in the report.
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
    """Measure perplexities on a text, with one decoder layer in memory at a time.

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
    return measure_perplexity(
        [resolve_model(str(name)) for name in names],
        list_of_texts(request.text),
        tokens=request.tokens,
        window=request.window,
        chat_template=request.chat_template,
        device=choose_device(Device.parse(request.device)),
        progress=progress or SilentProgress(),
    )


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
    """Perplexity of checkpoints on the same windows of text.

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
    progress.start(sum(model.layers + 1 for model in models))
    results = []
    for folder, own, model in zip(folders, opened, models, strict=True):
        started = time.monotonic()
        nats = _nats(own, model, windows.tokens_SL.to(device), progress, str(folder))
        seconds = time.monotonic() - started
        results.append(
            Evaluation(str(folder), nats, math.exp(min(nats, _MOST_NATS)), own.size, seconds)
        )
    progress.close()
    count, length = windows.tokens_SL.shape
    return EvaluateReport(
        tuple(results), count * (length - 1), tuple(texts), length, windows.messages
    )


@torch.no_grad()
def _nats(
    own: Evaluated, model: StreamedModel, tokens_SL: Tensor, progress: Progress, name: str
) -> float:
    """Mean negative log-likelihood per token, in nats."""
    parts = torch.split(tokens_SL, _WINDOWS_AT_ONCE)
    with model.embedding() as embed:
        states = [embed(part) for part in parts]
    for layer in range(model.layers):
        experts: ExpertsCall | None = None
        if layer in model.moe_layers:
            experts = experts_call(own.module(layer, model.device))
        with model.layer(layer, experts) as run:
            states = [run(part) for part in states]
        if not all(bool(part.isfinite().all()) for part in states):
            raise _not_finite(name, f"the hidden states after layer {layer}")
        progress.advance(1, f"{name}, layer {layer}")
    total = 0.0
    with model.head() as head:
        for part, hidden in zip(parts, states, strict=True):
            for tokens_L, hidden_LI in zip(part, hidden, strict=True):
                logits_LV = head(hidden_LI[None])[0].float()
                total += float(cross_entropy(logits_LV[:-1], tokens_L[1:], reduction="sum"))
    progress.advance(1, f"{name}, head")
    if not math.isfinite(total):
        raise _not_finite(name, "the predictions")
    return total / (tokens_SL.shape[0] * (tokens_SL.shape[1] - 1))


def _not_finite(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} of {name} hold NaN or infinity",
        hint="its weights are damaged or overflow: 'tuckerize check' tells for a Tucker "
        "checkpoint; fetch or write the weights again",
    )
