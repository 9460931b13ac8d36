"""The command `decompose`."""

from __future__ import annotations

from tuckerize.cli import options
from tuckerize.cli.boundary import boundary
from tuckerize.cli.settings import calibration_of
from tuckerize.domain import Device


@boundary
def decompose(
    model: options.Model,
    download: options.Download = False,
    keep: options.Keep = None,
    bits: options.Bits = None,
    rank: options.Rank = None,
    tolerance: options.Tolerance = None,
    recipe: options.RecipeFile = None,
    layers: options.Layers = None,
    projections: options.Projections = None,
    group_size: options.GroupSize = None,
    joint: options.JointOption = None,
    dtype: options.StoredDtype = None,
    quantize: options.Quantize = None,
    dequantize_rest: options.DequantizeRest = None,
    mtp: options.MtpOption = None,
    max_sweeps: options.MaxSweeps = None,
    engine: options.EngineOption = None,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    random_share: options.RandomShare = None,
    no_chat_template: options.NoChatTemplate = False,
    multiple: options.Multiple = None,
    target: options.TargetOption = None,
    refine: options.Refine = None,
    device: options.DeviceOption = Device.AUTO,
    collective_timeout: options.CollectiveTimeout = None,
    max_memory: options.MaxMemory = None,
    output: options.Output = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Decompose the experts of a model; writes a Tucker checkpoint.

    Needs exactly one of --keep, --bits, --rank, --tolerance and --recipe. A run that was
    interrupted continues when it is started again. Under torchrun the processes share out the
    stacks, or the experts of each layer with --calibration.

    Example: tuckerize decompose --model DeepSeek-V2-Lite --keep 0.75 --output OUT
    """
    settings = {
        "tokens": calibration_tokens,
        "random_share": random_share,
        "chat_template": False if no_chat_template else None,
        "multiple": multiple,
        "target": target,
        "refine": refine,
    }
    text = calibration_of(calibration, settings)
    if download:
        from tuckerize.checkpoint.hub import download_model

        download_model(model)

    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.decompose import DecomposeRequest, preview
    from tuckerize.pipeline.decompose import decompose as run

    request = DecomposeRequest(
        model=model,
        output=output,
        keep=keep,
        bits=bits,
        rank=rank,
        tolerance=tolerance,
        recipe=recipe,
        layers=layers,
        projections=projections,
        group_size=group_size,
        joint=joint,
        dtype=dtype,
        quantize=quantize,
        dequantize_rest=dequantize_rest,
        mtp=mtp,
        max_sweeps=max_sweeps,
        engine=engine,
        calibration=text,
        device=device,
        collective_timeout=collective_timeout,
        max_memory=max_memory,
        overwrite=overwrite,
    )
    with TerminalProgress() as progress:
        report = preview(request, progress) if dry_run else run(request, progress)
    if report is not None:
        show(report, as_json=as_json)
