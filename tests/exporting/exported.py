"""What the tests of exported files share."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

_names = (f"exported_{number}" for number in itertools.count())


def quick(file: Path, flag: str = "-O0") -> Path:
    """Has a file compile with less optimization, which takes a sixth of the time."""
    file.write_text(file.read_text().replace('"-O3"', f'"{flag}"'))
    return file


def load(file: Path) -> ModuleType:
    """Imports a file under a name of its own."""
    name = next(_names)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def compiling() -> Iterator[None]:
    """Calls that compile, which exported files warn of."""
    with pytest.warns(UserWarning, match="once for this machine"):
        yield
