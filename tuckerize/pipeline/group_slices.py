"""Split of the tensors of one group over the processes of a mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from tuckerize.domain import Layout, TensorHeader
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.names import TensorName
from tuckerize.parallel.layouts import (
    Parallelism,
    Slice,
    SplitDimensions,
    owned_slice,
    owners_of,
    split_dimensions,
)


@dataclass(frozen=True, slots=True)
class GroupSlices:
    """Split of the tensors of one group over the processes of a mesh.

    Attributes:
        headers: The tensors.
        cuts: Their dimensions that are split.
        tp: Tensor-parallel processes.
        owners: Expert-parallel processes that share the group.
        experts: Experts of the group.
    """

    headers: Mapping[TensorName, TensorHeader]
    cuts: Mapping[TensorName, SplitDimensions]
    tp: int
    owners: range
    experts: int

    def parts(self, ep_rank: int, tp_rank: int) -> dict[TensorName, list[Slice]]:
        """Slices, one per dimension, of the tensors of which a process owns a part."""
        found = {}
        place = self.owners.index(ep_rank)
        own = owned_slice(self.experts, len(self.owners), place)
        for name, header in self.headers.items():
            if name.expert is None or own.start <= name.expert < own.stop:
                parts = [Slice(0, size) for size in header.shape]
                tp, experts, unit = self.cuts[name]
                if tp is not None:
                    parts[tp] = owned_slice(header.shape[tp], self.tp, tp_rank, unit)
                if experts is not None:
                    parts[experts] = own
                found[name] = parts
        return found

    def bytes_of(self, ep_rank: int) -> int:
        """Bytes of the largest process of an expert-parallel rank, its first."""
        if ep_rank not in self.owners:
            return 0
        return sum(
            self.headers[name].bytes
            // self.headers[name].parameters
            * math.prod(part.length for part in parts)
            for name, parts in self.parts(ep_rank, 0).items()
        )

    @property
    def bytes(self) -> int:
        """Bytes of the files of all processes."""
        return sum(
            self.headers[name].bytes
            // self.headers[name].parameters
            * math.prod(part.length for part in parts)
            for ep_rank, tp_rank in itertools.product(self.owners, range(self.tp))
            for name, parts in self.parts(ep_rank, tp_rank).items()
        )

    @property
    def uneven(self) -> list[TensorName]:
        """Tensors with a size that the processes do not divide."""
        return [
            name
            for name, cut in self.cuts.items()
            if cut.tp is not None and self.headers[name].shape[cut.tp] % (self.tp * cut.unit)
        ]


def slices_of(
    tucker: TuckerCheckpoint, layer: int, group: int, layout: Layout, mesh: Parallelism
) -> GroupSlices:
    """Split of a group of a checkpoint over the processes of a mesh."""
    sizes = tucker.manifest.layer_shape(layer)
    headers = tucker.group_headers(layer, group)
    return GroupSlices(
        headers,
        {
            name: split_dimensions(layout, name, sizes.ranks[group], sizes.shape, sizes.core_type)
            for name in headers
        },
        mesh.tp,
        owners_of(group, groups=len(sizes.ranks), ep=mesh.ep),
        sizes.shape.experts,
    )
