"""Cut a Tucker checkpoint into one file per layer, group and process."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.space import require_space
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import CoreType, Layout, MultilinearRank, Projection, cores_of
from tuckerize.errors import UsageError
from tuckerize.format.manifest import (
    ShardManifest,
    ShardRecord,
    TuckerManifest,
    read_shard_manifest,
    sealed,
    shard_file_name,
    sharding_name,
)
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.layouts import (
    LayerShape,
    Parallelism,
    even_load,
    layer_traffic,
    smallest_split_size,
)
from tuckerize.pipeline.group_slices import slices_of
from tuckerize.progress import Progress, SilentProgress
from tuckerize.report.results import LayoutCost, ShardReport
from tuckerize.version import __version__
from tuckerize.weight_types import WEIGHT_TYPES

# Version that torch.distributed.checkpoint.hf_storage expects in a safetensors header.
DCP_VERSION = "1.0"

# A layout may store this much more than the smallest before its traffic stops mattering.
_BYTES_MARGIN = 1.1


def choose_layout(tucker: TuckerCheckpoint, mesh: Parallelism, layout: Layout | None) -> Layout:
    """The requested layout, or the best: fewest bytes per process, then least traffic.

    Raises:
        UsageError: Some process would own nothing, experts do not divide, or the layout needs
            experts of equal width.
    """
    for option, size in (("--tp", mesh.tp), ("--ep", mesh.ep)):
        if size < 1:
            raise UsageError(
                f"{option} {size} is not a number of processes", hint=f"use {option} 1 or more"
            )
    _check_experts_divide(tucker, mesh.ep)
    if tucker.family.storage.biased and tucker.manifest.groups > 1 and mesh.ep > 1:
        raise UsageError(
            f"--ep {mesh.ep} shares out the groups of a layer, and every process needs the biases "
            "of all experts",
            hint="use --ep 1, or decompose with one group per layer",
        )
    if layout is None:
        costs = layout_costs(tucker, mesh)
        least = min(cost.bytes_per_process for cost in costs)
        affordable = [c for c in costs if c.bytes_per_process <= least * _BYTES_MARGIN]
        layout = Layout(min(affordable, key=lambda cost: cost.traffic_per_token).layout)
    if layout not in _layouts(tucker):
        raise UsageError(
            f"layout '{layout}' splits cores that are not quantised only, and these are"
            if tucker.manifest.cores
            else f"layout '{layout}' splits experts of equal width only, and calibration gave "
            "these different ones",
            hint=f"use --layout {Layout.INTERMEDIATE}",
        )
    manifest = tucker.manifest
    smallest = min(
        smallest_split_size(
            layout,
            ranks,
            manifest.shape._replace(intermediate=max(manifest.widths(layer, group))),
            cores_of(manifest.cores, layer),
        )
        for layer in manifest.layers
        for group, ranks in enumerate(manifest.ranks(layer))
    )
    if mesh.tp > smallest:
        other = ", or another layout"
        if manifest.cores:
            cores = {cores_of(manifest.cores, layer) for layer in manifest.layers}
            of_128 = cores & {CoreType.W4_G128, CoreType.W3_G128}
            other = ", or decompose in groups of 32 (--quantize w4)" if of_128 else ""
        raise UsageError(
            f"layout '{layout}' splits a size of {smallest}, which is not enough for {mesh.tp} "
            "processes",
            hint=f"use --tp {smallest} or less{other}",
        )
    return layout


def _check_experts_divide(tucker: TuckerCheckpoint, ep: int) -> None:
    """Refuse expert-parallel processes that would own unequally many experts, as Megatron does."""
    groups = tucker.manifest.groups
    count, what = (groups, "groups") if groups > 1 else (tucker.manifest.shape.experts, "experts")
    if count % ep:
        fitting = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
        raise UsageError(
            f"--ep {ep} does not divide the {count} {what} of a layer",
            hint=f"--ep can be {fitting}",
        )


def _layouts(tucker: TuckerCheckpoint) -> tuple[Layout, ...]:
    """The layouts that can split the checkpoint."""
    manifest = tucker.manifest
    places = [(layer, group) for layer in manifest.layers for group in range(manifest.groups)]
    equal = all(len(set(manifest.widths(*place))) == 1 for place in places)
    return tuple(Layout) if equal and not manifest.cores else (Layout.INTERMEDIATE,)


def layout_costs(tucker: TuckerCheckpoint, mesh: Parallelism) -> tuple[LayoutCost, ...]:
    """Bytes per process and traffic per token of every layout that can split the checkpoint."""
    costs = []
    for layout in _layouts(tucker):
        slices = [
            slices_of(tucker, layer, group, layout, mesh)
            for layer in tucker.manifest.layers
            for group in range(tucker.manifest.groups)
        ]
        stored = max(sum(s.bytes_of(ep_rank) for s in slices) for ep_rank in range(mesh.ep))
        sizes = [tucker.manifest.layer_shape(layer) for layer in tucker.manifest.layers]
        costs.append(LayoutCost(layout, stored, _traffic(tucker, layout, sizes, mesh)))
    return tuple(costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRequest:
    """A sharding to write.

    Attributes:
        folder: The Tucker checkpoint.
        tp: Tensor-parallel processes.
        ep: Expert-parallel processes.
        layout: "intermediate" or "rank": how tensors are split; by default the one with the fewest
            bytes per process, then the least traffic.
        overwrite: Begin anew: replace a sharding of the same mesh, finished or not.
    """

    folder: str | Path
    tp: int
    ep: int = 1
    layout: str | None = None
    overwrite: bool = False


def shard(request: ShardRequest, progress: Progress | None = None) -> ShardReport:
    """Cut a Tucker checkpoint into one file per layer, group and process.

    Args:
        request: The sharding.
        progress: Shows how far the work is.

    Raises:
        UsageError: The mesh is too large for a split size, or does not divide the experts.
        OutputError: The mesh is sharded already.

    Example:
        >>> shard(ShardRequest(folder="OUT", tp=4)).folder  # doctest: +SKIP
        'OUT/tp4'
    """
    return write_shards(
        TuckerCheckpoint.open(Path(request.folder)),
        mesh=Parallelism(request.tp, request.ep),
        layout=None if request.layout is None else Layout.parse(request.layout),
        overwrite=request.overwrite,
        progress=progress or SilentProgress(),
    )


def write_shards(
    tucker: TuckerCheckpoint,
    *,
    mesh: Parallelism,
    layout: Layout | None,
    overwrite: bool,
    progress: Progress,
) -> ShardReport:
    """Write the shards of one mesh to a folder in the checkpoint's: `tp4/`, `tp2-ep2/`.

    Args:
        tucker: The Tucker checkpoint.
        mesh: The processes.
        layout: How tensors are split; None chooses.
        overwrite: Begin anew: replace a sharding of the same mesh, finished or not.
        progress: Shows how far the work is.

    Raises:
        UsageError: The mesh is too large for a split size, or does not divide the experts.
        OutputError: The mesh is sharded already.
    """
    chosen = choose_layout(tucker, mesh, layout)
    folder = OutputFolder(tucker.folder / sharding_name(tp=mesh.tp, ep=mesh.ep))
    plan = {
        "tuckerize_version": __version__,
        "tucker_manifest_sha256": tucker.manifest_sha256,
        "tp_size": mesh.tp,
        "ep_size": mesh.ep,
        "layout": chosen,
    }
    with folder.claim(plan, overwrite=overwrite, read=progress.advance):
        if folder.is_finished:  # by a run that was killed at its very end
            folder.tidy()
            manifest = read_shard_manifest(folder.folder)
        else:
            manifest = _write_all(tucker, chosen, folder, mesh, progress)
            folder.finish(sealed(manifest))
    dense = [dense_sizes(tucker.manifest)] * len(tucker.manifest.layers)
    return ShardReport(
        folder=str(folder.folder),
        tp_size=mesh.tp,
        ep_size=mesh.ep,
        layout=chosen,
        costs=layout_costs(tucker, mesh),
        dense_traffic_per_token=_traffic(tucker, Layout.INTERMEDIATE, dense, mesh),
        uneven=manifest.uneven,
        files=len(manifest.shards),
    )


def _write_all(
    tucker: TuckerCheckpoint,
    layout: Layout,
    folder: OutputFolder,
    mesh: Parallelism,
    progress: Progress,
) -> ShardManifest:
    """Write the files of all groups that are not written yet; returns the manifest."""
    places = [(la, gr) for la in tucker.manifest.layers for gr in range(tucker.manifest.groups)]
    every = [slices_of(tucker, layer, group, layout, mesh) for layer, group in places]
    require_space(folder.folder, sum(slices.bytes for slices in every))
    progress.start(len(places))
    shards, uneven = [], []
    for (layer, group), slices in zip(places, every, strict=True):
        piece = f"layer-{layer:05d}-group-{group:04d}"
        entries = folder.record(piece)
        own = [ShardRecord.model_validate(entry) for entry in entries or ()]
        if entries is None:
            own = _write_group(tucker, layer, group, layout, folder, mesh)
            values = [record.model_dump(mode="json") for record in own]
            folder.write_record(piece, values, [record.file for record in own])
        shards += own
        experts = tucker.family.experts_prefix(layer)
        uneven += [str(name.within(group, experts)) for name in slices.uneven]
        progress.advance(1, piece)
    progress.close()
    return ShardManifest(
        tuckerize_version=__version__,
        layout=layout,
        tp_size=mesh.tp,
        ep_size=mesh.ep,
        tucker_manifest_sha256=tucker.manifest_sha256,
        uneven=tuple(uneven),
        shards=tuple(shards),
    )


def dense_sizes(manifest: TuckerManifest) -> LayerShape:
    """A layer of the dense model, which Megatron splits as the `intermediate` layout does."""
    ranks = dict.fromkeys(Projection, MultilinearRank(*manifest.shape))
    return LayerShape([ranks], manifest.shape, joint=False)


def _write_group(
    tucker: TuckerCheckpoint,
    layer: int,
    group: int,
    layout: Layout,
    folder: OutputFolder,
    mesh: Parallelism,
) -> list[ShardRecord]:
    """Write the files of one group, one for each process that owns some of it; their records."""
    slices = slices_of(tucker, layer, group, layout, mesh)
    tensors = tucker.read_group(layer, group)
    experts = tucker.family.experts_prefix(layer)
    records = []
    for ep_rank, tp_rank in itertools.product(slices.owners, range(mesh.tp)):
        rank, size = ep_rank * mesh.tp + tp_rank, mesh.ep * mesh.tp
        name = shard_file_name(layer, group, rank=rank, size=size)
        parts = slices.parts(ep_rank, tp_rank)
        sharding = {
            str(tensor.within(group, experts)): {"saved_offsets": [part.start for part in own]}
            for tensor, own in parts.items()
        }
        file = write_tensors(
            folder.folder / name,
            {
                str(tensor.within(group, experts)): tensors[tensor][
                    tuple(slice(p.start, p.stop) for p in own)
                ]
                for tensor, own in parts.items()
            },
            {
                "DCP_VERSION": DCP_VERSION,
                "DCP_SHARDING_INFO": json.dumps(sharding),
                "layout": layout,
                "tp_rank": str(tp_rank),
                "tp_size": str(mesh.tp),
                "ep_rank": str(ep_rank),
                "ep_size": str(mesh.ep),
            },
        )
        records.append(
            ShardRecord(layer=layer, group=group, tp_rank=tp_rank, ep_rank=ep_rank, file=file)
        )
    return records


def _traffic(
    tucker: TuckerCheckpoint, layout: Layout, layers: Sequence[LayerShape], mesh: Parallelism
) -> float:
    """Bytes that a process sends per token through layers, with an even router."""
    # Activations have the type of the factors.
    value_bytes = WEIGHT_TYPES[tucker.manifest.dtype].bits // 8
    top_k = tucker.family.routing(tucker.config).top_k
    return math.fsum(
        sum(
            layer_traffic(
                layout,
                sizes,
                mesh,
                even_load(top_k, experts=sizes.experts, groups=len(sizes.ranks), ep=mesh.ep),
                value_bytes=value_bytes,
            ).values()
        )
        for sizes in layers
    )
