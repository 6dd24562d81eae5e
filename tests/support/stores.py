"""The type of the fixture `open_store`."""

from pathlib import Path
from typing import Any, Protocol

from kvstore import KVStore


class OpenStore(Protocol):
    """Opens a store, at the test's `path` unless told else; see the fixture in `conftest.py`."""

    def __call__(
        self, path: str | Path | None = None, *, check: bool = True, **options: Any
    ) -> KVStore: ...
