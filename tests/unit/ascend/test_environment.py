from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from tuckerize.ascend.environment import (
    CANN_BY_TORCH_NPU,
    float32_products,
    generation_of,
    hccl_buffer_mib,
    installed_cann,
    make_hccl_deterministic,
    set_hccl_timeouts,
    torch_npu_for,
)


@pytest.mark.parametrize(
    ("device_name", "generation"),
    [
        ("Ascend910B1", "A2"),
        ("Ascend910B4-1", "A2"),
        ("Ascend910_9362", "A3"),
        ("Ascend910_9392", "A3"),
        ("Ascend910B", "Ascend910B"),  # the first generation
        ("Ascend910A", "Ascend910A"),
        ("Ascend310P3", "Ascend310P3"),
    ],
)
def test_generation_of(device_name: str, generation: str) -> None:
    assert generation_of(device_name) == generation


@pytest.mark.parametrize(
    ("device_name", "allow_hf32", "expected"),
    [
        ("Ascend910B3", False, "float32"),
        ("Ascend910B3", True, "hf32"),
        ("Ascend910B", False, "float16"),
        ("Ascend910ProA", True, "float16"),
    ],
)
def test_float32_products(device_name: str, allow_hf32: bool, expected: str) -> None:
    npu = SimpleNamespace(
        get_device_name=lambda _: device_name, matmul=SimpleNamespace(allow_hf32=allow_hf32)
    )
    assert float32_products(npu, 0) == expected


@pytest.mark.parametrize(
    ("environment", "mib"),
    [
        ({}, 200),
        ({"HCCL_BUFFSIZE": "512"}, 512),
        ({"HCCL_BUFFSIZE": "200M"}, 0),
    ],
)
def test_hccl_buffer_mib(environment: dict[str, str], mib: int) -> None:
    assert hccl_buffer_mib(environment) == mib


def test_installed_cann_is_that_of_the_first_home_that_has_one(tmp_path: Path) -> None:
    for home, version in (("empty", None), ("latest", "9.0.0")):
        folder = tmp_path / home / "x86_64-linux"
        folder.mkdir(parents=True)
        if version:
            (folder / "ascend_toolkit_install.info").write_text(f"arch=x86_64\nversion={version}\n")
    homes = {
        "ASCEND_HOME_PATH": str(tmp_path / "empty"),
        "ASCEND_TOOLKIT_HOME": str(tmp_path / "latest"),
    }
    assert installed_cann(homes) == "9.0.0"
    assert installed_cann({"ASCEND_HOME_PATH": str(tmp_path / "empty")}) is None
    assert installed_cann({}) is None


def test_torch_npu_for_is_the_inverse_of_the_table() -> None:
    for torch_npu, cann in CANN_BY_TORCH_NPU.items():
        assert torch_npu in torch_npu_for(cann)
    assert torch_npu_for("1.0") == []


def test_make_hccl_deterministic_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_DETERMINISTIC", "strict")
    make_hccl_deterministic()
    assert os.environ["HCCL_DETERMINISTIC"] == "strict"
    monkeypatch.delenv("HCCL_DETERMINISTIC")
    make_hccl_deterministic()
    assert os.environ["HCCL_DETERMINISTIC"] == "true"


@pytest.mark.parametrize(
    ("hours", "connect", "execute"),
    [(2, "7200", "7200"), (24, "7200", "86400"), (0.01, "120", "36")],
)
def test_set_hccl_timeouts_within_the_limits(
    monkeypatch: pytest.MonkeyPatch, hours: float, connect: str, execute: str
) -> None:
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    set_hccl_timeouts(timedelta(hours=hours))
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == connect
    assert os.environ["HCCL_EXEC_TIMEOUT"] == execute


def test_set_hccl_timeouts_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "0")
    set_hccl_timeouts(timedelta(hours=2))
    assert (os.environ["HCCL_CONNECT_TIMEOUT"], os.environ["HCCL_EXEC_TIMEOUT"]) == ("600", "0")
