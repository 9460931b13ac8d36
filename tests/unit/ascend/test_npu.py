from __future__ import annotations

import importlib.util

import pytest

from tuckerize.ascend.npu import explained, import_torch_npu
from tuckerize.errors import ParallelError
from tuckerize.version import INSTALL_NPU

# What torch raises where a backend that it loads by itself cannot be loaded.
AUTOLOAD_ERROR = "Failed to load the backend extension: torch_npu. You can disable extension ..."


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="has torch_npu")
def test_import_of_a_missing_torch_npu_says_how_to_install_it() -> None:
    with pytest.raises(ParallelError, match="torch_npu, which is not installed") as caught:
        import_torch_npu()
    assert caught.value.hint == f"{INSTALL_NPU} with the same minor version of torch"


@pytest.mark.parametrize(("autoload", "remedy"), [(None, True), ("1", True), ("0", False)])
def test_explained_error_names_its_cause_and_remedies(
    autoload: str | None, remedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    if autoload is not None:
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", autoload)
    message = r"cannot be loaded.*: libhccl.so: no file"
    with pytest.raises(ParallelError, match=message) as caught, explained():
        raise RuntimeError(AUTOLOAD_ERROR) from ImportError("libhccl.so: no file")
    assert "set_env.sh" in caught.value.hint
    assert ("TORCH_DEVICE_BACKEND_AUTOLOAD=0" in caught.value.hint) == remedy


def test_explained_leaves_other_errors_alone() -> None:
    with pytest.raises(ImportError, match="another"), explained():
        raise ImportError("another")
