"""The error boundary: exceptions become a message on stderr and an exit code.

0 done, 1 the check ran and the answer is no, 2 something the user can fix, 70 a bug, 130
interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from types import FrameType
from typing import NoReturn, ParamSpec

from tuckerize.ascend.npu import explained
from tuckerize.errors import LeaderFailedError, ProcessLostError, TuckerizeError

P = ParamSpec("P")

NO = 1
USER_ERROR = 2
BUG = 70
INTERRUPTED = 130


def boundary(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: its errors are printed, and the process exits with their code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _interruptible(), explained():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            _leave("interrupted", "run the same command again: it continues", INTERRUPTED)
        except TuckerizeError as error:
            consequence = isinstance(error, ProcessLostError)
            _leave(error.message, error.hint, error.exit_code, is_cause=not consequence)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            _leave(
                f"{error.strerror or error}{place}",
                "check that the folder may be written and that the disk has room",
                USER_ERROR,
            )
        except LeaderFailedError:
            sys.exit(USER_ERROR)
        except Exception as error:  # noqa: BLE001 this is the one place that may
            traceback.print_exc()
            _leave(f"this is a bug in tuckerize: {error}", "please report it", BUG)

    return guarded


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn any error that Ctrl-C ends as into an interruption.

    Python raises KeyboardInterrupt wherever it happens to be, and a library may convert it to
    another error: torch asks storages for their length and takes any error for a no.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored (nohup), or somebody else's
        return
    interrupted = Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if interrupted.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(message: str, hint: str, code: int, *, is_cause: bool = True) -> NoReturn:
    process = os.environ.get("RANK", "0")
    where = "" if process == "0" else f" (process {process})"
    text = f"error{where}: {message}\n"
    if hint:
        text += f"\nhint: {hint}\n"
    # One write, so that the lines of several processes do not mix.
    sys.stderr.write(text)
    sys.stderr.flush()
    if is_cause and code != INTERRUPTED:
        _tell_torchrun(text)
    sys.exit(code)


def _tell_torchrun(text: str) -> None:
    """Have torchrun print the error in the box that it ends with, as its `@record` would."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    extra = {"py_callstack": text.rstrip(), "timestamp": str(int(time.time()))}
    error = {"message": {"message": text, "extraInfo": extra}}
    with suppress(OSError):
        Path(file).write_text(json.dumps(error), encoding="utf-8")
