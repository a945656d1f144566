"""What building may end with."""

from __future__ import annotations


class BuildError(RuntimeError):
    """A package could not be built, stored or exported; the message says why and what to do."""
