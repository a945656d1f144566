"""What the machine refuses to the command line: one line and status 1, without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LONG = "a" * 300


def run(*args: str, cwd: Path, stdout: str | None = None) -> tuple[int, str]:
    command = [sys.executable, "-m", "convgen", *args]
    with open(stdout or "/dev/null", "w") as output:
        done = subprocess.run(
            command, cwd=cwd, stdout=output, stderr=subprocess.PIPE, text=True, check=False
        )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "args",
    [("generate", "--kernel", "3", "--out", LONG), ("list", "--in", LONG), ("show", LONG)],
    ids=lambda args: args[0],
)
def test_a_name_longer_than_the_file_system_takes_is_one_line(
    args: tuple[str, ...], tmp_path: Path
) -> None:
    status, error = run(*args, cwd=tmp_path)
    assert status in (1, 2)
    assert len(error.splitlines()) == 1
    assert "too long" in error


@pytest.mark.parametrize("args", [("--version",), ("--help",)], ids=lambda args: args[0])
def test_a_full_output_is_one_line(args: tuple[str, ...], tmp_path: Path) -> None:
    status, error = run(*args, cwd=tmp_path, stdout="/dev/full")
    assert status == 1
    assert error.splitlines() == [error.strip()]
    assert "No space left" in error
