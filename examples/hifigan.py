"""Runs HiFi-GAN's generator, by torch and then with the layers that convgen computes faster.

    python -m examples.hifigan

The generator is that of V3 in the paper (https://arxiv.org/abs/2010.05646), with random weights;
its input is the mel spectrogram of a second of speech. Weight normalization stays where it is.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

import convgen

CHANNELS = 256
UPS = ((8, 16), (8, 16), (4, 8))
BLOCKS = ((3, (1, 2)), (5, (2, 6)), (7, (3, 12)))
FRAMES = 86


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, kernel, padding="same", dilation=d))
            for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(leaky_relu(x, 0.1))
        return x


class Generator(nn.Module):
    """(N, 80, frames) -> (N, 1, 256 frames)."""

    def __init__(self) -> None:
        super().__init__()
        self.before = weight_norm(nn.Conv1d(80, CHANNELS, 7, padding=3))
        self.ups = nn.ModuleList()
        self.blocks = nn.ModuleList()
        channels = CHANNELS
        for rate, kernel in UPS:
            up = nn.ConvTranspose1d(channels, channels // 2, kernel, rate, (kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            channels //= 2
            self.blocks.append(nn.ModuleList(ResBlock(channels, k, d) for k, d in BLOCKS))
        self.after = weight_norm(nn.Conv1d(channels, 1, 7, padding=3))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.before(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return torch.tanh(self.after(leaky_relu(x)))


def seconds(model: nn.Module, mel: Tensor, runs: int = 10) -> float:
    """Of the quickest of a few runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        model(mel)[0, 0, 0].item()  # on a GPU, this waits
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Generator().to(device).eval()
    mel = torch.randn(1, 80, FRAMES, device=device)

    expected, before = model(mel), seconds(model, mel)
    report = convgen.swap(model, mel)  # measures every layer here, and takes what is faster
    after = seconds(model, mel)
    print(f"{report}\n")
    print(f"the same within {(model(mel) - expected).abs().max().item():.1e}")
    print(f"a second of speech takes {1e3 * after:.1f} ms instead of {1e3 * before:.1f}")


if __name__ == "__main__":
    main()
