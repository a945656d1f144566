"""Depthwise layers in channels_last on a GPU: values, memory formats, determinism."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Package

pytestmark = pytest.mark.gpu

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenet": ("conv2d", {"kernel_size": 3, "padding": 1, "groups": 192}),
    "strided": ("conv2d", {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 20}),
    "convnext": ("conv2d", {"kernel_size": 7, "padding": 3, "groups": 96}),
    "odd": ("conv3d", {"kernel_size": 3, "padding": 1, "dilation": 2, "groups": 7}),
    "transposed": ("conv_transpose3d", {"kernel_size": 3, "stride": 2, "groups": 12}),
}
LIMITS = {torch.bfloat16: 4e-3, torch.float64: 1e-13}


@pytest.fixture(params=LAYERS)
def module(request: pytest.FixtureRequest, package: Package) -> ModuleType:
    op, constants = LAYERS[request.param]
    channels = {"in_channels": constants["groups"]}  # of which there are no implicit GEMMs
    return package(op, "cuda", dtypes=["f64", "bf16"], **constants, **channels)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_values_gradients_and_formats(
    module: ModuleType, dtype: torch.dtype, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, ndim, groups = module.SPEC["op"], int(module.SPEC["op"][-2]), module.SPEC["groups"]
    constants = {name: module.SPEC[name] for name in ("stride", "padding", "dilation", "groups")}
    memory_format = torch.channels_last if ndim == 2 else torch.channels_last_3d
    taken = []
    run = module._runtime.Launch.run

    def watched(launch: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(launch.takes_layouts)
        return run(launch, *args, **kwargs)

    monkeypatch.setattr(module._runtime.Launch, "run", watched)
    for batch, extents in ((2, (9, 14, 19)), (1, (20, 33, 40)), (3, (6, 7, 8))):
        x = torch.randn(batch, groups, *extents[-ndim:], device="cuda").to(dtype)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        shape = (groups, outputs) if "transpose" in op else (groups * outputs, 1)
        w = torch.randn(*shape, *module.SPEC["kernel_size"], device="cuda").to(dtype)
        b = torch.randn(groups * outputs, device="cuda").to(dtype)
        leaves = [x, w.requires_grad_(), b.requires_grad_()]
        taken.clear()
        found = getattr(module, op)(*leaves)
        assert taken == [True]
        double = [each.detach().double().requires_grad_() for each in leaves]
        expected = getattr(F, op)(*double, **constants)
        assert found.is_contiguous(memory_format=memory_format)
        grad = torch.randn_like(found)
        gradients = torch.autograd.grad(found, leaves, grad)
        wanted = torch.autograd.grad(expected, double, grad.double())
        for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
            assert float((one.double() - other).norm() / other.norm()) <= LIMITS[dtype]
        again = getattr(module, op)(*leaves)
        assert torch.equal(found, again)
        for one, other in zip(gradients, torch.autograd.grad(again, leaves, grad), strict=True):
            assert torch.equal(one, other)
