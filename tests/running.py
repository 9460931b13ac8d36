"""Run the program as users do: in processes of its own, alone or under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from tuckerize.cli.app import app

ROOT = Path(__file__).parent.parent
SECONDS = 240


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run_module(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module: `tests.npu.scripts.linalg_cases`, say."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=_environment(),
        check=False,
    )


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `tuckerize` with arguments."""
    return run_module("tuckerize", *arguments)


def run_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `tuckerize` in this process, which saves the seconds that importing torch takes."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def succeed(*arguments: str | Path) -> str:
    """Run `tuckerize` in this process, which must succeed; returns its standard output."""
    result = run_here(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def torchrun(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module or script under torchrun: `-m tuckerize verify OUT`, or `script.py ...`."""
    options = ("--standalone", "--nproc-per-node", str(processes))
    return run_module("torch.distributed.run", *options, *arguments)


def torchrun_on_two_nodes(
    folders: tuple[Path, Path], *arguments: str | Path
) -> list[subprocess.CompletedProcess[str]]:
    """Run a module under two torchruns that find each other, each with a folder to work in."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        options = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
        agents = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, "--node-rank", str(rank),
                 *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=_environment(),
                cwd=folder,
            )
            for rank, folder in enumerate(folders)
        ]  # fmt: skip
        outputs = [agent.communicate(timeout=SECONDS) for agent in agents]
        if "EADDRINUSE" not in outputs[0][1]:  # somebody took the port in between
            return [
                subprocess.CompletedProcess(agent.args, agent.returncode, *output)
                for agent, output in zip(agents, outputs, strict=True)
            ]


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Start `tuckerize` and return at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuckerize", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(),
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path: equal dictionaries are equal folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
