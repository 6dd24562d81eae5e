"""The benchmark: all engines do the same work."""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Final, cast

import engines.record
import pytest
from engines import ENGINES, BatchEngine, Engine, Kind, importable, own
from engines.own import IMPLEMENTATIONS, PLAIN
from support.clock import FakeClock
from support.tasks import tell_implementation
from support.threads import run_together
from workers import Worker

from harness import Plan
from kvstore import IMPLEMENTATION, KVStoreError

VALUE: Final = {"name": "Ada", "scores": [1, 2.5, None], "text": "é" * 200}
OTHER: Final = {"name": "Grace"}
Exists: Final = (ValueError, KVStoreError)

OpenAgain = Callable[[], Engine]


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each engine that is there; of kvstore's two, the one that this process has."""
    name: str = request.param
    if not importable([name]):
        pytest.skip(f"{name}: {ENGINES[name].wanting}")
    if IMPLEMENTATIONS.get(name, IMPLEMENTATION) != IMPLEMENTATION:
        pytest.skip(f"these tests are run with the {IMPLEMENTATION} kvstore")
    return ENGINES[name]


@pytest.fixture
def open_again(kind: Kind, tmp_path: Path) -> Iterator[OpenAgain]:
    """A function that closes the engine, where it is open, and opens it in the same folder."""
    opened: list[Engine] = []

    def open_again() -> Engine:
        if opened:
            opened.pop().close()
        opened.append(kind.open(tmp_path))
        return opened[0]

    yield open_again
    for engine in opened:
        engine.close()


@pytest.fixture
def engine(open_again: OpenAgain) -> Engine:
    return open_again()


