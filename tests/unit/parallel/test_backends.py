from __future__ import annotations

import importlib.util
import os
from datetime import timedelta

import pytest
import torch

from tuckerize.errors import ParallelError
from tuckerize.parallel.backends import DeviceChoice, backend_for, choose_device, let_hccl_wait

has_accelerator = torch.accelerator.is_available()


def test_choose_device_cpu_is_always_there() -> None:
    assert choose_device("cpu", local_rank=7) == torch.device("cpu")


@pytest.mark.skipif(has_accelerator, reason="there is an accelerator")
def test_choose_device_auto_without_an_accelerator_is_the_cpu() -> None:
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.skipif(has_accelerator, reason="there is an accelerator")
def test_choose_device_that_is_not_there_says_what_is() -> None:
    choice: DeviceChoice = "cuda"
    with pytest.raises(ParallelError) as caught:
        choose_device(choice)
    assert caught.value.message == (
        f"device 'cuda' is not available: torch {torch.__version__} finds cpu only"
    )
    assert caught.value.hint.startswith("use --device cpu")


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="has torch_npu")
def test_choose_device_npu_without_its_package_says_what_to_install() -> None:
    with pytest.raises(ParallelError) as caught:
        choose_device("npu")
    assert caught.value.message == (
        "device 'npu' needs the package torch_npu, which is not installed"
    )
    assert "tuckerize[npu]" in caught.value.hint


def test_backend_for_the_cpu_is_gloo_alone() -> None:
    assert backend_for(torch.device("cpu")) == "gloo"


def test_backend_for_an_accelerator_has_gloo_beside_it() -> None:
    assert backend_for(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize(
    ("hours", "connect", "execute"),
    [(2, "7200", "7200"), (24, "7200", "86400"), (0.01, "120", "36")],
)
def test_let_hccl_wait_as_long_as_it_can(
    monkeypatch: pytest.MonkeyPatch, hours: float, connect: str, execute: str
) -> None:
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    let_hccl_wait(timedelta(hours=hours))
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == connect
    assert os.environ["HCCL_EXEC_TIMEOUT"] == execute


def test_let_hccl_wait_leaves_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "0")
    let_hccl_wait(timedelta(hours=2))
    assert (os.environ["HCCL_CONNECT_TIMEOUT"], os.environ["HCCL_EXEC_TIMEOUT"]) == ("600", "0")
