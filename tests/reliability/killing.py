"""Kill a command at a chosen change of the file system, in a forked child.

Boundaries are counted below one folder: every open, rename, removal, mkdir, chmod and fsync, and
every write, of which half is done. The parent never runs a command itself, so that it has no
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

_AUDITED = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod"}


class Boundaries:
    """Counter of boundaries below a folder; kills this process at one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0

    def install(self) -> None:
        """Watch this process from here on."""
        sys.addaudithook(self._audit)
        fsync, open_ = os.fsync, io.open

        def counted_fsync(file: int) -> None:
            self.pass_one()
            fsync(file)

        def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            opened = open_(file, mode, *args, **kwargs)
            writes = set(mode) & set("wa+x") and self._is_below(file)
            return _Halved(opened, self) if writes else opened

        os.fsync, io.open = counted_fsync, counted_open  # type: ignore[assignment]

    def pass_one(self) -> None:
        """Count a boundary, and end here if it is the chosen one."""
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _AUDITED:
            return
        is_reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        in_open_folder = event in {"os.remove", "os.rmdir"} and arguments[1] != -1  # of rmtree
        if not is_reading and (in_open_folder or self._is_below(arguments[0])):
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


def in_child(
    command: Callable[[], object],
    folder: Path,
    *,
    kill_at: int | None = None,
    while_it_runs: Callable[[int], object] = lambda _: None,
) -> tuple[int, int]:
    """Run a command in a forked child.

    Args:
        command: The command.
        folder: Where boundaries are counted.
        kill_at: Boundary at which the child is killed, counted from 1.
        while_it_runs: Called with the child's process id.

    Returns:
        Exit code, negative of the signal where one ended the child, and the number of boundaries.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        boundaries = Boundaries(folder, kill_at)
        code = 1
        try:
            boundaries.install()
            command()
            code = 0
        except KeyboardInterrupt:
            code = 130
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
