"""Sizes that fit onto devices: weights, key-value cache and overhead, from headers alone."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuckerize.domain import ENCODINGS, MultilinearRank, StackShape, Target, TensorHeader
from tuckerize.errors import UsageError
from tuckerize.moe.family import text_config
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.layouts import owned_slice
from tuckerize.parallel.memory import parse_bytes
from tuckerize.planning.uniform import BudgetUnit
from tuckerize.recipe import multiple_for
from tuckerize.report.plans import FitChoice, FitReport
from tuckerize.weight_types import WEIGHT_TYPES, WeightType, stored_bytes, stored_parameters

UNUSED_SHARE = 0.08
"""Share of a device that vLLM leaves alone by default (`gpu_memory_utilization` 0.92)."""

WORKING_SHARE = 0.04
"""Share of a device for activations and captured graphs: an estimate."""

_CACHE_BYTES = 2  # of a cached value: 16 bits
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_FUSED = ("qkv_proj.weight", "query_key_value.weight", "Wqkv.weight")
_CACHED = ("k_proj.weight", "v_proj.weight")
# Latents and index keys have no heads: every device keeps all of them.
_LATENT = ("kv_a_proj_with_mqa.weight", "indexer.wk.weight")
# Modules that engines keep whole on every device; towers of other modalities are so by our choice.
_TOWER = re.compile(r"visual|vision|audio")
_WHOLE = re.compile(rf"_a_proj|indexer|\.gate\.|router|{_TOWER.pattern}")


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices that serve a model with tensor parallelism.

    Attributes:
        count: Number of them.
        bytes: Memory of each.
    """

    count: int
    bytes: int

    @classmethod
    def parse(cls, text: str) -> Devices:
        """Read `4x32GiB`.

        Raises:
            UsageError: It is of another form.
        """
        match = re.fullmatch(r"(?:(\d+) ?[x×*] ?)?(.+)", text.strip())
        memory = parse_bytes(match[2]) if match else None
        if match is None or not memory or match[1] == "0":
            raise UsageError(
                f"--fit {text!r} is not a number of devices and their memory",
                hint="use the form 4x32GiB; the units are MB, MiB, GB, GiB and TiB",
            )
        return cls(int(match[1] or 1), memory)


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences that are served at the same time.

    Attributes:
        context: Tokens of each.
        sequences: Number of them.
    """

    context: int
    sequences: int


def fit_devices(source: SourceModel, devices: Devices, workload: Workload) -> FitReport:
    """The most bits per routed weight that fit onto devices.

    Everything but the routed experts keeps its format. Matrices are split over the devices, the
    experts on their neurons as `shard` does; norms, routers, latent projections, vision towers and
    U_I are whole on each.

    Args:
        source: The dense model.
        devices: The devices.
        workload: The sequences.

    Raises:
        UsageError: Not even the smallest experts fit, or they have no gate_proj.
    """
    source.require_gates()
    heads = _kv_heads(source.checkpoint.config)
    rest = _rest_bytes(source, devices.count, heads)
    cache, uncounted = _cache_bytes(source, devices.count, workload, heads)
    reserved = round(devices.bytes * (UNUSED_SHARE + WORKING_SHARE))
    left = devices.bytes - reserved - rest - cache
    weights = WEIGHT_TYPES[source.moe.dtype]
    choices = [
        choice
        for target in (Target.FREE, Target.ANY_ENGINE)
        for cores in ENCODINGS
        for choice in _largest(source, devices.count, left, replace(weights, cores=cores), target)
    ]
    free = [choice for choice in choices if choice.target == Target.FREE]
    if not free:
        raise UsageError(
            f"nothing fits: of {_size(devices.bytes)} per device, {_size(rest)} are what is not "
            f"routed experts, {_size(cache)} the key-value cache and {_size(reserved)} overhead",
            hint="use more devices, or fewer --sequences, or a shorter --context",
        )
    return FitReport(
        model=str(source.checkpoint.folder),
        devices=devices.count,
        device_bytes=devices.bytes,
        reserved_bytes=reserved,
        rest_bytes=rest,
        cache_bytes=cache,
        context=workload.context,
        sequences=workload.sequences,
        source_bits=8 * source.size.routed_bytes / source.size.routed_parameters,
        bits=_bits(free),
        choices=tuple(choices),
        notes=()
        if not uncounted
        else (
            f"{uncounted} layers have no keys and values that are known here (linear attention, "
            "a recurrent state): their state is not counted",
        ),
    )


def _bits(choices: Sequence[FitChoice]) -> float:
    """The most bits that fit whatever encodings a budget is spent on.

    The fewer bits the cores have, the larger is the share of U_I, which is whole on every device.
    """
    smallest = choices[-1]
    return max(choice.bits for choice in choices) if smallest.kept == 1 else smallest.bits


def _largest(
    source: SourceModel, devices: int, left: int, weights: WeightType, target: Target
) -> Iterator[FitChoice]:
    """The largest experts of an encoding that fit, if any do.

    With the target `free` their hidden mode is truncated, as without calibration: of all shapes
    with as many bytes it has the largest factors. With `any-engine` all are equally wide.
    """
    shape, layers = source.moe.shape, len(source.moe.layers)
    full, unit = shape.hidden, BudgetUnit(shape, 1, weights).step
    if target == Target.ANY_ENGINE:
        full = shape.intermediate
        unit = multiple_for(target, full, weights.cores)
    sizes = sorted({*range(unit, full, unit), full})

    def rank(size: int) -> MultilinearRank:
        if target == Target.ANY_ENGINE:
            return MultilinearRank(shape.experts, size, shape.hidden)
        return MultilinearRank(shape.experts, shape.intermediate, size)

    def on_device(size: int) -> int:
        return layers * _layer_bytes(shape, rank(size), weights, target, devices)

    if on_device(full) <= left:  # without a factor, full modes may be the smaller
        size = full
    else:
        place = bisect_right(sizes[:-1], left, key=on_device)
        if not place:
            return
        size = sizes[place - 1]
    own = _own_shape(shape, rank(size), target)
    parameters = sum(stored_parameters(own, rank(size), coupled=coupled) for coupled in (2, 1))
    whole = layers * _layer_bytes(shape, rank(size), weights, target, 1)
    yield FitChoice(
        target=target,
        cores=weights.cores,
        kept=parameters / (3 * shape.parameters),
        bits=8 * whole / source.moe.routed_parameters,
        device_bytes=on_device(size),
        total_bytes=source.size.total_bytes - source.size.routed_bytes + whole,
    )


def _own_shape(shape: StackShape, rank: MultilinearRank, target: Target) -> StackShape:
    """Sizes of the stacks: narrowed experts are dense ones of fewer neurons."""
    if target == Target.ANY_ENGINE:
        return shape._replace(intermediate=rank.intermediate)
    return shape


def _layer_bytes(
    shape: StackShape, rank: MultilinearRank, weights: WeightType, target: Target, devices: int
) -> int:
    """Bytes of a layer's experts on the device that has the most."""
    unit = (weights.cores and weights.cores.group_size) or 1
    width = owned_slice(rank.intermediate, devices, 0, unit).length
    own = _own_shape(shape, rank, target)
    total = 0
    for coupled, transposed in ((2, False), (1, True)):
        whole = stored_bytes(own, rank, weights, coupled=coupled, transposed=transposed)
        cores = coupled * weights.core_bytes(rank, transposed=transposed)
        part = rank._replace(intermediate=width)
        total += whole - cores + coupled * weights.core_bytes(part, transposed=transposed)
    return total


