"""Consistency of a Tucker checkpoint: config.json against the weight files."""

from __future__ import annotations

from tuckerize.errors import CheckpointError
from tuckerize.format.card import LOADER
from tuckerize.format.config import METHOD, TuckerQuantization, find_quantization
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.names import TensorName


def check_loadable(tucker: TuckerCheckpoint) -> None:
    """Refuse a checkpoint whose factored experts would not be loaded completely.

    Raises:
        CheckpointError: `quantization_config` is missing, malformed or of another release, or
            describes other tensors than the weight files hold.
    """
    place = tucker.folder / "config.json"
    value = find_quantization(tucker.config)
    if value is None:
        raise _damaged(f"{place} has no quantization_config of {METHOD}")
    try:
        quantization = TuckerQuantization.parse(value)
    except ValueError as error:
        raise _damaged(f"{place}: {error}") from error
    expected = {
        str(name.within(index, module)): shape
        for module, groups in quantization.modules.items()
        for index, group in enumerate(groups)
        for name, shape in group.tensor_shapes(tucker.manifest.shape.hidden).items()
    }
    below = tuple(f"{module}." for module in quantization.modules)
    found = {
        name: tuple(header.shape)
        for name, header in tucker.checkpoint.tensors.items()
        if name.startswith(below) or TensorName.find(name)
    }
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _damaged(
                f"{place} announces {name} as {expected.get(name, 'absent')}, "
                f"the weight files have it as {found.get(name, 'absent')}"
            )


def carries_loader(tucker: TuckerCheckpoint) -> bool:
    """Whether it can also be loaded with `trust_remote_code=True`, without importing tuckerize."""
    auto_map = tucker.config.get("auto_map")
    named = auto_map.get("AutoModelForCausalLM", "") if isinstance(auto_map, dict) else ""
    module = str(named).partition(".")[0]
    return module == LOADER and (tucker.folder / f"{LOADER}.py").exists()


def _damaged(message: str) -> CheckpointError:
    hint = "the folder was changed: run 'tuckerize decompose' with --overwrite"
    return CheckpointError(message, hint=hint)
