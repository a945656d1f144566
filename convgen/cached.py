"""Where Python imports cached packages from: ``convgen.cached.<key>.<name>`` lies in the cache.

Thus the classes of a specialized module have an importable home, and what was pickled with them
(a whole model, or one sent to a spawned worker) loads in another process of the same machine.
"""

from __future__ import annotations

from convgen.building.cache import cache_dir, cache_path

# The folder is created by whoever builds; if it exists, it must be nobody else's to write.
__path__ = [str(cache_dir() if cache_path().exists() else cache_path())]
