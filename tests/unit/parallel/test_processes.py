from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from tuckerize.errors import LeaderFailedError, ParallelError, UsageError
from tuckerize.parallel.processes import (
    Processes,
    process_group,
    started_by_torchrun,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def fail() -> str:
    raise UsageError("wrong")


def test_process_group_without_torchrun_is_one_process() -> None:
    with process_group(lambda local: torch.device("cpu", local)) as (processes, device):
        assert (processes.rank, processes.size, processes.is_leader) == (0, 1, True)
        assert device == torch.device("cpu", 0)
        processes.barrier()
        assert processes.gather("x") == ["x"]
        assert processes.broadcast({"a": 1}) == {"a": 1}
        assert processes.leader_first(lambda: 3) == 3
        assert list(processes.queue(4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "but MASTER_ADDR is not"),
        ({"RANK": "x", "WORLD_SIZE": "y"}, "RANK is 'x', expected a number"),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=3 is not"),
    ],
)
def test_variables_of_torchrun_that_are_not_whole_are_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ParallelError, match=message) as caught,
        process_group(lambda local: torch.device("cpu", local)),
    ):
        pass
    assert "torchrun" in caught.value.hint


def test_broadcast_of_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="process 0 must pass a value"):
        Processes().broadcast(None)


def test_queue_of_several_processes_gives_each_index_once() -> None:
    store = HashStore()
    queues = [Processes(rank, 2, store=store).queue(5) for rank in range(2)]
    taken = [next(queue) for queue in (*queues, *queues, queues[0])]
    assert taken == [0, 1, 2, 3, 4]
    assert [list(queue) for queue in queues] == [[], []]


def test_leader_first_failing_on_the_leader_keeps_the_others_quiet() -> None:
    store = HashStore()
    with pytest.raises(UsageError, match="wrong"):
        Processes(0, 2, store=store).leader_first(fail)
    with pytest.raises(LeaderFailedError):
        Processes(1, 2, store=store).leader_first(fail)


def test_leader_first_failing_on_another_process_only_speaks_of_storage() -> None:
    store = HashStore()
    assert Processes(0, 2, store=store).leader_first(lambda: "a") == "a"
    with pytest.raises(ParallelError, match=r"^on .*: wrong$") as caught:
        Processes(1, 2, store=store).leader_first(fail)
    assert "storage that all nodes see under the same path" in caught.value.hint


def test_together_works_at_once_and_reports_the_error_of_the_leader_alone() -> None:
    """Process 1 is through with its work before process 0 begins."""
    done = threading.Event()

    def follow(work: Callable[[], str]) -> str:
        try:
            return work()
        finally:
            done.set()

    def lead(work: Callable[[], str]) -> str:
        assert done.wait(60)
        return work()

    def both(leading: Callable[[], str], following: Callable[[], str]) -> list[Future[str]]:
        done.clear()
        store = HashStore()
        with ThreadPoolExecutor() as pool:
            works = (lambda: lead(leading), lambda: follow(following))
            return [
                pool.submit(Processes(rank, 2, store=store).together, work)
                for rank, work in enumerate(works)
            ]

    assert [found.result() for found in both(lambda: "a", lambda: "b")] == ["a", "b"]
    first, second = both(fail, fail)
    assert isinstance(first.exception(), UsageError)
    assert isinstance(second.exception(), LeaderFailedError)
    first, second = both(lambda: "a", fail)
    assert first.result() == "a"
    assert isinstance(second.exception(), ParallelError)


def test_leader_first_succeeding_lets_the_others_work() -> None:
    store = HashStore()
    assert Processes(0, 2, store=store).leader_first(lambda: "a") == "a"
    assert Processes(1, 2, store=store).leader_first(lambda: "b") == "b"


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, False),
        ({"RANK": "3"}, False),
        ({"RANK": "3", "WORLD_SIZE": "4"}, True),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "1"}, True),
    ],
)
def test_started_by_torchrun_reads_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], started: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_by_torchrun() == started
