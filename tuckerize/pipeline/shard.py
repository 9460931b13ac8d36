"""Cut a Tucker checkpoint into one file per layer, group and process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import tuckerize
from tuckerize.checkpoint.manifest import ShardManifest, ShardRecord
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import MultilinearRank, Projection, TensorHeader
from tuckerize.errors import UsageError
from tuckerize.parallel.layouts import (
    Layout,
    Traffic,
    layer_traffic,
    part,
    smallest_split_size,
    split_dimension,
)
from tuckerize.pipeline.opened import OpenedTucker
from tuckerize.report import LayoutCost, Progress, ShardReport
from tuckerize.runtime.experts import SHARED_U_I

# What torch.distributed.checkpoint.hf_storage looks for in a safetensors header.
DCP_VERSION = "1.0"

# A layout may store this much more than the smallest before its traffic stops mattering.
_BYTES_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class _Slices:
    """How the tensors of one group are split."""

    dimensions: Mapping[str, int | None]
    headers: Mapping[str, TensorHeader]

    def offsets(self, name: str, tp_size: int, tp_rank: int) -> list[int]:
        """First index of a process's slice in every dimension."""
        offsets = [0] * len(self.headers[name].shape)
        dimension = self.dimensions[name]
        if dimension is not None:
            size = self.headers[name].shape[dimension]
            offsets[dimension] = part(size, tp_size, tp_rank).start
        return offsets

    def own(self, name: str, tensor: Tensor, tp_size: int, tp_rank: int) -> Tensor:
        """A process's slice of a tensor."""
        dimension = self.dimensions[name]
        if dimension is None:
            return tensor
        return tensor.narrow(dimension, *part(tensor.shape[dimension], tp_size, tp_rank))

    def bytes_of_largest(self, tp_size: int) -> int:
        """Bytes that process 0, which owns the most, holds."""
        total = 0
        for name, header in self.headers.items():
            dimension = self.dimensions[name]
            if dimension is None:
                total += header.bytes
            else:
                size = header.shape[dimension]
                total += header.bytes // size * part(size, tp_size, 0).length
        return total

    def uneven(self, tp_size: int) -> list[str]:
        """Tensors with a size that the processes do not divide."""
        return [
            name
            for name, dimension in self.dimensions.items()
            if dimension is not None and self.headers[name].shape[dimension] % tp_size
        ]


def choose_layout(tucker: OpenedTucker, tp_size: int, layout: Layout | None) -> Layout:
    """The layout that was asked for, or the best: the fewest bytes a process, then least traffic.

    Raises:
        UsageError: Some process would own nothing, or the layout needs experts of equal width.
    """
    if tp_size < 1:
        raise UsageError(f"--tp {tp_size} is not a number of processes", hint="use --tp 1 or more")
    if layout is None:
        costs = layout_costs(tucker, tp_size)
        least = min(cost.bytes_per_process for cost in costs)
        affordable = [c for c in costs if c.bytes_per_process <= least * _BYTES_MARGIN]
        layout = Layout(min(affordable, key=lambda cost: cost.traffic_per_token).layout)
    if layout not in _layouts(tucker):
        raise UsageError(
            f"layout '{layout}' splits experts of equal width only, and calibration gave these "
            "different ones",
            hint=f"use --layout {Layout.INTERMEDIATE}",
        )
    smallest = min(
        min(
            smallest_split_size(layout, ranks, tucker.manifest.stack_shape(layer)),
            *tucker.manifest.widths(layer, group),
        )
        for layer in tucker.manifest.layers
        for group, ranks in enumerate(tucker.ranks(layer))
    )
    if tp_size > smallest:
        raise UsageError(
            f"layout '{layout}' splits a size of {smallest}, which is not enough for {tp_size} "
            "processes",
            hint=f"use --tp {smallest} or less, or another layout",
        )
    return layout


def _layouts(tucker: OpenedTucker) -> tuple[Layout, ...]:
    """The layouts that can split the checkpoint."""
    manifest = tucker.manifest
    places = [(layer, group) for layer in manifest.layers for group in range(manifest.groups)]
    equal = all(len(set(manifest.widths(*place))) == 1 for place in places)
    return tuple(Layout) if equal else (Layout.INTERMEDIATE,)


def layout_costs(tucker: OpenedTucker, tp_size: int) -> tuple[LayoutCost, ...]:
    """Bytes a process and traffic a token of every layout that can split the checkpoint."""
    number = _number_bytes(tucker)
    costs = []
    for layout in _layouts(tucker):
        stored, sent = 0, 0.0
        for layer in tucker.manifest.layers:
            for group in range(tucker.manifest.groups):
                stored += _slices(tucker, layer, group, layout).bytes_of_largest(tp_size)
            traffic = layer_traffic(
                layout,
                tucker.ranks(layer),
                tucker.manifest.stack_shape(layer),
                top_k=_top_k(tucker),
            )
            sent += traffic.sent_numbers(tp_size) * number
        costs.append(LayoutCost(layout, stored, sent))
    return tuple(costs)


