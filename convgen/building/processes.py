"""Compilers as child processes, which end when this one does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from convgen.building.disk import plain_temporary

# What ends a process that does nothing about it, and what is done about it then.
_ENDING = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGQUIT: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}

# PR_SET_PDEATHSIG outlives exec. It is set in a Python of its own: between fork and exec of this
# process, which has threads, it could not be. A parent that died before is noticed by its number.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and so would the program
    signal.signal(number, signal.SIG_DFL)
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class _Ended(BaseException):
    """This process was told to end."""


class _Handler:
    """Raises in the main thread when a signal comes, or soon afterwards."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_held_back = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:  # the others would interrupt the cleaning up
            self.received = number
            if not self.is_held_back:
                self.end()

    def end(self) -> None:
        raise KeyboardInterrupt if self.received == signal.SIGINT else _Ended

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Has a signal wait until the end of this."""
        self.is_held_back = True
        try:
            yield
        finally:
            self.is_held_back = False
            if self.received is not None:
                self.end()


_handlers: list[_Handler] = []
"""Of the main thread: none, or the one that is in force."""


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets what is inside clean up when a signal ends the process, which then ends by it.

    Signals that somebody handles or ignores are left to that; so are all outside the main thread,
    where Python lets nobody handle them.
    """
    if threading.current_thread() is not threading.main_thread() or _handlers:
        yield
        return
    handler = _Handler()
    before = {number: how for number, how in _ENDING.items() if signal.getsignal(number) == how}
    try:
        _handlers.append(handler)
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, how in before.items():
            signal.signal(number, how)
        _handlers.clear()
        if handler.received not in (None, signal.SIGINT):
            os.kill(os.getpid(), handler.received)


def _held_back() -> contextlib.AbstractContextManager[None]:
    is_main = threading.current_thread() is threading.main_thread()
    return _handlers[0].held_back() if is_main and _handlers else contextlib.nullcontext()


def start(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], keep_open: Sequence[int]
) -> subprocess.Popen[str]:
    """Starts a program whose output is read, and which is told to end when this thread has ended.

    It is of a session of its own: keys such as Ctrl-\\ reach this process alone, which ends it.

    Args:
        command: the program's absolute path, and its arguments.
        folder: where it runs.
        environment: its own.
        keep_open: descriptors that it inherits.
    """
    launcher: tuple[str, ...] = ()
    if sys.executable and sys.platform == "linux":
        launcher = (sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()))
    process = None
    try:
        with _held_back():
            process = subprocess.Popen(
                (*launcher, *command),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                pass_fds=tuple(keep_open),
                start_new_session=True,
            )
    except BaseException:
        if process is not None:
            process.terminate()
        raise
    return process


def output(
    command: Sequence[str], stdin: str, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """What a short command says, run in a temporary folder whose path is plain.

    Raises:
        OSError, subprocess.TimeoutExpired: where it does not run, or not to its end.
    """
    process = None
    with ended_by_signals(), plain_temporary() as folder:
        try:
            with _held_back():
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**environment, "TMPDIR": str(folder)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,
                )
            out, err = process.communicate(stdin, timeout_s)
        except BaseException:
            if process is not None:
                with process, contextlib.suppress(ProcessLookupError):
                    # The command may be a script: what it has started is of its group.
                    os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)
