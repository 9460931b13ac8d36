"""Under torchrun: sharded layers and their gradients against dense experts in float64.

Usage: layer_cases.py TPxEPxCP ... Every process cuts its own slices from the same seeded factors,
runs the layer on its own tokens and back, and compares outputs, gradients and counted traffic with
what automatic differentiation of the dense experts, and the prediction, give. Prints every case
with the largest relative errors of all processes as JSON on process 0.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad, silu

from tuckerize.moe.family import Glu
from tuckerize.runtime.activations import activation_of

sys.path.insert(0, str(Path(__file__).parents[2]))

from tuckerize.domain import GATE_UP, Layout, Mode, MultilinearRank, Projection, StackShape
from tuckerize.names import TensorName
from tuckerize.parallel import mesh as meshes
from tuckerize.parallel.collectives import counted
from tuckerize.parallel.layouts import (
    Collective,
    LayerShape,
    Parallelism,
    layer_traffic,
    owned_slice,
    owners_of,
    split_dimensions,
)
from tuckerize.parallel.mesh import Position, make_mesh, own_tokens, padded_count
from tuckerize.pipeline.verify.traffic import load_of
from tuckerize.runtime.sharded import ShardedExperts

EXPERTS, TOP_K = 8, 3


@dataclass(frozen=True)
class Case:
    """One sharded layer, and what goes through it."""

    layout: Layout
    rank: MultilinearRank
    shape: StackShape
    joint: bool
    tokens: int = 9
    routes: str = "random"
    widths: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    all_to_all: bool = True
    biased: bool = False

    @property
    def sizes(self) -> LayerShape:
        """What decides how the layer is split."""
        ranks = dict.fromkeys(Projection, self.rank)
        return LayerShape([ranks] * (EXPERTS // self.shape.experts), self.shape, self.joint)


SHAPES = (StackShape(8, 17, 23), StackShape(2, 16, 20))


def layers(shapes: Sequence[StackShape]) -> Iterator[Case]:
    """Every layout with every combination of truncated modes, even and uneven sizes."""
    for layout, shape, joint in itertools.product(Layout, shapes, (False, True)):
        # Below half of I even the tokens of gate and up without a joint U_I are narrower.
        short = (shape.experts - 1, shape.intermediate - 5, shape.hidden // 2 - 1 + 4 * joint)
        for keep in itertools.product((True, False), repeat=3):
            chosen = (n if full else r for n, r, full in zip(shape, short, keep, strict=True))
            if not (joint and keep[Mode.HIDDEN]):
                yield Case(layout, MultilinearRank(*chosen), shape, joint)


def cases(mesh: Parallelism) -> Iterator[Case]:
    """Every layer, on every way that its tokens can go."""
    shape = StackShape(8, 16, 20)
    latent = Case(Layout.INTERMEDIATE, MultilinearRank(8, 16, 9), shape, joint=True)
    tucker = replace(latent, layout=Layout.RANK, rank=MultilinearRank(6, 11, 9))
    widths = replace(latent, widths=(16, 12, 20, 16, 13, 19, 15, 17))
    table = [*layers(SHAPES if mesh.cp == 1 else SHAPES[:1]), widths]
    if mesh.tp == 1:  # layouts are the same then
        table = [case for case in table if case.layout == Layout.INTERMEDIATE]
    yield from table
    for case in (latent, tucker, widths):
        yield replace(case, biased=True)
        if mesh.tp > 1:
            yield replace(case, biased=True, sequence_parallel=True)
    if mesh.tp > 1:
        yield from (replace(case, sequence_parallel=True) for case in table if case.joint)
    for case in (latent, tucker):
        for tokens in (0, 1):
            yield replace(case, tokens=tokens)
        yield replace(case, routes="one expert")
        if mesh.ep > 1:
            yield replace(case, all_to_all=False)
            yield replace(case, all_to_all=False, tokens=1)
            yield replace(case, all_to_all=False, sequence_parallel=mesh.tp > 1)


def make_group(case: Case, generator: torch.Generator) -> dict[TensorName, Tensor]:
    """Random tensors of one group, by their names relative to it."""

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64) / 4

    tensors = {}
    for projection in Projection:
        if case.widths is None:
            tensors[TensorName.core(projection)] = random(*case.rank)
        else:
            for expert, width in enumerate(case.widths):
                tensors[TensorName.core(projection, expert)] = random(width, case.rank.hidden)
        if case.biased and projection == Projection.DOWN:
            tensors[TensorName.bias(projection)] = random(EXPERTS, case.shape.hidden)
        elif case.biased and case.widths is None:
            tensors[TensorName.bias(projection)] = random(EXPERTS, case.shape.intermediate)
        elif case.biased and case.widths is not None:
            for expert, width in enumerate(case.widths):
                tensors[TensorName.bias(projection, expert)] = random(width)
        for mode in case.rank.truncated_modes(case.shape):
            coupling = GATE_UP if case.joint and projection != Projection.DOWN else None
            name = TensorName.factor(mode, projection, coupling)
            tensors[name] = random(case.shape[mode], case.rank[mode])
    return tensors


def expand(case: Case, group: dict[TensorName, Tensor], projection: Projection) -> Tensor:
    """The dense stack of one projection, zeros beyond the neurons of narrower experts."""
    shared = case.joint and projection != Projection.DOWN
    if case.widths is None:
        core = group[TensorName.core(projection)]
    else:
        matrices = [group[TensorName.core(projection, e)] for e in range(EXPERTS)]
        core = torch.stack([pad(m, (0, 0, 0, max(case.widths) - len(m))) for m in matrices])
    for letters, mode in zip(("abc,xa->xbc", "abc,xb->axc", "abc,xc->abx"), Mode, strict=True):
        name = TensorName.factor(mode, projection, GATE_UP if shared else None)
        if name in group:
            core = torch.einsum(letters, core, group[name])
    return core


def dense(
    case: Case, groups: list[dict[TensorName, Tensor]], x_TI: Tensor, shares_TE: Tensor
) -> Tensor:
    """Output of the dense experts, each computed on every token."""
    gate, up, down = (torch.cat([expand(case, g, p) for g in groups]) for p in Projection)
    gate_TEH, up_TEH = (torch.einsum("ti,ehi->teh", x_TI, stack) for stack in (gate, up))
    if not case.biased:
        return torch.einsum("teh,ehi,te->ti", silu(gate_TEH) * up_TEH, down, shares_TE)
    gate_EH, up_EH, down_EI = (own_biases(case, groups[0], p) for p in Projection)
    neurons_TEH = silu(gate_TEH + gate_EH) * (up_TEH + up_EH)
    return torch.einsum("teh,ehi,te->ti", neurons_TEH, down, shares_TE) + shares_TE @ down_EI


def own_biases(case: Case, group: dict[TensorName, Tensor], projection: Projection) -> Tensor:
    """Biases of a projection, zeros beyond the neurons of narrower experts."""
    whole = group.get(TensorName.bias(projection))
    if whole is not None:
        return whole
    own = [group[TensorName.bias(projection, expert)] for expert in range(EXPERTS)]
    return torch.stack([pad(b_H, (0, max(case.widths or ()) - len(b_H))) for b_H in own])


def own_slices(
    case: Case, groups: list[dict[TensorName, Tensor]], position: Position
) -> list[dict[TensorName, Tensor]]:
    """One process's slices of its groups."""
    tp, ep = position.tp, position.ep
    found = []
    for index, group in enumerate(groups):
        owners = owners_of(index, groups=len(groups), ep=ep.size)
        if ep.rank not in owners:
            continue
        own = owned_slice(case.shape.experts, len(owners), owners.index(ep.rank))
        slices = {}
        for name, tensor in group.items():
            if name.expert is not None and not own.start <= name.expert < own.stop:
                continue
            cut = split_dimensions(case.layout, name, case.sizes.ranks[index], case.shape)
            if cut.tp is not None:
                tensor = tensor.narrow(cut.tp, *owned_slice(tensor.shape[cut.tp], tp.size, tp.rank))  # noqa: PLW2901
            if cut.experts is not None:
                tensor = tensor.narrow(cut.experts, *own)  # noqa: PLW2901
            expert = None if name.expert is None else name.expert - own.start
            slices[replace(name, expert=expert)] = tensor
        found.append(slices)
    return found


