"""Whether transformers and vLLM will find in a Tucker checkpoint what its config.json announces."""

from __future__ import annotations

from tuckerize.errors import CheckpointError
from tuckerize.format.card import LOADER
from tuckerize.format.config import METHOD, check_format, group_shapes
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.names import TensorName


def check_loadable(tucker: TuckerCheckpoint) -> None:
    """Refuse a checkpoint whose factored experts would not be loaded as a whole.

    Raises:
        CheckpointError: config.json announces no experts, others than are there, or in a format of
            another release.
    """
    place = tucker.folder / "config.json"
    announced = tucker.config.get("quantization_config") or {}
    if announced.get("quant_method") != METHOD:
        raise _damaged(f"{place} has no quantization_config of {METHOD}")
    try:
        check_format(announced)
    except ValueError as error:
        raise _damaged(f"{place}: {error}") from error
    sizes = {
        "experts": announced["group_size"],
        "hidden": tucker.manifest.shape.hidden,
        "joint": announced["joint"],
    }
    expected = {
        str(name.within(index, module)): tuple(shape)
        for module, groups in announced["modules"].items()
        for index, group in enumerate(groups)
        for name, shape in group_shapes(group, **sizes).items()
    }
    below = tuple(f"{module}." for module in announced["modules"])
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
    """Whether it can be loaded with `trust_remote_code=True` as well as after the import."""
    auto_map = tucker.config.get("auto_map") or {}
    module = str(auto_map.get("AutoModelForCausalLM", "")).partition(".")[0]
    return module == LOADER and (tucker.folder / f"{LOADER}.py").exists()


def _damaged(message: str) -> CheckpointError:
    hint = "the folder was changed: run 'tuckerize decompose' with --overwrite"
    return CheckpointError(message, hint=hint)
