"""Trains nnU-Net's plain U-Net, by torch and then with the layers that convgen computes faster.

    python -m examples.nnunet

The network is that of dynamic_network_architectures' PlainConvUNet, a little smaller so that two
cores of a CPU take less than a minute, most of which are spent on compiling. On a GPU it is the
same script.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import convgen

FEATURES = (16, 32, 64)
PATCH = (2, 1, 32, 32, 32)


class ConvNormReLU(nn.Module):
    """Registers its layers under two names, as nnU-Net's does."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.LeakyReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.all_modules(x)
        return y


def stage(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    first = ConvNormReLU(in_channels, out_channels, stride)
    return nn.Sequential(first, ConvNormReLU(out_channels, out_channels))


class PlainConvUNet(nn.Module):
    def __init__(self, features: tuple[int, ...] = FEATURES, classes: int = 3) -> None:
        super().__init__()
        pairs = list(zip(features[1:], features, strict=False))
        self.encoder = nn.ModuleList([stage(1, features[0])])
        self.encoder.extend(stage(few, many, stride=2) for many, few in pairs)
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(many, few, 2, stride=2) for many, few in reversed(pairs)
        )
        self.decoder = nn.ModuleList(stage(2 * few, few) for _, few in reversed(pairs))
        self.head = nn.Conv3d(features[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.encoder:
            x = down(x)
            skips.append(x)
        for up, decode, skip in zip(self.ups, self.decoder, skips[-2::-1], strict=True):
            x = decode(torch.cat((up(x), skip), 1))
        y: Tensor = self.head(x)
        return y


def train(model: nn.Module, x: Tensor, labels: Tensor, steps: int = 4) -> float:
    """Seconds of the quickest of a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.99, nesterov=True)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        value = loss.item()  # on a GPU, this waits
        seconds.append(time.perf_counter() - start)
        print(f"  step {step}: loss {value:.4f}, {1e3 * seconds[-1]:.0f} ms")
    return min(seconds)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PlainConvUNet().to(device)
    x = torch.randn(PATCH, device=device)
    labels = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()

    print("torch:")
    before = train(model, x, labels)
    report = convgen.swap(model, x)  # measures every layer here, and takes what is faster
    print(f"\n{report}\n\nconvgen:")
    after = train(model, x, labels)
    print(f"a step takes {1e3 * after:.0f} ms instead of {1e3 * before:.0f}")


if __name__ == "__main__":
    main()
