"""Convolutions that compute what follows them in an nn.Sequential."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convgen
from convgen.models import fusion
from convgen.models.fusion import Fused, activation_of
from convgen.spec.activation import Activation

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture(autouse=True)
def _all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without example inputs, every layer is chosen."""
    monkeypatch.setattr("convgen.models.choices.rule", lambda *_: (True, "for the test"))


class Block(nn.Sequential):
    """A container of a user's: its forward is nn.Sequential's."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = Block(
        nn.Conv1d(2, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.ConvTranspose1d(4, 4, 4, stride=2, groups=2),
        nn.BatchNorm1d(4),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.0),
        nn.Conv1d(4, 2, 3, padding=1),
    )
    model = nn.Sequential(body, nn.Flatten()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def swap(model: nn.Module, **options: Any) -> convgen.SwapReport:
    return convgen.swap(model, dtypes=("f64",), fuse=True, **options)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What neighbours were computed together, by their activations."""
    called: list[str] = []
    function_of = fusion._with_activation
    monkeypatch.setattr(
        fusion, "_with_activation", lambda c, text: (called.append(text), function_of(c, text))[1]
    )
    return called


X = torch.randn(3, 2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_torchs(training: bool, calls: list[str]) -> None:
    model = network().train(training)
    expected = results(network().train(training), X)
    report = swap(model)
    assert [row.names for row in report.fused] == [("0.0", "0.1", "0.2"), ("0.3", "0.4", "0.5")]
    reason = "BatchNorm is in training mode" if training else ""
    assert [row.reason for row in report.fused] == [reason] * 2
    for found, wanted in zip(results(model, X), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert calls == ([] if training else ["leaky_relu:0.1"] * 2)
    assert ("one kernel" in str(report)) != training


def test_nothing_else_changes(calls: list[str]) -> None:
    model = network().eval()
    plain = network().eval()
    swap(model)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name])
    body = model[0]
    assert isinstance(body, Block)
    assert isinstance(body, Fused)
    # A module, and a slice, compute what they are.
    torch.testing.assert_close(body[0](X), plain[0][0](X))
    torch.testing.assert_close(body[:2](X), plain[0][:2](X))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(X), plain(X))
    assert calls
    # Back in training mode, statistics are kept up to date.
    model.train()(X)
    assert not torch.equal(body[1].running_mean, plain[0][1].running_mean)
    convgen.unswap(model)
    assert type(body) is Block
    assert type(model) is nn.Sequential


def test_hooks_prevent_it(calls: list[str]) -> None:
    model, seen = network().eval(), []
    model[0][2].register_forward_hook(lambda *_: seen.append("activation"))
    model[0][3].register_forward_pre_hook(lambda *_: seen.append("convolution"))
    report = swap(model)
    assert [row.reason for row in report.fused] == [
        "LeakyReLU has hooks",
        "ConvTranspose1d has hooks",
    ]
    torch.testing.assert_close(model(X), network().eval()(X))
    assert seen == ["activation", "convolution"]
    assert not calls


def test_compiles(calls: list[str]) -> None:
    model = network().eval()
    expected = results(network().eval(), X)
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(X)
    torch.testing.assert_close(y, expected[0])
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    for each, wanted in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(each, wanted)


def test_activations_are_written_as_specifications_have_them() -> None:
    for module in (
        *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.GELU(), nn.GELU("tanh")),
        *(nn.Sigmoid(), nn.Tanh(), nn.Hardswish(), nn.Hardtanh(-2, 3)),
    ):
        x = torch.randn(99) * 4
        text = activation_of(module)
        assert text is not None
        expression = Activation.parse(text).forward("x")
        y = eval(expression, {"torch": torch, "F": nn.functional, "x": x})
        torch.testing.assert_close(y, module(x))
    assert activation_of(nn.Softplus()) is None
