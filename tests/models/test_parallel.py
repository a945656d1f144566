"""Swapped networks in two processes: DDP and FSDP2 against one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import LAYERS, Package
from torch import nn
from torch.multiprocessing.spawn import spawn
from whole_networks import Volumes, made

import convgen
from convgen.models import choices
from convgen.models.classes import Swapped

pytestmark = pytest.mark.long


def swapped() -> nn.Module:
    model, _ = made(Volumes)
    model.eval()  # statistics of a batch would be those of a half
    report = convgen.swap(model, dtypes=("f32", "f64"))
    assert len(report.swapped) == 4
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, store: str, cache: str) -> None:
    """One of two processes; an assertion that fails ends both."""
    os.environ["CONVGEN_CACHE_DIR"] = cache
    choices.rule = lambda *_: (True, "for the test")  # type: ignore[assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    _, x = made(Volumes)
    x = torch.cat((x, x.flip(0) * 2))
    half = x[2 * rank : 2 * rank + 2]
    expected = gradients(made(Volumes)[0].eval(), x)

    parallel = nn.parallel.DistributedDataParallel(swapped(), find_unused_parameters=True)
    found = gradients(parallel, half)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.removeprefix("module.")], msg=name)

    model = swapped()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.encoder, model.causal, model.up):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.causal, Swapped)
    for name, value in gradients(model, half).items():
        torch.testing.assert_close(value.full_tensor(), expected[name], msg=name)
    convgen.unswap(model)
    assert not isinstance(model.up, Swapped)
    convgen.swap(model, dtypes=("f32", "f64"))
    model.zero_grad()
    for name, value in gradients(model, half).items():
        torch.testing.assert_close(value.full_tensor(), expected[name], msg=name)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.usefixtures("shared_cache")
def test_two_processes_have_the_gradients_of_one(
    package: Package, session_cache: Path, tmp_path: Path
) -> None:
    for op in ("conv_transpose3d", "conv3d"):
        package(op, **LAYERS[op])
    spawn(work, (str(tmp_path / "store"), str(session_cache)), nprocs=2)
