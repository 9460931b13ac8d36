"""Comparisons of what the vLLM engine gives, between runs and with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.vllm.running import Found

# Of log-probabilities: sums in another order in float32.
EXACT = 1e-4


def differences(found: Found, expected: Found) -> Iterator[tuple[float, float]]:
    """Differences of two runs at every step, until their tokens part; after that the texts differ.

    Yields:
        The largest difference of log-probabilities above -10, and how much more probable the
        expected token is than the one found (in log-probability).
    """
    for prompt, tokens in enumerate(expected["tokens"]):
        for step, token in enumerate(tokens):
            one, other = (run["logprobs"][prompt][step] for run in (found, expected))
            pairs = [pair for pair in zip(one, other, strict=True) if max(pair) > -10]
            own = found["tokens"][prompt][step]
            yield max(abs(a - b) for a, b in pairs), other[token] - other[own]
            if own != token:
                break


def assert_same_up_to_ties(found: Found, expected: Found, tolerance: float) -> None:
    """Equal tokens, or, where they part, tokens that are as probable within a tolerance."""
    for difference, advantage in differences(found, expected):
        assert difference < tolerance
        assert advantage < 2 * tolerance


def assert_as_in_transformers(found: Found, folder: Path) -> None:
    """The same log-probabilities after every prompt and its tokens, of a run in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    runs = zip(found["prompts"], found["tokens"], found["logprobs"], strict=True)
    for prompt, tokens, logprobs in runs:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=EXACT)
