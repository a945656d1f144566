"""What tests share: devices, a cache folder of their own, and packages compiled once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import convgen

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Package = Callable[..., ModuleType]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of compiled packages; CONVGEN_TEST_CACHE keeps one between sessions."""
    kept = os.environ.get("CONVGEN_TEST_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("packages", numbered=False)


@pytest.fixture(scope="session")
def package(session_cache: Path) -> Package:
    """``package("conv2d", "cpu", kernel_size=3, ...)``: a module, compiled at its first use."""

    def build(op: str, device: str = "cpu", **constants: Any) -> ModuleType:
        constants.setdefault("dtypes", ("f32", "f64"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
            return convgen.specialize(op, backends=device, **constants)

    return build


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """``"cpu"``, and ``"cuda"`` where there is a GPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Seeds torch, and gives TF32 no say in what a GPU computes as a reference."""
    torch.manual_seed(0)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
