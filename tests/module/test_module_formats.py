"""Memory formats: results lie as those of torch's own convolutions do."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package
from interpreted import mostly_long
from torch import Tensor
from torch.library import opcheck

LAYERS: dict[str, dict[str, Any]] = {
    "conv2d": {"kernel_size": 3, "stride": 2, "padding": 1},
    "conv_transpose3d": {"kernel_size": 3, "stride": 2},
}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
WAYS = [(last_x, last_w) for last_x in (False, True) for last_w in (False, True)]


@pytest.fixture(params=LAYERS)
def op(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def module(package: Package, op: str) -> ModuleType:
    return package(op, **LAYERS[op])


def operands(op: str, last_x: bool, last_w: bool) -> list[Tensor]:
    ndim = int(op[-2])
    x, w = (
        torch.randn(2, 4, *[5] * ndim),
        torch.randn(*((4, 3) if "t" in op[4:] else (3, 4)), *[3] * ndim),
    )
    given = [
        tensor.contiguous(memory_format=FORMATS[ndim]) if last else tensor
        for tensor, last in ((x, last_x), (w, last_w))
    ]
    return [tensor.requires_grad_() for tensor in (*given, torch.randn(3))]


@pytest.mark.parametrize(("last_x", "last_w"), WAYS)
def test_results_and_gradients_lie_as_torch_has_them(
    module: ModuleType, op: str, last_x: bool, last_w: bool
) -> None:
    given = operands(op, last_x, last_w)
    constants = {name: value for name, value in module.SPEC.items() if name in LAYERS[op]}
    constants.pop("kernel_size")
    ours, theirs = getattr(module, op)(*given), getattr(F, op)(*given, **constants)
    grad = torch.randn_like(theirs)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, given, grad)),
        (theirs, *torch.autograd.grad(theirs, given, grad)),
        strict=True,
    )
    for one, other in pairs:
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("last_x", "last_w"), WAYS[1:])
def test_operators_and_their_fakes_agree(
    module: ModuleType, op: str, last_x: bool, last_w: bool
) -> None:
    x, w, b = operands(op, last_x, last_w)
    operators = getattr(torch.ops, module._operators.NAMESPACE)
    y = getattr(module, op)(x, w, b)
    first, second = ("dgrad", "fprop") if "transpose" in op else ("fprop", "dgrad")
    tests = ("test_schema", "test_faketensor")
    opcheck(getattr(operators, first).default, (x, w, b, y.shape[2:]), test_utils=tests)
    opcheck(getattr(operators, second).default, (y, w, None, x.shape[2:]), test_utils=tests)
    coarse, fine = (x, y) if "transpose" in op else (y, x)
    for operator in (operators.wgrad, operators.wbgrad):
        opcheck(operator.default, (coarse.detach(), fine.detach()), test_utils=tests)
    bias = y.detach().contiguous(memory_format=FORMATS[y.dim() - 2])
    torch.testing.assert_close(operators.bgrad(bias), operators.bgrad(bias.contiguous()))


@pytest.mark.long
def test_one_dimensional_results_are_contiguous(package: Package) -> None:
    module = package("conv1d", kernel_size=3)
    x, w = torch.randn(2, 7, 4).mT, torch.randn(3, 4, 3)
    y = module.conv1d(x, w)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.conv1d(x, w), rtol=1e-4, atol=1e-4)


LAYERS_OF_ONE: dict[str, dict[str, int]] = {
    "conv2d": {"kernel_size": 3},
    "conv_transpose2d": {"kernel_size": 2, "stride": 2},
    "conv3d": {"kernel_size": 3},
}


@pytest.mark.parametrize("op", mostly_long(list(LAYERS_OF_ONE), 1))
def test_one_channel_lies_as_its_strides_say(op: str, package: Package) -> None:
    """Tensors of one channel are contiguous and channels_last at once: torch goes by strides."""
    module = package(op, **LAYERS_OF_ONE[op])
    ndim, taps = int(op[-2]), LAYERS_OF_ONE[op]["kernel_size"]
    last = FORMATS[ndim]
    constants = {"stride": LAYERS_OF_ONE[op].get("stride", 1)}
    for given, made, x_last, w_last, extent in itertools.product(
        (1, 3), (1, 4), (False, True), (False, True), (5, taps)
    ):
        shape = (given, made) if "transpose" in op else (made, given)
        x, w = torch.randn(2, given, *[extent] * ndim), torch.randn(*shape, *[taps] * ndim)
        x = (x.to(memory_format=last) if x_last else x).requires_grad_()
        w = (w.to(memory_format=last) if w_last else w).requires_grad_()
        results = [getattr(each, op)(x, w, **more) for each, more in ((F, constants), (module, {}))]
        theirs, ours = results
        assert ours.stride() == theirs.stride(), (x.stride(), w.stride())
        torch.testing.assert_close(ours, theirs)
        if extent == 5:
            operators = getattr(torch.ops, module._operators.NAMESPACE)
            first = operators.dgrad if "transpose" in op else operators.fprop
            operands = (x.detach(), w.detach(), None, ours.shape[2:])
            opcheck(first.default, operands, test_utils=("test_faketensor",))
            grad = torch.randn_like(theirs)
            pairs = zip(*(torch.autograd.grad(y, (x, w), grad) for y in results), strict=True)
            for theirs, ours in pairs:
                assert ours.stride() == theirs.stride(), (x.stride(), w.stride())
                torch.testing.assert_close(ours, theirs)