def make_tokens(case: Case, mesh: Parallelism) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, their experts and weights, and what their outputs count in the loss."""
    generator = torch.Generator().manual_seed(1)
    count = case.tokens
    if mesh.cp > 1 or case.sequence_parallel or not case.all_to_all:
        count = padded_count(count, mesh)
    x_TI = torch.randn(count, case.shape.hidden, generator=generator, dtype=torch.float64)
    scores_TE = torch.rand(count, EXPERTS, generator=generator, dtype=torch.float64)
    weights_Tk, experts_Tk = scores_TE.topk(TOP_K, dim=1)
    if case.routes == "one expert":
        weights_Tk, experts_Tk = weights_Tk[:, :1], torch.full((count, 1), 2)
    probe_TI = torch.randn(x_TI.shape, generator=generator, dtype=torch.float64)
    return x_TI, experts_Tk, weights_Tk, probe_TI


def error(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative error; what has no gradient has a gradient of zero."""
    if expected is None or expected.norm() == 0:
        return 0.0 if found is None else float(found.norm())
    if found is None or found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm())


def errors_of(case: Case, position: Position) -> tuple[float, float, float]:
    """Relative errors of this process's output, gradients, and of the traffic of all."""
    mesh = position.parallelism
    x_TI, experts_Tk, weights_Tk, probe_TI = make_tokens(case, mesh)
    generator = torch.Generator().manual_seed(0)
    groups = [make_group(case, generator) for _ in case.sizes.ranks]

    leaves = [x_TI, weights_Tk, *(tensor for group in groups for tensor in group.values())]
    for leaf in leaves:
        leaf.requires_grad_()
    shares_TE = torch.zeros(len(x_TI), EXPERTS, dtype=torch.float64)
    expected_TI = dense(case, groups, x_TI, shares_TE.scatter_add(1, experts_Tk, weights_Tk))
    (expected_TI * probe_TI).sum().backward()  # type: ignore[no-untyped-call]

    own_T = own_tokens(len(x_TI), position)
    layer = ShardedExperts(
        [{n: t.detach() for n, t in g.items()} for g in own_slices(case, groups, position)],
        layout=case.layout,
        sizes=case.sizes,
        position=position,
        activation=activation_of(Glu()),
    ).requires_grad_()
    own_x, own_weights = (t.detach()[own_T].requires_grad_() for t in (x_TI, weights_Tk))
    with counted() as moved:
        output_TI = layer(own_x, experts_Tk[own_T], own_weights)
        sent = dict(moved)
    (output_TI * probe_TI[own_T]).sum().backward()
    layer.sum_gradients()

    gradients = [{n: t.grad for n, t in g.items() if t.grad is not None} for g in groups]
    expected = {
        str(name.within(index)): gradient
        for index, group in enumerate(own_slices(case, gradients, position))
        for name, gradient in group.items()
    }
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert x_TI.grad is not None
    assert weights_Tk.grad is not None
    worst = [error(found[name], gradient) for name, gradient in expected.items()]
    worst += [error(own_x.grad, x_TI.grad[own_T])]
    worst += [error(own_weights.grad, weights_Tk.grad[own_T])]
    return (
        error(output_TI.detach(), expected_TI.detach()[own_T]),
        max(worst) if len(found) >= len(expected) else float("inf"),
        traffic_error(case, position, experts_Tk, sent),
    )


