"""The two implementations: the plain one, in Python, and the compiled one (as in PEP 399).

The compiled one is there where it could be built. `_bytes` has what is done for each slot and
record by splits and recovery, or for each extent: functions of the same names as in
`kvstore.format`, which tells what they do, with the same results. `_fast_path` has the common case
of the operations on one key, a shortcut: what it does not do, the Python code does. Both extensions
are used, or neither; but where threads run without the interpreter's lock (a free-threaded Python),
on which `_fast_path` relies, `_bytes` is used alone, and nothing switches that lock on. With
``KVSTORE_PURE=1`` in the environment neither is loaded.

A store keeps to the implementation that was `selected` as it was opened.
"""

import os
import sys
import threading
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Final, cast

from kvstore.format import layout

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable
    from mmap import mmap

    from kvstore.format.extent_records import FoundBlocks

    from .interface import FastPath, Members, OwnedLock

_FUNCTIONS: Final = {
    "find_magics",
    "scan_blocks",
    "link_free_blocks",
    "sort_words",
    "has_equal_hashes",
    "judge_words",
    "members_of_words",
    "count_members",
    "partition_slots",
    "build_segment",
    "count_in_use",
    "find_partly_used",
}


class Implementation:
    """Functions over bytes, of one kind, of some modules; `kvstore.format` tells what they do."""

    if TYPE_CHECKING:
        name: str
        """"plain", "compiled", or "free-threaded": compiled, but without the fast path."""
        find_magics: Callable[[bytes], tuple[int, int, int]]
        scan_blocks: Callable[[bytes, int, int, int, int, int], FoundBlocks]
        link_free_blocks: Callable[[array[int], int], tuple[int, list[tuple[int, int]]]]
        sort_words: Callable[[list[array[int]]], array[int]]
        has_equal_hashes: Callable[[array[int]], bool]
        judge_words: Callable[
            [mmap | bytes, int, array[int], int, int],
            tuple[array[int], array[int], array[int], array[int]],
        ]
        members_of_words: Callable[[mmap | bytes, int, array[int]], Members]
        count_members: Callable[[Members], int]
        partition_slots: Callable[
            [mmap | bytes, int, int, int, int, int, int], tuple[Members, Members, list[bytes], int]
        ]
        build_segment: Callable[[int, int, Members], tuple[bytes, int]]
        count_in_use: Callable[[bytes], tuple[int, int, int, int]]
        find_partly_used: Callable[[bytes], list[int]]
        make_fast_path: Callable[..., FastPath] | None
        """Makes the fast path of one store: see `_fast_path.pyx`."""

    def __init__(
        self, name: str, modules: "Iterable[ModuleType]", make_fast_path: "type[FastPath] | None"
    ) -> None:
        self.name = name
        self.make_fast_path = make_fast_path
        for module in modules:
            for each in _FUNCTIONS & vars(module).keys():
                setattr(self, each, getattr(module, each))


def _load() -> dict[str, ModuleType]:
    """Return the extensions by name; none where they were not built or are not wanted.

    Raises:
        ImportError: They were built and cannot be used: one is missing or does not load, or the
            file format is not the one that they were built for.
    """
    if os.environ.get("KVSTORE_PURE", "0") not in ("", "0"):
        return {}
    wanted = ("_bytes", "_fast_path") if _has_gil() else ("_bytes",)
    try:
        found = {name: module for name in wanted if (module := _find(name)) is not None}
        if found:
            _check(found, wanted)
    except ImportError as error:
        error.add_note(
            "The compiled hot path of kvstore cannot be used as it was built. Install kvstore "
            "anew, or choose the plain one in Python by KVSTORE_PURE=1 in the environment."
        )
        raise
    return found


def _has_gil() -> bool:
    """Return whether threads take turns, once everything is loaded that may have them do so."""
    import orjson  # noqa: F401
    import xxhash  # noqa: F401

    return getattr(sys, "_is_gil_enabled", lambda: True)()


def _find(name: str) -> ModuleType | None:
    """Return an extension, or None where there is none; let any other error through."""
    full_name = f"{__package__}.{name}"
    try:
        return import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        return None


def _check(found: dict[str, ModuleType], wanted: tuple[str, ...]) -> None:
    """Raise ImportError unless all are there and were built with the layout that is there."""
    for name in wanted:
        if name not in found:
            raise ImportError(
                f"{__package__}.{name} is missing, though {', '.join(found)} was built with it"
            )
    for module in found.values():
        built_with: dict[str, object] = module.built_with()
        for constant, value in built_with.items():
            now = getattr(layout, constant, None)
            if now != value:
                was = f"{value:,}" if isinstance(value, int) else repr(value)
                raise ImportError(
                    f"{module.__file__} was built with {constant} = {was}, and in layout.py "
                    f"it is {now!r}"
                )


_extensions: Final = _load()
_fast_path: Final = _extensions.get("_fast_path")


def _make_plain() -> Implementation:
    from kvstore.format import (  # where not compiled
        extent_map,
        extent_records,
        found_words,
        members,
        segment,
    )

    modules = extent_records, found_words, members, segment, extent_map
    return Implementation("plain", modules, None)


def __getattr__(name: str) -> Implementation:
    if name == "PLAIN":  # made once it is asked for
        return globals().setdefault(name, _make_plain())  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


PLAIN: Implementation
COMPILED: Final = (
    Implementation(
        "compiled" if _fast_path else "free-threaded",
        (_extensions["_bytes"],),
        _fast_path.FastPath if _fast_path else None,
    )
    if _extensions
    else None
)
selected: Implementation = COMPILED or __getattr__("PLAIN")
# Those of the process: stores of both kinds take them. The plain one lets its own thread pass: see
# `reentry` for what is asked before it is taken.
Lock: "Final[Callable[[], OwnedLock]]" = (
    cast("Callable[[], OwnedLock]", threading.RLock) if _fast_path is None else _fast_path.Lock
)
Inside: "Final[Callable[[], OwnedLock] | None]" = None if _fast_path is None else _fast_path.Inside
IMPLEMENTATION: Final = selected.name
