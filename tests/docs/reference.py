"""The pages that are made from the code: recipe keys and commands.

python -m tests.docs.reference    # writes them
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from typer.models import ArgumentInfo

import tuckerize
from tests.docs.pages import ROOT
from tests.tiny_families import INFERRED, NOT_STREAMED
from tuckerize.cli.app import app
from tuckerize.moe.families import FAMILIES, UNSUPPORTED
from tuckerize.moe.family import FamilyRow
from tuckerize.recipe import CalibrationSettings, Recipe, Rule

_HOW = "<!-- Written by `python -m tests.docs.reference`. -->"

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}

_RECIPE = """\
# Recipes

{how}

A recipe is a YAML file that says which stacks are decomposed, how far, and how: `--recipe FILE`,
or the name of one in [recipes/](../../recipes). It replaces all options that decide what is
written. E is the number of experts, H the intermediate size (`moe_intermediate_size`), I the
hidden size (`hidden_size`).

<!-- file: recipe.yaml -->
```yaml
schema_version: 1
joint: gate_up
rules:
  - layers: 1-2
    rank: full,full,75%
  - keep: 0.75
```

```bash
tuckerize decompose --model MODEL --recipe recipe.yaml --output OUT
```

## The recipe

{recipe}
## `rules`

Each rule has exactly one of `rank`, `keep` and `tolerance`.

{rule}
## `calibration`

{calibration}
With `calibration`, a rule gives `rank` or `keep`, and is for all three projections.
"""


_API = """\
# Python API

{how}

Each command is a function of one request that returns a report. Requests and reports are frozen
dataclasses; the fields of a report are those of `--json`.

```python
import tuckerize

request = tuckerize.DecomposeRequest(model="MODEL", output="OUT", keep=0.75)
report = tuckerize.decompose(request)
print(report.before.routed_parameters, report.after.routed_parameters)
```

```text
2949120 2211456
```

Under torchrun every process calls `decompose` or `verify`. Errors that the caller can mend are
`tuckerize.errors.TuckerizeError`, with a `message` and a `hint`.
"""


def api_page() -> str:
    """docs/reference/api.md."""
    functions = {
        name: getattr(tuckerize, name)
        for name in tuckerize.__all__
        if inspect.isfunction(getattr(tuckerize, name))
    }
    return "\n".join([_API.format(how=_HOW), *(_function(*item) for item in functions.items())])


def _function(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function, eval_str=True)
    shown = ", ".join(signature.parameters)
    text = re.split(r"^(?:Args|Returns|Example):", inspect.getdoc(function) or "", flags=re.M)[0]
    parts = [f"## {name}\n", f"`tuckerize.{name}({shown})`\n", f"{text.strip()}\n"]
    for parameter in signature.parameters.values():
        request = parameter.annotation
        if dataclasses.is_dataclass(request) and isinstance(request, type):
            meanings = _attributes(request)
            rows = [(f"`{field.name}`", _field_default(field), meanings[field.name])
                    for field in dataclasses.fields(request)]  # fmt: skip
            header = (f"{request.__name__}", "default", "meaning")
            parts.append(_table((f"`{header[0]}`", *header[1:]), rows))
    return "\n".join(parts)


def _field_default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return _default(field.default)


def recipe_page() -> str:
    """docs/reference/recipe.md."""
    models: dict[str, type[BaseModel]] = {
        "recipe": Recipe,
        "rule": Rule,
        "calibration": CalibrationSettings,
    }
    header = ("key", "value", "default", "meaning")
    tables = {name: _table(header, _keys(model)) for name, model in models.items()}
    return _RECIPE.format(how=_HOW, **tables)


def commands_page() -> str:
    """docs/reference/commands.md."""
    parts = [
        "# Commands\n",
        f"{_HOW}\n",
        "`tuckerize COMMAND --help` prints the same.\n",
    ]
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        parts.append(_command(command.name or function.__name__, function))
    return "\n".join(parts)


_MODELS = """\
# Models

{how}

tuckerize decomposes the routed experts of these families; `model_type` is that of config.json, or of its
`text_config`. Which layout a checkpoint has is decided by its tensors: one tensor for each expert and projection, or
packed, also transposed. What is outside of the experts may be anything: vision towers and layers that predict further
tokens are copied.

Each family but `kimi_k2`, which is a `deepseek_v3` by another name and not known to transformers, is tested on a random
model that transformers makes: at full core sizes the checkpoint that transformers
loads gives the same logits, `reconstruct` the source's bytes, routing is that of transformers' router, and the model
runs layer by layer as a whole one does, which calibration needs.

{families}
## Other families

A checkpoint of another family is decomposed if its experts are named as usual (`experts.0.gate_proj.weight`,
`experts.0.w1.weight` or `experts.gate_up_proj`), one tensor beside them has the shape of a router, and transformers
holds its experts as an activation times up between two GEMMs, without bias; a note says so. Tested:
{inferred}.

