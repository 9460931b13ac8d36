"""One pass over a model with a calibration set: hidden states, captured tokens, dense experts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.rows import Rows, gathered
from tuckerize.calibration.sharing import all_windows, exchange_for, own_windows, sharing_of
from tuckerize.calibration.states import States
from tuckerize.calibration.stream import ExpertsCall, StreamedModel
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.calibration.tokens import DenseGroup, LayerTokens, StacksOnDisk, fewest_tokens
from tuckerize.checkpoint.sealed_tensors import read_sealed, write_sealed
from tuckerize.domain import Projection, group_experts
from tuckerize.errors import NonFiniteError, UsageError, located
from tuckerize.linalg.hooi import check_finite
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.tucker import largest_magnitude
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.parallel.processes import Processes
from tuckerize.recipe import CalibrationSettings, Recipe
from tuckerize.runtime.activations import Activation, activation_of
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.runtime.quantised import CoreOnDisk

# Attention of more windows takes buffers so large that the system maps them anew for every call.
# Experts of large layers may be read from files, and all of them for every call: those decide, and
# not what is held, as sums of other tokens at once have other last bits.
_WINDOWS_AT_ONCE, _WINDOWS_OF_LARGE_LAYERS = 2, 8
_LARGE_LAYER_VALUES = 2**31  # 8 GiB in float32
_SEED = 0
_STATES = "states"
# Lower bound on relative norms: tokens with small hidden states must not dominate.
_LEAST_NORM = 0.1


class Captured(NamedTuple):
    """Routed experts of a layer as they were run.

    Attributes:
        tokens: Tokens of all windows before them, in float32.
        output_TI: Their combined output, in float32, with the tokens' relative weights.
        norms_T1: Relative norms of the tokens' hidden states, which `output_TI` is divided by.
        after: States of this process's windows after the layer.
    """

    tokens: LayerTokens
    output_TI: Tensor
    norms_T1: Tensor
    after: States


@dataclass(frozen=True, slots=True)
class CalibrationPass:
    """A model and its calibration set.

    Attributes:
        source: The dense model.
        model: Its decoder layers, one at a time.
        windows_SL: Tokens, shape (S, L).
        text_windows: Number of windows of text; they are the first, random tokens follow.
        group_size: Experts in a group.
        settings: Settings of the calibration.
        notes: Notes on the text for the user.
        sharing: The processes that share its windows and the experts of its layers.
        held: Whether the dense experts of a layer are in memory while it is worked on; otherwise
            each is read whenever it is used.
        scratch: Folder of temporary files that hold what is as long as the calibration set; None
            for memory.
    """

    source: SourceModel
    model: StreamedModel
    windows_SL: Tensor
    text_windows: int
    group_size: int
    settings: CalibrationSettings
    notes: tuple[str, ...] = ()
    sharing: Sharing = ALONE
    held: bool = True
    scratch: Path | None = None

    @classmethod
    def open(
        cls,
        source: SourceModel,
        recipe: Recipe,
        device: torch.device,
        processes: Processes | None = None,
    ) -> CalibrationPass:
        """Read the calibration text of a recipe, and open the model for streaming.

        Args:
            source: The dense model.
            recipe: A recipe with a calibration.
            device: Where to compute.
            processes: The processes that share the work; by default this one is alone.

        Raises:
            ParallelError: There are more processes than experts in a group.
            UsageError: A text is missing or cannot be read, or there are too few tokens for a
                validation set where more were asked for.
            CheckpointError: The activation is not known, or tensors are missing.
        """
        settings = recipe.calibration
        if settings is None:
            raise TypeError("the recipe has no calibration")
        checkpoint = source.checkpoint
        for glu in source.moe.glus:
            activation_of(glu)
        model = StreamedModel.open(checkpoint, source.moe.family, device=device)
        windows = read_windows(
            [parse_source(text) for text in settings.texts],
            checkpoint.folder,
            tokens=settings.tokens,
            window=settings.window,
            seed=_SEED,
            random_share=settings.random_share,
            vocabulary=model.vocabulary,
            chat_template=settings.chat_template,
        )
        notes = list(windows.messages)
        count = windows.tokens_SL.numel()
        if count < fewest_tokens() <= settings.tokens:
            raise UsageError(
                f"the calibration texts give {count} tokens, the random ones counted, and at least "
                f"{fewest_tokens()} are needed to fit some and validate with others",
                hint="give more text; or ask for few tokens in so many words, with "
                f"--calibration-tokens {max(settings.window, 1024)}: then nothing is predicted, "
                "and no error is measured",
            )
        if count < fewest_tokens():
            notes.append(
                "no refinement, no measured errors and no prediction: fewer than "
                f"{fewest_tokens()} tokens leave none for validation"
            )
        group_size = recipe.group_size or source.moe.shape.experts
        return cls(
            source,
            model,
            windows.tokens_SL,
            windows.text,
            group_size,
            settings,
            tuple(notes),
            sharing_of(processes, group_size),
        )

    def with_held(self, *, experts: bool, states: bool) -> CalibrationPass:
        """The same pass, with more or less in memory; all processes have it as the first one.

        Args:
            experts: Whether dense experts are in memory, or read from the source.
            states: Whether what is as long as the calibration set is, or in temporary files.
        """
        held = self.sharing.of_first(lambda: experts)
        scratch = None if self.sharing.of_first(lambda: states) else Path(tempfile.gettempdir())
        return replace(self, held=held, scratch=scratch)

    @property
    def windows_at_once(self) -> int:
        """Windows that go through a layer together."""
        of_layer = len(Projection) * self.source.moe.shape.parameters
        large = of_layer > _LARGE_LAYER_VALUES
        return _WINDOWS_OF_LARGE_LAYERS if large else _WINDOWS_AT_ONCE

    @property
    def has_validation(self) -> bool:
        """Whether there are enough tokens to validate with some."""
        return self.windows_SL.numel() >= fewest_tokens()

    def activation(self, layer: int) -> Activation:
        """The activation of the experts of a layer."""
        return activation_of(self.source.moe.glu(layer))

    def embed(self) -> States:
        """States of all windows before the first layer."""
        with self.model.embedding() as embed:
            parts = torch.split(self.windows_SL.to(self.model.device), self.windows_at_once)
            return States.joined(map(embed, parts), len(self.windows_SL), self.scratch)

    def own(self, states: States) -> States:
        """This process's share of the windows of some states, which may have one twice."""
        return own_windows(states, self.sharing)

    def whole(self, states: States, windows: int) -> States:
        """The states of all windows, which are so many, from those of every process."""
        return all_windows(states, self.sharing, windows, self.scratch)

    def run_layer(self, layer: int, states: States, experts: ExpertsCall | None) -> States:
        """States after a layer.

        Raises:
            NonFiniteError: They hold NaN or infinity.
        """
        with self.model.layer(layer, experts) as run:
            parts = map(run, states.split(self.windows_at_once))
            after = States.joined(parts, len(states), self.scratch)
        if not math.isfinite(largest_magnitude(after.hidden_SLI)):
            raise NonFiniteError(
                f"the hidden states after layer {layer} hold NaN or infinity",
                hint="repair or replace the source checkpoint",
            )
        return after

    def capture(self, layer: int, states: States, windows: int, experts: TuckerExperts) -> Captured:
        """Run a layer and capture the input and the output of its routed experts.

        Routing weights, and with them all outputs, errors and moments that are computed from these
        tokens, are relative to the norms of the hidden states after the layer: see
        `relative_norms`.

        Args:
            layer: Index of the layer.
            states: This process's share of the windows before it.
            windows: Number of windows that the processes share.
            experts: Its routed experts.
        """
        num_tokens = states.tokens_SL.numel()
        own = [Rows(num_tokens, self.scratch) for _ in LayerTokens._fields]
        outputs = Rows(num_tokens, self.scratch)

        def noted(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
            seen = LayerTokens(x_TI.float(), experts_Tk, weights_Tk.float())
            for rows, part in zip(own, seen, strict=True):
                rows.add(part)
            output_TI: Tensor = experts(*seen)
            outputs.add(output_TI)
            return output_TI.to(x_TI.dtype)

        after = self.run_layer(layer, states, noted)
        count = windows * states.tokens_SL.shape[1]
        norms_T1 = token_norms(after.hidden_SLI)
        parts = [*(rows.whole for rows in own), norms_T1, outputs.whole]
        x_TI, experts_Tk, weights_Tk, norms_T1, output_TI = (
            gathered(part, self.sharing, count, self.scratch) for part in parts
        )
        norms_T1 = relative_norms(norms_T1)
        tokens = LayerTokens(x_TI, experts_Tk, weights_Tk / norms_T1)
        return Captured(tokens, output_TI.div_(norms_T1), norms_T1, after)

    def output(self, experts: TuckerExperts, tokens: LayerTokens) -> Tensor:
        """Routed output of tokens, shape (T, I); every process computes its share of them."""
        own = tokens.part(self.sharing.own(len(tokens.x_TI)))
        output_TI: Tensor = self.sharing.gather(experts(*own))
        return output_TI

    def groups(self, layer: int) -> list[DenseGroup]:
        """This process's dense experts of a layer, in float32 on the device, or on disk.

        Raises:
            NonFiniteError: A stack holds NaN or infinity.
        """
        count = self.source.moe.shape.experts // self.group_size
        return [self._group(layer, index) for index in range(count)]

    def _group(self, layer: int, index: int) -> DenseGroup:
        group = group_experts(self.source.moe.shape, self.group_size, index)
        own = self.sharing.own(len(group))
        experts = group[own]

        def read(projection: Projection, some: range) -> Tensor:
            stack = self.source.stack(layer, projection, some)
            with located(f"layer {layer}, group {index}, {projection}"):
                check_finite(stack, some.start - experts.start)
            return stack.to(self.model.device, torch.float32)

        shape = self.source.moe.shape._replace(experts=len(experts))
        stacks: Mapping[Projection, Tensor] = StacksOnDisk(read, experts, shape)
        if self.held:
            stacks = dict(stacks)
        found = self.source.biases(layer, group, dtype=torch.float32)
        whole = {projection: bias.to(self.model.device) for projection, bias in found.items()}
        # Those of down are added where the tokens are, which may be of any expert.
        biases = {p: b if p == Projection.DOWN else b[own] for p, b in whole.items()}
        return DenseGroup(stacks, experts, biases)

    def dense(self, layer: int, groups: Sequence[DenseGroup]) -> TuckerExperts:
        """The dense experts of a layer as a module, which reads those that are on disk."""
        module = self.module(layer, [group.as_tensors() for group in groups])
        for own, group in zip(module.groups, groups, strict=True):
            if isinstance(group.stacks, StacksOnDisk):
                for projection in Projection:
                    own.stack(projection).read_core(_core_on_disk(group, projection))
        return module

    def module(self, layer: int, groups: Sequence[Mapping[TensorName, Tensor]]) -> TuckerExperts:
        """The routed experts of a layer from the tensors of its groups."""
        return TuckerExperts(
            groups,
            group_size=len(range(self.group_size)[self.sharing.own(self.group_size)]),
            activation=self.activation(layer),
            exchange=exchange_for(groups, self.sharing, self.group_size),
        )


def _core_on_disk(group: DenseGroup, projection: Projection) -> CoreOnDisk:
    """Experts' matrices of one projection; outputs are rows, as in quantised cores."""
    experts, neurons, hidden = group.shape
    if projection == Projection.DOWN:
        return CoreOnDisk(lambda place: group.matrix(projection, place).mT, experts, hidden)
    return CoreOnDisk(lambda place: group.matrix(projection, place), experts, neurons)


def token_norms(hidden_SLI: Tensor) -> Tensor:
    """Norms of hidden states, shape (T, 1)."""
    norms_T1: Tensor = torch.linalg.vector_norm(
        hidden_SLI.flatten(2).flatten(0, 1).float(), dim=1, keepdim=True
    )
    return norms_T1


def relative_norms(norms_T1: Tensor) -> Tensor:
    """Norms of hidden states relative to their median, shape (T, 1).

    Every reader of the residual stream normalises it (RMSNorm), so an absolute error matters
    inversely to the norm of the state, which is large at the first token of a window, say.
    """
    median = norms_T1.median().clamp_min(torch.finfo(torch.float32).tiny)
    relative_T1: Tensor = (norms_T1 / median).clamp_min(_LEAST_NORM)
    return relative_T1


def experts_call(module: TuckerExperts) -> ExpertsCall:
    """A module as the routed experts of a streamed layer: computed in float32."""

    def call(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        output: Tensor = module(x_TI.float(), experts_Tk, weights_Tk.float())
        return output.to(x_TI.dtype)

    return call


@dataclass(frozen=True, slots=True)
class SavedStates:
    """States on disk, so that an interrupted pass continues after the last layer.

    Attributes:
        path: The file; it holds the states of the last finished layer only.
    """

    path: Path

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """The next layer, and the tensors of the states before it; (0, {}) at the start.

        A damaged file is that of no pass.
        """
        tensors = read_sealed(self.path, _STATES)
        if tensors is None:
            return 0, {}
        return int(tensors.pop("next_layer")), tensors

    def save(self, next_layer: int, states: Mapping[str, Tensor]) -> None:
        """Replace the states by those before another layer."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        host = {name: tensor.cpu().contiguous() for name, tensor in states.items()}
        write_sealed(self.path, _STATES, {**host, "next_layer": torch.tensor(next_layer)})

    def remove(self) -> None:
        """Remove the file: the pass is finished."""
        self.path.unlink(missing_ok=True)
