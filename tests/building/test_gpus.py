"""Which GPUs are here, asked of the driver alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from convgen.building import gpus
from convgen.building.gpus import gpu_architectures


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_architectures_of_the_gpus_present_are_specific_from_hopper_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capabilities = ((9, 0), (8, 6), (9, 0), (12, 0))
    monkeypatch.setattr(gpus, "nvml", lambda: gpus.Nvml((13, 0), capabilities))
    assert gpu_architectures() == ("86", "90a", "120a")


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0"])
def test_hidden_gpus_are_not_seen(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setattr(gpus, "nvml", lambda: gpus.Nvml((13, 0), ((9, 0),)))
    assert gpu_architectures() == ("90a",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu_architectures() == ()


def test_architectures_are_found_without_importing_torch() -> None:
    code = (
        "import sys; from convgen.building import gpus; gpus.gpu_architectures(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
def test_architectures_agree_with_torch() -> None:
    import torch

    found = {
        f"{major}{minor}{'a' if major >= 9 else ''}"
        for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    }
    assert set(gpu_architectures()) == found
    assert set(gpus.driver_capabilities()) == set(gpus.nvml().capabilities)
