"""Errors of whole networks."""

from __future__ import annotations


class NetworkError(ValueError):
    """Something about a network, or what it is given, that cannot be; one line says what."""
