from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tuckerize.format.card import (
    CARD,
    LOADER,
    SOURCE_CARD,
    restore_card,
    with_loader,
    write_hub_files,
)
from tuckerize.format.manifest import TuckerManifest, read_tucker_manifest

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"
CONFIG = {"architectures": ["DeepseekV2ForCausalLM"]}
SOURCE = """---
license: mit
tags: [moe]
---
# The source
"""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Source and output."""
    folders = tmp_path / "source", tmp_path / "output"
    for folder in folders:
        folder.mkdir()
    return folders


def manifest_of(name: str, model: str) -> TuckerManifest:
    manifest = read_tucker_manifest(GOLDEN / name)
    assert manifest.source is not None
    return manifest.model_copy(
        update={"source": manifest.source.model_copy(update={"model": model})}
    )


def facts_of(card: Path) -> dict[str, Any]:
    facts: dict[str, Any] = ModelCard.load(card).data.to_dict()
    return facts


def test_configuration_names_our_loader_in_place_of_the_sources_classes() -> None:
    config = {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.X"}}
    assert with_loader(config) == {
        **CONFIG,
        "auto_map": {"AutoModelForCausalLM": f"{LOADER}.DeepseekV2ForCausalLM"},
    }


@pytest.mark.parametrize("names", [None, [], [None], ["not a name"], ["import os; x"]])
def test_configuration_without_a_usable_architecture_names_none(
    names: object, folders: tuple[Path, Path]
) -> None:
    config = {"architectures": names, "auto_map": {"AutoModel": "x.Y"}}
    assert with_loader(config) == {"architectures": names}
    write_hub_files(*folders, manifest_of("tucker", "owner/model"), config)
    assert not (folders[1] / f"{LOADER}.py").exists()


def test_loader_defines_the_class_that_the_configuration_names(folders: tuple[Path, Path]) -> None:
    write_hub_files(*folders, manifest_of("tucker", "owner/model"), CONFIG)
    code = (folders[1] / f"{LOADER}.py").read_text()
    assert code == (GOLDEN.parent / f"{LOADER}.txt").read_text()
    classes = [node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    module, _, name = with_loader(CONFIG)["auto_map"]["AutoModelForCausalLM"].partition(".")
    assert (module, [name]) == (LOADER, classes)


def test_card_keeps_the_facts_of_the_source_and_adds_ours(folders: tuple[Path, Path]) -> None:
    source, output = folders
    (source / CARD).write_text(SOURCE)
    write_hub_files(source, output, manifest_of("calibrated", "owner/model"), CONFIG)
    assert facts_of(output / CARD) == {
        "license": "mit",
        "tags": ["moe", "tuckerize"],
        "library_name": "transformers",
        "base_model": "owner/model",
    }
    text = (output / CARD).read_text()
    assert "A calibration text decided what to keep." in text
    after = read_tucker_manifest(GOLDEN / "calibrated").after
    assert f"({after.routed_parameters:,} of " in text
    assert (output / SOURCE_CARD).read_text() == SOURCE


def test_card_of_a_local_model_does_not_tell_its_path(folders: tuple[Path, Path]) -> None:
    source, output = folders
    write_hub_files(source, output, manifest_of("tucker", str(source)), CONFIG)
    assert "base_model" not in facts_of(output / CARD)
    text = (output / CARD).read_text()
    assert str(source) not in text
    assert "The routed experts of `source`" in text
    assert "Data-free: no text was used." in text
    assert not (output / SOURCE_CARD).exists()


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "no front matter", "---\n- a\n---", ""])
def test_card_that_cannot_be_read_does_not_stop_anything(
    folders: tuple[Path, Path], card: str
) -> None:
    source, output = folders
    (source / CARD).write_text(card)
    write_hub_files(source, output, manifest_of("tucker", "owner/model"), CONFIG)
    assert facts_of(output / CARD)["tags"] == ["tuckerize"]
    assert (output / SOURCE_CARD).read_text() == card


@pytest.mark.parametrize("present", [True, False])
def test_restored_card_is_that_of_the_source(folders: tuple[Path, Path], present: bool) -> None:
    source, output = folders
    if present:
        (source / CARD).write_text(SOURCE)
    write_hub_files(source, output, manifest_of("tucker", "owner/model"), CONFIG)
    restore_card(output)
    assert not (output / SOURCE_CARD).exists()
    assert (output / CARD).exists() == present
    assert not present or (output / CARD).read_text() == SOURCE


@pytest.mark.parametrize(
    ("front", "tags"),
    [
        ("tags: [moe, 2024]", ["2024", "moe", "tuckerize"]),
        ("tags: [a, null]", ["a", "tuckerize"]),
        ("tags: [2024-05-01, moe]", ["2024-05-01", "moe", "tuckerize"]),
        ("tags: [1, {a: b}]", ["1", "tuckerize"]),
        ("tags: 5", ["tuckerize"]),
        ("tags: [true, moe]", ["moe", "tuckerize"]),
        ("ignore_metadata_errors: true", ["tuckerize"]),
        (f"a: 0x{'f' * 5000}", ["tuckerize"]),
        ("1: 2", ["tuckerize"]),
        ("model-index: 7", ["tuckerize"]),
        ("a: &a [*a]", ["tuckerize"]),
    ],
)
def test_odd_metadata_of_the_source_stops_nothing(
    folders: tuple[Path, Path], front: str, tags: list[str]
) -> None:
    source, output = folders
    (source / CARD).write_text(f"---\n{front}\n---\n# Source\n")
    write_hub_files(source, output, manifest_of("tucker", "owner/name"), CONFIG)
    facts = facts_of(output / CARD)
    assert facts["tags"] == tags
    assert (facts["base_model"], facts["library_name"]) == ("owner/name", "transformers")


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("DeepseekV2ForCausalLM", "AutoModelForCausalLM"),
        ("Qwen3VLMoeForConditionalGeneration", "AutoModelForImageTextToText"),
    ],
)
def test_card_loads_with_the_class_that_its_configuration_names(
    folders: tuple[Path, Path], architecture: str, auto: str
) -> None:
    source, output = folders
    config = {"architectures": [architecture]}
    write_hub_files(source, output, manifest_of("tucker", "owner/name"), config)
    assert f"{auto}.from_pretrained" in (output / CARD).read_text()
    assert list(with_loader(config)["auto_map"]) == [auto]
