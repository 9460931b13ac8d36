"""Continue a prompt with a Tucker checkpoint in transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import tuckerize.engines.transformers  # noqa: F401  transformers learns the format
from tuckerize.errors import CheckpointError


def generate(folder: Path, prompt: str, *, tokens: int, device: torch.device) -> str:
    """The prompt and its greedy continuation by a Tucker checkpoint.

    Args:
        folder: The checkpoint.
        prompt: What is continued.
        tokens: New tokens at most.
        device: Where the whole model is loaded to.

    Raises:
        CheckpointError: transformers cannot load the model or its tokenizer.
    """
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