def traffic_error(
    case: Case, position: Position, experts_Tk: Tensor, sent: dict[Collective, float]
) -> float:
    """Largest relative difference of the counted from the predicted bytes of a collective."""
    mesh = position.parallelism
    total = torch.tensor([sent[kind] for kind in Collective], dtype=torch.float64)
    dist.all_reduce(total)
    if not len(experts_Tk):
        return float(total.abs().max())
    # A process has 1 / (ep cp) of the tokens, and there are tp ep cp processes.
    counted_bytes = (total / (len(experts_Tk) * mesh.tp)).tolist()
    load = load_of(experts_Tk, case.sizes, mesh)
    predicted = layer_traffic(case.layout, case.sizes, mesh, load, value_bytes=8)
    differences = [
        abs(found - predicted[kind]) / max(1.0, predicted[kind])
        for kind, found in zip(Collective, counted_bytes, strict=True)
    ]
    return float(max(differences))


def main() -> None:
    """Run every case on every mesh and print the largest errors of all processes for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = []
    for argument in sys.argv[1:]:
        tp, ep, cp = map(int, argument.split("x"))
        mesh = make_mesh("cpu", tp=tp, ep=ep, cp=cp)
        for case in cases(Parallelism(tp, ep, cp)):
            vars(meshes)["_WITH_ALL_TO_ALL"] = {"gloo"} if case.all_to_all else set()
            position = Position.on(mesh, sequence_parallel=case.sequence_parallel)
            errors = torch.tensor(errors_of(case, position), dtype=torch.float64)
            dist.all_reduce(errors, dist.ReduceOp.MAX)
            output, gradients, traffic = errors.tolist()
            found.append(
                {
                    "mesh": argument,
                    "layout": case.layout,
                    "sequence_parallel": case.sequence_parallel,
                    "all_to_all": case.all_to_all,
                    "case": str(case),
                    "errors": {"output": output, "gradients": gradients, "traffic": traffic},
                }
            )
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(found))
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
