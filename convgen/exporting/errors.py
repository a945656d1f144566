"""What exporting may end with."""

from __future__ import annotations


class ExportError(ValueError):
    """What was given cannot be exported, or not to there; the message says why and what can."""
