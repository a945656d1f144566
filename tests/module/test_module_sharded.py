"""Generated modules on DTensors: two processes against one, forward and backward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Package
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import convgen

UP = {"op": "conv_transpose3d", "kernel_size": 3, "stride": 2, "dtypes": ("f32", "f64")}
DOWN = {"op": "conv1d", "kernel_size": 5, "stride": 3, "padding": 2, "dtypes": ("f32", "f64")}


class Network(nn.Module):
    def __init__(self, up: Any, down: Any) -> None:
        super().__init__()
        self.up = up.ConvTranspose3d(2, 3, dtype=torch.float64)
        self.down = down.Conv1d(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.down(self.up(x, output_size).relu().flatten(2))


def gradients(network: nn.Module, x: Tensor, output_size: list[int] | None) -> list[Any]:
    """The output, and first and second derivatives."""
    tensors = [x.requires_grad_(), *network.parameters()]
    y = network(x, output_size)
    first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), tensors[:2])
    return [y, *first, *second]


def work(rank: int, store: str, cache: str) -> None:
    """One of two processes; an assertion that fails ends both."""
    os.environ["CONVGEN_CACHE_DIR"] = cache
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # Packages are imported before DTensor: it learns of them when it calls.
    up, down = (convgen.specialize(**each, backends="cpu") for each in (UP, DOWN))
    from torch.distributed.tensor import (
        Placement,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    single, sharded = Network(up, down), Network(up, down)
    sharded.load_state_dict(single.state_dict())
    sharded = distribute_module(sharded, mesh)
    x = torch.randn(3, 2, 3, 2, 4, dtype=torch.float64)  # 3 samples: 2 for one, 1 for the other
    placements: tuple[Placement, ...] = (Replicate(), Shard(0), Shard(1), Shard(3))
    for size in (None, [8, 5, 9]):  # the output padding of a second call differs
        expected = gradients(single, x.clone(), size)
        for placement in placements:
            found = gradients(sharded, distribute_tensor(x, mesh, [placement]), size)
            if placement == Shard(0):
                assert found[0].placements == (Shard(0),)  # nothing was gathered
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.full_tensor(), theirs)
    with torch.inference_mode():
        y = sharded(distribute_tensor(x, mesh, [Shard(0)]))
    torch.testing.assert_close(y.full_tensor(), single(x))
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_compute_what_one_does(
    package: Package, session_cache: Path, tmp_path: Path
) -> None:
    for layer in (UP, DOWN):
        package(**layer)  # built once
    spawn(work, (str(tmp_path / "store"), str(session_cache)), nprocs=2)
