"""torch_npu: imported here only, and what it means when it cannot be. Does not import torch.

Where torch_npu is installed, `import torch` imports it, and so does transformers, whether or not
torch was told to leave it alone.
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

PACKAGE = "torch_npu"

_TORCH_SAYS = f"Failed to load the backend extension: {PACKAGE}"
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def import_torch_npu() -> Any:  # noqa: ANN401
    """Import torch_npu, which makes torch know the device `npu` and the backend `hccl`.

    Raises:
        ParallelError: It is not installed, or cannot be loaded.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ParallelError(
            "device 'npu' needs the package torch_npu, which is not installed",
            hint="pip install 'tuckerize[npu]' beside the same minor version of torch",
        )
    with explained():
        return importlib.import_module(PACKAGE)


@contextmanager
def explained() -> Iterator[None]:
    """Raise ParallelError in the place of an error that comes from importing torch_npu."""
    try:
        yield
    except Exception as error:
        if not any(_is_of_import(cause) for cause in _causes(error)):
            raise
        *_, cause = _causes(error)
        remedies = "source CANN's set_env.sh first, or uninstall torch_npu"
        if os.environ.get(_AUTOLOAD, "1") == "1":
            remedies += (
                f", or set {_AUTOLOAD}=0 for what runs on the CPU and does not need transformers"
            )
        raise ParallelError(
            f"torch_npu is installed but cannot be loaded, which breaks what imports it: {cause}",
            hint=remedies,
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised for, one after the other."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_of_import(error: BaseException) -> bool:
    """Whether torch says so, or torch_npu was being imported."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _TORCH_SAYS in str(error) or any(
        frame.f_code.co_name == "<module>"
        and str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE
        for frame in frames
    )
