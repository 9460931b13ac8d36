"""The training loop: steps, validation, best state, early stop, and exact resumption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tuckerize.checkpoint.files import write_text
from tuckerize.engines.trainable import Model
from tuckerize.errors import TuckerizeError
from tuckerize.healing.objective import Windows, losses
from tuckerize.healing.state import SavedRun, SavedTensors
from tuckerize.healing.tensors import (
    TrainedTensor,
    clip,
    local,
    orthonormalise,
    sum_gradients,
)
from tuckerize.parallel.mesh import Axis
from tuckerize.progress import Progress

# Validations of a run, and those without a better state after which it stops: half of the run, as
# the state improves again when the learning rate falls.
_VALIDATIONS = 20
_PATIENCE = 10
# Way of a quantised core's code over a run whose gradients all have one sign, in codes. Codes begin
# in the middle of what rounds to them: below one half they never change, and above one noise does.
_CODE_WAY = 0.75
_WARM_UP = 0.05
_LARGEST_NORM = 1.0
_BETAS = (0.9, 0.95)
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Smallest size of a tensor's values that a step is relative to.
_SMALLEST = 1e-6


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of a run.

    Attributes:
        steps: Number of steps.
        batch: Windows per step, of all processes.
        at_once: Windows per forward of one process.
        learning_rate: Largest step of a value, relative to the root mean square of its tensor.
        seed: Of the order of the windows.
    """

    steps: int
    batch: int
    at_once: int
    learning_rate: float
    seed: int

    @property
    def validated(self) -> set[int]:
        """Numbers of steps after which the state is measured, and the run saved."""
        return {*range(0, self.steps, max(1, self.steps // _VALIDATIONS)), self.steps}

    def tokens(self, data: Windows) -> int:
        """Tokens that are predicted in a step."""
        return self.batch * data.predicted

    def rate(self, step: int) -> float:
        """Learning rate of a step, relative to the largest: warm-up, then half a cosine."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def windows(self, step: int, count: int) -> Tensor:
        """Indices of a step's windows; every pass over all of them is in another order."""
        first = step * self.batch
        places = range(first, first + self.batch)
        orders = {place // count: self._order(place // count, count) for place in places}
        return torch.stack([orders[place // count][place % count] for place in places])

    def _order(self, turn: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + turn)
        return torch.randperm(count, generator=generator)


@dataclass(slots=True)
class History:
    """State of a run after some steps.

    Attributes:
        step: Steps that were made.
        best_step: Steps before the best state.
        best: Objective of the best state on the validation set, nats per token.
        first_nats: Negative log-likelihood on the validation set before the first step.
        best_nats: The same of the best state.
        bad: Validations since the best state.
        log: A line for every step and validation.
    """

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    first_nats: float = math.nan
    best_nats: float = math.nan
    bad: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Training:
    """A model in training.

    Attributes:
        model: The model.
        share: Share of the KL divergence to the teacher in the objective.
        tensors: What is trained.
        schedule: The steps.
        data: Windows to train on.
        validation: Windows that decide.
        replicas: The processes that share the windows of a step.
        reduced: Whether gradients of replicas are averaged in the backward (FSDP).
        finish_backward: Sums gradients over tensor-parallel processes.
        device: This process's device.
        saved: Where the state is kept.
        log_file: A line of JSON for every step and validation.
        progress: Shows how far the work is.
    """

    model: Model
    share: float
    tensors: Sequence[TrainedTensor]
    schedule: Schedule
    data: Windows
    validation: Windows
    replicas: Axis
    reduced: bool
    finish_backward: Callable[[], None]
    device: torch.device
    saved: SavedRun
    log_file: Path
    progress: Progress
    history: History = field(default_factory=History)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        groups = [
            {"params": [tensor.parameter], "largest": self._largest_rate(tensor)}
            for tensor in self.tensors
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0)

    def run(self) -> History:
        """Train to the end, from where an interrupted run has saved its state.

        Raises:
            TuckerizeError: The loss is not finite.
        """
        schedule = self.schedule
        resumed = self._resume()
        self.progress.start(schedule.steps)
        self.progress.stage("warm-up, in which a device compiles its kernels")
        if not resumed:
            self._validate()
        self.progress.advance(self.history.step, "resumed" if resumed else "")
        started, first = time.monotonic(), self.history.step
        while self.history.step < schedule.steps and self.history.bad < _PATIENCE:
            step = self.history.step
            line = self._step(step)
            seconds = (time.monotonic() - started) / (step + 1 - first)
            tokens = schedule.tokens(self.data)
            line |= {
                "tokens_per_second": round(tokens / seconds, 1),
                "seconds_left": round(seconds * (schedule.steps - step - 1), 1),
            }
            self._log(line)
            self.history.step += 1
            note = f"loss {line['loss']:.4f}, {line['tokens_per_second']:.0f} tokens/s"
            self.progress.advance(1, note)
            if self.history.step in schedule.validated:
                self._validate()
        self.progress.close()
        return self.history

    def best(self) -> SavedTensors:
        """The weights of the best state, whole."""
        return self.saved.tensors(self.history.best_step)

    def _step(self, step: int) -> dict[str, Any]:
        """One step of the optimizer; returns a line of the log."""
        schedule = self.schedule
        rows = schedule.windows(step, len(self.data))
        own = rows[self.replicas.rank :: self.replicas.size]
        scale = 1 / schedule.tokens(self.data)
        total = torch.zeros((), device=self.device)
        for part in torch.split(own, schedule.at_once):
            with self._autocast():
                found = losses(self.model, self.data[part].to(self.device), self.share)
            factor = scale * (self.replicas.size if self.reduced else 1)
            (found.objective * factor).backward()  # type: ignore[no-untyped-call]
            total += found.objective.detach() * scale
        self.finish_backward()
        if not self.reduced:
            sum_gradients(self.tensors, self.replicas)
        loss = self._summed(total)
        norm = clip(self.tensors, _LARGEST_NORM)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TuckerizeError(
                f"step {step}: the loss is {loss}, the norm of its gradient {norm}",
                hint="use a smaller --learning-rate, with --overwrite to begin anew",
            )
        rate = schedule.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["largest"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        orthonormalise(self.tensors)
        return {
            "step": step,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate * schedule.learning_rate,
        }

    def _largest_rate(self, tensor: TrainedTensor) -> float:
        """Largest learning rate of a tensor."""
        if tensor.is_codes:
            return _CODE_WAY / sum(map(self.schedule.rate, range(self.schedule.steps)))
        return self.schedule.learning_rate * _root_mean_square(tensor)

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the state as it would be stored; keep it if it is the best; save the run."""
        kept = [local(tensor.parameter).clone() for tensor in self.tensors]
        for tensor in self.tensors:
            own = local(tensor.parameter)
            own.copy_(own.to(tensor.stored))
        objective, nats = self._mean_losses()
        for tensor, own in zip(self.tensors, kept, strict=True):
            local(tensor.parameter).copy_(own)
        history = self.history
        self._log({"step": history.step, "validation_loss": objective, "validation_nats": nats})
        if math.isnan(history.first_nats):
            history.first_nats = nats
        history.bad += 1
        if objective < history.best:
            history.best, history.best_nats = objective, nats
            history.best_step, history.bad = history.step, 0
        self._save()

    def _mean_losses(self) -> tuple[float, float]:
        """Objective and negative log-likelihood of the validation set, nats per token."""
        count, size = len(self.validation), self.replicas.size
        # Every process makes equally many forwards, as FSDP gathers weights in each: the last
        # windows may be there once more, and do not count.
        places = torch.arange(self.replicas.rank, -(-count // size) * size, size)
        sums = torch.zeros(2, device=self.device)
        for part in torch.split(places, self.schedule.at_once):
            windows = self.validation[part % count].to(self.device)
            known = int((part < count).sum())
            with self._autocast():
                found = losses(self.model, windows, self.share, known)
            sums += torch.stack([found.objective, found.nats])
        if size > 1:
            dist.all_reduce(sums, group=self.replicas.group)
        objective, nats = (sums / (count * self.validation.predicted)).tolist()
        return objective, nats

    def _summed(self, value: Tensor) -> float:
        """Sum of a value over the replicas."""
        if self.replicas.size > 1:
            dist.all_reduce(value, group=self.replicas.group)
        return float(value)

    def _autocast(self) -> AbstractContextManager[None]:
        """16-bit products on an accelerator; the host computes in float32."""
        if self.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _log(self, line: Mapping[str, Any]) -> None:
        self.history.log.append(dict(line))
        if self.saved.processes.is_leader:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        """Save all that the next step depends on."""
        kinds = {"weights": {own.name: local(own.parameter) for own in self.tensors}}
        for key in _MOMENTS if self.optimizer.state else ():
            kinds[key] = {
                own.name: local(self.optimizer.state[own.parameter][key]) for own in self.tensors
            }
        dimensions = {tensor.name: tensor.dimension for tensor in self.tensors}
        history = self.history
        self.saved.save(history.step, history.best_step, kinds, dimensions, asdict(history))

    def _resume(self) -> bool:
        """Take up a saved state; whether there is one."""
        found = self.saved.history()
        if found is not None:
            self.history = History(**found)
            self._take_up(self.history.step)
        if self.saved.processes.is_leader:
            lines = [json.dumps(line) + "\n" for line in self.history.log]
            write_text(self.log_file, "".join(lines))
        return found is not None

    def _take_up(self, step: int) -> None:
        """Set weights and moments to those after some steps."""
        weights = self.saved.tensors(step)
        moments = {key: self.saved.tensors(step, key) for key in _MOMENTS if step}
        for tensor in self.tensors:
            parameter = tensor.parameter
            tensor.set(parameter, weights[tensor.name])
            if step:
                own = {key: torch.zeros_like(parameter) for key in moments}
                for key, target in own.items():
                    tensor.set(target, moments[key][tensor.name])
                steps = torch.tensor(float(step))
                self.optimizer.state[parameter] = {"step": steps, **own}


def _root_mean_square(tensor: TrainedTensor) -> float:
    """Size of a tensor's values, of all processes' parts together."""
    own = local(tensor.parameter)
    sums = torch.stack([own.square().sum(), torch.tensor(float(own.numel()), device=own.device)])
    if tensor.dimension is not None:
        dist.all_reduce(sums, group=tensor.axis.group)
    squares, count = sums.tolist()
    return max(_SMALLEST, math.sqrt(squares / count))
