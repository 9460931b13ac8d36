"""Continue a prompt with a Tucker checkpoint in transformers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import tuckerize.engines.transformers  # noqa: F401  transformers learns the format
from tuckerize.domain import Device
from tuckerize.errors import CheckpointError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.backends import choose_device


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt to continue.

    Attributes:
        folder: The Tucker checkpoint.
        prompt: Text to continue.
        tokens: Largest number of new tokens.
        device: Where the whole model is loaded to: auto, npu, cuda or cpu.
    """

    folder: str | Path
    prompt: str
    tokens: int = 64
    device: str = Device.AUTO


def generate(request: GenerateRequest) -> str:
    """Continue a prompt greedily with a Tucker checkpoint; the whole model is loaded.

    Args:
        request: The checkpoint and the prompt.

    Returns:
        The prompt and its continuation.

    Raises:
        CheckpointError: The folder is not a finished Tucker checkpoint, or transformers cannot load
            the model or its tokenizer.

    Example:
        >>> generate(GenerateRequest(folder="OUT", prompt="Once upon"))  # doctest: +SKIP
    """
    folder = TuckerCheckpoint.open(Path(request.folder)).folder
    device = choose_device(Device.parse(request.device))
    return _continue(folder, request.prompt, tokens=request.tokens, device=device)


def _continue(folder: Path, prompt: str, *, tokens: int, device: torch.device) -> str:
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder}: {error}",
            hint="check it with: tuckerize verify",
        ) from error
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    output = model.to(device).generate(**inputs, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text
