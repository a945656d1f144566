"""How far a build is, for people."""

from __future__ import annotations

import sys
import time
from typing import Any


class Bar:
    """A progress bar on a terminal, plain lines elsewhere; nothing where nothing is reported."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        """Whether nothing is shown."""
        self.total = 0
        """Steps in all; 0 until the first report."""
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        self.total = total
        if self.quiet:
            return
        if not sys.stderr.isatty():
            print(f"[{done}/{total}] {what}" if total else what, file=sys.stderr)
            return
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None, description=what)
