"""Under torchrun: verify with a published sharding bug planted in a copy of the layer.

The layer cuts both factors by columns, completes only the middle by an all-reduce, and returns what
its own columns give: a partial gate and up goes into the activation, and a partial down out of the
layer. Usage: seed_layer.py columns|no-last-sum verify OUT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tuckerize.moe.family import Glu
from tuckerize.runtime.activations import activation_of

sys.path.insert(0, str(Path(__file__).parents[2]))

from tuckerize.ascend.dispatch import FusedPair
from tuckerize.cli import main
from tuckerize.domain import Projection
from tuckerize.format.shards import Sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.collectives import all_reduce
from tuckerize.parallel.layouts import owned_slice
from tuckerize.parallel.mesh import Axis, Position
from tuckerize.pipeline.verify import verification as verify
from tuckerize.runtime import exchange
from tuckerize.runtime.exchange import Combine, RankExchange, ReplicatedDispatch, Tokens
from tuckerize.runtime.experts import TuckerExperts, TuckerStack
from tuckerize.runtime.grouped import Assignments, assign


class SeedExperts(TuckerExperts):
    """The published layer, for one group: whole cores, factors cut by columns, one all-reduce."""

    @classmethod
    def of_layer(
        cls, sharding: Sharding, layer: int, position: Position, *, fused: FusedPair | None
    ) -> SeedExperts:
        """The published layer loads whole factors and cuts them itself."""
        del fused
        tucker = TuckerCheckpoint.open(sharding.checkpoint)
        return cls(
            [tucker.read_group(layer, 0)],
            group_size=tucker.manifest.group_size,
            activation=activation_of(Glu()),
            exchange=RankExchange(tp=position.tp),
        )

    def forward(self, x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """Routed output as that layer computes it."""
        (group,) = self.groups
        rows = assign(experts_Tk, range(self.group_size))
        x_NI = x_TI[rows.tokens_N]
        gate_NH = self._project(x_NI, group.stack(Projection.GATE), rows, down=False)
        up_NH = self._project(x_NI, group.stack(Projection.UP), rows, down=False)
        neurons_NH = self.activation(gate_NH, up_NH)
        result_NI = self._project(neurons_NH, group.stack(Projection.DOWN), rows, down=True)
        return rows.sum_over_experts(result_NI, weights_Tk)

    def _project(
        self, x_NX: Tensor, stack: TuckerStack, rows: Assignments, *, down: bool
    ) -> Tensor:
        if stack.U_H is None or stack.U_I is None or not isinstance(self.exchange, RankExchange):
            raise TypeError("the planted bug needs both factors and the rank layout")
        near, far = (stack.U_H, stack.U_I) if down else (stack.U_I, stack.U_H)
        tp = self.exchange.tp
        own_near, own_far = (_own_columns(factor, tp) for factor in (near, far))
        low_NR = torch.zeros(len(x_NX), near.shape[1])
        # The process's columns of the core are those that its columns of the factor belong to.
        low_NR[:, own_near] = x_NX @ near.float()[:, own_near]
        (middle,) = all_reduce([stack.multiply(low_NR, rows, transposed=down)], tp)
        return middle[:, own_far] @ far.float()[:, own_far].T


class NoLastSum(ReplicatedDispatch):
    """Our layer without the last all-reduce."""

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """Keep the partial sums."""
        return tokens, _keep


def _keep(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return outputs


def _own_columns(factor: Tensor, tp: Axis) -> slice:
    own = owned_slice(factor.shape[1], tp.size, tp.rank)
    return slice(own.start, own.stop)


if __name__ == "__main__":
    if sys.argv.pop(1) == "columns":
        vars(verify)["ShardedExperts"] = SeedExperts
    else:
        vars(exchange)["ReplicatedDispatch"] = NoLastSum
    main()
