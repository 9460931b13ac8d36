"""The error boundary: exceptions become a message on stderr and an exit code.

0 done, 1 the check ran and the answer is no, 2 something the user can fix, 70 a bug, 130
interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
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
from tuckerize.cli.printing import STDOUT
from tuckerize.control_groups import usable_cores
from tuckerize.errors import LeaderFailedError, ProcessLostError, TuckerizeError

P = ParamSpec("P")

_AGAIN = "run the same command again, without --overwrite: it continues"

NO = 1
USER_ERROR = 2
BUG = 70
INTERRUPTED = 130
PIPE_CLOSED = 141

# Parts of the messages of torch's allocators and of the system, where no type tells.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to map segment from shared object", "cannot allocate memory",
)  # fmt: skip
_NO_THREAD = ("can't start new thread", "thread creation failed", "Resource temporarily unavail")
_BYTES = re.compile(r"(\d+) bytes")


def boundary(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: its errors are printed, and the process exits with their code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        _limit_threads()
        try:
            with _interruptible(), explained():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            _leave("interrupted", _AGAIN, INTERRUPTED)
        except TuckerizeError as error:
            consequence = isinstance(error, ProcessLostError)
            _leave(error.message, error.hint, error.exit_code, is_cause=not consequence)
        except OSError as error:
            _leave_because_of_the_system(error)
        except LeaderFailedError:
            sys.exit(USER_ERROR)
        except Exception as error:  # noqa: BLE001 this is the one place that may
            if message := _lack_of_memory(error):
                _leave(
                    message,
                    "free memory or raise its limit (ulimit -v, the container's), and run the same "
                    "command again; --dry-run of decompose estimates what it needs",
                    USER_ERROR,
                )
            traceback.print_exc()
            _leave(f"this is a bug in tuckerize: {error}", "please report it", BUG)

    return guarded


def _limit_threads() -> None:
    """Give torch, which is not imported yet, as many threads as a quota of the container has cores.

    Without one it takes the cores that it may run on, as it does by itself.
    """
    cores = usable_cores()
    if cores < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _leave_because_of_the_system(error: OSError) -> NoReturn:
    """Leave with what the operating system refused, and what helps against that."""
    if error.filename == STDOUT:
        with suppress(OSError, ValueError):  # so that nothing is written when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(PIPE_CLOSED)
        _leave(
            f"the standard output cannot be written: {error.strerror}",
            "check where it is sent to; what the command writes to folders is in place",
            USER_ERROR,
        )
    place = f" ({error.filename})" if error.filename else ""
    hints = {
        errno.ENOSPC: f"make room on that disk, and {_AGAIN}",
        errno.EDQUOT: f"make room in your quota, and {_AGAIN}",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another file system",
        errno.ENOMEM: "free memory or raise its limit (ulimit -v), and run the command again",
        errno.EMFILE: "raise the limit on open files: ulimit -n 1024",
        errno.EIO: "the disk reports a fault: look at its log (dmesg), and use another disk",
    }
    _leave(
        f"{error.strerror or error}{place}",
        hints.get(error.errno or 0, "check that the path exists and that you may read or write it"),
        USER_ERROR,
    )


def _lack_of_memory(error: BaseException) -> str:
    """Message of an error that means too little memory; empty for any other error."""
    text = str(error)
    if isinstance(error, RuntimeError | ImportError) and any(part in text for part in _NO_THREAD):
        return "the system starts no more threads: memory or processes are limited"
    if not isinstance(error, MemoryError) and not any(part in text for part in _NO_MEMORY):
        return ""
    size = _BYTES.search(text)
    wanted = f": {int(size[1]) / 2**20:,.0f} MiB more were needed" if size else ""
    return f"there is not enough memory{wanted}"


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
