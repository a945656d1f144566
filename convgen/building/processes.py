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

_ENDING = (signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)

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


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets what is inside clean up when a signal ends the process, which then ends by it.

    Signals that somebody handles or ignores are left to that; so are all outside the main thread,
    where Python lets nobody handle them.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # the others would interrupt the cleaning up
            raise _Ended

    handled = []
    if threading.current_thread() is threading.main_thread():
        handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in handled:
            signal.signal(number, end)
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])


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
    return subprocess.Popen(
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


def output(
    command: Sequence[str], stdin: str, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """What a short command says, run in a temporary folder whose path is plain.

    Raises:
        OSError, subprocess.TimeoutExpired: where it does not run, or not to its end.
    """
    with (
        ended_by_signals(),
        plain_temporary() as folder,
        subprocess.Popen(
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
        ) as process,
    ):
        try:
            out, err = process.communicate(stdin, timeout_s)
        except BaseException:
            # The command may be a script: what it has started is of its group.
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)
