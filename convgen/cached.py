"""Where Python imports packages of the cache from.

``convgen.cached.<key>.<name>`` is one of this machine's cache. What ``specialize`` returns is
``convgen.cached.<name>__<arguments>``, with its arguments in the name: the classes of such a module
have a home on every machine. What was pickled with them, a whole model too, loads wherever convgen
is installed; the package is found in the cache there, or generated and compiled.

They are imported from their sources alone, which the entry's digests vouch for: neither compiled
modules in ``__pycache__``, which nothing vouches for, nor anything else that Python would prefer.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

from convgen.building import cache, requests

__path__ = [str(cache.trusted_path())]

packages: dict[str, Path] = {}
"""Folders of modules with their arguments in the name that this process has found or built."""


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
        request = requests.read(parts[0])
        if request is not None and len(parts) == 1:
            if parts[0] not in packages:
                # Imported here, since it is needed on machines alone that have not built it yet.
                pipeline = importlib.import_module("convgen.specialize")
                packages[parts[0]] = pipeline.generate_request(request)
            source = str(packages[parts[0]] / "__init__.py")
            return spec_from_file_location(
                fullname,
                source,
                loader=_SourceLoader(fullname, source),
                submodule_search_locations=[str(packages[parts[0]])],
            )
        for folder in map(Path, path or ()):
            if len(parts) == 1:
                if cache.is_key(parts[0]) and (folder / parts[0]).is_dir():
                    spec = ModuleSpec(fullname, None, is_package=True)
                    spec.submodule_search_locations = [str(folder / parts[0])]
                    return spec
                continue
            looked_up = request is not None or len(parts) > 2
            if not looked_up and not cache.lookup_in(folder.parent, folder.name, parts[1]):
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
