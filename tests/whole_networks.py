"""Small networks, whose convolutions are those that conftest compiles for all tests."""

from __future__ import annotations

from typing import Any

import torch
from conftest import LAYERS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

CONV3D: dict[str, Any] = LAYERS["conv3d"]
UP3D: dict[str, Any] = LAYERS["conv_transpose3d"]


class Causal(nn.Conv3d):
    """Pads in front along the first axis by itself, as video VAEs do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (1, 3, 2), padding=(2, 1, 1))
        self.front = (0, 0, 0, 0, 2, 0)
        self.padding = (0, 1, 1)  # torch has taken (2, 1, 1) for other modes of padding

    def forward(self, x: Tensor, cached: Tensor | None = None) -> Tensor:
        if cached is not None:
            x = torch.cat((cached, x), 2)
        return super().forward(nn.functional.pad(x, self.front))[:, :, : x.shape[2]]


class OwnForward(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x, self.weight * 2, self.bias, padding=self.padding)


class Stage(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.all_modules = nn.Sequential(conv, nn.Tanh())  # nnU-Net registers it twice, too

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.all_modules(x)
        return y


class Volumes(nn.Module):
    """A U-Net of one level: (N, 2, D, H, W) -> (N, 3, 2 D + 1, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stage(nn.Conv3d(2, 4, **CONV3D))
        self.norm = nn.BatchNorm3d(4)
        self.causal = Causal(4)
        self.up = nn.ConvTranspose3d(4, 3, **UP3D)
        self.head = parametrizations.spectral_norm(nn.Conv3d(3, 3, **CONV3D))
        self.other = OwnForward(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.causal(self.norm(self.encoder(x)))
        z: Tensor = self.other(self.head(self.up(y)).tanh())
        return z


class Waves(nn.Module):
    """A vocoder of two layers: (N, 3, L) -> (N, 2, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(
            [
                parametrizations.weight_norm(
                    nn.ConvTranspose1d(3, 4, **LAYERS["conv_transpose1d"])
                ),
                weight_norm(nn.ConvTranspose1d(2, 3, 4, 3, output_padding=1, dilation=2)),
            ]
        )
        self.down = nn.Conv1d(4, 2, **LAYERS["conv1d"])
        self.last = nn.Conv1d(3, 2, **LAYERS["conv1d"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.leaky_relu(self.ups[0](x), 0.1))
        z: Tensor = self.last(self.ups[1](y).relu())
        return z


INPUTS = {Volumes: (2, 2, 3, 4, 5), Waves: (2, 3, 7)}


def made(network: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """A network in float64, and its input."""
    torch.manual_seed(0)
    model = network().double()
    return model, torch.randn(INPUTS[network], dtype=torch.float64)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of all parameters and of the input, and buffers after the run."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    gradients = {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}
