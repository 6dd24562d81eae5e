"""Random operations, openings and crashes against a plain dictionary, with the clock in hand.

A crash is a copy of the file's bytes while the store is open: what the death of the process would
leave. Opened, the copy must hold what the dictionary holds, and the machine may go on with it.
"""

import random
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import MIN_MAX_BYTES, scaled
from support.clock import FakeClock
from support.keys import contended_key
from support.values import Value, identical, json_value, sized_value

from kvstore import KeyExistsError, KeyNotFoundError, KVStore
from kvstore.recovery.check import check_file

values = st.one_of(
    json_value,
    st.builds(
        sized_value,
        st.one_of(
            st.integers(12, 700),
            st.integers(12, 16_384),
            st.sampled_from([2, 12, 16_383, 16_384]),
        ),
        st.integers(0, 9),
    ),
)
ttls = st.one_of(
    st.none(), st.none(), st.integers(1, 30), st.integers(1, 10**10), st.sampled_from([1, 10**10])
)
# Keys that only their records tell apart.
key_of_same_slot = st.builds(
    "".join, st.tuples(st.just("🐍" * 8), st.sampled_from(["", "1", "2", "é\0", "🐍" * 24]))
)
# Whole milliseconds, as the file keeps them.
steps_ms = st.one_of(st.integers(0, 2_000), st.integers(0, 60_000), st.integers(0, 10**13))


