"""The Hugging Face Hub: names of models, and transfers that the user has asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.space import require_space
from tuckerize.errors import CheckpointError, OutputError, TuckerizeError, did_you_mean

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

# Weights in formats that are not read, and what else nobody needs here.
_NOT_READ = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".png", ".jpg", ".pdf")


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
        raise CheckpointError(f"there is no folder {model}", hint=similar_folder(folder))
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
                f"there is no folder {model}", hint=similar_folder(folder)
            ) from None
        raise CheckpointError(
            f"{model!r} is not a folder, and {repository} is not in the Hugging Face cache",
            hint=f"fetch it with: hf download {repository}, or add --download to plan or decompose",
        ) from None


def download_model(model: str) -> Path:
    """Folder of a model, which is fetched to the Hugging Face cache unless it is there.

    A progress bar is drawn on stderr. An interrupted transfer continues.

    Args:
        model: Path, id or short name, as typed.

    Raises:
        CheckpointError: There is no such model, or it cannot be fetched.
        OutputError: The disk of the cache has no room for it.
    """
    if Path(model).expanduser().exists() or SHORT_NAMES.get(model, model).count("/") != 1:
        return resolve_model(model)
    repository = SHORT_NAMES.get(model, model)
    from huggingface_hub import HfApi, constants

    with _told(f"cannot fetch {repository}", f"check the name: {constants.ENDPOINT}/{repository}"):
        api = HfApi()
        files = api.model_info(repository, files_metadata=True).siblings or []
        wanted = [file for file in files if not file.rfilename.endswith(_NOT_READ)]
        require_space(Path(constants.HF_HUB_CACHE), sum(file.size or 0 for file in wanted))
        names = [escape(file.rfilename) for file in wanted]
        return Path(api.snapshot_download(repository, allow_patterns=names))


def upload_files(
    folder: Path, names: Sequence[str], texts: Mapping[str, str], repository: str, *, private: bool
) -> str:
    """Upload files of a folder to a repository, which is made if there is none; returns its URL.

    Args:
        folder: The folder.
        names: The files.
        texts: Files that are uploaded with another text.
        repository: Its id.
        private: Whether a new repository is private.

    Raises:
        OutputError: The Hub refused it, or was not reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _told(f"cannot upload to {repository}", "log in with: hf auth login", OutputError):
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        plain = [escape(name) for name in names if name not in texts]
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=plain)
        for name, text in texts.items():
            api.upload_file(repo_id=repository, path_or_fileobj=text.encode(), path_in_repo=name)
    return url


@contextmanager
def _told(
    what: str, hint: str, kind: type[CheckpointError | OutputError] = CheckpointError
) -> Iterator[None]:
    """Errors of the Hub and of the network as ours."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    transport: Any = HfHubHTTPError.__bases__[0]  # HTTPError of httpx, or of its successor
    try:
        yield
    except TuckerizeError:
        raise
    except HFValidationError as error:
        raise kind(f"{what}: {error}", hint="an id looks like owner/name") from None
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise kind(f"{what}: {str(error).splitlines()[0]}", hint=hint) from None
    except (transport, OSError) as error:
        is_of_a_file = getattr(error, "errno", None) is not None
        if is_of_a_file and not isinstance(error, ConnectionError):
            raise  # a full disk, say
        raise kind(
            f"{what}: {error}", hint="check the network; the same command continues"
        ) from None


def similar_folder(folder: Path) -> str:
    """Hint at the folder beside a missing one whose name is most like it."""
    beside = folder.parent
    if not beside.is_dir():
        return "check the path"
    names = [str(path) for path in beside.iterdir() if path.is_dir()]
    return did_you_mean(str(folder), names).strip() or "check the path"