def _rest_bytes(source: SourceModel, devices: int, heads: int | None) -> int:
    """Bytes on a device of everything but the routed experts and further layers."""
    total = 0.0
    for name, header in source.checkpoint.tensors.items():
        if source.moe.is_routed(name):
            continue
        if len(header.shape) < 2 or _WHOLE.search(name):  # no matrix
            parts = 1
        elif name.endswith(_CACHED) and heads:
            parts = min(devices, heads)
        else:
            parts = devices
        total += header.bytes / parts
    return round(total)


def _cache_bytes(
    source: SourceModel, devices: int, workload: Workload, heads: int | None
) -> tuple[int, int]:
    """Bytes of the key-value cache on a device, and the number of layers that are not counted."""
    config = text_config(source.checkpoint.config)
    layers: dict[int, float] = {}
    for name, header in source.checkpoint.tensors.items():
        found = _LAYER.search(name)
        values = _cached_values(name, header, config, devices, heads)
        if (
            found
            and values
            and not _WHOLE.search(name.replace("_a_proj", "").replace("indexer", ""))
        ):
            layers[int(found[1])] = layers.get(int(found[1]), 0) + values
    depth = config.get("num_hidden_layers")
    depth = depth if isinstance(depth, int) else len(layers)
    kinds = config.get("layer_types")
    total = 0.0
    for layer in (layer for layer in layers if layer < depth):
        kind = kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else ""
        window = config.get("sliding_window") if "sliding" in str(kind) else None
        if "chunked" in str(kind):
            window = config.get("attention_chunk_size")
        kept = min(workload.context, window) if isinstance(window, int) else workload.context
        total += layers[layer] * kept * workload.sequences * _CACHE_BYTES
    return round(total), depth - sum(layer < depth for layer in layers)


def _cached_values(
    name: str, header: TensorHeader, config: Mapping[str, Any], devices: int, heads: int | None
) -> float:
    """Values that a device keeps of a token, of the output of a projection."""
    rows = header.shape[0]
    if name.endswith(_LATENT):
        return rows
    parts = min(devices, heads) if heads else devices
    if name.endswith(_CACHED):
        return rows / parts
    queries = config.get("num_attention_heads")
    if name.endswith(_FUSED) and heads and isinstance(queries, int):
        return rows * 2 * heads / (queries + 2 * heads) / parts
    return 0


def _kv_heads(config: Mapping[str, Any]) -> int | None:
    own = text_config(config)
    heads = own.get("num_key_value_heads", own.get("num_attention_heads"))
    return heads if isinstance(heads, int) and heads > 0 else None


def _size(count: int) -> str:
    unit, size = ("GiB", 2**30) if count >= 2**30 else ("MiB", 2**20)
    return f"{count / size:.1f} {unit}"
