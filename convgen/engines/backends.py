"""What kernels are generated for."""

from __future__ import annotations

BACKENDS = ("cpu", "cuda")

SOURCE_SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
"""Suffix of the translation units of each backend."""
