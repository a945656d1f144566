"""``convgen export``: what it prints, and that a mistake is one line and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from convgen.cli import main

LAYER = ("export", "--op", "conv1d", "--kernel", "3", "--backend", "cpu", "-o")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_prints_the_line_that_imports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYER, "layer.py"]) == 0
    said = capsys.readouterr()
    assert said.out == "from layer import Conv1d\n"
    assert said.err.startswith("layer.py: ")
    assert main([*LAYER, "layer.py", "--no-backward"]) == 0  # convgen's own file is replaced


def test_names_what_is_left_to_torch(capsys: pytest.CaptureFixture[str]) -> None:
    Path("problem.py").write_text(
        "import torch\nfrom torch import nn\nclass Model(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.conv = nn.Conv2d(1, 1, 3)\n"
        "        self.lazy = nn.LazyConv2d(1, 3)\n    def forward(self, x):\n"
        "        return torch.conv2d(self.conv(x), self.conv.weight)\n"
        "def get_init_inputs():\n    return []\n"
    )
    arguments = ["export", "--model", "problem.py", "-o", "out.py", "--backend", "cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out == "from out import ModelNew\n"
    assert "Left to torch: lazy: its channels are not known before it is called\n" in said.err
    assert "Left to torch: torch.conv2d, line 9: " in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "-o", "x.py"], "Give one of MODULE, --kernel and --model."),
        (["export", "--kernel", "3"], "Missing option '-o'"),
        ([*LAYER, "nowhere/x.py"], "cannot write nowhere/x.py"),
        ([*LAYER, "mine.py"], "mine.py exists and was not written by convgen"),
        ([*LAYER, "x.py", "--padding", "-1"], "padding"),
        (["export", "nothing", "-o", "x.py"], "no module 'nothing'"),
        (["export", "--model", "none.py", "-o", "x.py"], "none.py cannot be read: No such file"),
        (["export", "--model", "mine.py", "-o", "x.py"], "mine.py has no Model"),
        (["export", "--model", "mine.py", "-o", "x.py", "--class", "a b"], "not an identifier"),
        ([*LAYER, "x.py", "--arch", "12"], "architecture '12'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text("mine = True\n")
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert Path("mine.py").read_text() == "mine = True\n"
    assert not Path("x.py").exists()
