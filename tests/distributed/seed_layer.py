"""Under torchrun: verify with the sharding bug of a published layer planted in a copy of ours.

The layer cuts U_H and U_I by columns, completes only the middle, and never sums its output, so every
process feeds a partial sum into the activation. Usage: seed_layer.py OUT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tuckerize.cli import main
from tuckerize.domain import Projection
from tuckerize.parallel.collectives import all_reduce
from tuckerize.parallel.layouts import part
from tuckerize.pipeline import verify
from tuckerize.runtime import experts
from tuckerize.runtime.exchange import Exchange, RankExchange

SHARDS_ARE_RIGHT = "--correct" in sys.argv


class SeedExperts(experts.TuckerExperts):
    """Our layer, but gate and up multiply their own columns of U_H and forget the others."""

    def _gate_up(self, x_TI: Tensor, assigned: list[experts.Assignments]) -> list[Tensor]:
        exchange = self.exchange
        if not isinstance(exchange, RankExchange):
            raise TypeError("the planted bug is one of the rank layout")
        neurons = []
        for group, rows in zip(self.groups, assigned, strict=True):
            halves = []
            for projection in (Projection.GATE, Projection.UP):
                stack, U_I = group.stack(projection), group.hidden_factor(projection)
                if U_I is None or stack.U_H is None:
                    raise TypeError("the planted bug needs U_I and U_H")
                low = (x_TI @ U_I.to(x_TI.dtype))[rows.tokens]
                (middle,) = all_reduce([stack.multiply(low, rows.counts, transposed=False)])
                own = part(middle.shape[1], exchange.tp_size, exchange.tp_rank)
                mine = slice(own.start, own.stop)
                halves.append(middle[:, mine] @ stack.U_H.to(x_TI.dtype)[:, mine].T)
            neurons.append(self.activation(halves[0]) * halves[1])
        return neurons


class NoLastSum(RankExchange):
    """Forgets the last all-reduce."""

    def output(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Keep the partial sums."""
        return outputs


def forgetful_exchange(layout: object, *, tp_size: int, tp_rank: int) -> Exchange:
    """The exchange of the rank layout without its last sum."""
    del layout
    return NoLastSum(tp_size, tp_rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    which = sys.argv.pop(1)
    if which == "columns":
        verify.TuckerExperts = SeedExperts  # type: ignore[misc]
    elif which == "no-last-sum":
        verify.exchange_for = forgetful_exchange  # type: ignore[assignment]
    main()
