"""Import of torch_npu, here only, and explanation of its failures. Does not import torch.

Where torch_npu is installed, `import torch` imports it unless told not to; transformers imports it
in any case.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tuckerize.errors import ParallelError
from tuckerize.version import INSTALL_NPU

PACKAGE = "torch_npu"

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""Variable that tells torch whether to import installed device backends."""

INSTALL_HINT = f"{INSTALL_NPU} with the same minor version of torch"
"""Hint that installs torch_npu."""

_TORCH_SAYS = f"Failed to load the backend extension: {PACKAGE}"


def import_torch_npu() -> Any:  # noqa: ANN401
    """Import torch_npu, which registers the device `npu` and the backend `hccl` with torch.

    Raises:
        ParallelError: It is not installed, or cannot be loaded.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ParallelError(
            "device 'npu' needs the package torch_npu, which is not installed",
            hint=INSTALL_HINT,
        )
    with explained():
        return importlib.import_module(PACKAGE)


@contextmanager
def explained() -> Iterator[None]:
    """Raise ParallelError instead of any error that comes from importing torch_npu."""
    try:
        yield
    except Exception as error:
        if not any(_is_of_import(cause) for cause in _causes(error)):
            raise
        *_, cause = _causes(error)
        remedies = "source CANN's set_env.sh first, or uninstall torch_npu"
        if os.environ.get(AUTOLOAD, "1") == "1":
            remedies += (
                f", or set {AUTOLOAD}=0 for commands that run on the CPU without transformers"
            )
        raise ParallelError(
            f"torch_npu is installed but cannot be loaded, which breaks what imports it: {cause}",
            hint=remedies,
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the chain of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_of_import(error: BaseException) -> bool:
    """Whether the error comes from importing torch_npu."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _TORCH_SAYS in str(error) or any(
        frame.f_code.co_name == "<module>"
        and str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE
        for frame in frames
    )
