"""The command `heal`."""

from __future__ import annotations

from tuckerize.cli import heal_options, options
from tuckerize.cli.boundary import boundary
from tuckerize.domain import Device


@boundary
def heal(
    folder: options.TuckerFolder,
    data: heal_options.Data,
    output: options.DenseOutput,
    train: heal_options.Train = None,
    teacher: heal_options.Teacher = None,
    teacher_share: heal_options.TeacherShare = 0.5,
    tokens: heal_options.Tokens = 1048576,
    window: heal_options.Window = 512,
    batch: heal_options.Batch = 16,
    at_once: heal_options.AtOnce = 4,
    learning_rate: heal_options.LearningRate = 1e-3,
    recompute: heal_options.Recompute = False,
    seed: heal_options.Seed = 0,
    no_chat_template: options.PlainChats = False,
    tp: heal_options.TrainingTp = 1,
    fsdp: heal_options.Fsdp = False,
    device: options.DeviceOption = Device.AUTO,
    collective_timeout: options.CollectiveTimeout = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a Tucker checkpoint to make up for what was lost.

    Loads the whole model. A part of the text decides which state is kept. Under torchrun the
    processes are replicas, or as --tp and --fsdp say. An interrupted run continues when it is
    started again.

    Example: tuckerize heal OUT --data text.txt --output HEALED
    """
    from tuckerize.cli.progress import TerminalProgress, is_leader
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.heal import HealRequest
    from tuckerize.pipeline.heal import heal as run

    request = HealRequest(
        folder=folder,
        data=data,
        output=output,
        train=train,
        teacher=teacher,
        teacher_share=teacher_share,
        tokens=tokens,
        window=window,
        batch=batch,
        at_once=at_once,
        learning_rate=learning_rate,
        recompute=recompute,
        seed=seed,
        tp=tp,
        fsdp=fsdp,
        chat_template=not no_chat_template,
        device=device,
        collective_timeout=collective_timeout,
        overwrite=overwrite,
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    if is_leader():
        show(report, as_json=as_json)
