"""Which lines of some modules run. Only those within functions count: the others run when a module is imported."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


class Lines:
    """Of modules that can be imported."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._all: dict[str, frozenset[int]] = {}
        self._seen: dict[str, set[int]] = {}
        for name in modules:
            file = str(importlib.import_module(name).__file__)
            code = compile(Path(file).read_bytes(), file, "exec")
            self._all[file] = frozenset(_in_functions(code))
            self._seen[file] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context lines are noted; in threads that begin in it, too."""
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]  # typeshed does not know

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        seen = self._seen.get(frame.f_code.co_filename)
        if seen is None:
            return None

        def note(frame: FrameType, event: str, argument: Any) -> Any:
            seen.add(frame.f_lineno)
            return note

        return note(frame, event, argument)

    @property
    def counts(self) -> tuple[int, int]:
        """Lines that ran, and all of them."""
        ran = sum(len(self._all[file] & seen) for file, seen in self._seen.items())
        return ran, sum(map(len, self._all.values()))

    def missed(self) -> list[str]:
        """`file.py: 12 13 40` for each that has lines that did not run."""
        found = []
        for file, lines in self._all.items():
            if missed := sorted(lines - self._seen[file]):
                found.append(f"{Path(file).name}: {' '.join(map(str, missed))}")
        return found


def _in_functions(code: CodeType) -> Iterator[int]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            if part.co_flags & inspect.CO_OPTIMIZED:  # a function's, and not a class's body
                yield from (line for _, _, line in part.co_lines() if line and line != part.co_firstlineno)
            yield from _in_functions(part)