@dataclass
class Entry:
    value: Value
    expires_at: int | None  # ms

    def left(self, now: int) -> int | None:
        """Whole seconds left at `now`, rounded up; at most 0 where it has expired."""
        return None if self.expires_at is None else -((now - self.expires_at) // 1000)


class StoreMachine(RuleBasedStateMachine):
    """A store beside the dictionary of what it should hold, expired entries included."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-model-"))
        self.clock = FakeClock()
        self.patches = ExitStack()
        self.patches.enter_context(mock.patch("kvstore.clock.time_ns", self.clock))
        self.file_count = 0
        self.path = self.folder / "0.kvs"
        self.entries: dict[str, Entry] = {}

    @initialize(durable=st.sampled_from([False, False, False, True]), seed=st.integers(0, 9))
    def open_new(self, durable: bool, seed: int) -> None:
        self.durable = durable
        # The hash seeds of files decide in which order keys come, so which ones `popitem` removes.
        self.patches.enter_context(mock.patch("os.urandom", random.Random(seed).randbytes))
        self.store = self.opened()

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.store.close()
                self.assert_consistent()
        finally:
            self.patches.close()
            shutil.rmtree(self.folder)

    def opened(self) -> KVStore:
        return KVStore(self.path, max_bytes=MIN_MAX_BYTES, durable=self.durable)

    def assert_consistent(self) -> None:
        assert [str(problem) for problem in check_file(self.path)] == []

    def model(self) -> dict[str, Value]:
        """What must be there now."""
        now = self.clock.now_ms
        return {
            key: entry.value
            for key, entry in self.entries.items()
            if entry.expires_at is None or now < entry.expires_at
        }

    def entry(self, value: Value, ttl: int | None) -> Entry:
        """What is stored now, for so many seconds."""
        return Entry(value, None if ttl is None else self.clock.now_ms + 1000 * ttl)

    # --- operations ---

    @rule(key=contended_key, value=values, ttl=ttls)
    def create(self, key: str, value: Value, ttl: int | None) -> None:
        if key in self.model():
            with pytest.raises(KeyExistsError):
                self.store.create(key, value, ttl)
        else:
            self.store.create(key, value, ttl)
            self.entries[key] = self.entry(value, ttl)

    @precondition(lambda self: self.model())
    @rule(data=st.data(), value=values)
    def create_existing(self, data: st.DataObject, value: Value) -> None:
        key = data.draw(st.sampled_from(sorted(self.model())), "key")
        with pytest.raises(KeyExistsError):
            self.store.create(key, value)

    @rule(key=contended_key, value=values, ttl=ttls)
    def put(self, key: str, value: Value, ttl: int | None) -> None:
        self.store.put(key, value, ttl)
        self.entries[key] = self.entry(value, ttl)

    @precondition(lambda self: self.model())
    @rule(data=st.data(), value=values, ttl=ttls)
    def put_existing(self, data: st.DataObject, value: Value, ttl: int | None) -> None:
        self.put(data.draw(st.sampled_from(sorted(self.model())), "key"), value, ttl)

    @rule(key=key_of_same_slot, value=values)
    def assign(self, key: str, value: Value) -> None:
        self.store[key] = value
        self.entries[key] = self.entry(value, None)

    @rule(key=contended_key, value=values, ttl=ttls)
    def setdefault(self, key: str, value: Value, ttl: int | None) -> None:
        if key not in self.model():
            self.entries[key] = self.entry(value, ttl)
        assert identical(self.store.setdefault(key, value, ttl), self.entries[key].value)

    @rule(key=contended_key, ttl=ttls)
    def touch(self, key: str, ttl: int | None) -> None:
        if key in self.model():
            self.store.touch(key, ttl)
            self.entries[key] = self.entry(self.entries[key].value, ttl)
        else:
            with pytest.raises(KeyNotFoundError):
                self.store.touch(key, ttl)

    @precondition(lambda self: self.model())
    @rule(data=st.data(), ttl=ttls)
    def touch_existing(self, data: st.DataObject, ttl: int | None) -> None:
        self.touch(data.draw(st.sampled_from(sorted(self.model())), "key"), ttl)

    @rule(changes=st.dictionaries(contended_key, values, max_size=4))
    def update(self, changes: dict[str, Value]) -> None:
        self.store.update(changes)
        self.entries.update({key: self.entry(value, None) for key, value in changes.items()})

    @rule(key=contended_key)
    def read(self, key: str) -> None:
        expected = self.model().get(key)
        if expected is None:
            for call in (self.store.read, self.store.read_bytes):
                with pytest.raises(KeyNotFoundError):
                    call(key)
        else:
            assert identical(self.store.read(key), expected)
        assert self.store.get(key) == expected
        assert (key in self.store) == (expected is not None)

    @rule(key=contended_key)
    def ttl(self, key: str) -> None:
        if key in self.model():
            assert self.store.ttl(key) == self.entries[key].left(self.clock.now_ms)
        else:
            with pytest.raises(KeyNotFoundError):
                self.store.ttl(key)

    @rule(key=contended_key)
    def delete(self, key: str) -> None:
        if key in self.model():
            self.store.delete(key)
            del self.entries[key]
        else:
            with pytest.raises(KeyNotFoundError):
                self.store.delete(key)

    @precondition(lambda self: self.model())
    @rule(data=st.data())
    def delete_existing(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model())), "key")
        self.store.delete(key)
        del self.entries[key]

    @rule(key=contended_key)
    def pop(self, key: str) -> None:
        expected = self.model().get(key)
        if expected is None:
            assert self.store.pop(key, None) is None
            with pytest.raises(KeyNotFoundError):
                self.store.pop(key)
        else:
            assert identical(self.store.pop(key), expected)
            del self.entries[key]

    @rule(count=st.integers(1, 5))
    def popitem(self, count: int) -> None:
        for _ in range(min(count, len(self.model()))):
            key, value = self.store.popitem()
            assert identical(value, self.model()[key])
            del self.entries[key]
        if not self.model():
            with pytest.raises(KeyError):
                self.store.popitem()

    @rule(really=st.integers(0, 4))
    def clear(self, really: int) -> None:
        if not really:  # else there would rarely be much
            self.store.clear()
            self.entries.clear()
            assert self.store.purge_expired() == 0

    @rule(pairs=st.lists(st.tuples(contended_key, values), max_size=8), ttl=ttls)
    def put_many(self, pairs: list[tuple[str, Value]], ttl: int | None) -> None:
        self.store.put_many(pairs, ttl)
        self.entries.update((key, self.entry(value, ttl)) for key, value in pairs)

    @rule(keys=st.lists(contended_key, max_size=8), present=st.booleans())
    def get_many(self, keys: list[str], present: bool) -> None:
        model = self.model()
        keys += sorted(model)[:40] if present else []
        expected = {key: model[key] for key in keys if key in model}
        found = self.store.get_many(keys)
        assert identical(found, expected)
        assert list(found) == list(expected)

    @rule(keys=st.lists(contended_key, max_size=8), present=st.booleans())
    def delete_many(self, keys: list[str], present: bool) -> None:
        model = self.model()
        keys += sorted(model)[::3] if present else []
        gone = model.keys() & set(keys)
        assert self.store.delete_many(keys) == len(gone)
        for key in gone:
            del self.entries[key]

    @rule(name=st.sampled_from("pq"), count=st.integers(1, 60), value=values, batch=st.booleans())
    def put_numbered(self, name: str, count: int, value: Value, batch: bool) -> None:
        """Some of them twice: the first is promised to nobody, unless there is a flush."""
        pairs = [
            (f"{name}{number}", {"n": number, "v": value.get("n")})
            for number in (*range(count), *range(0, count, 3))
        ]
        if batch:
            self.put_many(pairs, None)
        else:
            for key, each in pairs:
                self.put(key, each, None)

    @rule(name=st.sampled_from("pq"), count=st.integers(1, 60), ttl=ttls, value=values)
    def create_numbered(self, name: str, count: int, ttl: int | None, value: Value) -> None:
        for number in range(count):
            self.create(f"{name}{number}", {"n": number, "v": value.get("n")}, ttl)

    @rule(name=st.sampled_from("pq"))
    def delete_numbered(self, name: str) -> None:
        for key in [key for key in self.model() if key[0] == name and key[1:].isdecimal()]:
            self.store.delete(key)
            del self.entries[key]

    @rule()
    def iterate(self) -> None:
        model = self.model()
        items = list(self.store.items())
        assert len(items) == len(model)
        assert identical(dict(items), model)
        assert sorted(self.store) == sorted(self.store.keys()) == sorted(model)
        for key in model:
            assert self.store.ttl(key) == self.entries[key].left(self.clock.now_ms)

    @rule()
    def purge(self) -> None:
        present = len(self.model())
        assert 0 <= self.store.purge_expired() <= len(self.entries) - present
        assert self.store.purge_expired() == 0
        self.entries = {key: self.entries[key] for key in self.model()}

    @rule()
    def sync(self) -> None:
        self.store.sync()

    @rule()
    def reclaim(self) -> None:
        """As a store does by itself where much of the file is retired, or it is full."""
        self.store._parts.reclaimer.reclaim()

    @invariant()
    def the_count_is_right(self) -> None:
        if hasattr(self, "store"):
            assert len(self.store) == len(self.model())
            assert bool(self.store) == bool(self.model())

    # --- the clock ---

    @rule(step=steps_ms)
    def advance_clock(self, step: int) -> None:
        self.clock.advance(step / 1000)

    @precondition(lambda self: any(entry.expires_at for entry in self.entries.values()))
    @rule(data=st.data(), off=st.integers(-1, 1))
    def advance_clock_to_an_expiry(self, data: st.DataObject, off: int) -> None:
        times = sorted({e.expires_at for e in self.entries.values() if e.expires_at is not None})
        moment = data.draw(st.sampled_from(times), "expiry") + off
        if moment > self.clock.now_ms:
            self.clock.advance((moment - self.clock.now_ms) / 1000)

    @rule(step=steps_ms)
    def set_clock_back(self, step: int) -> None:
        """What had expired may be there again, or its space was taken back: either is right."""
        before = self.model()
        self.clock.advance(-min(step, self.clock.now_ms - 1000) / 1000)
        for key in self.model().keys() - before.keys():
            if key not in self.store:
                del self.entries[key]

    # --- openings and crashes ---

    @rule()
    def close_and_open_again(self) -> None:
        self.store.close()
        self.assert_consistent()
        self.store = self.opened()
        self.iterate()

    @rule(go_on_with_the_copy=st.booleans())
    def crash(self, go_on_with_the_copy: bool) -> None:
        self.file_count += 1
        original, path = self.store, self.folder / f"{self.file_count}.kvs"
        shutil.copyfile(self.path, path)
        old_path, self.path = self.path, path
        self.store = self.opened()
        self.iterate()
        if go_on_with_the_copy:
            original.close()
            old_path.unlink()
        else:
            self.store.close()
            self.assert_consistent()
            path.unlink()
            self.store, self.path = original, old_path


StoreMachine.TestCase.settings = settings(max_examples=scaled(25), stateful_step_count=40)
test_a_store_does_what_a_dictionary_does = StoreMachine.TestCase
