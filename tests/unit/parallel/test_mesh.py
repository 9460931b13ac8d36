from __future__ import annotations

import itertools

import pytest
import torch

from tuckerize.errors import ParallelError
from tuckerize.parallel.layouts import Parallelism
from tuckerize.parallel.mesh import Axis, Position, check_world, make_mesh, own_tokens, padded_count


def test_make_mesh_before_the_processes_have_met_is_refused() -> None:
    with pytest.raises(ParallelError, match="need a process group") as caught:
        make_mesh("cpu", tp=2)
    assert "init_process_group first" in caught.value.hint


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_check_world_takes_sizes_whose_product_is_the_number_of_processes(
    sizes: tuple[int, int, int],
) -> None:
    check_world(8, Parallelism(*sizes))


def test_check_world_of_other_sizes_names_those_that_fit() -> None:
    with pytest.raises(ParallelError, match="8 processes are not tp x ep x cp = 2 x 2 x 1") as one:
        check_world(8, Parallelism(2, 2, 1))
    assert one.value.hint.removeprefix("sizes that fit: ").split("; ") == [
        "--tp 4 --ep 2 --cp 1",
        "--tp 2 --ep 4 --cp 1",
        "--tp 2 --ep 2 --cp 2",
        "--tp 8 --ep 1 --cp 1",
    ]
    with pytest.raises(ParallelError) as none:
        check_world(4, Parallelism(0, 3, 1))
    assert none.value.hint == "sizes that fit: --tp 1 --ep 4 --cp 1; --tp 4 --ep 1 --cp 1"


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (Parallelism(tp=4), 33),
        (Parallelism(tp=4, sequence_parallel=True), 36),
        (Parallelism(cp=2), 36),
        (Parallelism(tp=4, cp=2), 36),
        (Parallelism(tp=4, cp=2, sequence_parallel=True), 48),
        (Parallelism(ep=2), 34),
    ],
)
def test_padded_count_of_33_tokens_is_that_of_megatron(mesh: Parallelism, expected: int) -> None:
    assert padded_count(33, mesh) == expected
    assert padded_count(expected, mesh) == expected


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), (1, 3), (1, 2))))
def test_own_tokens_of_all_positions_are_all_tokens(
    sizes: tuple[int, int, int], sequence_parallel: bool
) -> None:
    tp, ep, cp = sizes
    mesh = Parallelism(tp, ep, cp, sequence_parallel)
    tokens = padded_count(17, mesh)
    own = [
        own_tokens(tokens, Position(Axis(tp, t), Axis(ep, e), Axis(cp, c), sequence_parallel))
        for t, e, c in itertools.product(range(tp), range(ep), range(cp))
    ]
    assert len({len(indices) for indices in own}) == 1
    copies = 1 if sequence_parallel else tp
    assert torch.equal(torch.cat(own).sort().values, torch.arange(tokens).repeat_interleave(copies))


def test_own_tokens_of_context_parallel_positions_are_a_chunk_and_its_mirror() -> None:
    own = [own_tokens(8, Position(cp=Axis(2, rank))).tolist() for rank in range(2)]
    assert own == [[0, 1, 6, 7], [2, 3, 4, 5]]
