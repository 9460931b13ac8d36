"""The `doctor` command: device, versions, precision and environment variables, and their problems.

Works where torch cannot be imported: torch is imported inside functions only.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping

from tuckerize.ascend.environment import (
    CANN_BY_TORCH_NPU,
    CANN_HOMES,
    GENERATIONS,
    VARIABLES,
    generation_of,
    installed_cann,
    torch_npu_for,
)
from tuckerize.ascend.npu import INSTALL_HINT, PACKAGE, explained
from tuckerize.errors import ParallelError
from tuckerize.report.machine import DeviceFacts, DoctorReport, Problem, Variable
from tuckerize.version import __version__, installed_version


def doctor() -> DoctorReport:
    """Examine this machine and its environment; changes nothing.

    Example:
        >>> doctor().passed  # doctest: +SKIP
    """
    versions = {
        "tuckerize": __version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in ("torch", PACKAGE, "transformers")},
        "CANN": installed_cann(os.environ),
    }
    problems = [*version_problems(versions), *variable_problems(os.environ)]
    device = None
    try:
        with explained():
            device = _examine_device()
    except ParallelError as error:
        problems.append(Problem(error.message, error.hint))
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(Problem(f"torch cannot be imported: {error}", "reinstall torch"))
    if device is not None:
        problems += device_problems(device, npu_expected=versions[PACKAGE] is not None)
    variables = [
        Variable(name, os.environ.get(name), known.default) for name, known in VARIABLES.items()
    ]
    expected = CANN_BY_TORCH_NPU.get(versions[PACKAGE] or "")
    return DoctorReport(versions, expected, device, tuple(variables), tuple(problems))


def version_problems(versions: Mapping[str, str | None]) -> Iterator[Problem]:
    """Missing and incompatible versions, from versions by package name, CANN's included."""
    torch, torch_npu, cann = (versions[name] for name in ("torch", PACKAGE, "CANN"))
    if torch is None:
        yield Problem("torch is not installed", "install the build of torch for your device")
        return
    if torch_npu is None:
        if cann is not None:
            yield Problem(
                f"CANN {cann} is installed, but torch_npu is not",
                INSTALL_HINT,
            )
        return
    if _minor(torch) != _minor(torch_npu):
        yield Problem(
            f"torch_npu {torch_npu} does not match torch {torch}: minor versions must be equal",
            f"pip install torch=={_minor(torch_npu)}.*",
        )
    if cann is None:
        yield Problem(
            f"torch_npu is installed, but neither {' nor '.join(CANN_HOMES)} points to CANN",
            "source CANN's set_env.sh in this shell",
        )
    elif CANN_BY_TORCH_NPU.get(torch_npu, cann) != cann:
        fitting = ", ".join(torch_npu_for(cann)) or "none is known"
        yield Problem(
            f"torch_npu {torch_npu} is for CANN {CANN_BY_TORCH_NPU[torch_npu]}, found {cann}",
            f"install CANN {CANN_BY_TORCH_NPU[torch_npu]}, or a torch_npu for your CANN: {fitting}",
        )


def variable_problems(environment: Mapping[str, str]) -> Iterator[Problem]:
    """Invalid values of environment variables."""
    for name, known in VARIABLES.items():
        value = environment.get(name)
        if value is not None and not known.accepts(value):
            yield Problem(
                f"{name} is '{value}', expected {known.expected}", f"unset or correct {name}"
            )


def device_problems(device: DeviceFacts, *, npu_expected: bool) -> Iterator[Problem]:
    """Problems of the device that torch finds."""
    if npu_expected and device.kind != "npu":
        yield Problem(
            f"torch_npu is installed, but torch finds {device.kind} only",
            "check that npu-smi info lists devices, that ASCEND_RT_VISIBLE_DEVICES does not hide "
            "them, and that this user may open /dev/davinci*",
        )
    if device.float32_products != "float32":
        yield Problem(
            f"{device.name} multiplies float32 matrices in {device.float32_products}, but "
            "verify tolerates differences of 1e-5 only",
            "verify with --device cpu, or set torch.npu.matmul.allow_hf32 to False if it is on",
        )


def _minor(version: str) -> str:
    """Major and minor version."""
    return ".".join(re.findall(r"\d+", version)[:2])


def _examine_device() -> DeviceFacts:
    """Facts of the device that torch finds."""
    import torch

    from tuckerize.parallel.backends import backend_for, float32_products, free_memory

    found = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if found is None else torch.device(found.type, 0)
    own = torch.get_device_module(device)
    named = device.type != "cpu" and hasattr(own, "get_device_name")
    name = own.get_device_name(0) if named else platform.machine()
    generation = generation_of(name)
    free, total = free_memory(device)
    return DeviceFacts(
        kind=device.type,
        count=torch.accelerator.device_count() if found else 1,
        name=name,
        backend=backend_for(device),
        float32_products=float32_products(device),
        free_bytes=free,
        total_bytes=total,
        generation=generation if generation in GENERATIONS else None,
    )
