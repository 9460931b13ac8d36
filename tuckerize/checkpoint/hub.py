"""From what a user types as a model to a folder on this machine. Nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path

from tuckerize.errors import CheckpointError

SHORT_NAMES = {
    "DeepSeek-V2-Lite": "deepseek-ai/DeepSeek-V2-Lite",
    "DeepSeek-V2-Lite-Chat": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "DeepSeek-V2": "deepseek-ai/DeepSeek-V2",
    "DeepSeek-V2-Chat": "deepseek-ai/DeepSeek-V2-Chat",
    "DeepSeek-Coder-V2-Lite-Base": "deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
    "DeepSeek-Coder-V2-Lite-Instruct": "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
}
"""Names that need no organisation in front."""


def resolve_model(model: str) -> Path:
    """Folder of a model: a path, a Hugging Face id, or a short name.

    Ids are looked up in the local Hugging Face cache only; a checkpoint of many gigabytes is
    fetched when the user says so, not as a side effect.

    Args:
        model: What the user typed.

    Raises:
        CheckpointError: Neither a folder nor in the cache; the hint says how to fetch it.
    """
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError):  # too long for a path, or the home of nobody
        is_folder = exists = False
    if is_folder:
        return folder
    repository = SHORT_NAMES.get(model, model)
    if exists:
        raise CheckpointError(f"{model} is a file", hint="give the folder that holds config.json")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model!r} is neither a folder nor a Hugging Face id",
            hint=f"give a folder, an id like owner/name, or one of: {', '.join(SHORT_NAMES)}",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(
            f"{model!r} is not a valid Hugging Face id", hint="an id looks like owner/name"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model!r} is not a folder, and {repository} is not in the Hugging Face cache",
            hint=f"fetch it once with: hf download {repository}",
        ) from None
