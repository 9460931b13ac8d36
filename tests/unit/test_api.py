"""The Python API: names, and that importing the package imports nothing heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest

import tuckerize
from tests.tiny_models import make_tiny_model
from tuckerize.cli.app import app
from tuckerize.errors import RecipeError, UsageError
from tuckerize.report.json_form import SCHEMA_VERSION, to_json

REQUESTS = [name for name in tuckerize.__all__ if name.endswith("Request")]


def test_every_command_is_a_function_of_the_package() -> None:
    commands = {info.callback.__name__ for info in app.registered_commands if info.callback}
    functions = {n for n in tuckerize.__all__ if inspect.isfunction(getattr(tuckerize, n))}
    assert functions == commands | {"preview", "fit"}  # of decompose --dry-run and plan --fit


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_of_a_request_is_described(name: str) -> None:
    request = getattr(tuckerize, name)
    assert is_dataclass(request)
    described = inspect.getdoc(request) or ""
    assert all(f"\n    {field.name}: " in described for field in fields(request))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'compress'"):
        getattr(tuckerize, "compress")  # noqa: B009


def test_names_of_the_package_import_nothing_heavy_until_used() -> None:
    script = (
        "import sys, tuckerize; dir(tuckerize); hasattr(tuckerize, 'nothing')\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_requests_are_frozen() -> None:
    request = tuckerize.ShardRequest(folder="OUT", tp=2)
    with pytest.raises(FrozenInstanceError):
        request.tp = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (tuckerize.DecomposeRequest(model="m", output="o"), UsageError, "no size was given"),
        (tuckerize.DecomposeRequest(model="m", keep=0.5), UsageError, "--output is missing"),
        (tuckerize.DecomposeRequest(model="m", output="o", keep=75), RecipeError, "--keep 75"),
        (
            tuckerize.DecomposeRequest(model="m", output="o", keep=0.5, device="gpu"),
            UsageError,
            "device 'gpu' is not one of: auto, npu, cuda, cpu",
        ),
        (
            tuckerize.DecomposeRequest(
                model="m", output="o", keep=0.5, calibration={"texts": ["a"], "shape": "wide"}
            ),
            RecipeError,
            "calibration.shape wide is not one of: auto, latent, neurons, narrow-latent, full",
        ),
    ],
)
def test_request_that_cannot_be_carried_out_is_refused(
    request_: tuckerize.DecomposeRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tuckerize.decompose(request_)


def test_whole_job_through_the_api(tmp_path: Path) -> None:
    model, out = make_tiny_model(tmp_path / "model"), tmp_path / "out"
    dense = tuckerize.inspect(model)
    request = tuckerize.DecomposeRequest(model=model, output=out, keep="60%", joint="gate_up")
    planned, report = tuckerize.preview(request), tuckerize.decompose(request)
    assert planned is not None
    assert report is not None
    assert (planned.before, planned.after) == (dense.size, report.after)
    assert tuckerize.inspect(str(out)).size == report.after
    assert tuckerize.shard(tuckerize.ShardRequest(folder=out, tp=2)).tp_size == 2
    verified = tuckerize.verify(tuckerize.VerifyRequest(folder=out, tokens=4))
    assert verified.passed
    assert verified.notes[0].startswith("the shards were not verified: tp2; run: torchrun")
    back = tuckerize.reconstruct(
        tuckerize.ReconstructRequest(folder=out, output=tmp_path / "dense")
    )
    assert back.size.routed_parameters == dense.size.routed_parameters
    assert to_json(back)["schema_version"] == SCHEMA_VERSION
