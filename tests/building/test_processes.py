"""Compilers end with the process that started them, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convgen.building.processes import ended_by_signals

BUILDER = """
import os, sys, threading
from convgen.building import cache
from convgen.building.build import Library, build
from convgen.building.toolchain import Commands
if sys.argv[2] == "handler":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
commands = Commands((sys.argv[1],), (sys.argv[1],), (), "")
library = Library("lib/x.so", ("src/a.cpp", "src/b.cpp"), commands)
work = lambda: build("package", {"src/a.cpp": "", "src/b.cpp": ""}, [library])
if sys.argv[2] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""

PROBE = """
from convgen.building.toolchain import find_cpp
find_cpp()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CONVGEN_JOBS", "2")
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A compiler that says who it is and then waits, in a process of its own."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\nsleep 600 &\necho $$ $! >>{tmp_path}/pids\nwait\n")
    path.chmod(0o755)
    return path


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def runs(pid: str) -> bool:
    """Whether a process is alive: neither gone nor dead and only not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def begin(
    compiler: Path, code: str, how: str, compilers: int
) -> tuple[subprocess.Popen[str], set[str]]:
    """A process that waits for compilers, and the numbers of all their processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(compiler), how],
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores keys, and so would this.
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (1, 2, 3, 15)],
    )
    pids = compiler.parent / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().count("\n") == compilers)
    return process, set(pids.read_text().split())


class TestBuild:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
    def test_a_signal_ends_compilers_and_process_and_leaves_nothing(
        self, root: Path, compiler: Path, number: signal.Signals
    ) -> None:
        process, pids = begin(compiler, BUILDER, "main", 2)
        process.send_signal(number)
        assert process.wait(30) == -number
        wait_for(lambda: not any(map(runs, pids)))
        assert list((root / "tmp").iterdir()) == []

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
    def test_compilers_end_with_a_process_that_can_do_nothing_more(
        self, compiler: Path, number: signal.Signals
    ) -> None:
        process, pids = begin(compiler, BUILDER, "thread", 2)
        process.send_signal(number)
        assert process.wait(30) == -number
        wait_for(lambda: not any(map(runs, pids)))

    def test_a_signal_that_is_handled_ends_nothing(self, compiler: Path) -> None:
        process, pids = begin(compiler, BUILDER, "handler", 2)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "handled\n"
        assert process.poll() is None
        assert all(map(runs, pids))
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(runs, pids)))


class TestProbe:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
    def test_a_signal_ends_a_compiler_that_is_asked_for_its_version(
        self, compiler: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CXX", str(compiler))
        process, pids = begin(compiler, PROBE, "", 1)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == -number
        wait_for(lambda: not any(map(runs, pids)))


class TestHandlers:
    def test_are_as_before_afterwards_and_only_of_the_main_thread(self) -> None:
        def inside() -> None:
            with ended_by_signals():
                seen.append(signal.getsignal(signal.SIGTERM))

        seen: list[object] = []
        inside()
        assert seen.pop() is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        assert seen == [signal.SIG_DFL]