@pytest.fixture
def engine_clock(kind: Kind, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of every engine, kvstore among them, in the test's hands."""
    if kind.module in {"snkv", "pysciqlop_cache"}:
        pytest.skip("its clock is in its library")
    monkeypatch.setattr(engines.record, "time_ns", clock)
    if kind.module == "diskcache":
        library = pytest.importorskip("diskcache.core")
        own = SimpleNamespace(time=lambda: clock.now_ms / 1000, sleep=time.sleep)
        monkeypatch.setattr(library, "time", own)
    return clock


def test_what_was_created_is_read_until_deleted(engine: Engine) -> None:
    engine.create("key", VALUE, None)
    engine.create("other", OTHER, 60)
    assert engine.read("key") == VALUE
    assert engine.read("other") == OTHER
    engine.delete("key")
    with pytest.raises(KeyError):
        engine.read("key")
    assert engine.read("other") == OTHER
    engine.create("key", OTHER, None)
    assert engine.read("key") == OTHER


def test_absent_key_is_a_key_error(engine: Engine) -> None:
    engine.create("key", VALUE, None)
    for operation in (engine.read, engine.delete, partial(engine.touch, ttl=60)):
        with pytest.raises(KeyError):
            operation("other")


@pytest.mark.parametrize("ttl", [None, 60])
def test_create_of_a_live_key_fails_and_changes_nothing(engine: Engine, ttl: int | None) -> None:
    engine.create("key", VALUE, ttl)
    with pytest.raises(Exists):
        engine.create("key", OTHER, None)
    assert engine.read("key") == VALUE


@pytest.mark.parametrize("ttl", [None, 60])
def test_put_stores_whatever_was_there(
    engine: Engine, engine_clock: FakeClock, ttl: int | None
) -> None:
    for before in (VALUE, OTHER, VALUE):
        engine.put("key", before, 30)
    assert engine.read("key") == VALUE
    engine.put("key", OTHER, ttl)
    engine_clock.advance(59)
    assert engine.read("key") == OTHER
    engine_clock.advance(1)
    if ttl is None:
        assert engine.read("key") == OTHER
        return
    with pytest.raises(KeyError):
        engine.read("key")
    engine.put("key", VALUE, None)
    assert engine.read("key") == VALUE


def test_touch_gives_another_expiry_and_revives_nothing(
    engine: Engine, engine_clock: FakeClock
) -> None:
    for key in ("longer", "for ever", "shorter"):
        engine.create(key, VALUE, 60)
    engine.touch("longer", 120)
    engine.touch("for ever", None)
    engine.touch("shorter", 30)
    engine_clock.advance(60)
    with pytest.raises(KeyError):
        engine.touch("shorter", None)
    assert engine.read("longer") == engine.read("for ever") == VALUE
    engine_clock.advance(60)
    with pytest.raises(KeyError):
        engine.read("longer")
    assert engine.read("for ever") == VALUE


def test_expired_key_is_absent(engine: Engine, engine_clock: FakeClock) -> None:
    engine.create("key", VALUE, 60)
    engine.create("deleted", VALUE, 60)
    engine.create("for good", VALUE, None)
    engine_clock.advance(59.999)
    assert engine.read("key") == VALUE
    engine_clock.advance(0.001)
    with pytest.raises(KeyError):
        engine.read("key")
    with pytest.raises(KeyError):
        engine.delete("deleted")
    assert engine.read("for good") == VALUE


def test_create_takes_the_place_of_an_expired_key(engine: Engine, engine_clock: FakeClock) -> None:
    engine.create("key", VALUE, 60)
    engine_clock.advance(60)
    engine.create("key", OTHER, 60)
    engine_clock.advance(59)
    assert engine.read("key") == OTHER
    with pytest.raises(Exists):
        engine.create("key", VALUE, None)


def test_what_expired_in_the_past_is_absent_by_every_clock(kind: Kind, engine: Engine) -> None:
    if kind.is_own:
        pytest.skip("takes no time to live that is over")
    for key in ("read", "deleted", "touched", "created", "put"):
        engine.put(key, VALUE, -1)
    for operation, key in (
        (engine.read, "read"),
        (engine.delete, "deleted"),
        (partial(engine.touch, ttl=60), "touched"),
    ):
        with pytest.raises(KeyError):
            operation(key)
    for store in (engine.create, engine.put):
        key = "created" if store == engine.create else "put"
        store(key, OTHER, 60)
        assert engine.read(key) == OTHER
    with pytest.raises(Exists):
        engine.create("created", VALUE, None)


def test_batches_do_what_single_calls_do(kind: Kind, engine: Engine) -> None:
    if not kind.has_batches or (kind.is_own and not hasattr(engine, "get_many")):
        pytest.skip("has no batches")
    store = cast("BatchEngine", engine)
    store.put_many({"a": OTHER, "b": OTHER}, None)
    store.put_many({"b": VALUE, "c": OTHER}, 60)
    keys = ["absent", "c", "b", "a"]
    if not kind.is_own:  # which takes no time to live that is over
        store.put_many({"expired": VALUE}, -1)
        keys.append("expired")
    assert store.get_many(keys) == {"a": OTHER, "b": VALUE, "c": OTHER}
    assert store.read("b") == VALUE
    assert store.delete_many(keys[:2] + keys[3:]) == 2
    assert store.get_many(keys) == {"b": VALUE}
    with pytest.raises(KeyError):
        store.read("c")


def test_opened_again_it_holds_what_was_stored(kind: Kind, open_again: OpenAgain) -> None:
    if not kind.keeps_a_file:
        pytest.skip("keeps nothing")
    engine = open_again()
    for index in range(100):
        engine.create(f"key {index}", {"index": index}, 60 if index % 2 else None)
    engine.delete("key 0")
    engine = open_again()
    with pytest.raises(KeyError):
        engine.read("key 0")
    assert [engine.read(f"key {index}") for index in range(1, 100)] == [
        {"index": index} for index in range(1, 100)
    ]


def test_opened_again_it_knows_what_expires(
    kind: Kind, open_again: OpenAgain, engine_clock: FakeClock
) -> None:
    if not kind.keeps_a_file:
        pytest.skip("keeps nothing")
    engine = open_again()
    engine.create("key", VALUE, 60)
    engine.create("for good", VALUE, None)
    engine = open_again()
    engine_clock.advance(60)
    with pytest.raises(KeyError):
        engine.read("key")
    assert engine.read("for good") == VALUE


def test_durable_engine_does_the_same(kind: Kind, tmp_path: Path) -> None:
    if not kind.can_be_durable:
        with pytest.raises(ValueError, match=r"durable|not offered"):
            kind.open(tmp_path, durable=True)
        return
    for _ in range(2):
        engine = kind.open(tmp_path, durable=True)
        engine.create("key", VALUE, None)
        engine.put("key", OTHER, None)
        assert engine.read("key") == OTHER
        engine.delete("key")
        with pytest.raises(KeyError):
            engine.delete("key")
        engine.close()


# diskcache has a connection for each thread, and leaves those of ended threads to be collected,
# which is to be here and not in another test.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.usefixtures("frequent_switches")
def test_of_many_creators_of_one_key_exactly_one_wins(engine: Engine) -> None:
    threads, keys = 4, 100
    won: list[list[str]] = [[] for _ in range(threads)]

    def create_all(number: int) -> None:
        for index in range(keys):
            try:
                engine.create(f"key {index}", {"thread": number}, None)
            except Exists:
                continue
            won[number].append(f"key {index}")

    run_together(*(partial(create_all, number) for number in range(threads)))
    gc.collect()
    assert sorted(chain(*won)) == sorted(f"key {index}" for index in range(keys))
    for number, names in enumerate(won):
        assert all(engine.read(name) == {"thread": number} for name in names)


def test_version_of_each_engine_is_known_and_the_path_is_left_as_it_is() -> None:
    before = list(sys.path)
    versions = {name: kind.version() for name, kind in importable(ENGINES).items()}
    assert versions["sqlite3"].startswith("SQLite 3")
    for version in versions.values():
        assert any(character.isdigit() for character in version), version
    assert sys.path == before


def test_each_implementation_of_kvstore_is_an_engine_that_runs_no_other(tmp_path: Path) -> None:
    kinds = importable(IMPLEMENTATIONS)
    for name, kind in kinds.items():
        assert kind.version().endswith(f" ({IMPLEMENTATIONS[name]})")
        with Worker(Plan(tmp_path, kinds), name) as worker:
            assert worker.call(tell_implementation, tmp_path) == IMPLEMENTATIONS[name]


def test_engine_of_the_implementation_that_a_process_does_not_have_is_not_opened(
    tmp_path: Path,
) -> None:
    (other,) = (name for name, each in IMPLEMENTATIONS.items() if each != IMPLEMENTATION)
    with pytest.raises(RuntimeError, match=f"this process has the {IMPLEMENTATION} one"):
        ENGINES[other].open(tmp_path)
    assert not list(tmp_path.iterdir())


def test_compiled_kvstore_is_left_out_where_it_is_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own, "ask", lambda _engine: ("plain", "1"))
    assert list(importable(IMPLEMENTATIONS)) == [PLAIN]
