"""The loss: next-token cross-entropy, mixed with the KL divergence to a teacher's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tuckerize.engines.trainable import Model


class Predictions(NamedTuple):
    """A teacher's most likely next tokens; all others count as one.

    Attributes:
        tokens_SLk: The tokens, int32, after every token but the last of a window.
        logs_SLk: Their log-probabilities, and in one column more that of all others together,
            unless there are none; float32.
    """

    tokens_SLk: Tensor
    logs_SLk: Tensor

    @classmethod
    def of_logits(cls, logits_SLV: Tensor, kept: int) -> Predictions:
        """Those of a teacher.

        Args:
            logits_SLV: Its logits for all tokens of windows.
            kept: How many tokens are kept, at most.
        """
        logits_SLV = logits_SLV[:, :-1].float()
        tokens_SLk = logits_SLV.topk(min(kept, logits_SLV.shape[-1])).indices.int()
        return cls(tokens_SLk, _logs(logits_SLV, tokens_SLk))


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of tokens, and what is known of them.

    Attributes:
        tokens_SL: The tokens.
        taught: A teacher's predictions.
    """

    tokens_SL: Tensor
    taught: Predictions | None = None

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.tokens_SL)

    @property
    def predicted(self) -> int:
        """Tokens of a window that are predicted: all but its first."""
        return self.tokens_SL.shape[1] - 1

    def __getitem__(self, windows: Tensor | slice) -> Windows:
        """Some of the windows."""
        taught = self.taught and Predictions(*(own[windows] for own in self.taught))
        return Windows(self.tokens_SL[windows], taught)

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        taught = self.taught and Predictions(*(own.to(device) for own in self.taught))
        return Windows(self.tokens_SL.to(device), taught)


class Losses(NamedTuple):
    """Sums over the predicted tokens of some windows, in nats.

    Attributes:
        objective: What is minimised.
        nats: Negative log-likelihood.
    """

    objective: Tensor
    nats: Tensor


def losses(model: Model, windows: Windows, share: float, counted: int | None = None) -> Losses:
    """Losses of windows of tokens.

    Args:
        model: The model that is trained.
        windows: The windows; without a teacher's predictions the text alone is learned.
        share: Share of the KL divergence to the teacher in the objective.
        counted: How many of the windows count, the first ones; all by default.
    """
    logits_SLV = model.logits(windows.tokens_SL)[:counted, :-1].float()
    windows = windows[:counted]
    expected_SL = windows.tokens_SL[:, 1:]
    nats = cross_entropy(logits_SLV.flatten(0, 1), expected_SL.flatten(), reduction="sum")
    if windows.taught is None:
        return Losses(nats, nats.detach())
    own_SLk = _logs(logits_SLV, windows.taught.tokens_SLk)
    divergence = kl_div(own_SLk, windows.taught.logs_SLk, reduction="sum", log_target=True)
    return Losses((1 - share) * nats + share * divergence, nats.detach())


def _logs(logits_SLV: Tensor, tokens_SLk: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together, if there are any."""
    places_SLk = tokens_SLk.long()
    found = [logits_SLV.gather(-1, places_SLk)]
    if tokens_SLk.shape[-1] < logits_SLV.shape[-1]:
        others_SLV = logits_SLV.scatter(-1, places_SLk, -torch.inf)
        found.append(others_SLV.logsumexp(-1, keepdim=True))
    return torch.cat(found, -1) - logits_SLV.logsumexp(-1, keepdim=True)
