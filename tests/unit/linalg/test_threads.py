from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from tuckerize.linalg.threads import Workers, parallel_workers

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    with parallel_workers(CPU) as workers:
        assert list(workers.map(lambda a, b: a - b, range(50), range(50, 0, -1))) == [
            2 * number - 50 for number in range(50)
        ]
    assert torch.get_num_threads() == threads


def test_calls_run_at_the_same_time_and_torch_has_one_thread_in_each(threads: int) -> None:
    together = threading.Barrier(threads, timeout=60)

    def call(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    with parallel_workers(CPU) as workers:
        assert list(workers.map(call, range(2 * threads))) == [1] * 2 * threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_have_the_bits_of_one_thread(threads: int, dtype: torch.dtype) -> None:
    """On some processors those of two threads are others, and a new thread has all that there are.

    Not asked how many threads it has, which would set them.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 10, 30), (10, 30, 15), (30, 20, 15), (64, 31, 48), (100, 10, 100), (200, 5, 256)]
    lefts = [torch.randn((n, m), dtype=dtype, generator=generator).T for n, m, _ in shapes]
    rights = [torch.randn((n, k), dtype=dtype, generator=generator) for n, _, k in shapes]
    torch.set_num_threads(1)
    expected = list(map(torch.mm, lefts, rights))
    torch.set_num_threads(threads)
    with parallel_workers(CPU) as workers:
        found = list(workers.map(torch.mm, lefts, rights))
    assert all(map(torch.equal, found, expected))


def test_few_calls_are_made_before_their_results_are_taken(threads: int) -> None:
    asked = []

    def items() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    with parallel_workers(CPU) as workers:
        results = workers.map(abs, items())
        assert next(results) == 0
        assert len(asked) <= threads + 1


def test_error_of_a_call_is_raised_and_torch_gets_its_threads_back(threads: int) -> None:
    def call(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"), parallel_workers(CPU) as workers:
        workers.do(call, range(10))
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("threads")
def test_work_of_an_accelerator_is_queued_by_the_calling_thread() -> None:
    before = torch.get_num_threads()
    with parallel_workers(torch.device("meta")) as workers:
        assert torch.get_num_threads() == before
        called = set(workers.map(lambda _: threading.get_ident(), range(8)))
    assert called == {threading.get_ident()}


def test_without_a_pool_calls_are_made_one_by_one() -> None:
    assert list(Workers().map(abs, [-1, 2])) == [1, 2]