## Not supported

{unsupported}
## Without calibration

These cannot be run layer by layer; decompose them without `--calibration`.

{not_streamed}"""


def models_page() -> str:
    """docs/reference/models.md."""
    rows = [
        (f"`{row.model_type}`", row.models, _layouts(row))
        for row in FAMILIES.values()
    ]
    return _MODELS.format(
        how=_HOW,
        families=_table(("`model_type`", "models", "first tensor below a layer"), rows),
        inferred=", ".join(f"`{name}`" for name in INFERRED),
        unsupported=_reasons(UNSUPPORTED),
        not_streamed=_reasons(NOT_STREAMED),
    )


def _layouts(row: FamilyRow) -> str:
    first = row.storages[0].names[0].replace("{expert}", "N")
    return f"`{first}`{', or packed' if len(row.storages) > 1 else ''}"


def _reasons(why: Mapping[str, str]) -> str:
    return _table(("`model_type`", "reason"), [(f"`{name}`", own) for name, own in why.items()])


PAGES = {
    ROOT / "docs" / "reference" / "models.md": models_page,
    ROOT / "docs" / "reference" / "recipe.md": recipe_page,
    ROOT / "docs" / "reference" / "commands.md": commands_page,
    ROOT / "docs" / "reference" / "api.md": api_page,
}


def _command(name: str, function: Callable[..., Any]) -> str:
    text, _, example = inspect.cleandoc(function.__doc__ or "").partition("Example: ")
    usage, panels = ["tuckerize", name], dict[str, list[tuple[str, ...]]]()
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        word = parameter.name.upper()
        if isinstance(info, ArgumentInfo):
            usage.append(word)
        else:
            # Typer keeps the first name of an annotated option as its default.
            named = [str(info.default or ""), *(info.param_decls or ())]
            dashed = f"--{parameter.name.replace('_', '-')}"
            word = next((text for text in named if text.startswith("--")), dashed)
        row = (
            f"`{word}`",
            _value(kind, info.metavar),
            f"{info.help or ''}{_default_text(parameter)}",
        )
        panels.setdefault(str(info.rich_help_panel or ""), []).append(row)
    tables = (
        _table((panel or "option", "value", "meaning"), rows) for panel, rows in panels.items()
    )
    return (
        f"## {name}\n\n`{' '.join([*usage, '[OPTIONS]'])}`\n\n{text.strip()}\n\n"
        f"Example: `{example.strip()}`\n\n" + "\n".join(tables)
    )


def _value(kind: object, metavar: str | None) -> str:
    """The value of an option in words: its choices, its own word, or its type."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in {list, tuple}:
        return f"{_value(parts[0], metavar)}, repeatable"
    if parts:
        return _value(parts[0], metavar)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    words: dict[object, str] = {bool: "", int: "integer", float: "number", Path: "path"}
    return metavar or words.get(kind, "text")


def _default_text(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return " Required."
    if parameter.default is None or parameter.default is False:
        return ""
    return f" Default: {_default(parameter.default)}."


def _keys(model: type[BaseModel]) -> Iterable[tuple[str, ...]]:
    schema = model.model_json_schema()
    meanings = _attributes(model)
    required = schema.get("required", [])
    for name, value in schema["properties"].items():
        default = "required" if name in required else _default(model.model_fields[name].default)
        yield (f"`{name}`", _kind(value, schema.get("$defs", {})), default, meanings[name])


def _attributes(model: type) -> dict[str, str]:
    """The section `Attributes` of a docstring."""
    _, _, section = inspect.getdoc(model).partition("Attributes:\n")  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(_default(part) for part in value)
    text = getattr(value, "value", value)
    return f"`{str(text).lower() if isinstance(text, bool) else text}`"


def _kind(schema: dict[str, Any], defined: dict[str, Any]) -> str:
    """The value of a key in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        nested = {"Rule": "[keys](#rules)", "CalibrationSettings": "[keys](#calibration)"}
        return nested.get(name) or _kind(defined[name], defined)
    if "anyOf" in schema:
        parts = (_kind(part, defined) for part in schema["anyOf"] if part.get("type") != "null")
        return " or ".join(parts)
    if choices := schema.get("enum", [schema[key] for key in ("const",) if key in schema]):
        return ", ".join(f"`{value}`" for value in choices)
    if schema["type"] == "array":
        return f"list of {_kind(schema['items'], defined)}"
    words = {"string": "text", "boolean": "`true`, `false`"}
    limits = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if key in schema]
    return ", ".join([words.get(schema["type"], schema["type"]), *limits])


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Write the pages."""
    for path, make in PAGES.items():
        path.write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
