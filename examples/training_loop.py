"""Trains a small network with a generated layer: it learns to undo a 3-D average pooling.

Run it from the folder in which the layer was generated::

    convgen generate --kernel 3 --stride 2
    python -m examples.training_loop
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from generated.conv_transpose3d_k3_s2 import ConvTranspose3d


def main(steps: int = 30) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(
        nn.Conv3d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        ConvTranspose3d(16, 1),  # the drop-in: stride 2 and kernel 3 are compiled in
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    volume = F.interpolate(torch.randn(4, 1, 5, 5, 5), size=(17, 33, 33), mode="trilinear")
    target = volume.to(device)
    pooled = F.avg_pool3d(target, kernel_size=3, stride=2)
    print(f"{tuple(pooled.shape)} -> {tuple(model(pooled).shape)} on {device}")
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(pooled), target)
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:2}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
