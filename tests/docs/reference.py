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
from tests.quantized_models import EXPERT_FORMATS, formats_of
from tests.tiny_families import CALIBRATED, EVERY_VERSION, FAMILY_NAMES, INFERRED
from tuckerize.cli.app import app
from tuckerize.moe.families import FAMILIES, UNSUPPORTED
from tuckerize.moe.family import FamilyRow
from tuckerize.pipeline.recipes import list_recipes
from tuckerize.recipe import CalibrationSettings, Recipe, Rule
from tuckerize.report.plans import PlannedBytes

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

## Targets

A file may hold several recipes, one for each `target`, separated by `---`: the first is the default,
`--target` takes another. What a recipe leaves open of its calibration, options give: `--calibration FILE` for
`texts`, `--calibration-tokens` for `tokens`.

## Shipped recipes

`tuckerize recipes list` names them, `tuckerize recipes show NAME` prints one.

<!-- not run: download -->
```bash
tuckerize decompose --model Qwen3-30B-A3B --recipe qwen3-30b-a3b --calibration text.txt --output OUT
```

Each keeps three quarters of the routed parameters, with cores of 4 bits: 3.4 to 3.6 bits per routed weight. Above about
4 bits int4 alone is the better choice, below 3 the loss grows; see [the sizes](../how-to/size.md). No layer with routed
experts is left dense: the budget gives each what it needs. Models with many experts for each token's few
calibrate with 131072 tokens, so that an expert sees 2048 or more on average.

