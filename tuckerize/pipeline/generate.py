"""Continue a prompt with a Tucker checkpoint in transformers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import tuckerize.engines.transformers  # noqa: F401  transformers learns the format
from tuckerize.calibration.documents import as_unicode
from tuckerize.calibration.tokenizer import check_tokens, load_tokenizer
from tuckerize.domain import Device
from tuckerize.errors import CheckpointError, UsageError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.backends import check_encoding, choose_device

# What transformers raises for values of config.json that it does not expect, or that the weights
# do not fit.
_INVALID = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)


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
    tucker = TuckerCheckpoint.open(Path(request.folder))
    tucker.family.routing(tucker.config)  # refuses what transformers fails at in a forward
    device = choose_device(Device.parse(request.device))
    check_encoding(device, tucker.manifest.cores)
    return _continue(tucker.folder, request.prompt, tokens=request.tokens, device=device)


def _continue(folder: Path, prompt: str, *, tokens: int, device: torch.device) -> str:
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True
        )
    except (*_INVALID, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder}: {error}",
            hint="check it with: tuckerize verify",
        ) from error
    ids = _tokens(tokenizer, prompt)
    check_tokens(max(ids), model.get_input_embeddings().num_embeddings, folder)
    ids_SL = torch.tensor([ids], device=device)
    output = model.to(device).generate(
        ids_SL, attention_mask=torch.ones_like(ids_SL), max_new_tokens=tokens, do_sample=False
    )
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def _tokens(tokenizer: Any, prompt: str) -> list[int]:  # noqa: ANN401
    """Tokens of a prompt, or the begin token where it has none.

    Raises:
        UsageError: There is neither.
    """
    ids: list[int] = tokenizer(as_unicode(prompt), return_token_type_ids=False)["input_ids"]
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise UsageError(
            f"the prompt {prompt!r} has no tokens, and the tokenizer has no begin token",
            hint='give a text to continue: --prompt "Once upon a time"',
        )
    return [tokenizer.bos_token_id]
