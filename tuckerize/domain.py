"""Domain types: projections, modes, shapes, multilinear ranks, stack names.

Pure Python, so that planning and `--help` never import torch. Shapes are always in the order
(E experts, H intermediate, I hidden).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple, Self

from tuckerize.errors import UsageError


class Projection(StrEnum):
    """One of the three weight matrices of an expert, by its name in our format and options."""

    GATE = "gate_proj"
    UP = "up_proj"
    DOWN = "down_proj"


class Choice(StrEnum):
    """Base of the closed sets of options."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a member from its value.

        >>> Device.parse("cpu") is Device.CPU
        True

        Raises:
            UsageError: There is none.
        """
        try:
            return cls(text)
        except ValueError:
            raise UsageError(
                f"{cls.__name__.lower()} '{text}' is not one of: {', '.join(cls)}"
            ) from None


class Device(Choice):
    """Type of the device that computes; `auto` takes the accelerator where there is one."""

    AUTO = "auto"
    NPU = "npu"
    CUDA = "cuda"
    CPU = "cpu"


class Dtype(Choice):
    """Type in which factors are stored or layers are computed."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def safetensors_name(self) -> str:
        """Name of the type in the header of a weight file."""
        return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[self]


class CoreType(Choice):
    """Encoding of cores as codes and scales.

    `w8` is int8 with one scale per output; `w4` and `w3` are 4 and 3 bits with one scale per output
    and group of 32 consecutive inputs, `w4-g128` and `w3-g128` of 128; `fp8` is float8_e4m3fn with
    one scale per output. None stores zero points.
    """

    W8 = "w8"
    W4 = "w4"
    W4_G128 = "w4-g128"
    W3 = "w3"
    W3_G128 = "w3-g128"
    FP8 = "fp8"

    @property
    def bits(self) -> int:
        """Bits per value, without scales."""
        return 8 if self == CoreType.FP8 else int(self[1])

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None if all of an output do."""
        if self.bits == 8:
            return None
        return 128 if self.endswith("-g128") else 32

    @property
    def word_codes(self) -> int:
        """Codes that are packed together, padded with zeros; see `words`."""
        return 1 if self.bits == 8 else 8

    def words(self, codes: int) -> int:
        """Integers that codes are stored as: eight of 4 bits as an int32, of 3 bits as 3 bytes."""
        return -(-codes // self.word_codes) * (3 if self.bits == 3 else 1)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if self == CoreType.FP8:
            return -448, 448
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


ENCODINGS = (None, CoreType.W8, CoreType.W4)
"""Encodings that every engine has products for, by falling bits; None is the type of the factors.

`fp8` has the bytes of `w8`, and rounds more coarsely: it is for who asks for it.
"""


def encodings_for(target: Target) -> tuple[CoreType | None, ...]:
    """Encodings that planners choose from: engines have 3 bits on CUDA only, we everywhere."""
    return (*ENCODINGS, CoreType.W3) if target == Target.FREE else ENCODINGS


class Part(Choice):
    """Part of a model that can be trained.

    `cores` and `factors` are those of the routed experts, `scales` those of quantised cores,
    `routers` the routers' weights and biases, `norms` all other norms.
    """

    CORES = "cores"
    FACTORS = "factors"
    SCALES = "scales"
    ROUTERS = "routers"
    NORMS = "norms"


class Engine(Choice):
    """Implementation of HOOI: our own, or TensorLy's as the slow reference."""

    TUCKERIZE = "tuckerize"
    TENSORLY = "tensorly"


class Mtp(Choice):
    """Treatment of layers that predict further tokens, where they are not compressed."""

    COPY = "copy"


class Joint(Choice):
    """Projections that share one U_I."""

    GATE_UP = "gate_up"


class Truncation(Choice):
    """Modes that a calibrated budget may truncate.

    `latent` truncates the hidden mode, `neurons` the width of the experts, `narrow-latent` both,
    with one size of the hidden mode, `full` all three modes of every stack. `auto` takes for each
    layer the one with the smallest predicted error.
    """

    AUTO = "auto"
    LATENT = "latent"
    NEURONS = "neurons"
    NARROW_LATENT = "narrow-latent"
    FULL = "full"