There is none for `fused-kernels`, the default, where the plugin has no use for one: experts with biases (gpt-oss) or with
clamped activations (DeepSeek-V4, MiniMax-M3, Step-3.5, GLM-5.3-Flash). For `any-engine` the result is a stock checkpoint: with
experts of 4 bits, [as compressed-tensors stores them](../how-to/quantise-cores.md#for-engines-without-tuckerize), where
the release has them one by one and transformers reads such a checkpoint; otherwise in 16 bits, which the engine's own
quantizer brings to the same size. There is none for releases in 8 or 4 bits: one in 16 bits would exceed them, and a
stock checkpoint has one format for experts and attention.

Sizes are planned from the published configuration, which lies beside the recipe with its source; a test
compares them with the shapes of transformers' model of that configuration, and its parameters with the published number.

{shipped}
Left out: Nemotron-3, whose only size is that of [`fold`](models.md#latent-spaces); LongCat, which is
[not supported](models.md#not-supported); openPangu 2.0 and Kimi-K3, which transformers 5.24 does not know; Ling 2.6, of which no
published configuration was found.
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
    return _RECIPE.format(how=_HOW, **tables, shipped=_shipped())


def _shipped() -> str:
    """Table of the recipes of published models."""
    rows = [
        (
            f"`{recipe.name}`",
            f"{recipe.model}{f', {recipe.also}' if recipe.also else ''}",
            f"{recipe.layers} x {' x '.join(map(str, recipe.shape))}",
            _planned(recipe.before),
            *(
                _planned(recipe.after[target]) if target in recipe.after else ""
                for target in ("fused-kernels", "free", "any-engine")
            ),
        )
        for recipe in list_recipes().recipes
    ]
    header = ("recipe", "models", "MoE layers x E x H x I", "release, GB (bits per routed weight)")
    return _table((*header, "fused-kernels", "free", "any-engine"), rows)


def _planned(sizes: PlannedBytes) -> str:
    return f"{sizes.total_bytes / 1e9:.1f} ({sizes.bits_per_weight:.2f})"


def commands_page() -> str:
    """docs/reference/commands.md."""
    parts = [
        "# Commands\n",
        f"{_HOW}\n",
        "`tuckerize COMMAND --help` prints the same.\n",
    ]
    parts += [_command(words, function) for words, function in commands().items()]
    return "\n".join(parts)


def commands() -> dict[str, Callable[..., Any]]:
    """Functions of the commands, those of groups (`recipes list`) included."""
    found: dict[str, Callable[..., Any]] = {}
    groups = [(f"{info.name} ", info.typer_instance) for info in app.registered_groups]
    for prefix, group in [("", app), *groups]:
        for info in group.registered_commands if group else ():
            assert info.callback is not None
            found[prefix + (info.name or info.callback.__name__)] = info.callback
    return found


_MODELS = """\
# Models

{how}

tuckerize decomposes the routed experts of these families; `model_type` is that of config.json, or of its
`text_config`. Which layout a checkpoint has is decided by its tensors: one tensor for each expert and projection, or
packed, also transposed. What is outside of the experts may be anything: vision towers are copied.

Each family but `kimi_k2`, which is a `deepseek_v3` by another name and not known to transformers, is tested on a random
model that transformers makes: at full core sizes the checkpoint that transformers
loads gives the same logits, `reconstruct` the source's bytes, routing is that of transformers' router, and the model
runs layer by layer as a whole one does, which calibration needs, also where layers look at the tokens themselves
(DeepSeek-V4, Qwen4), attend to those that an earlier layer has found (GLM-5, GLM-5.3-Flash, Hy4) or read the inputs of
earlier layers (Inkling 2). Two are compressed without calibration only: `openai_privacy_filter`, which predicts no text, and
`inkling2_loop_text`, whose layers run more than once.

Source formats are those that the layout is tested in, besides bf16, fp16 and fp32: `all` of [these](sources.md) where experts
are stored one by one, FP8 in blocks where they are stored together, and MXFP4 as gpt-oss has it. The whole job on a quantized source, to
transformers, is tested with DeepSeek-V2 in each format, gpt-oss and DeepSeek-V4 as they are released, and in vLLM with FP8
and DeepSeek-V2 and Qwen3-MoE.

A calibrated job is: profile, budget, compression, shards, `verify`, `evaluate` and `reconstruct` on a random model
(`make test-families`). The same target verifies two shards of every family under torchrun.

{families}
## Other families

A checkpoint of another family is decomposed if its experts are named as usual (`experts.0.gate_proj.weight`,
`experts.0.w1.weight` or `experts.gate_up_proj`), one tensor beside them has the shape of a router, and transformers
holds its experts as an activation times up between two GEMMs, without bias; a note says so. Tested:
{inferred}.

## Latent spaces

Experts of Nemotron-H (`nemotron_h`: Nemotron 3 Nano, Super and Ultra) have no gate_proj, and compute between two linear
layers of the model's own, into a latent space and out of it. `tuckerize fold` makes that space smaller: a projection of
it is folded into the two layers and into the experts, and the result is a stock checkpoint with a smaller
`moe_latent_size`, in 16 or 32 bits. Of a Nano, whose experts read the hidden states themselves, the two layers are
written anew.

<!-- not run: download -->
```bash
tuckerize fold nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16 --keep 0.75 --calibration text.txt --output OUT
```

What the experts read of the space is best approximated in the mean over experts, what they write as the hidden states
see it; with a text, on the vectors that it gives. There are no shards: `check` hashes the result, and `evaluate OUT
--against MODEL` measures it. Tested: at the full size transformers' logits are the model's; a smaller one, with and
without calibration; layers that predict further tokens, which get the same size (transformers 5.24).

## Layers that predict further tokens

DeepSeek-V3, GLM-4.5 and their relatives keep them after the last layer (`num_nextn_predict_layers` counts them),
Qwen3-Next and Qwen3.5 beside the layers (`mtp.layers`). Their experts are compressed like the
others, but always without calibration: they read what no pass over the model computes, and since drafts are checked an error of
theirs costs time, not tokens. `--mtp copy` leaves them as they are, as does `--target any-engine`, and as do experts of
another layout or size than the model's. Tested: DeepSeek-V3, GLM-4-MoE, Qwen3-Next. transformers leaves such layers out; vLLM
loads them for speculative decoding only, and the plugin refuses factored ones that follow the last layer: decompose with
`--mtp copy`. Those of Qwen3-Next and Qwen3.5 it loads; the engine cannot run them on a CPU, dense or factored.

## Odd checkpoints

| checkpoint | what happens |
| --- | --- |
| one weight file, several with an index, several without it that are complete | read |
| index with surplus, missing or wrong entries; a stale index beside one file | the tensors that transformers loads |
| a tensor in two files | read if the same in both, else refused |
| two sets of weights in one folder | refused; both are named |
| tied embeddings; snapshots of the cache, whose files are links; any number of experts that is left after pruning | read |
| fewer layers in config.json than in the files | the others are copied |
| `.bin` | refused with the command that converts it; never unpickled |
| GGUF, a LoRA adapter, the authors' own format, a dense model, Git LFS pointers | refused by name |

Each line is a test (`tests/unit/checkpoint/test_weight_set.py`, `tests/integration/test_odd_sources.py`).

## Not supported

{unsupported}"""


def models_page() -> str:
    """docs/reference/models.md."""
    rows = [
        (
            f"`{row.model_type}`",
            row.models,
            _layouts(row),
            _formats(row),
            *_tested(row.model_type),
        )
        for row in FAMILIES.values()
        if row.latent is None
    ]
    return _MODELS.format(
        how=_HOW,
        families=_table(
            (
                "`model_type`",
                "models",
                "first tensor below a layer",
                "source formats",
                "tested with transformers",
                "calibrated job",
            ),
            rows,
        ),
        inferred=", ".join(f"`{name}`" for name in INFERRED),
        unsupported=_reasons(UNSUPPORTED),
    )


def _tested(model_type: str) -> tuple[str, str]:
    """Releases of transformers that a family is tested with, and whether its whole job is."""
    [own] = re.findall(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    [older] = re.findall(r"^TRANSFORMERS \?= ([\d. ]+)", (ROOT / "Makefile").read_text(), re.M)
    if model_type in ("deepseek_v2", *EVERY_VERSION):
        return ", ".join([*older.split(), own]), "yes"
    if model_type not in FAMILY_NAMES:
        return "", ""
    return own, "yes" if model_type in CALIBRATED else ""


def _layouts(row: FamilyRow) -> str:
    first = row.storages[0].names[0].replace("{expert}", "N")
    return f"`{first}`{', or packed' if len(row.storages) > 1 else ''}"


def _formats(row: FamilyRow) -> str:
    """Formats that the layouts of a family are tested in, besides 16 and 32 bits."""
    each = [set(formats_of(storage)) for storage in row.storages]
    if len(each) > 1 and each[0] == {*EXPERT_FORMATS} - {"mxfp4"}:
        return "all; packed: FP8"
    return ", ".join(sorted(kind.upper() for kind in set.union(*each)))


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
