"""Report of doctor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """Fault of a machine or its environment.

    Attributes:
        message: The fault.
        hint: Its remedy.
    """

    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The device that torch finds.

    Attributes:
        kind: Its type: npu, cuda or cpu.
        count: How many there are.
        name: Name of the first.
        backend: Collective backends of a run on them.
        float32_products: Precision in which they multiply float32 matrices.
        free_bytes: Free memory of the first, or of the host.
        total_bytes: All of it.
        generation: Generation of an NPU: A2 or A3; None for any other device.
    """

    kind: str
    count: int
    name: str
    backend: str
    float32_products: str
    free_bytes: int
    total_bytes: int
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """Environment variable that affects a run.

    Attributes:
        name: Its name.
        value: Its value, or None if it is not set.
        default: Behaviour where it is not set.
    """

    name: str
    value: str | None
    default: str


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """State of a machine, and its faults.

    Attributes:
        versions: Versions by package, CANN's among them; None where not installed.
        cann_expected: The CANN that the installed torch_npu is for; None if that is not known.
        device: The device; None if torch cannot be imported.
        variables: Variables of the device and its collectives.
        problems: Faults found.
    """

    versions: Mapping[str, str | None]
    cann_expected: str | None
    device: DeviceFacts | None
    variables: tuple[Variable, ...]
    problems: tuple[Problem, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems
