"""Look at the machine: device, versions, precision, variables, and what is wrong with them.

It works where torch cannot be imported, so torch is imported inside of it only.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tuckerize.ascend.npu import PACKAGE, explained
from tuckerize.errors import ParallelError
from tuckerize.report import DeviceFacts, DoctorReport, Problem, Variable
from tuckerize.version import __version__

# torch_npu and the CANN that it is for. Source: Ascend/pytorch, compatibility table, August 2026.
_CANN_OF = {
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
_CANN_FOLDERS = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")


@dataclass(frozen=True, slots=True)
class _Setting:
    """A variable that changes what runs.

    Attributes:
        default: What holds where it is not set.
        allowed: Pattern of the values that are understood.
        expected: The same in words.
        lowest: Smallest number, where it is one.
        highest: Largest number.
    """

    default: str
    allowed: str
    expected: str
    lowest: int = 0
    highest: int = 2**31 - 1


# Source: CANN 8.5, environment variables of HCCL.
_SETTINGS = {
    "HCCL_BUFFSIZE": _Setting("200", r"\d+", "megabytes, at least 1", lowest=1),
    "HCCL_CONNECT_TIMEOUT": _Setting("120", r"\d+", "seconds, 120 to 7200", 120, 7200),
    "HCCL_EXEC_TIMEOUT": _Setting("1836", r"\d+", "seconds, 0 for ever"),
    "HCCL_DETERMINISTIC": _Setting("false", r"(?i)true|false|strict", "true, false or strict"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": _Setting("1", "0|1", "0 or 1"),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": _Setting("0", "0|1", "0 or 1"),
}


def examine() -> DoctorReport:
    """Look at this machine and environment; changes nothing."""
    versions = {
        "tuckerize": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in ("torch", PACKAGE, "transformers")},
        "CANN": _cann_version(os.environ),
    }
    problems = [*version_problems(versions), *variable_problems(os.environ)]
    device = None
    try:
        with explained():
            device = _look_at_device()
    except ParallelError as error:
        problems.append(Problem(error.message, error.hint))
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(Problem(f"torch cannot be imported: {error}", "install torch again"))
    if device is not None:
        problems += device_problems(device, npu_expected=versions[PACKAGE] is not None)
    variables = [
        Variable(name, os.environ.get(name), setting.default) for name, setting in _SETTINGS.items()
    ]
    expected = _CANN_OF.get(versions[PACKAGE] or "")
    return DoctorReport(versions, expected, device, tuple(variables), tuple(problems))


def version_problems(versions: Mapping[str, str | None]) -> Iterator[Problem]:
    """What does not fit together among versions by package name, with CANN's."""
    torch, torch_npu, cann = (versions[name] for name in ("torch", PACKAGE, "CANN"))
    if torch is None:
        yield Problem("torch is not installed", "pip install torch, of the build for your device")
        return
    if torch_npu is None:
        if cann is not None:
            yield Problem(
                f"CANN {cann} is there, and torch_npu is not installed",
                "pip install 'tuckerize[npu]' beside the same minor version of torch",
            )
        return
    if _minor(torch) != _minor(torch_npu):
        yield Problem(
            f"torch_npu {torch_npu} does not fit torch {torch}: minor versions must be the same",
            f"pip install torch=={_minor(torch_npu)}.*",
        )
    if cann is None:
        yield Problem(
            f"torch_npu is installed, and neither {' nor '.join(_CANN_FOLDERS)} names a CANN",
            "source CANN's set_env.sh in this shell",
        )
    elif _CANN_OF.get(torch_npu, cann) != cann:
        yield Problem(
            f"torch_npu {torch_npu} is for CANN {_CANN_OF[torch_npu]}, found {cann}",
            f"install CANN {_CANN_OF[torch_npu]}, or the torch_npu of your CANN: {_rows_of(cann)}",
        )


def variable_problems(environment: Mapping[str, str]) -> Iterator[Problem]:
    """Variables with values that are not understood."""
    for name, setting in _SETTINGS.items():
        value = environment.get(name)
        if value is None:
            continue
        understood = re.fullmatch(setting.allowed, value) is not None
        if understood and setting.allowed == r"\d+":
            understood = setting.lowest <= int(value) <= setting.highest
        if not understood:
            yield Problem(
                f"{name} is '{value}', expected {setting.expected}", f"unset {name}, or correct it"
            )


def device_problems(device: DeviceFacts, *, npu_expected: bool) -> Iterator[Problem]:
    """What is wrong with the device that torch finds."""
    if npu_expected and device.kind != "npu":
        yield Problem(
            f"torch_npu is installed, and torch finds {device.kind} only",
            "look whether npu-smi info lists devices, whether ASCEND_RT_VISIBLE_DEVICES hides "
            "them, and whether this user may open /dev/davinci*",
        )
    if device.float32_products != "float32":
        yield Problem(
            f"{device.name} multiplies float32 matrices in {device.float32_products}: verify "
            "allows differences of 1e-5 only",
            "verify with --device cpu, or set torch.npu.matmul.allow_hf32 to False where it is on",
        )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cann_version(environment: Mapping[str, str]) -> str | None:
    """CANN's version, as its toolkit's `ascend_toolkit_install.info` has it."""
    for name in _CANN_FOLDERS:
        folder = environment.get(name)
        for path in sorted(Path(folder).rglob("ascend_*_install.info")) if folder else ():
            found = re.search(r"^version=(\S+)", path.read_text(), re.MULTILINE)
            if found:
                return found[1]
    return None


def _minor(version: str) -> str:
    """The first two numbers of a version."""
    return ".".join(re.findall(r"\d+", version)[:2])


def _rows_of(cann: str) -> str:
    """The releases of torch_npu for a CANN."""
    return ", ".join(row for row, needed in _CANN_OF.items() if needed == cann) or "none is known"


def _look_at_device() -> DeviceFacts:
    """What torch finds."""
    import torch

    from tuckerize.parallel.backends import (
        backend_for,
        float32_products,
        free_memory,
        npu_product,
    )

    found = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if found is None else torch.device(found.type, 0)
    own = torch.get_device_module(device)
    named = device.type != "cpu" and hasattr(own, "get_device_name")
    name = own.get_device_name(0) if named else platform.machine()
    product = npu_product(name)
    free, total = free_memory(device)
    return DeviceFacts(
        kind=device.type,
        count=torch.accelerator.device_count() if found else 1,
        name=name,
        backend=backend_for(device),
        float32_products=float32_products(device),
        free_bytes=free,
        total_bytes=total,
        product=product if product in ("A2", "A3") else None,
    )
