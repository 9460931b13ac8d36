"""Makes Mixture-of-Experts checkpoints smaller by HOOI Tucker decomposition.

The functions are the commands: each takes one request and returns a report.

    import tuckerize

    request = tuckerize.DecomposeRequest(model="DeepSeek-V2-Lite", output="OUT", keep=0.75)
    report = tuckerize.decompose(request)

Importing the package lets transformers load Tucker checkpoints. It imports neither torch nor
transformers: the functions do, when they are first used.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

from tuckerize.version import __version__

if TYPE_CHECKING:
    from tuckerize.pipeline.check import check
    from tuckerize.pipeline.decompose import DecomposeRequest, decompose, preview
    from tuckerize.pipeline.doctor import doctor
    from tuckerize.pipeline.evaluate import EvaluateRequest, evaluate
    from tuckerize.pipeline.fit import FitRequest, fit
    from tuckerize.pipeline.fold import FoldRequest, fold
    from tuckerize.pipeline.generate import GenerateRequest, generate
    from tuckerize.pipeline.heal import HealRequest, heal
    from tuckerize.pipeline.inspect import inspect
    from tuckerize.pipeline.plan import PlanRequest, plan
    from tuckerize.pipeline.push import PushRequest, push
    from tuckerize.pipeline.quantize import QuantizeRequest, quantize
    from tuckerize.pipeline.reconstruct import ReconstructRequest, reconstruct
    from tuckerize.pipeline.report import ReportRequest, write_report
    from tuckerize.pipeline.shard import ShardRequest, shard
    from tuckerize.pipeline.verify import VerifyRequest, verify

__all__ = [
    "DecomposeRequest",
    "EvaluateRequest",
    "FitRequest",
    "FoldRequest",
    "GenerateRequest",
    "HealRequest",
    "PlanRequest",
    "PushRequest",
    "QuantizeRequest",
    "ReconstructRequest",
    "ReportRequest",
    "ShardRequest",
    "VerifyRequest",
    "__version__",
    "check",
    "decompose",
    "doctor",
    "evaluate",
    "fit",
    "fold",
    "generate",
    "heal",
    "inspect",
    "plan",
    "preview",
    "push",
    "quantize",
    "reconstruct",
    "shard",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Import a command, or its request, from its module in `pipeline` when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'tuckerize' has no attribute '{name}'")
    others = {"preview": "decompose", "write_report": "report"}
    command = others.get(name, name.removesuffix("Request").lower())
    return getattr(import_module(f"tuckerize.pipeline.{command}"), name)


def __dir__() -> list[str]:
    """Names of the API."""
    return __all__


def _register_with_transformers(_: ModuleType) -> None:
    """Make transformers know the format, as soon as it can be told."""
    import tuckerize.engines.transformers  # noqa: F401


register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
