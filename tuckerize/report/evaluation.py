"""Report of evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from tuckerize.domain import Size


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the windows of a text.

    Attributes:
        value: The mean.
        error: Its standard error; None of a single window.
    """

    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity of one checkpoint on a text.

    Attributes:
        folder: The checkpoint.
        nats: Mean negative log-likelihood per token, in nats.
        perplexity: Its exponential.
        perplexity_error: Standard error of the perplexity; None of a single window.
        size: Parameters and bytes of the checkpoint.
        seconds: Wall time of its layers.
    """

    folder: str
    nats: float
    perplexity: float
    perplexity_error: float | None
    size: Size
    seconds: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of the predictions of a checkpoint from those of another, on the same tokens.

    Attributes:
        perplexity_ratio: Its perplexity over the other's (unitless).
        kl: KL divergence of its prediction from the other's, nats per token.
        same_top: Share of the tokens with the same most likely next token.
        experts_changed: Share of the tokens whose set of routed experts differs in at least one
            layer; None where the two have not the same layers of experts.
    """

    perplexity_ratio: Estimate
    kl: Estimate
    same_top: Estimate
    experts_changed: Estimate | None


@dataclass(frozen=True, slots=True)
class EvaluateReport:
    """Perplexity of checkpoints on the same text.

    Attributes:
        results: The checkpoints, in the order that was asked for.
        tokens: Tokens that each predicted.
        texts: The texts, over which the tokens are evenly spread.
        window: Tokens that are read at once; all but the first of a window are predicted.
        divergence: Of the last from the first, where there are two.
        notes: Remarks for the user on the text.
    """

    results: tuple[Evaluation, ...]
    tokens: int
    texts: tuple[str, ...]
    window: int
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
