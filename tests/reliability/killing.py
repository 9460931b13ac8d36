"""Kill a command, or have the system fail, at a chosen boundary, in a forked child.

Boundaries are counted below one folder: every open, rename, removal, mkdir, chmod and fsync, and
every write, of which half is done; for errors of reading, every open of a file that is read. The
parent never runs a command itself, so that it has no
threads when it forks.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tuckerize.cli.boundary import USER_ERROR
from tuckerize.errors import TuckerizeError

_AUDITED = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod"}


class Boundaries:
    """Counter of boundaries below a folder; kills this process at one of them, or fails there."""

    def __init__(self, folder: Path, at: int | None, error: int | None, *, reads: bool) -> None:
        self.folder, self.at, self.error, self.reads = str(folder), at, error, reads
        self.count = 0

    def install(self) -> None:
        """Watch this process from here on."""
        sys.addaudithook(self._audit)
        fsync, open_ = os.fsync, io.open

        def counted_fsync(file: int) -> None:
            if not self.reads:
                self.pass_one()
            fsync(file)

        def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            opened = open_(file, mode, *args, **kwargs)
            writes = not self.reads and set(mode) & set("wa+x") and self._is_below(file)
            return _Halved(opened, self) if writes else opened

        os.fsync, io.open = counted_fsync, counted_open  # type: ignore[assignment]

    def pass_one(self) -> None:
        """Count a boundary, and end or fail here if it is the chosen one."""
        self.count += 1
        if self.count == self.at:
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _AUDITED:
            return
        is_reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        in_open_folder = event in {"os.remove", "os.rmdir"} and arguments[1] != -1  # of rmtree
        if is_reading == self.reads and (in_open_folder or self._is_below(arguments[0])):
            self.pass_one()

    def _is_below(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)


class _Halved:
    """A file that counts a boundary in the middle of every write."""

    def __init__(self, file: Any, boundaries: Boundaries) -> None:  # noqa: ANN401
        self._file, self._boundaries = file, boundaries

    def write(self, data: Any) -> int:  # noqa: ANN401
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._boundaries.pass_one()
        self._file.write(data[half:])
        return len(data)

    def __enter__(self) -> _Halved:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._file, name)


def make_thread_pool() -> None:
    """Make torch's thread pool in a forked process: its first use by two threads at once fails."""
    torch.set_num_threads(torch.get_num_threads())


def in_child(
    command: Callable[[], object],
    folder: Path,
    *,
    at: int | None = None,
    error: int | None = None,
    reads: bool = False,
    while_it_runs: Callable[[int], object] = lambda _: None,
) -> tuple[int, int]:
    """Run a command in a forked child.

    Args:
        command: The command.
        folder: Where boundaries are counted.
        at: Boundary at which the child is killed, counted from 1.
        error: Number of the system's error that it meets there in place of that.
        reads: Whether opens of files that are read are counted, and nothing else.
        while_it_runs: Called with the child's process id.

    Returns:
        Exit code, 2 for errors that the user is told, negative of the signal where one ended the
        child; and the number of boundaries.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        make_thread_pool()
        boundaries = Boundaries(folder, at, error, reads=reads)
        code = 1
        try:
            boundaries.install()
            command()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except (TuckerizeError, OSError):
            code = USER_ERROR
        except BaseException:  # noqa: BLE001 the parent must not go on twice
            traceback.print_exc()
        finally:
            os.write(writing, str(boundaries.count).encode())
            os._exit(code)
    os.close(writing)
    while_it_runs(child)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(text or 0)
