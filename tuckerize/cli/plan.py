"""The command `plan`."""

from __future__ import annotations

from tuckerize.cli import options
from tuckerize.cli.boundary import boundary
from tuckerize.cli.settings import calibration_of
from tuckerize.domain import Device, Target
from tuckerize.errors import UsageError


@boundary
def plan(
    model: options.Model,
    download: options.Download = False,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    random_share: options.RandomShare = None,
    no_chat_template: options.NoChatTemplate = False,
    multiple: options.Multiple = None,
    target: options.PlanTarget = None,
    bits: options.PlanBits = None,
    fit: options.Fit = None,
    context: options.Context = None,
    sequences: options.Sequences = None,
    group_size: options.GroupSize = None,
    device: options.DeviceOption = Device.AUTO,
    max_memory: options.MaxMemory = None,
    as_json: options.AsJson = False,
) -> None:
    """Predict what every size costs, for every encoding of the cores, or what fits onto devices.

    Decomposes nothing. With --calibration, one pass over the text, whose result is kept in the
    cache for decompose. With --fit, from headers alone; with both, the cost of what fits.

    Example: tuckerize plan --model DeepSeek-V2-Lite --calibration text.txt

    Example: tuckerize plan --model DeepSeek-V2-Lite --fit 2x24GiB
    """
    settings = {
        "tokens": calibration_tokens,
        "random_share": random_share,
        "chat_template": False if no_chat_template else None,
        "multiple": multiple,
        "target": None if target == "all" else target,
    }
    text = calibration_of(calibration, settings)
    _check(text is not None, fit, bits, context, sequences)
    if download:
        from tuckerize.checkpoint.hub import download_model

        download_model(model)
    from tuckerize.cli.progress import TerminalProgress, is_leader
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.fit import FitRequest
    from tuckerize.pipeline.fit import fit as run_fit
    from tuckerize.pipeline.plan import PlanRequest
    from tuckerize.pipeline.plan import plan as run

    targets = tuple(Target) if target == "all" else ()
    with TerminalProgress() as progress:
        if fit is not None:
            given = {"context": context, "sequences": sequences}
            request = FitRequest(
                model=model,
                devices=fit,
                calibration=text,
                targets=targets,
                group_size=group_size,
                device=device,
                **{name: value for name, value in given.items() if value is not None},
            )
            fitting = run_fit(request, progress)
            if is_leader():
                show(fitting, as_json=as_json)
            return
        planned = PlanRequest(
            model=model,
            calibration=text or {},
            targets=targets,
            bits=bits,
            group_size=group_size,
            device=device,
            max_memory=max_memory,
        )
        report = run(planned, progress)
    if report is not None:
        show(report, as_json=as_json)


def _check(
    has_text: bool,  # noqa: FBT001
    fit: str | None,
    bits: float | None,
    context: int | None,
    sequences: int | None,
) -> None:
    """Refuse options that do not go together."""
    if fit is None:
        for name, value in (("context", context), ("sequences", sequences)):
            if value is not None:
                raise UsageError(
                    f"--{name} belongs to --fit, which is not given",
                    hint="add --fit with the devices, as in --fit 4x32GiB",
                )
        if not has_text:
            raise UsageError(
                "plan needs --calibration, --fit, or both",
                hint="--calibration FILE predicts what every size costs; --fit 4x32GiB says what "
                "fits onto devices",
            )
    elif bits is not None:
        raise UsageError("--fit decides the bits, and --bits too", hint="leave one of them out")
