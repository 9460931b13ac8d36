"""The weight files of a model's folder: those that transformers loads, or a refusal by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tuckerize.checkpoint.files import check_plain_name, read_json_object
from tuckerize.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_CONVERT = (
    "convert it, which transformers does without running code of the file: python -c 'from "
    'transformers import AutoModelForCausalLM as M; M.from_pretrained("{folder}", dtype="auto")'
    '.save_pretrained("NEW")\', and copy the tokenizer files to NEW'
)


def find_weight_files(folder: Path) -> list[str]:
    """Names of the weight files of a folder, sorted: those that transformers loads.

    It loads `model.safetensors` where that is present, and the files of the index otherwise; vLLM
    prefers the index. A complete set of numbered files needs no index.

    Raises:
        CheckpointError: There are none, two sets of them, or another format.
    """
    single, index = (folder / SINGLE_FILE).exists(), folder / INDEX
    indexed = _files_of_index(index) if index.exists() else []
    others = [name for name in indexed if name != SINGLE_FILE and (folder / name).exists()]
    if single and others:
        raise CheckpointError(
            f"{folder} holds two sets of weights: {SINGLE_FILE}, which transformers loads, and "
            f"{others[0]} with the others of {INDEX}, which vLLM loads",
            hint=f"move the set that is not meant away, {SINGLE_FILE} or {INDEX} with its files",
        )
    if single:
        return [SINGLE_FILE]
    if indexed:
        return indexed
    numbered = _complete_set(path.name for path in folder.glob("*.safetensors"))
    if numbered:
        return numbered
    raise _without_weights(folder)


def refuse_other_formats(folder: Path) -> None:
    """Name what a folder without a configuration holds, where it is known.

    Raises:
        CheckpointError: It is another format, or a folder around that of the model.
    """
    if (folder / CONFIG).exists():
        return
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, not a model",
            hint="merge it into its base model, and give the folder of the result: python -c "
            f'\'from peft import AutoPeftModelForCausalLM as M; M.from_pretrained("{folder}", '
            'dtype="auto").merge_and_unload().save_pretrained("NEW")\', and copy the tokenizer '
            "files to NEW",
        )
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds a GGUF file, which cannot be decomposed",
            hint="give the safetensors checkpoint that it was converted from",
        )
    if (folder / "params.json").exists():
        raise CheckpointError(
            f"{folder} holds a model in the format of its authors (params.json), without {CONFIG}",
            hint="fetch the files of the same model for transformers: hf download OWNER/NAME",
        )
    below = sorted(path.parent for path in folder.glob("*/" * 2 + CONFIG))
    below += sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if below:
        raise CheckpointError(
            f"{folder} has no {CONFIG}, but {below[-1]} has", hint=f"did you mean {below[-1]}?"
        )


def _files_of_index(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", hint="fetch the file again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{index} places {tensor} in {name!r}, expected the name of a file",
                hint="fetch the file again",
            )
        check_plain_name(name, found_in=index)
    return sorted(set(weight_map.values()))


def _complete_set(names: Iterable[str]) -> list[str]:
    """The one complete set of files numbered `-00001-of-00003`; empty if there is not one."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match[1], int(match[3])), []).append(name)
    complete = [found for (_, count), found in sets.items() if len(found) == count]
    return complete[0] if len(complete) == 1 else []


def _without_weights(folder: Path) -> CheckpointError:
    """Error for a folder that has a configuration and no weights that can be read."""
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    numbered = sorted(path.name for path in folder.glob("*-of-*.safetensors"))
    if numbered:
        return CheckpointError(
            f"{folder} has {numbered[0]}, but neither {INDEX} nor all files of its set",
            hint="fetch the checkpoint again: hf download continues where it stopped",
        )
    message = f"{folder} has neither {INDEX} nor {SINGLE_FILE}"
    if pickled:
        return CheckpointError(f"{message}, but {pickled[0]}", hint=_CONVERT.format(folder=folder))
    if any(folder.glob("*.gguf")):
        return CheckpointError(
            f"{message}, but a GGUF file, which cannot be decomposed",
            hint="give the safetensors checkpoint that it was converted from",
        )
    return CheckpointError(message, hint="the folder is unfinished or is not a checkpoint")
