from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from tuckerize.checkpoint.hub import SHORT_NAMES, resolve_model
from tuckerize.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and an empty working directory."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def add_snapshot(cache: Path, repository: str) -> Path:
    """Lay a model out as huggingface_hub does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    (folder / "blobs" / "b").write_text("{}")
    (snapshot / "config.json").symlink_to(folder / "blobs" / "b")
    return snapshot


def refusal(model: str) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(model)
    return caught.value.message, caught.value.hint


def test_resolve_model_of_a_folder_is_the_folder(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_resolve_model_expands_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model") == tmp_path / "model"


def test_resolve_model_of_an_unknown_home_is_refused(cache: Path) -> None:
    assert (
        refusal("~nobody-of-this-name/model")[0] == "there is no folder ~nobody-of-this-name/model"
    )


@pytest.mark.parametrize(
    ("model", "hint"),
    [("./modls", "check the path"), ("models/tiny-mo", "did you mean 'models/tiny-moe'?")],
)
def test_resolve_model_of_a_missing_folder_says_so(cache: Path, model: str, hint: str) -> None:
    Path("models/tiny-moe").mkdir(parents=True)
    Path("models/other").mkdir()
    if hint == "check the path":
        Path("models").rename("elsewhere")
    assert refusal(model) == (f"there is no folder {model}", hint)


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("deepseek-v2-lite", "DeepSeek-V2-Lite"),
        ("DeepSeek-V2-Lit", "DeepSeek-V2-Lite"),
        ("Qwen3-30B-A3", "Qwen3-30B-A3B"),
        ("OLMoE-1B-7B", "OLMoE-1B-7B-0924"),
    ],
)
def test_resolve_model_like_a_short_name_asks_whether_it_is_meant(
    cache: Path, model: str, meant: str
) -> None:
    message, hint = refusal(model)
    assert message == f"'{model}' is neither a folder nor a Hugging Face id"
    assert hint.startswith(f"did you mean '{meant}'? ")
    snapshot = add_snapshot(cache, SHORT_NAMES[meant])
    assert resolve_model(meant) == snapshot


def test_resolve_model_of_a_name_too_long_for_a_file_is_refused(cache: Path) -> None:
    message, _ = refusal("x" * 5000)
    assert "is neither a folder nor a Hugging Face id" in message


@pytest.mark.parametrize("model", ["owner/name", *SHORT_NAMES])
def test_resolve_model_in_the_cache_is_its_snapshot(cache: Path, model: str) -> None:
    snapshot = add_snapshot(cache, SHORT_NAMES.get(model, model))
    assert resolve_model(model) == snapshot
    assert (snapshot / "config.json").exists()


def test_resolve_model_prefers_a_folder_to_the_cache(cache: Path) -> None:
    add_snapshot(cache, "owner/name")
    Path("owner/name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")


@pytest.mark.parametrize("model", ["owner/name", "DeepSeek-V2-Lite"])
def test_resolve_model_absent_from_the_cache_says_how_to_fetch_it(cache: Path, model: str) -> None:
    repository = SHORT_NAMES.get(model, model)
    assert refusal(model) == (
        f"{model!r} is not a folder, and {repository} is not in the Hugging Face cache",
        f"fetch it with: hf download {repository}, or add --download to plan or decompose",
    )
    assert list(cache.iterdir()) == []


def test_resolve_model_of_another_model_in_the_cache_is_refused(cache: Path) -> None:
    add_snapshot(cache, "owner/other")
    assert "is not in the Hugging Face cache" in refusal("owner/name")[0]


@pytest.mark.parametrize("model", ["DeepSeek", "a/b/c", ""])
def test_resolve_model_that_is_no_id_lists_the_short_names(cache: Path, model: str) -> None:
    if not model:
        assert resolve_model(model) == Path()  # the working directory, as for any tool
        return
    message, hint = refusal(model)
    assert message == f"{model!r} is neither a folder nor a Hugging Face id"
    known = ", ".join(SHORT_NAMES)
    assert hint.endswith(f"give a folder, an id like owner/name, or one of: {known}")


def test_resolve_model_with_characters_that_no_id_has_is_refused(cache: Path) -> None:
    assert refusal("owner/na me")[0] == "'owner/na me' is not a valid Hugging Face id"


def test_resolve_model_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    model = str(tmp_path / "a.safetensors")
    assert refusal(model) == (f"{model} is a file", "give the folder that holds config.json")
