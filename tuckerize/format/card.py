"""Model card and `trust_remote_code` loader of a Tucker checkpoint."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard

from tuckerize.checkpoint.files import write_text
from tuckerize.format.manifest import TuckerManifest
from tuckerize.format.warnings import warnings_of
from tuckerize.version import INSTALL, __version__

CARD = "README.md"
SOURCE_CARD = "README.source.md"
"""File that keeps the card of the source."""

# Raised by metadata of an unexpected form: a card that cannot be read must not stop anything.
_ODD = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    yaml.YAMLError,
)

# `copy_other_files` leaves it out, since it begins with the program's name.
LOADER = "tuckerize_modeling"

_ADDED = "<!-- added by tuckerize push -->"

_CODE = '''"""Loads this checkpoint with trust_remote_code=True, as `import tuckerize` does."""

import transformers

try:
    # Makes transformers know the format; a mere folder of that name has no version.
    from tuckerize import __version__  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this checkpoint needs the package tuckerize, from its source checkout: {install}"
    ) from error


class {architecture}(transformers.{architecture}):
    """The stock model; only its experts' modules are others."""

    @classmethod
    def is_custom_code(cls):
        """Its dense layers are read as those of the stock model."""
        return False
'''

_TEXT = """
# {name}, made smaller

> **`import tuckerize` before loading.** transformers does not know this format by itself: it prints
> a warning about an unknown quantization type and returns a model whose experts are **random**.

```python
import tuckerize  # {install}
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder", dtype="auto")
```

With `trust_remote_code=True` the checkpoint imports it itself. vLLM serves it where tuckerize is
installed beside it: `vllm serve path/to/this/folder`. `tuckerize reconstruct` makes an ordinary
dense checkpoint of it, for tools that cannot load it.

The routed experts of `{model}` as Tucker factors, made by tuckerize {version}: {share:.1%} of their
parameters ({after:,} of {before:,}), {bits:.2f} bits per weight of the source's; all tensors
together have {bytes_after:,} bytes, {bytes_before:,} before. {how} Sizes and errors of every layer
are in `tuckerize.json`.

`tuckerize decompose --recipe` makes it again, with this file:

```yaml
{recipe}```
"""


# transformers' loaders of architectures, by the end of their names.
_AUTO = {
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def with_loader(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose `auto_map` names our loader in place of the source's own classes."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    architecture = _architecture(config)
    if architecture is None:
        return kept
    return {**kept, "auto_map": {_auto_class(architecture): f"{LOADER}.{architecture}"}}


def _auto_class(architecture: str | None) -> str:
    """Class of transformers that loads models of an architecture."""
    own = (auto for ending, auto in _AUTO.items() if (architecture or "").endswith(ending))
    return next(own, "AutoModelForCausalLM")


def write_hub_files(
    source: Path, output: Path, manifest: TuckerManifest, config: dict[str, Any]
) -> list[str]:
    """Write the card and the loader of a Tucker checkpoint; returns the names of the files.

    Args:
        source: Folder of the source; its card is kept beside ours.
        output: Folder of the Tucker checkpoint.
        manifest: Its manifest.
        config: Configuration of the source.
    """
    architecture = _architecture(config)
    written = [CARD]
    if architecture is not None:
        write_text(
            output / f"{LOADER}.py", _CODE.format(architecture=architecture, install=INSTALL)
        )
        written.append(f"{LOADER}.py")
    present = source / CARD
    before = present.read_text(encoding="utf-8", errors="replace") if present.exists() else None
    if before is not None:
        write_text(output / SOURCE_CARD, before)
        written.append(SOURCE_CARD)
    write_text(output / CARD, _card(before or "", manifest, _auto_class(architecture)))
    return written


def card_with(card: str, section: str, facts: dict[str, Any]) -> str:
    """A card with a section at its end, and further metadata where it has none.

    Args:
        card: The card.
        section: Markdown; what was added before is replaced.
        facts: The metadata.
    """
    text = card.split(_ADDED, maxsplit=1)[0].rstrip()
    whole = f"{text}\n\n{_ADDED}\n{section}" if section else f"{text}\n"
    try:
        parsed = ModelCard(whole)
        parsed.data = CardData(**{**facts, **parsed.data.to_dict()})  # type: ignore[no-untyped-call]
        return str(parsed)
    except _ODD:
        return whole


def restore_card(output: Path) -> None:
    """Put the source's card back, in a folder with the files of a Tucker checkpoint."""
    kept = output / SOURCE_CARD
    if kept.exists():
        kept.replace(output / CARD)
    else:
        (output / CARD).unlink(missing_ok=True)


def _architecture(config: dict[str, Any]) -> str | None:
    """Name of the model's class in transformers, if the configuration has one."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else None


def _card(source_card: str, manifest: TuckerManifest, auto: str) -> str:
    model = manifest.source.model if manifest.source else ""
    before, after = manifest.before, manifest.after
    name = Path(model).name
    how = "Data-free: no text was used."
    if manifest.calibrated:
        how = "A calibration text decided what to keep."
    if manifest.healed is not None:
        how += f" Trained on {manifest.healed.tokens:,} tokens of text after that."
    text = _TEXT.format(
        name=name,
        auto=auto,
        install=INSTALL,
        model=name if Path(model).exists() else model,
        version=__version__,
        share=after.routed_parameters / before.routed_parameters,
        after=after.routed_parameters,
        before=before.routed_parameters,
        bits=after.bits_per_weight(before),
        recipe=yaml.safe_dump(_recipe(manifest)),
        bytes_after=after.total_bytes,
        bytes_before=before.total_bytes,
        how=how,
    )
    text += "".join(f"\n> **Warning:** {warning}\n" for warning in warnings_of(manifest))
    own: dict[str, Any] = {"library_name": "transformers"}
    if not Path(model).exists():
        own["base_model"] = model
        if manifest.cores is not None:
            own["base_model_relation"] = "quantized"
    facts = _facts_of(source_card)
    tags = facts.get("tags")
    named = {str(tag) for tag in (tags if isinstance(tags, list) else ()) if _is_word(tag)}
    try:
        return _rendered(text, {**facts, **own, "tags": sorted({*named, "tuckerize"})})
    except _ODD:
        return _rendered(text, {**own, "tags": ["tuckerize"]})


def _recipe(manifest: TuckerManifest) -> dict[str, Any]:
    """The recipe, with texts by name: their folders are of another machine."""
    recipe = dict(manifest.recipe)
    calibration = recipe.get("calibration")
    if isinstance(calibration, dict) and isinstance(calibration.get("texts"), list):
        texts = [Path(str(text)).name for text in calibration["texts"]]
        recipe["calibration"] = {**calibration, "texts": texts}
    return recipe


def _rendered(text: str, facts: dict[str, Any]) -> str:
    card = ModelCard(f"---\n{{}}\n---\n{text}")
    card.data = CardData(**facts)
    return str(card)


def _is_word(tag: object) -> bool:
    """Whether a tag is one word: text, a number or a date."""
    return isinstance(tag, str | int | float | date) and not isinstance(tag, bool)


def _facts_of(source_card: str) -> dict[str, Any]:
    """Licence, language and other metadata of the source's card."""
    if not source_card.startswith("---"):
        return {}
    try:
        facts: dict[str, Any] = ModelCard(source_card).data.to_dict()  # type: ignore[no-untyped-call]
    except _ODD:
        return {}
    return facts
