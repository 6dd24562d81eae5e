"""Which twin of the hot path runs: the compiled one, or the plain one in Python (as in PEP 399).

The compiled twin is there where it could be built: `_hot` replaces `Slab`, `Slots` and
`Operations`, each at the end of the module that has the plain one, and `_rebuild` does what takes
recovery longest. They work on the same bytes of the same file under the same locks, and are used
together or not at all. With ``KVSTORE_PURE=1`` in the environment the plain twin runs.
"""

import os
import threading
from collections.abc import Callable
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Final, Protocol, cast

from kvstore.format import layout

_EXTENSIONS: Final = ("_hot", "_rebuild")


class OwnedLock(Protocol):
    """A lock that knows which thread holds it, as `threading.RLock` does."""

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; return False where it is held and `blocking` is false."""

    def release(self) -> None:
        """Let go of the lock."""

    def __enter__(self) -> bool: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
    def _is_owned(self) -> bool: ...


def _load() -> dict[str, ModuleType]:
    """Return the extensions by name; none where they were not built or are not wanted.

    Raises:
        ImportError: They were built and cannot be used: one is missing or does not load, or the
            file format is not the one that they were built for.
    """
    if os.environ.get("KVSTORE_PURE", "0") not in ("", "0"):
        return {}
    try:
        found = {name: module for name in _EXTENSIONS if (module := _find(name)) is not None}
        if found:
            _check(found)
    except ImportError as error:
        error.add_note(
            "The compiled hot path of kvstore cannot be used as it was built. Install kvstore "
            "anew, or choose the plain one in Python by KVSTORE_PURE=1 in the environment."
        )
        raise
    return found


def _find(name: str) -> ModuleType | None:
    """Return an extension, or None where there is none; let any other error through."""
    full_name = f"{__package__}.{name}"
    try:
        return import_module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        return None


def _check(found: dict[str, ModuleType]) -> None:
    """Raise ImportError unless all are there and were built with the layout that is there."""
    for name in _EXTENSIONS:
        if name not in found:
            raise ImportError(
                f"{__package__}.{name} is missing, though {', '.join(found)} was built with it"
            )
    for module in found.values():
        built_with: dict[str, int] = module.BUILT_WITH
        for constant, value in built_with.items():
            now = getattr(layout, constant, None)
            if now != value:
                raise ImportError(
                    f"{module.__file__} was built with {constant} = {value:,}, and in layout.py "
                    f"it is {now!r}"
                )


_extensions: Final = _load()
compiled: Final = _extensions.get("_hot")
compiled_rebuild: Final = _extensions.get("_rebuild")
# The plain one lets its own thread pass: see `reentry` for what is asked before it is taken.
Lock: Final[Callable[[], OwnedLock]] = (
    cast(Callable[[], OwnedLock], threading.RLock) if compiled is None else compiled.Lock
)
IMPLEMENTATION: Final = "plain" if compiled is None else "compiled"