def shard(
    tucker: OpenedTucker,
    *,
    tp_size: int,
    layout: Layout | None,
    overwrite: bool,
    progress: Progress,
) -> ShardReport:
    """Write the shards of one tensor-parallel mesh to `tp<size>/` in the checkpoint's folder.

    Args:
        tucker: The Tucker checkpoint.
        tp_size: Number of processes.
        layout: How tensors are split; None chooses.
        overwrite: Replace a sharding of the same mesh.
        progress: Shows how far the work is.

    Raises:
        UsageError: The mesh is too large for a split size.
        OutputError: The mesh is sharded already.
    """
    chosen = choose_layout(tucker, tp_size, layout)
    folder = OutputFolder(tucker.folder / f"tp{tp_size}")
    folder.claim(
        {
            "tuckerize_version": tuckerize.__version__,
            "tucker_manifest_sha256": tucker.manifest_sha256,
            "tp_size": tp_size,
            "layout": chosen,
        },
        overwrite=overwrite,
    )
    places = [(la, gr) for la in tucker.manifest.layers for gr in range(tucker.manifest.groups)]
    progress.start(len(places))
    shards, uneven = [], []
    for layer, group in places:
        piece = f"layer-{layer:05d}-group-{group:04d}"
        record = folder.record(piece)
        if record is None:
            record = {"shards": _write_group(tucker, layer, group, chosen, folder, tp_size)}
            folder.write_record(piece, record)
        shards += [ShardRecord.model_validate(entry) for entry in record["shards"]]
        prefix = tucker.group_prefix(layer, group)
        uneven += [prefix + n for n in _slices(tucker, layer, group, chosen).uneven(tp_size)]
        progress.advance(1, piece)
    progress.close()
    manifest = ShardManifest(
        tuckerize_version=tuckerize.__version__,
        layout=chosen.value,
        tp_size=tp_size,
        tucker_manifest_sha256=tucker.manifest_sha256,
        uneven=tuple(uneven),
        shards=tuple(shards),
    )
    folder.finish(manifest.model_dump(mode="json"))
    dense = Traffic(float(tucker.manifest.shape.hidden), 0.0).sent_numbers(tp_size)
    return ShardReport(
        folder=str(folder.folder),
        tp_size=tp_size,
        layout=chosen,
        costs=layout_costs(tucker, tp_size),
        dense_traffic_per_token=dense * _number_bytes(tucker) * len(tucker.manifest.layers),
        uneven=tuple(uneven),
        files=len(shards),
    )


def _write_group(
    tucker: OpenedTucker,
    layer: int,
    group: int,
    layout: Layout,
    folder: OutputFolder,
    tp_size: int,
) -> list[object]:
    """Write the files of one group, one a process; returns their records."""
    slices = _slices(tucker, layer, group, layout)
    tensors = tucker.read_group(layer, group)
    prefix = tucker.group_prefix(layer, group)
    records: list[object] = []
    for tp_rank in range(tp_size):
        name = f"layer-{layer:05d}-group-{group:04d}-rank-{tp_rank:05d}-of-{tp_size:05d}"
        sharding = {
            prefix + tensor: {"saved_offsets": slices.offsets(tensor, tp_size, tp_rank)}
            for tensor in tensors
        }
        file = write_tensors(
            folder.folder / f"{name}.safetensors",
            {prefix + n: slices.own(n, t, tp_size, tp_rank) for n, t in tensors.items()},
            {
                "DCP_VERSION": DCP_VERSION,
                "DCP_SHARDING_INFO": json.dumps(sharding),
                "layout": layout,
                "tp_rank": str(tp_rank),
                "tp_size": str(tp_size),
            },
        )
        record = ShardRecord(layer=layer, group=group, tp_rank=tp_rank, file=file)
        records.append(record.model_dump(mode="json"))
    return records


def _slices(tucker: OpenedTucker, layer: int, group: int, layout: Layout) -> _Slices:
    headers = tucker.group_headers(layer, group)
    ranks: dict[Projection, MultilinearRank] = tucker.ranks(layer)[group]
    dimensions = {}
    for name in headers:
        owner, _, tensor = name.partition(".")
        projection = Projection.GATE if owner == SHARED_U_I else Projection(owner)
        dimensions[name] = split_dimension(
            layout, projection, tensor, ranks[projection], tucker.manifest.stack_shape(layer)
        )
    return _Slices(dimensions, headers)


def _number_bytes(tucker: OpenedTucker) -> int:
    """Bytes of one activation: it has the type of the weights."""
    header = next(iter(tucker.group_headers(tucker.manifest.layers[0], 0).values()))
    return header.bytes // header.parameters


def _top_k(tucker: OpenedTucker) -> int:
    return tucker.family.routing(tucker.config).top_k
