"""The tokenizer of a model, as transformers loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuckerize.errors import CheckpointError


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """Load the tokenizer of a model from its folder.

    Raises:
        CheckpointError: There is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    fetch = "fetch the model's tokenizer files into the folder: tokenizer.json or tokenizer.model, "
    fetch += "and tokenizer_config.json"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a")  # settings that are of a wrong type are used here first
    except Exception as error:  # the libraries raise what they like, Exception itself included
        text = " ".join(str(error).split())
        newer = "untagged enum" in text or "unknown variant" in text
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load: {text}",
            hint="a newer release may know this tokenizer.json: "
            "pip install --upgrade tokenizers transformers"
            if newer
            else fetch,
        ) from error
    # Without files, transformers makes a tokenizer of special tokens and the unknown one at most.
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids) + 1:
        raise CheckpointError(f"{folder} has no tokenizer files", hint=fetch)
    return tokenizer


def renderer(tokenizer: Any) -> Callable[[list[dict[str, Any]]], str] | None:  # noqa: ANN401
    """Function that renders a conversation by the chat template; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(chat: list[dict[str, Any]]) -> str:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
        return text

    return render


def check_tokens(largest: int, vocabulary: int, folder: Path) -> None:
    """Check that a model has an embedding for every token that its tokenizer makes.

    Args:
        largest: The largest token.
        vocabulary: Number of embeddings.
        folder: Folder of the tokenizer.

    Raises:
        CheckpointError: It has not.
    """
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer in {folder} makes the token {largest} of the text, and the model has "
            f"{vocabulary} embeddings",
            hint="the tokenizer is that of another model, or tokens were added to it: put the "
            "model's own tokenizer files into the folder",
        )
