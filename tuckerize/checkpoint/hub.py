"""Resolution of a model's name to a folder on this machine. Nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path

from tuckerize.errors import CheckpointError, did_you_mean

SHORT_NAMES = {
    "DeepSeek-V2-Lite": "deepseek-ai/DeepSeek-V2-Lite",
    "DeepSeek-V2-Lite-Chat": "deepseek-ai/DeepSeek-V2-Lite-Chat",
    "DeepSeek-V2": "deepseek-ai/DeepSeek-V2",
    "DeepSeek-V2-Chat": "deepseek-ai/DeepSeek-V2-Chat",
    "DeepSeek-Coder-V2-Lite-Base": "deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
    "DeepSeek-Coder-V2-Lite-Instruct": "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "OLMoE-1B-7B-0924": "allenai/OLMoE-1B-7B-0924",
}
"""Names that need no organisation before them."""


def resolve_model(model: str) -> Path:
    """Folder of a model: a path, a Hugging Face id, or a short name.

    Ids are looked up in the local Hugging Face cache only; a checkpoint of many gigabytes is
    fetched when the user says so, not as a side effect.

    Args:
        model: Path, id or short name, as typed.

    Raises:
        CheckpointError: Neither a folder nor in the cache; the hint says how to fetch it.
    """
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError):  # too long for a path, or the home of an unknown user
        folder, is_folder, exists = Path(model), False, False
    if is_folder:
        return folder
    repository = SHORT_NAMES.get(model, model)
    if exists:
        raise CheckpointError(f"{model} is a file", hint="give the folder that holds config.json")
    if model.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {model}", hint=_similar_folder(folder))
    if repository.count("/") != 1:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a Hugging Face id",
            hint=f"{did_you_mean(model, SHORT_NAMES)}give a folder, an id like owner/name, or one "
            f"of: {', '.join(SHORT_NAMES)}",
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
        if Path(model).parent.is_dir() and model not in SHORT_NAMES:
            raise CheckpointError(
                f"there is no folder {model}", hint=_similar_folder(folder)
            ) from None
        raise CheckpointError(
            f"{model!r} is not a folder, and {repository} is not in the Hugging Face cache",
            hint=f"fetch it once with: hf download {repository}",
        ) from None


def _similar_folder(folder: Path) -> str:
    """Hint at the folder beside a missing one whose name is most like it."""
    beside = folder.parent
    if not beside.is_dir():
        return "check the path"
    names = [str(path) for path in beside.iterdir() if path.is_dir()]
    return did_you_mean(str(folder), names).strip() or "check the path"
