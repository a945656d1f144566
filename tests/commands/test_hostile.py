"""The command line with hostile arguments, streams, folders and signals: one line, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convgen import cli
from convgen.building import disk

LONG = "x" * 300
DIGITS, MORE_DIGITS = "9" * 400, "9" * 5000
LAYER = "--kernel 3 --out-channels 1 --shape"

MISTAKES = [
    *(f"generate --kernel 3 --out {LONG}", f"list --in {LONG}", f"show {LONG}", f"show a/{LONG}"),
    *(f"verify {LONG}", f"clean {LONG} --yes", f"generate --kernel 3 --name {LONG}"),
    *(f"bench --suite {LONG}", f"bench --suite {LONG}.json", f"generate --kernel 3 --op {LONG}"),
    *(f"verify --seed {2**64}", f"tune {LAYER} 1,1,4,4,4 --seed {2**63}", "verify --seed -1"),
    *(f"bench {LAYER} 1,1,4,4,4 --json /nowhere/x.json", f"bench {LAYER} 1,1,4,4,4 --json {LONG}"),
    *(f"tune {LAYER} 1,1,4,4,4 --json folder", f"bench {LAYER} 1,1,4,4,4 --plot /proc/x.png"),
    *(f"bench {LAYER} 1,1,4,4,4 --plot x.foo", f"tune {LAYER} 1,1,4,4,4 --table /proc/x/y.json"),
    *(f"tune {LAYER} 1,1,4,4,4 --table folder", f"bench {LAYER} 1,1,4,4,4 --seconds inf"),
    *(f"generate --kernel {DIGITS}", f"generate --kernel {MORE_DIGITS}"),
    *(f"generate --kernel 3 --stride {DIGITS}", f"generate --kernel 3 --padding {DIGITS}"),
    *(f"generate --kernel 3 --groups {DIGITS}", f"generate --kernel 3 --in-channels {DIGITS}"),
    *(f"bench {LAYER} 1,1,4,4,{DIGITS}", f"tune {LAYER} {DIGITS},1,4,4,4 --dry-run"),
    *(f"bench --kernel 3 --shape 1,1,4,4,4 --out-channels {DIGITS}", "bench --suite folder.json"),
    *("CONVGEN_CACHE_DIR=~nobody-here/x generate --op conv1d --kernel 3 --backend cpu",),
    *("CONVGEN_CACHE_DIR=~nobody-here/x clean --cache --yes",),
    *("CONVGEN_TUNED=~nobody-here/x generate --op conv1d --kernel 3 --backend cpu",),
    *(f"CONVGEN_TUNED=/dev/zero tune {LAYER} 1,1,4,4,4", "show fifo", "show zero"),
]


@pytest.mark.parametrize("command", MISTAKES, ids=[command[:60] for command in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("CONVGEN_TUNED", str(tmp_path / "none.json"))
    for name in ("folder", "folder.json", "fifo", "zero"):
        Path(name).mkdir()
    os.mkfifo("fifo/spec.json")
    Path("zero/spec.json").symlink_to("/dev/zero")
    before = sorted(tmp_path.rglob("*"))
    words = command.split()
    while "=" in words[0]:
        variable, value = words.pop(0).split("=")
        monkeypatch.setenv(variable, value)
    assert cli.main(words) in (1, 2)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("convgen")
    assert sorted(tmp_path.rglob("*")) == before


def start(*arguments: str, shell: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = f'exec "$0" -m convgen "$@" {shell}'
    return subprocess.run(
        ["/bin/sh", "-c", line, sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "CONVGEN_CACHE_DIR": str(cwd / "none")},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        (">&-", 1, "Bad file descriptor"),
        (">/dev/full", 1, "No space left on device"),
        ("2>&-", 0, ""),
        (">&- 2>&-", 1, ""),
        (">/dev/full 2>/dev/full", 1, ""),
        ("<&-", 0, ""),
        ("| head -c 1", 0, ""),
    ],
)
@pytest.mark.parametrize("command", ["--help", "doctor --json"])
def test_a_stream_that_takes_nothing_is_said_in_one_line(
    tmp_path: Path, command: str, shell: str, status: int, said: str
) -> None:
    if command == "--help" and shell == "2>&-":
        command = "list"  # which reports that there is nothing
    result = start(*command.split(), shell=shell, cwd=tmp_path)
    assert result.returncode == status
    assert said in result.stderr
    assert result.stderr.count("\n") <= 1
    assert "Traceback" not in result.stderr


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\xe4"
    os.mkdir(folder)
    for encoding in ("ascii", "utf-8:strict"):
        result = subprocess.run(
            [sys.executable, "-m", "convgen", "clean", "--in", folder, b"\xff"],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert result.returncode == 2
        assert result.stderr.count(b"\n") == 1


def test_a_deleted_working_folder_is_said_in_one_line(tmp_path: Path) -> None:
    gone = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m convgen generate --kernel 3'
    result = subprocess.run(
        ["/bin/sh", "-c", gone, sys.executable], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.endswith("generate: the working folder does not exist any more\n")
    assert result.stderr.count("\n") == 1


INTERRUPT = """
import atexit, os, runpy, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == {when!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
if {when!r} == "exit":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["convgen", "list", "--in", "nowhere"]
runpy.run_module("convgen", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("when", "status", "said"),
    [
        ("click", -signal.SIGINT, ""),
        ("convgen.cli", -signal.SIGINT, ""),
        ("convgen.commands.report", cli.INTERRUPTED, "Interrupted."),
        ("exit", -signal.SIGINT, "run convgen generate first."),
    ],
)
def test_ctrl_c_shows_no_traceback_from_the_first_line_to_the_last(
    when: str, status: int, said: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPT.format(when=when)], capture_output=True, text=True
    )
    assert result.returncode == status
    assert result.stderr.strip().endswith(said)
    assert len(result.stderr.strip().splitlines()) <= 1


def test_json_goes_to_the_file_of_a_link_and_into_pipes_and_devices(tmp_path: Path) -> None:
    """Nothing takes the place of a link or a device, as the renaming of a file would."""
    (tmp_path / "link").symlink_to("file")
    disk.check_writable(tmp_path / "link")
    disk.write_anywhere(tmp_path / "link", "[1]")
    assert json.loads((tmp_path / "file").read_text()) == [1]
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "null").symlink_to("/dev/null")
    disk.check_writable(tmp_path / "null")
    disk.write_anywhere(tmp_path / "null", "[1]")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device"):
        disk.check_writable(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    disk.write_anywhere(tmp_path / "fifo", "[1]")
    assert os.read(reader, 10) == b"[1]"
    os.close(reader)
