"""The type of the fixture `open_store`; what the death of a process leaves of a store."""

import shutil
from pathlib import Path
from typing import Any, Protocol

import pytest

from kvstore import KVStore, clock

from .consistency import assert_consistent
from .values import Value


class OpenStore(Protocol):
    """Opens a store, at the test's `path` unless told else; see the fixture in `conftest.py`."""

    def __call__(
        self, path: str | Path | None = None, *, check: bool = True, **options: Any
    ) -> KVStore: ...


def after_death(store: KVStore) -> dict[str, Value]:
    """Return what is in a copy of the open store's file: what the process, killed now, leaves."""
    path = Path(shutil.copyfile(store.path, store.path.with_suffix(".killed")))
    with KVStore(path) as copy:
        contents = dict(copy)
        assert len(copy) == len(contents)
        with pytest.MonkeyPatch.context() as patch:  # both at the same moment
            now_ns = clock.time_ns()
            patch.setattr(clock, "time_ns", lambda: now_ns)
            lifetimes = {key: store.ttl(key) for key in contents}
            assert {key: copy.ttl(key) for key in copy} == lifetimes
    assert_consistent(path)
    path.unlink()
    return contents
