"""Whole problems as one file: the model's own constructor and forward, with other kernels."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from pathlib import Path

import pytest
import torch

import convgen
from tests.exporting.exported import load, quick

PROBLEM = '''
"""A model with convolutions in every place that a network has them."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

channels, extent = 4, 6


class Causal(nn.Conv1d):
    """Pads in front alone, and leaves the rest to torch."""

    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Own(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias, padding=1)


class Model(nn.Module):
    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super(Model, self).__init__()
        self.up = nn.ConvTranspose1d(channels, channels, 3, stride=2, output_padding=1, bias=bias)
        self.more = nn.Sequential(
            nn.ReLU(),
            nn.Sequential(Causal(channels, channels, 3), nn.BatchNorm1d(channels)),
            nn.Conv1d(channels, channels, 3, padding=1, padding_mode="circular"),
        )
        self.again = self.more[2]
        last = nn.Conv1d(channels, 2, 3, padding="same")
        self.normed = nn.utils.parametrizations.weight_norm(last)
        self.own = Own(2, 2, 3)
        self.filter = nn.Parameter(torch.rand(2, 2, 1))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.again(self.more(self.up(x, output_size=[2 * x.shape[-1] + 1])))
        return F.conv1d(self.own(self.normed(x)), self.filter) * scale


def get_inputs():
    return [torch.rand(2, channels, extent)]


def get_init_inputs():
    return [channels]
'''


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM)
    return path


@pytest.mark.filterwarnings("ignore:compiling")
def test_a_model_computes_what_it_did(
    problem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVGEN_EXPORT_DIR", str(tmp_path / "libraries"))
    written = convgen.export_model(problem, tmp_path / "solution.py", backends="cpu")
    assert [spec.name for spec in written.layers] == [
        "conv_transpose1d_k3_s2_op1",
        "conv1d_k3",
        "conv1d_k3_psame",
    ]
    assert [line.partition(":")[0] for line in written.left] == [
        "own",
        "F.conv1d, line 22",
        "F.conv1d, line 42",
    ]
    module = load(quick(written.path))
    assert "own: Own.forward does not call torch's" in module.ModelNew.__doc__
    assert inspect.signature(module.ModelNew) == inspect.signature(module.Model)
    models = []
    for kind in (module.Model, module.ModelNew):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            models.append(kind(*module.get_init_inputs()))
            (x,) = module.get_inputs()
    theirs, mine = models
    for (name, one), (other, two) in zip(
        theirs.state_dict().items(), mine.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two)
    assert mine.more[2] is mine.again
    assert type(mine.up) is module._ConvTranspose1d
    assert isinstance(mine.more[1][0], module.Causal)
    mine = copy.deepcopy(mine)
    outputs, grads = [], []
    for model in (theirs, mine):
        operand = x.clone().requires_grad_()
        outputs.append(model(operand, scale=2.0))
        grads.append(torch.autograd.grad(outputs[-1].sin().sum(), [operand, *model.parameters()]))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    part = pickle.loads(pickle.dumps(mine.more))  # torch pickles no parametrized layers
    assert type(part[1][0]) is type(mine.more[1][0]) is not module.Causal
    assert torch.equal(part(outputs[1].new_ones(2, 4, 9)), mine.more(outputs[1].new_ones(2, 4, 9)))
    # The kernels ran: without them, nothing would differ in the last place.
    assert module._kernels
    mine.again.dilation = (2,)
    with pytest.raises(ValueError, match="no kernels for Conv1d"):
        mine(x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("class Model(", "class Network("), "has no Model"),
        (("def get_init_inputs", "def get_arguments"), "has no get_init_inputs"),
        (("return [channels]", "return []"), r"failed: TypeError: .*missing 1 required"),
        (("return [channels]", "return [channels"), "is no Python: SyntaxError"),
        (("channels, extent = 4, 6", "channels, extent = 4"), "failed: TypeError"),
        (("class Own(", "class ModelNew(nn.Module): ...\n\n\nclass Own("), "defines ModelNew"),
        (("channels, extent = 4, 6", "channels = extent = hashlib = 4"), "defines hashlib"),
    ],
)
def test_mistakes_are_one_line(change: tuple[str, str], said: str, problem: Path) -> None:
    problem.write_text(PROBLEM.replace(*change))
    with pytest.raises(convgen.ExportError, match=said) as caught:
        convgen.export_model(problem, problem.with_name("solution.py"))
    assert "\n" not in str(caught.value)
    assert not problem.with_name("solution.py").exists()
    assert "_convgen_problem" not in sys.modules


def test_a_model_without_layers_is_refused(problem: Path) -> None:
    text = PROBLEM.partition("class Causal")[0]
    text += (
        "class Model(nn.Module):\n    def forward(self, x):\n        return F.conv1d(x, x)\n\n\n"
    )
    problem.write_text(text + "def get_init_inputs():\n    return []\n")
    with pytest.raises(convgen.ExportError, match=r"no convolution layer .*F\.conv1d, line 15"):
        convgen.export_model(problem, problem.with_name("solution.py"))


def test_other_arguments_than_the_exported_ones_are_refused(tmp_path: Path) -> None:
    problem = tmp_path / "problem.py"
    problem.write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, kernel_size):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 4, kernel_size)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x)\n"
        "def get_init_inputs():\n"
        "    return [3]\n"
    )
    module = load(convgen.export_model(problem, tmp_path / "solution.py", backends="cpu").path)
    module.ModelNew(3)
    with pytest.raises(ValueError, match=r"no kernels for Conv2d\(3, 4, kernel_size=\(5, 5\)"):
        module.ModelNew(5)
