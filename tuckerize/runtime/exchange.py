"""What the processes of a layout exchange between the steps of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tuckerize.parallel.collectives import all_reduce, reduce_scatter_columns
from tuckerize.parallel.layouts import Layout, part

Matrices = Sequence[Tensor]


class Exchange:
    """A process that owns everything and exchanges nothing; layouts override what they need.

    `truncated` says of each matrix whether its columns are the r_H core sizes of a truncated
    intermediate mode, in front of or behind a U_H, or the H neurons themselves.
    """

    def own_hidden(self, x_TI: Tensor) -> Tensor:
        """The part of the tokens that the process's cores of gate and up work on without U_I."""
        return x_TI

    def gate_up(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:  # noqa: ARG002
        """Complete the products of the cores of gate and up."""
        return middles

    def down(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:  # noqa: ARG002
        """Complete what the core of down works on."""
        return middles

    def output(self, outputs: Matrices) -> Matrices:
        """Complete the outputs."""
        return outputs


class IntermediateExchange(Exchange):
    """Megatron's layout: behind the activation everything is linear in a process's own neurons."""

    def output(self, outputs: Matrices) -> Matrices:
        """Sum over the processes."""
        return all_reduce(outputs)


class RankExchange(Exchange):
    """The rank layout: cores are split, so what they and the U_H of down give are partial sums."""

    def __init__(self, tp_size: int, tp_rank: int) -> None:
        self.tp_size = tp_size
        self.tp_rank = tp_rank

    def own_hidden(self, x_TI: Tensor) -> Tensor:
        """The columns that the process's slice of the cores belongs to."""
        own = part(x_TI.shape[1], self.tp_size, self.tp_rank)
        return x_TI[:, own.start : own.stop]

    def gate_up(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:
        """Sum: to all core sizes where U_H follows, to the process's own neurons where not."""
        return _by_kind(middles, truncated, all_reduce, self._reduce_scatter)

    def down(self, middles: Matrices, truncated: Sequence[bool]) -> Matrices:
        """Sum to the process's own core rows; without U_H its neurons are these rows already."""
        return _by_kind(middles, truncated, self._reduce_scatter, lambda matrices: matrices)

    def output(self, outputs: Matrices) -> Matrices:
        """Sum over the processes."""
        return all_reduce(outputs)

    def _reduce_scatter(self, matrices: Matrices) -> Matrices:
        return reduce_scatter_columns(matrices, self.tp_size, self.tp_rank)


def exchange_for(layout: Layout, *, tp_size: int, tp_rank: int) -> Exchange:
    """The exchange of a layout for one process."""
    if layout == Layout.INTERMEDIATE:
        return IntermediateExchange()
    return RankExchange(tp_size, tp_rank)


def _by_kind(
    matrices: Matrices,
    truncated: Sequence[bool],
    if_truncated: Callable[[Matrices], Matrices],
    otherwise: Callable[[Matrices], Matrices],
) -> Matrices:
    """Hand the matrices of each kind to its collective in one call; the order is kept."""
    results = dict(enumerate(matrices))
    for kind, collective in ((True, if_truncated), (False, otherwise)):
        chosen = [index for index, flag in enumerate(truncated) if flag == kind]
        if chosen:
            done = collective([matrices[index] for index in chosen])
            results.update(zip(chosen, done, strict=True))
    return list(results.values())
