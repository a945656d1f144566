"""Names of modules that say what was asked for, so that any machine can find or build it.

Pickles name a class by its module. A name made of a cache's key means something on one machine,
for one version of its compilers; this one holds the arguments themselves.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

_MARK = "__"
"""Between a title, for people to read, and the arguments in base32, an identifier's characters."""


def module_name(title: str, request: Mapping[str, Any]) -> str:
    """An identifier for what a request, which JSON can hold, brings forth."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"))
    return title + _MARK + base64.b32encode(text.encode()).decode().rstrip("=").lower()


def read(name: str) -> dict[str, Any] | None:
    """The request that :func:`module_name` put into a name; None of other names."""
    digits = name.rpartition(_MARK)[2].upper()
    try:
        request = json.loads(base64.b32decode(digits + "=" * (-len(digits) % 8)))
    except (ValueError, RecursionError):
        return None
    return request if isinstance(request, dict) and digits != name.upper() else None
