"""Fixtures. Every store that a test opens is closed and checked as the test ends."""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support import SEED, scaled
from support.clock import FakeClock
from support.implementations import IMPLEMENTATIONS
from support.platforms import USUAL_MAX_BYTES
from support.stores import OpenStore

import kvstore.clock
from kvstore import KVStore, compiled
from kvstore.compiled import Implementation
from kvstore.recovery.check import check_file

settings.register_profile(
    "kvstore",
    max_examples=scaled(100),
    deadline=None,
    derandomize=SEED != "random",
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("kvstore")


@pytest.fixture(autouse=True)
def same_files_every_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a test make files with the same hash seeds each time it runs, unless told otherwise."""
    if SEED != "random":
        seeded = random.Random(f"{SEED}/{request.node.nodeid}")
        monkeypatch.setattr(os, "urandom", seeded.randbytes)


@pytest.fixture(autouse=True, scope="session")
def usual_limit() -> None:
    """Have the stores of this process the limit that is usual in the tests."""
    vars(KVStore)["__init__"].__kwdefaults__["max_bytes"] = USUAL_MAX_BYTES


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda each: each.name)
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Implementation:
    """Each implementation in turn, selected for the stores that the test opens."""
    selected: Implementation = request.param
    monkeypatch.setattr(compiled, "selected", selected)
    return selected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the test's store is; nothing is there yet."""
    return tmp_path / "test.kvs"


@pytest.fixture
def open_store(path: Path) -> Iterator[OpenStore]:
    """A function that opens a store, at `path` unless told else, with KVStore's own arguments.

    What the test leaves open is closed as it ends, then every path opened is checked, but those
    that were ever opened with `check=False` (damaged or removed on purpose).
    """
    usual = path
    checked: dict[Path, bool] = {}
    with ExitStack() as closing:

        def open_one(
            path: str | Path | None = None, *, check: bool = True, **options: Any
        ) -> KVStore:
            store = KVStore(usual if path is None else path, **options)
            closing.callback(store.close)
            checked[store.path] = check and checked.get(store.path, True)
            return store

        yield open_one
    for each, wanted in checked.items():
        if wanted:
            _assert_consistent(each)


def _assert_consistent(path: Path) -> None:
    assert [str(problem) for problem in check_file(path)] == []


@pytest.fixture
def store(open_store: OpenStore) -> KVStore:
    """A new store at `path`, closed and checked as the test ends."""
    return open_store()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of every store, in the test's hands."""
    fake = FakeClock()
    monkeypatch.setattr(kvstore.clock, "time_ns", fake)
    return fake


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Make the interpreter change threads about a thousand times as often as it would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)