class Target(Choice):
    """Engines that a calibrated result is made for, which decides what may be truncated.

    `any-engine`: all experts of all layers equally wide and no factor, so that `reconstruct` writes
    a stock checkpoint of the family. `fused-kernels`: one width for a layer, and one latent size or
    none, for the fused-MoE kernels of engines with our plugin. `free`: each expert its own width,
    and any mode.
    """

    FREE = "free"
    FUSED_KERNELS = "fused-kernels"
    ANY_ENGINE = "any-engine"


class Allocation(Choice):
    """Distribution of a calibrated budget over the layers: by predicted error, or evenly."""

    ERROR = "error"
    UNIFORM = "uniform"


class Layout(Choice):
    """Split of a layer's tensors over tensor-parallel processes."""

    INTERMEDIATE = "intermediate"
    RANK = "rank"


class Mode(IntEnum):
    """A mode of a stack; the value is the tensor dimension."""

    EXPERT = 0
    INTERMEDIATE = 1
    HIDDEN = 2

    @property
    def factor_name(self) -> str:
        """Name of the mode's factor in code and on disk."""
        return ("U_E", "U_H", "U_I")[self]


class StackShape(NamedTuple):
    """Sizes (E, H, I) of the stack of one projection of the experts of one group."""

    experts: int
    intermediate: int
    hidden: int

    @property
    def parameters(self) -> int:
        """Parameters of the dense stack."""
        return math.prod(self)


def group_experts(shape: StackShape, group_size: int, group: int) -> range:
    """The experts of a group of a layer whose stacks have sizes (E, H, I)."""
    return range(group * group_size, min((group + 1) * group_size, shape.experts))


class MultilinearRank(NamedTuple):
    """Core sizes (r_E, r_H, r_I)."""

    expert: int
    intermediate: int
    hidden: int

    def truncated_modes(self, shape: StackShape) -> tuple[Mode, ...]:
        """Modes whose core size is below the mode's size: only these have a factor."""
        return tuple(mode for mode in Mode if self[mode] < shape[mode])

    def __str__(self) -> str:
        return ",".join(str(size) for size in self)


Cores = CoreType | dict[int, CoreType] | None
"""Encoding of a model's cores, or by layer; None, and layers that are left out: not quantised."""


def cores_by_layer(found: Mapping[int, CoreType | None]) -> Cores:
    """Encodings of a model's cores from those of its layers."""
    kinds = set(found.values())
    if len(kinds) == 1:
        return kinds.pop()
    return {layer: cores for layer, cores in found.items() if cores is not None}


def cores_of(cores: Cores, layer: int) -> CoreType | None:
    """Encoding of the cores of a layer."""
    return cores.get(layer) if isinstance(cores, dict) else cores


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters and bytes of the routed experts and of all tensors of a checkpoint."""

    routed_parameters: int
    routed_bytes: int
    total_parameters: int
    total_bytes: int

    def bits_per_weight(self, dense: Size) -> float:
        """Stored bits of the routed experts over the number of routed weights of a dense model."""
        return 8 * self.routed_bytes / dense.routed_parameters


Coupling = tuple[Projection, ...]
"""Projections that are decomposed together because they share one U_I; a lone one usually."""

GATE_UP: Coupling = (Projection.GATE, Projection.UP)
DOWN: Coupling = (Projection.DOWN,)

SHARED_U_I = "gate_up_proj"
"""Name of the module that holds the U_I of gate and up where they share one."""


def coupling_name(coupling: Coupling) -> str:
    """Name of a coupling in file names and tables: `gate_up_proj` or the projection's own."""
    return SHARED_U_I if len(coupling) > 1 else str(coupling[0])


@dataclass(frozen=True, slots=True)
class StackResult:
    """Result of the decomposition of one stack.

    Attributes:
        layer: Index of the layer in the model.
        group: Index of the group in the layer.
        projection: Which matrices of the experts.
        multilinear_rank: Core sizes (r_E, r_H, r_I).
        relative_residual: ‖X − X̂‖ / ‖X‖ of the weights as stored (unitless).
        sweeps: HOOI sweeps after the start.
    """

    layer: int
    group: int
    projection: Projection
    multilinear_rank: MultilinearRank
    relative_residual: float
    sweeps: int


class TensorHeader(NamedTuple):
    """Entry of one tensor in a weight file's header.

    Attributes:
        dtype: safetensors' name of the type: `BF16`, `F16`, `F32`, `F64`, …
        shape: Sizes of the dimensions.
        bytes: Bytes of the data.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)
