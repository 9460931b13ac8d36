from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuckerize.domain import Cores, CoreType, Device
from tuckerize.errors import ParallelError
from tuckerize.parallel.backends import backend_for, check_encoding, choose_device

has_accelerator = torch.accelerator.is_available()


def test_choose_device_cpu_is_always_there() -> None:
    assert choose_device(Device.CPU, local_rank=7) == torch.device("cpu")


@pytest.mark.skipif(has_accelerator, reason="there is an accelerator")
def test_choose_device_auto_without_an_accelerator_is_the_cpu() -> None:
    assert choose_device(Device.AUTO) == torch.device("cpu")


@pytest.mark.skipif(has_accelerator, reason="there is an accelerator")
def test_choose_device_that_is_not_there_says_what_is() -> None:
    with pytest.raises(ParallelError) as caught:
        choose_device(Device.CUDA)
    assert caught.value.message == (
        f"device 'cuda' is not available: torch {torch.__version__} finds cpu only"
    )
    assert caught.value.hint.startswith("use --device cpu")


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="has torch_npu")
def test_choose_device_npu_without_its_package_says_what_to_install() -> None:
    with pytest.raises(ParallelError) as caught:
        choose_device(Device.NPU)
    assert caught.value.message == (
        "device 'npu' needs the package torch_npu, which is not installed"
    )
    assert "tuckerize[npu]" in caught.value.hint


def test_backend_for_the_cpu_is_gloo_alone() -> None:
    assert backend_for(torch.device("cpu")) == "gloo"


def test_backend_for_an_accelerator_has_gloo_beside_it() -> None:
    assert backend_for(torch.device("cuda", 0)) == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize("cores", [CoreType.FP8, {0: CoreType.W8, 3: CoreType.FP8}])
def test_cores_in_fp8_are_refused_on_an_npu(cores: Cores) -> None:
    npu: Any = SimpleNamespace(type="npu")  # torch knows the name where torch_npu is
    with pytest.raises(ParallelError, match="A2 and A3 have no float8") as refused:
        check_encoding(npu, cores)
    assert "w8" in str(refused.value.hint)
    check_encoding(npu, CoreType.W8)
    check_encoding(npu, None)
    check_encoding(torch.device("cpu"), cores)
