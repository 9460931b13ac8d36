"""CANN, HCCL and NPU generations: versions, environment variables, device names.

Does not import torch, so that `doctor` works where torch cannot be imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tuckerize.ascend.npu import AUTOLOAD

# Source: Ascend/pytorch, compatibility table, August 2026.
CANN_BY_TORCH_NPU = {
    "2.12.0": "9.1.0",
    "2.11.0": "9.1.0",
    "2.10.0.post4": "9.1.0",
    "2.9.0.post6": "9.1.0",
    "2.9.0.post2": "9.0.0",
    "2.8.0.post4": "9.0.0",
    "2.7.1.post4": "9.0.0",
    "2.9.0": "8.5.0",
    "2.8.0.post2": "8.5.0",
    "2.7.1.post2": "8.5.0",
    "2.6.0.post5": "8.5.0",
    "2.8.0": "8.3.RC1",
    "2.7.1": "8.3.RC1",
    "2.6.0.post3": "8.3.RC1",
    "2.1.0.post17": "8.3.RC1",
}
"""The CANN release that each torch_npu release is built for."""

CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""Variables that name the folder of CANN's toolkit, set by its `set_env.sh`."""

GENERATIONS = ("A2", "A3")
"""NPU generations with the fused dispatch and combine."""

MAX_CONNECT_TIMEOUT = timedelta(seconds=7200)
"""Upper limit of HCCL_CONNECT_TIMEOUT: no process can wait longer for the others to join."""

STREAM_TIMEOUT = "107020"
"""Error code of a stream that waited for HCCL_EXEC_TIMEOUT (ACL_ERROR_RT_STREAM_SYNC_TIMEOUT)."""

# Device names of the Ascend 910 (the first generation). Those of A2 (Ascend910B1, ...) look alike.
_ASCEND_910 = frozenset(f"Ascend910{kind}" for kind in ("A", "B", "ProA", "ProB", "PremiumA"))


@dataclass(frozen=True, slots=True)
class EnvironmentVariable:
    """An environment variable that changes how torch_npu or HCCL runs.

    Attributes:
        default: Value that applies where it is unset.
        pattern: Regular expression of its valid values.
        expected: Valid values, in words.
        lowest: Smallest valid value of a number.
        highest: Largest valid value of a number.
    """

    default: str
    pattern: str
    expected: str
    lowest: int = 0
    highest: int = 2**31 - 1

    def accepts(self, value: str) -> bool:
        """Whether a value is valid."""
        if re.fullmatch(self.pattern, value) is None:
            return False
        return self.pattern != _NUMBER or self.lowest <= int(value) <= self.highest


_NUMBER = r"\d+"
_CONNECT_SECONDS = (120, int(MAX_CONNECT_TIMEOUT.total_seconds()))

# Source: CANN 8.5, environment variables of HCCL.
VARIABLES = {
    "HCCL_BUFFSIZE": EnvironmentVariable("200", _NUMBER, "megabytes, at least 1", lowest=1),
    "HCCL_CONNECT_TIMEOUT": EnvironmentVariable(
        "120", _NUMBER, "seconds, {} to {}".format(*_CONNECT_SECONDS), *_CONNECT_SECONDS
    ),
    "HCCL_EXEC_TIMEOUT": EnvironmentVariable("1836", _NUMBER, "seconds, 0 for no limit"),
    "HCCL_DETERMINISTIC": EnvironmentVariable(
        "false", r"(?i)true|false|strict", "true, false or strict"
    ),
    AUTOLOAD: EnvironmentVariable("1", "0|1", "0 or 1"),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": EnvironmentVariable("0", "0|1", "0 or 1"),
}
"""Environment variables by name."""


def installed_cann(environment: Mapping[str, str]) -> str | None:
    """CANN's version, read from its toolkit's `ascend_toolkit_install.info`; None if not found."""
    for name in CANN_HOMES:
        home = environment.get(name)
        for path in sorted(Path(home).rglob("ascend_*_install.info")) if home else ():
            found = re.search(r"^version=(\S+)", path.read_text(), re.MULTILINE)
            if found:
                return found[1]
    return None


def torch_npu_for(cann: str) -> list[str]:
    """The torch_npu releases that are built for a CANN release."""
    return [torch_npu for torch_npu, needed in CANN_BY_TORCH_NPU.items() if needed == cann]


def hccl_buffer_mib(environment: Mapping[str, str]) -> int:
    """HCCL_BUFFSIZE in MiB; 0 if it is not a number."""
    text = environment.get("HCCL_BUFFSIZE", VARIABLES["HCCL_BUFFSIZE"].default)
    return int(text) if text.isdigit() else 0


def set_hccl_timeouts(timeout: timedelta) -> None:
    """Set how long HCCL waits on the devices, which torch's own time-out does not change.

    To be called before the first communicator is made. Variables that are set already are kept.
    """
    seconds = int(timeout.total_seconds())
    lowest, highest = _CONNECT_SECONDS
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, lowest), highest)))
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(seconds))


def make_hccl_deterministic() -> None:
    """Have HCCL reduce in a fixed order, unless the variable is set already.

    To be called before the first communicator is made.
    """
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")


def generation_of(device_name: str) -> str:
    """The generation of an NPU: A2, A3, or the device name itself for any other.

    Source:
        torch_npu's device names: Ascend910B1 and up are A2, Ascend910_9362 and up are A3.

    >>> generation_of("Ascend910B4-1"), generation_of("Ascend910_9392")
    ('A2', 'A3')
    >>> generation_of("Ascend910B")
    'Ascend910B'
    """
    if re.match(r"Ascend910B\d", device_name):
        return "A2"
    return "A3" if device_name.startswith("Ascend910_93") else device_name


def float32_products(npu: Any, index: int | None) -> str:  # noqa: ANN401
    """Type in which an NPU multiplies float32 matrices: float32, hf32 or float16.

    Args:
        npu: The device module `torch.npu`.
        index: Index of the device; None for the current one.

    Source:
        torch_npu's `allow_hf32`; CANN on the Atlas training series (Ascend 910).
    """
    if npu.get_device_name(index) in _ASCEND_910:
        return "float16"
    return "hf32" if npu.matmul.allow_hf32 else "float32"
