"""Where Python imports cached packages from: ``convgen.cached.<key>.<name>`` lies in the cache.

Thus the classes of a specialized module have an importable home, and what was pickled with them
(a whole model, or one sent to a spawned worker) loads in another process of the same machine.

They are imported from their sources alone, which the entry's digests vouch for: neither compiled
modules in ``__pycache__``, which nothing vouches for, nor anything else that Python would prefer.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from convgen.building import cache

__path__ = [str(cache.trusted_path())]


class _SourceLoader(SourceFileLoader):
    """Compiles the source each time, which takes a few milliseconds."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


class _Finder:
    """Finds what lies below this module, the entry compared with its digests beforehand."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parts = fullname.removeprefix(f"{__name__}.").split(".")
        if not fullname.startswith(f"{__name__}."):
            return None
        for folder in map(Path, path or ()):
            if len(parts) == 1:
                if cache.is_key(parts[0]) and (folder / parts[0]).is_dir():
                    spec = ModuleSpec(fullname, None, is_package=True)
                    spec.submodule_search_locations = [str(folder / parts[0])]
                    return spec
                continue
            if len(parts) == 2 and cache.lookup_in(folder.parent, folder.name, parts[1]) is None:
                continue
            finder = FileFinder(str(folder), (_SourceLoader, importlib.machinery.SOURCE_SUFFIXES))
            if (found := finder.find_spec(fullname)) is not None:
                return found
        # Not None: the finders after this one would take what is damaged, too.
        raise ModuleNotFoundError(
            f"{fullname} is missing in the cache, or damaged there: call convgen.specialize again",
            name=fullname,
        )


sys.meta_path.insert(0, _Finder)
