"""Calls that the operating system refuses, each in its turn: writes, flushes, growth and the map.

The write path is tried as it is on copy-on-write file systems, where any write may be refused
(`os.pwrite`), and as it is elsewhere: a store through the map cannot be refused, but be cut short.
"""

import errno
import itertools
import logging
import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from support import MIB
from support.clock import FakeClock
from support.components import FaultyWrites, replace_writes
from support.consistency import assert_consistent
from support.workload import Value, difference, make_value, random_size
from xxhash import xxh3_64_intdigest

import kvstore.clock
import kvstore.file.platform
from kvstore import CorruptStoreError, KVStore, KVStoreError, StoreFullError
from kvstore.format.layout import (
    EXTENT_SIZE,
    FIXED_EXTENTS,
    MAX_FILE_SIZE,
    MIN_MAX_BYTES,
    SPLIT_AT,
)

from .laboratory import Experiment

State = dict[str, Value]


class Step(NamedTuple):
    """A call, and what it makes of a key: a value, or None where that is gone."""

    act: Callable[[KVStore], object]
    key: str | None = None
    value: Value | None = None

    def apply(self, state: State) -> State:
        """Return the state after it."""
        after = dict(state)
        if self.key is not None:
            after.pop(self.key, None)
            if self.value is not None:
                after[self.key] = self.value
        return after


def create(key: str, value: Value) -> Step:
    return Step(lambda store: store.create(key, value), key, value)


def put(key: str, value: Value) -> Step:
    return Step(lambda store: store.put(key, value), key, value)


def delete(key: str) -> Step:
    return Step(lambda store: store.delete(key), key)


PAGE: Final = 4096
NUMBERS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
STRIPE: Final = 7  # whose only segment is filled


class Refusals:
    """Stands in for functions of a module, and refuses one of the calls to them.

    Args:
        fail_at: the number of the call, from 1, that raises.
        number: the error's.
        lasting: so do all calls after it.
        rng: a refused write may have written some whole pages of its data; this decides.
    """

    def __init__(
        self, fail_at: int, number: int, *, lasting: bool, rng: random.Random | None = None
    ) -> None:
        self.fail_at = fail_at
        self._number = number
        self._lasting = lasting
        self._rng = rng
        self.calls = 0

    @property
    def reached(self) -> bool:
        """Whether it has refused anything."""
        return self.calls >= self.fail_at

    @contextmanager
    def of(self, *functions: tuple[Any, str]) -> Iterator[None]:
        """Stand in for these for as long as the block runs."""
        with pytest.MonkeyPatch.context() as patch:
            for module, name in functions:
                patch.setattr(module, name, partial(self._call, getattr(module, name)))
            yield

    def _call(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        if self.calls == self.fail_at or (self._lasting and self.calls > self.fail_at):
            if function is os.pwrite:
                self._write_a_part(*arguments)
            raise OSError(self._number, os.strerror(self._number))
        return function(*arguments, **more)

    def _write_a_part(self, fd: int, data: bytes, offset: int) -> None:
        first = -offset % PAGE  # bytes up to the first boundary of two pages
        if self._rng is not None and len(data) > first:
            boundaries = range(first, len(data), PAGE)
            os.pwrite(fd, data[: self._rng.choice(boundaries)], offset)


def through(write_path: str) -> None:
    """Have files opened as on a file system that is written so: "map" or "pwrite"."""
    logging.getLogger("kvstore").setLevel(logging.CRITICAL)  # it tells of each recovery
    setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: write_path == "map")  # noqa: B010
    setattr(kvstore.file.platform.system, "may_be_mapped_privately", lambda _fd: True)  # noqa: B010


def stop_clock() -> FakeClock:
    """Have the store's clock stand still until it is moved."""
    clock = FakeClock()
    setattr(kvstore.clock, "time_ns", clock)  # noqa: B010
    return clock


# --- operations, in every shape that writes differently ----------------------------------------


def fill(store: KVStore, count: int, homes: int = 16) -> list[str]:
    """Fill one segment of a store to `count` used slots, in its first buckets; return its keys.

    A third of the first twelve expire.
    """
    keys: list[str] = []
    in_bucket = [0] * 16
    number = 0
    while len(keys) < count:
        number += 1
        key = f"{'é' * 16 if number % 9 == 0 else ''}{number}"
        key_hash = xxh3_64_intdigest(key.encode(), store._file.hash_seed)
        home = key_hash & 15
        if key_hash >> 60 == STRIPE and home < homes and in_bucket[home] < count / homes:
            in_bucket[home] += 1
            store.create(
                key, {"n": number}, ttl=1_000 if len(keys) % 3 == 0 and len(keys) < 12 else None
            )
            keys.append(key)
    return keys


def new_key(store: KVStore, keys: list[str]) -> str:
    """Return another key of the segment that `fill` filled."""
    number = int(keys[-1].strip("é")) if keys else 0
    return next(
        key
        for key in map(str, range(number + 1, number + 1_000))
        if xxh3_64_intdigest(key.encode(), store._file.hash_seed) >> 60 == STRIPE
    )


def use_up_extents(store: KVStore, _keys: list[str]) -> None:
    """Have every extent of the file in use, by records of four an extent."""
    others = (
        key
        for key in map("large {}".format, itertools.count())
        if xxh3_64_intdigest(key.encode(), store._file.hash_seed) >> 60 != STRIPE
    )
    for key in itertools.islice(others, 4 * count_free_extents(store)):
        store.create(key, make_value("large", 1, 16_200))
    assert count_free_extents(store) == 0


def count_free_extents(store: KVStore) -> int:
    stats = store.stats()
    used = FIXED_EXTENTS * EXTENT_SIZE + stats.table_size + stats.slab_size
    return (stats.file_size - used) // EXTENT_SIZE


def free_a_block(store: KVStore, keys: list[str]) -> None:
    store.delete(keys[-1])


def leave_one_block(store: KVStore, _keys: list[str]) -> None:
    """Have the only extent of its class with all blocks but one in use."""
    for number in range(3):
        store.create(f"large {number}", make_value("large", number, 16_200))


def leave_none(store: KVStore, keys: list[str]) -> None:
    leave_one_block(store, keys)
    store.create("large 3", make_value("large", 3, 16_200))


def leave_tombstones(store: KVStore, keys: list[str]) -> None:
    """Delete more than half, so that the rest fits in half of the segment."""
    for key in keys[100:800]:
        store.delete(key)


def leave_buddies(store: KVStore, keys: list[str]) -> None:
    """Have the segment split in two that are nearly empty."""
    store.create(new_key(store, keys), {})
    for key in keys[40:]:
        store.delete(key)


def leave_scattered(store: KVStore, keys: list[str]) -> None:
    """Have few records left, in extents far apart, of a file that has grown."""
    use_up_extents(store, keys)
    _create_small(store)
    _thin_out_small(store)
    _delete_large(store)


def leave_segment_behind(store: KVStore, keys: list[str]) -> None:
    """Have the segment split into an extent behind all others, of which most are free."""
    use_up_extents(store, keys)
    store.create(new_key(store, keys), {})
    _delete_large(store)


def leave_full(store: KVStore, _keys: list[str]) -> None:
    """Have a file at its limit, with room in sparse extents only."""
    _create_small(store)
    with suppress(StoreFullError):
        for number in itertools.count():
            store.create(f"large {number}", LARGE)
    _thin_out_small(store)


def _create_small(store: KVStore) -> None:
    for number in range(50):
        store.create(f"small {number}", make_value("small", number, 3_000))


def _thin_out_small(store: KVStore) -> None:
    """Have few records left in some extents of one class."""
    for number in range(50):
        if number % 8:
            store.delete(f"small {number}")


def _delete_large(store: KVStore) -> None:
    for key in list(store):
        if key.startswith("large"):
            store.delete(key)


def nothing(_store: KVStore, _keys: list[str]) -> None:
    pass


def create_new(value: Value, key: str = "") -> Callable[[KVStore, list[str]], Step]:
    return lambda store, keys: create(key or new_key(store, keys), value)


def create_over_an_expired_one(_store: KVStore, keys: list[str]) -> Step:
    return create(keys[3], {"again": 1})


def delete_one(index: int) -> Callable[[KVStore, list[str]], Step]:
    return lambda _store, keys: delete(keys[index])


def put_over(index: int, value: Value) -> Callable[[KVStore, list[str]], Step]:
    return lambda _store, keys: put(keys[index], value)


def long_key(keys: list[str]) -> str:
    return next(key for key in keys if len(key) > 16)


def touch_one(store: KVStore, keys: list[str]) -> Step:
    return Step(lambda store: store.touch(keys[0], 50), keys[0], store.read(keys[0]))


def purge(_store: KVStore, _keys: list[str]) -> Step:
    return Step(KVStore.purge_expired)


def reclaim(_store: KVStore, _keys: list[str]) -> Step:
    return Step(lambda store: store._parts.reclaimer.reclaim())


def merge(_store: KVStore, _keys: list[str]) -> Step:
    return Step(lambda store: store._all_keys.merge_segments())


def compact(_store: KVStore, _keys: list[str]) -> Step:
    return Step(KVStore.compact)


def replace_first(store: KVStore, keys: list[str]) -> None:
    """Have a retired record."""
    store.put(keys[0], {"replaced": 1})


def replace_first_twice(store: KVStore, keys: list[str]) -> None:
    """Have a retired record, and one that nobody was promised."""
    store.put(keys[0], LARGE)
    store.put(keys[0], {"replaced": 2})


def create_first_anew(store: KVStore, keys: list[str]) -> None:
    """Have nothing but a record that nobody was promised."""
    store.delete(keys[0])
    store.create(keys[0], {"anew": 1})


def retire_and_mark(store: KVStore, keys: list[str]) -> None:
    for number, key in enumerate(keys[:8]):
        for value in ({"replaced": 3}, LARGE)[: number % 3]:
            store.put(key, value)
            store.sync()
        if number % 2:
            store.delete(key)


@dataclass(frozen=True)
class Shape:
    """An operation that is cut short, and the store that it is tried on.

    Attributes:
        slots: of the segment of its key that are used.
        prepare: what else is done to the store before it is closed.
        step: what is cut short.
        wait: seconds that go by before that.
        homes: how many buckets of the segment the keys are in.
        first: what is done in the same opening as that.
        stride: every which write is refused, where all would take too long.
        max_bytes: of the file.
    """

    slots: int
    prepare: Callable[[KVStore, list[str]], None]
    step: Callable[[KVStore, list[str]], Step]
    wait: int = 0
    homes: int = 16
    first: Callable[[KVStore, list[str]], None] = nothing
    stride: int = 1
    max_bytes: int = MAX_FILE_SIZE


LARGE: Final = make_value("new", 1, 16_200)
SHAPES: Final[dict[str, dict[str, Shape]]] = {
    "create": {
        "the first": Shape(0, nothing, create_new({"new": "x" * 5_000})),
        "beside others": Shape(40, nothing, create_new({"n": 0})),
        "of a long key": Shape(40, nothing, create_new({"n": 0}, "🙂" * 32)),
        "into a freed block": Shape(40, free_a_block, create_new({"n": 0})),
        "into the last block": Shape(0, leave_one_block, create_new(LARGE)),
        "over an expired one": Shape(40, nothing, create_over_an_expired_one, 2_000),
    },
    "delete": {
        "the only one": Shape(1, nothing, delete_one(0)),
        "one of many": Shape(40, nothing, delete_one(0)),
        "a long key": Shape(40, nothing, lambda _store, keys: delete(long_key(keys))),
        "from a full extent": Shape(0, leave_none, lambda _store, _keys: delete("large 1")),
    },
    "put": {
        "over one on the disk": Shape(40, nothing, put_over(0, {"n": -1})),
        "of another size": Shape(40, nothing, put_over(0, LARGE)),
        "over an expired one": Shape(40, nothing, put_over(3, {"again": 1}), 2_000),
        "over one that replaced another": Shape(
            40, nothing, put_over(0, {"n": -1}), first=replace_first
        ),
        "over a fresh replacement": Shape(
            40, nothing, put_over(0, {"n": -1}), first=replace_first_twice
        ),
        "over a fresh one": Shape(40, nothing, put_over(0, {"n": -1}), first=create_first_anew),
        "of a long key": Shape(
            40, nothing, lambda _store, keys: put(long_key(keys), {"n": -1}), first=replace_first
        ),
        "with the same value": Shape(40, nothing, touch_one),
    },
    "mark": {
        "of a replacement": Shape(40, nothing, delete_one(0), first=replace_first),
        "of a fresh replacement": Shape(40, nothing, delete_one(0), first=replace_first_twice),
        "of the only one": Shape(1, nothing, delete_one(0), first=replace_first),
    },
    "reclaiming": {"of all kinds": Shape(40, nothing, reclaim, first=retire_and_mark)},
    "purge": {"of expired ones": Shape(8, nothing, purge, 2_000)},
    "split": {
        "into free extents": Shape(SPLIT_AT, nothing, create_new({"n": 0}), stride=2),
        "that drops expired ones": Shape(SPLIT_AT, nothing, create_new({"n": 0}), 2_000, stride=2),
        "that is not needed": Shape(
            SPLIT_AT, leave_tombstones, create_new({"n": 0}), homes=14, stride=2
        ),
    },
    "growth": {
        "for a record": Shape(1, use_up_extents, create_new(LARGE)),
        "for a split": Shape(SPLIT_AT, use_up_extents, create_new(LARGE), stride=2),
    },
    "merge": {
        "of two": Shape(SPLIT_AT, leave_buddies, merge),
        "that drops expired ones": Shape(SPLIT_AT, leave_buddies, merge, 2_000),
    },
    "move": {
        "to make room": Shape(4, leave_full, create_new(LARGE), stride=5, max_bytes=MIN_MAX_BYTES),
        "to compact the file": Shape(4, leave_scattered, compact, stride=7),
        "to compact the table": Shape(SPLIT_AT, leave_segment_behind, compact, stride=5),
    },
}


def refuse_writes_of(group: str, folder: Path, rng: random.Random) -> int:
    """Refuse each write of an operation of a group, by itself and with all that follow it."""
    name = rng.choice(sorted(SHAPES[group]))
    shape = SHAPES[group][name]
    tried = 0
    # A store through the map is cut short, if it is, by a signal: once.
    for write_path, lasting in (("pwrite", False), ("pwrite", True), ("map", False)):
        through(write_path)
        original = Original(shape, folder / "original.kvs", folder / "test.kvs")
        for fail_at in itertools.count(rng.randrange(shape.stride) + 1, shape.stride):
            number = rng.choice(NUMBERS)
            try:
                reached = original.refuse(fail_at, number, lasting=lasting, rng=rng)
            except BaseException as error:
                error.add_note(
                    f"{group} {name}, by {write_path}, write {fail_at} refused with "
                    f"{errno.errorcode[number]}{', and all after it' if lasting else ''}"
                )
                raise
            if not reached:
                break
            tried += 1
    return tried


class Original:
    """A closed store as the operation finds it, to be tried on copies of at `path`."""

    def __init__(self, shape: Shape, original: Path, path: Path) -> None:
        self._shape = shape
        self._path = path
        self._clock = stop_clock()
        original.unlink(missing_ok=True)
        with KVStore(original, max_bytes=shape.max_bytes) as store:
            self._keys = fill(store, shape.slots, shape.homes)
            shape.prepare(store, self._keys)
            self._keys = [key for key in self._keys if key in store]
        self._bytes = original.read_bytes()
        self._clock.advance(shape.wait)

    def refuse(self, fail_at: int, number: int, *, lasting: bool, rng: random.Random) -> bool:
        """Refuse one write of the operation, and look at everything; False: it has not so many."""
        self._path.write_bytes(self._bytes)
        with KVStore(self._path, max_bytes=self._shape.max_bytes) as store:
            store._file.mark_dirty()
            self._shape.first(store, self._keys)
            before = dict(store.items())
            step = self._shape.step(store, self._keys)
            after = step.apply(before)
            reached, raised = self._act(
                store, step, Refusals(fail_at, number, lasting=lasting, rng=rng)
            )
            killed = self._path.read_bytes()
            assert raised is None or reached, f"raised {raised!r} where nothing was refused"
            now = after if raised is None else before
            self._assert_holds(store, now)
            final = go_on(store, now, step, rng)
            killed_later = self._path.read_bytes()
        self._reopen(None, final)
        assert_consistent(self._path)
        if rng.random() < 0.5:
            self._reopen(killed, now)
        else:
            self._reopen(killed_later, final)
        return reached

    def _act(
        self, store: KVStore, step: Step, refusals: Refusals
    ) -> tuple[bool, BaseException | None]:
        """Run the operation with a write refused; return whether one was, and what it raised."""
        write = store._file.write
        if store._file.in_place:
            faulty = FaultyWrites(store._file, refusals.fail_at, OSError(errno.EIO, "refused"))
        try:
            with refusals.of((os, "pwrite")):
                step.act(store)
        except (KVStoreError, OSError) as error:
            raised: BaseException | None = error
        else:
            raised = None
        if not store._file.in_place:
            return refusals.reached, raised
        if store._file.write is faulty:
            replace_writes(store._file, write)
        return faulty.reached, raised

    def _assert_holds(self, store: KVStore, state: State) -> None:
        """Assert that every way of reading agrees on this state."""
        found = dict(store.items())
        assert found == state, difference(found, state)
        assert len(store) == len(state), f"len is {len(store)}, there are {len(state)}"
        for key in [*self._keys[:20], *self._keys[-20:], "no such key"]:
            assert (key in store) == (key in state), key
            assert store.get(key) == state.get(key), key

    def _reopen(self, contents: bytes | None, state: State) -> None:
        if contents is not None:
            self._path.write_bytes(contents)
        with KVStore(self._path, max_bytes=self._shape.max_bytes) as store:
            self._assert_holds(store, state)


def go_on(store: KVStore, state: State, step: Step, rng: random.Random) -> State:
    """Work on, on a disk that has room again, with the key that was refused; return the state.

    Where a change could not be undone, nothing is written until the next opening, and this says so.
    """
    key = step.key or "another"
    if store._file.read_only:
        for _ in range(2):
            with suppress(KVStoreError), pytest.raises(CorruptStoreError, match="be undone"):
                store.delete(key) if key in store else store.create(key, {})
        return state
    steps = [delete(key)] if key in state else [create(key, {"late": 1}), delete(key)]
    if rng.random() < 0.5:
        steps = [put(key, {"late": 2}), put(key, {"late": 3}), delete(key)]
    steps += [Step(lambda store: store._parts.reclaimer.reclaim())] * rng.randrange(2)
    steps += [create(key, LARGE), create("another one", {}), put(key, {"late": 4}), delete(key)]
    for each in steps[: rng.randrange(len(steps) + 1)]:
        each.act(store)
        state = each.apply(state)
    store.sync()
    return state


def refuse_writes_of_clear(folder: Path, rng: random.Random) -> int:
    """Refuse each write of a clear: who opens the file next finds all that there was, or nothing.

    What can be read of the store meanwhile is right; nothing is written by it any more.
    """
    through("pwrite")
    stop_clock()
    path = folder / "test.kvs"
    with KVStore(path) as store:
        keys = fill(store, 40)
    closed = path.read_bytes()
    for fail_at in itertools.count(1):
        path.write_bytes(closed)
        refusals = Refusals(fail_at, rng.choice(NUMBERS), lasting=rng.random() < 0.5, rng=rng)
        with suppress(KVStoreError, OSError), KVStore(path) as store:
            retire_and_mark(store, keys)
            before = dict(store.items())
            with refusals.of((os, "pwrite")), suppress(KVStoreError, OSError):
                store.clear()
                before = {}
            for key, value in before.items():
                with suppress(CorruptStoreError):
                    assert store.get(key, value) == value
            if refusals.reached and not store._file.read_only:
                assert dict(store.items()) == before, difference(dict(store.items()), before)
        with KVStore(path) as store:
            found = dict(store.items())
            assert found in (before, {}), f"write {fail_at}: {difference(found, before)}"
            store.create("late", {})
        assert_consistent(path)
        if not refusals.reached:
            return fail_at - 1
    raise AssertionError


# --- opening, recovery and closing -------------------------------------------------------------


def refuse_writes_of_an_opening(folder: Path, rng: random.Random) -> int:
    """Refuse every third write of a recovery and the close after it, alone or with all that follow.

    Where there is no room, the file is open to readers at least.
    """
    through("pwrite")
    clock = stop_clock()
    path = folder / "test.kvs"
    killed, live = make_killed_file(path)
    clock.advance(2_000)
    lasting_first = rng.random() < 0.5
    first = rng.randrange(1, 4)
    for fail_at in itertools.count(first, 3):
        number = rng.choice(NUMBERS)
        lasting = (fail_at % 2 == 0) == lasting_first
        refusals = Refusals(fail_at, number, lasting=lasting, rng=rng)
        path.write_bytes(killed)
        now = dict(live)
        try:
            with refusals.of((os, "pwrite")):
                open_and_change(path, now, allow_io_errors=number == errno.EIO)
            with KVStore(path) as store:
                assert dict(store.items()) == now, difference(dict(store), now)
                store.create("late", {})
            assert_consistent(path)
        except BaseException as error:
            name = errno.errorcode[number]
            error.add_note(
                f"write {fail_at} refused with {name}{' permanently' if lasting else ''}"
            )
            raise
        if not refusals.reached:
            return (fail_at - first) // 3
    raise AssertionError


def make_killed_file(path: Path) -> tuple[bytes, State]:
    """Return what a killed process leaves: with gaps, expired records, and several classes."""
    live: State = {}
    with KVStore(path) as store:
        for number in range(60):
            key, value = f"{number}", make_value(str(number), number, 20 * number)
            store.create(key, value, ttl=1_000 if number % 7 == 0 else None)
            if number % 7:
                live[key] = value
        for number, key in enumerate(list(live)):
            if number % 3 == 0:
                live[key] = make_value(key, -number, 10 * number)
                store.put(key, live[key])
            if number % 4 == 0:
                store.delete(key)
                del live[key]
            if number == 20:
                store.sync()
        return path.read_bytes(), live


def open_and_change(path: Path, live: State, *, allow_io_errors: bool) -> None:
    """Open a file, look at all of it, create and delete, and close it; `live` follows."""
    try:
        store = KVStore(path)
    except (KVStoreError, OSError):
        assert allow_io_errors
        return
    with suppress(OSError), store:
        assert dict(store.items()) == live, difference(dict(store.items()), live)
        assert len(store) == len(live)
        for key in [key for key in live if key != "new"][:2]:
            with suppress(KVStoreError, OSError):
                store.put(key, {"put": 1})
                live[key] = {"put": 1}
        with suppress(KVStoreError, OSError):
            store.create("new", {})
            live["new"] = {}
        if "new" in live:
            with suppress(KVStoreError, OSError):
                store.delete("new")
                del live["new"]
        assert dict(store.items()) == live, difference(dict(store.items()), live)


# --- every other call to the system ------------------------------------------------------------

SYSTEM_CALLS: Final = tuple(
    (module, name)
    for module, name in (
        (os, "posix_fallocate"),
        (os, "ftruncate"),
        (os, "write"),
        (os, "fdatasync"),
        (os, "fsync"),
        (mmap, "mmap"),
    )
    if hasattr(module, name)
)


def refuse_system_calls(folder: Path, rng: random.Random) -> int:
    """Refuse each call that reserves, cuts, maps or flushes, in the life of a file from its birth.

    What was acknowledged is there, what was refused is not.
    """
    through(rng.choice(("map", "pwrite")))
    lasting_first = rng.random() < 0.5
    for fail_at in itertools.count(1):
        number = rng.choice((*NUMBERS, errno.ENOMEM, errno.EFBIG))
        lasting = (fail_at % 2 == 0) == lasting_first
        refusals = Refusals(fail_at, number, lasting=lasting)
        path = folder / f"{fail_at}.kvs"
        live: State = {}
        try:
            with refusals.of(*SYSTEM_CALLS):
                for opening in range(2):
                    live_a_life(path, live, f"{opening}/")
            with KVStore(path) as store:
                assert dict(store.items()) == live, difference(dict(store), live)
                store.create("late", {})
            assert_consistent(path)
        except BaseException as error:
            name = errno.errorcode[number]
            error.add_note(f"call {fail_at} refused with {name}{' permanently' if lasting else ''}")
            raise
        path.unlink()
        if not refusals.reached:
            return fail_at - 1
    raise AssertionError


def live_a_life(path: Path, live: State, prefix: str) -> None:
    """Fill the file so that it grows, delete, and close it, whatever is refused on the way."""
    try:
        store = KVStore(path)
    except (KVStoreError, OSError):
        return
    with suppress(OSError), store:
        for number in range(40):
            key, value = f"{prefix}{number}", make_value(prefix, number, 16_000)
            with suppress(KVStoreError, OSError):
                store.create(key, value)
                live[key] = value
        for number, key in enumerate(list(live)):
            if number % 3 < 2:
                with suppress(KVStoreError, OSError):
                    store.put(key, value := make_value(key, number, 8_000 * (number % 2)))
                    live[key] = value
            if number % 3 == 0:
                with suppress(KVStoreError, OSError):
                    store.delete(key)
                    del live[key]
        for act in (store._parts.reclaimer.reclaim, store.compact):
            with suppress(KVStoreError, OSError):
                act()
        # Wherever that was cut short, all that is free is to be had, and no error but these comes.
        for number in range(40):
            key, value = f"{prefix}late {number}", make_value(prefix, number, 16_000)
            with suppress(StoreFullError, OSError):
                store.create(key, value)
                live[key] = value
        with suppress(OSError):
            store.sync()
        assert dict(store.items()) == live, difference(dict(store.items()), live)


# --- flushes -----------------------------------------------------------------------------------


class Platter:
    """Stands in for the system's flushes: what a power loss would leave, and one that fails.

    Attributes:
        image: the file at the last flush that succeeded, or its pages at their own.
        failed: whether a flush has failed since the file was opened.
    """

    def __init__(self, path: Path, fail_at: int, number: int, *, lasting: bool) -> None:
        self._path = path
        self._fail_at = fail_at
        self._number = number
        self._lasting = lasting
        self.calls = 0
        self.image = b""
        self.failed = False

    def flush(self, _fd: int) -> None:
        """Stand in for `fdatasync` and `fsync`."""
        self._fail_in_time()
        self.image = self._path.read_bytes()

    def flush_pages(self, _mapped: mmap.mmap, start: int, end: int) -> None:
        """Stand in for `disk.flush_pages`."""
        self._fail_in_time()
        first, last = start // PAGE * PAGE, -(-end // PAGE) * PAGE
        pages = self._path.read_bytes()[first:last]
        self.image = self.image[:first] + pages + self.image[last:]

    def _fail_in_time(self) -> None:
        self.calls += 1
        if self.calls == self._fail_at or (self._lasting and self.calls > self._fail_at):
            self.failed = True
            raise OSError(self._number, os.strerror(self._number))


class Witness:
    """Works with a store, and checks what it says of durability against a platter."""

    def __init__(self, path: Path, platter: Platter, *, durable: bool) -> None:
        self._path = path
        self._platter = platter
        self._durable = durable
        self._number = 0
        self.live: State = {}
        # What was acknowledged as durable, and has taken its place since.
        self.on_disk: dict[str, list[Value]] = {}

    def use(self) -> None:
        """Open the file, create, delete, sync and close; raise where anything claims too much."""
        self._platter.failed = False
        try:
            store = KVStore(self._path, durable=self._durable)
        except (KVStoreError, OSError):
            return
        for _ in range(3):
            for _ in range(2):
                self._create(store)
            self._put(store)
            self._claim(store.sync)
        self._put(store)
        self._put(store)
        for key in list(self.live)[::2]:
            self._delete(store, key)
        with suppress(OSError):
            store.compact()
        self._claim(store.close)

    def _create(self, store: KVStore) -> None:
        self._number += 1
        key, value = f"key {self._number}", make_value("large", self._number, 16_000)
        try:
            store.create(key, value)
        except OSError:
            # The record is there; that it is on the disk was not said.
            if key in store:
                self.live[key] = value
            return
        self.live[key] = value
        if self._durable:
            self._take_down()

    def _put(self, store: KVStore) -> None:
        key = next(iter(self.live), None)
        if key is None:
            return
        self._number += 1
        value = make_value("large", self._number, 16_000)
        if key in self.on_disk:
            self.on_disk[key] = [*self.on_disk[key], value]
        try:
            store.put(key, value)
        except OSError:
            self.live[key] = store.read(key)
            return
        self.live[key] = value
        if self._durable:
            self._take_down()

    def _delete(self, store: KVStore, key: str) -> None:
        self.on_disk.pop(key, None)
        try:
            store.delete(key)
        except OSError:
            if key not in store:
                del self.live[key]
            return
        del self.live[key]
        if self._durable:
            self._take_down()

    def _claim(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError:
            return
        self._take_down()

    def _take_down(self) -> None:
        assert not self._platter.failed, "claims to be durable after a flush that failed"
        self.on_disk = {key: [value] for key, value in self.live.items()}


def fail_flushes(folder: Path, rng: random.Random) -> int:
    """Fail each flush in a file's life: nothing later claims to be durable, until reopened.

    After power loss everything is there that was acknowledged as durable.
    """
    tried = 0
    lasting_first = rng.random() < 0.5
    for durable in (False, True):
        through(rng.choice(("map", "pwrite")))
        for fail_at in itertools.count(1):
            lasting = (fail_at % 2 == 0) == lasting_first
            path = folder / f"{durable}-{fail_at}.kvs"
            platter = Platter(path, fail_at, rng.choice(NUMBERS), lasting=lasting)
            witness = Witness(path, platter, durable=durable)
            with pytest.MonkeyPatch.context() as patch:
                for name in ("fdatasync", "fsync"):
                    patch.setattr(os, name, platter.flush)
                patch.setattr(kvstore.file.platform.system, "flush_pages", platter.flush_pages)
                lost_power = []
                for _ in range(2):
                    witness.use()
                    lost_power.append((platter.image, dict(witness.on_disk)))
            for image, on_disk in lost_power:
                check_after_power_loss(folder / "power.kvs", image, on_disk)
            with KVStore(path) as store:
                assert dict(store.items()) == witness.live, f"flush {fail_at}"
            assert_consistent(path)
            path.unlink()
            if platter.calls < fail_at:
                break
            tried += 1
    return tried


def check_after_power_loss(path: Path, image: bytes, on_disk: dict[str, list[Value]]) -> None:
    if not image and not on_disk:
        return
    path.write_bytes(image)
    with KVStore(path) as store:
        found = dict(store.items())
    lost = [key for key, values in on_disk.items() if found.get(key) not in values]
    assert not lost, f"acknowledged as durable and lost: {lost}"


# --- at random ---------------------------------------------------------------------------------


def refuse_at_random(folder: Path, rng: random.Random) -> int:
    """Refuse some write of every third operation, as a disk that others fill and empty."""
    through("pwrite")
    refused, live = 0, State()
    path = folder / "test.kvs"
    store = KVStore(path, max_bytes=8 * MIB)
    for number in range(1_000):
        key = str(rng.randrange(300))
        fail_at = rng.randrange(1, 9) if rng.random() < 0.3 else 10**9
        refusals = Refusals(fail_at, rng.choice(NUMBERS), lasting=rng.random() < 0.1, rng=rng)
        with refusals.of((os, "pwrite")):
            try:
                if key in live and rng.random() < 0.5:
                    store.delete(key)
                    del live[key]
                else:
                    value = make_value(key, number, random_size(rng))
                    (store.put if key in live or number % 2 else store.create)(key, value)
                    live[key] = value
            except (KVStoreError, OSError):
                refused += 1
        if store._file.read_only or rng.random() < 0.01:
            assert dict(store.items()) == live, difference(dict(store.items()), live)
            store.close()
            store = KVStore(path, max_bytes=8 * MIB)
    assert dict(store.items()) == live, difference(dict(store.items()), live)
    store.close()
    with KVStore(path) as store:
        assert dict(store.items()) == live, difference(dict(store.items()), live)
    assert_consistent(path)
    return refused


def _needs_pwrite() -> str | None:
    return None if hasattr(os, "pwrite") else "the system has no pwrite"


EXPERIMENTS = (
    *(
        Experiment(
            f"refused-writes-{group}",
            f"each write of a {group} refused, once or permanently",
            "refusals",
            partial(refuse_writes_of, group),
            unavailable=_needs_pwrite,
        )
        for group in SHAPES
    ),
    Experiment(
        "refused-writes-clear",
        "each write of a clear refused, once or permanently",
        "refusals",
        refuse_writes_of_clear,
        unavailable=_needs_pwrite,
    ),
    Experiment(
        "refused-writes-opening",
        "each write of a recovery and a close refused, once or permanently",
        "refusals",
        refuse_writes_of_an_opening,
        unavailable=_needs_pwrite,
    ),
    Experiment(
        "refused-writes-at-random",
        "some write of every third operation refused",
        "refusals",
        refuse_at_random,
        unavailable=_needs_pwrite,
    ),
    Experiment(
        "refused-system-calls",
        "each call that reserves, cuts, maps or flushes refused, once or permanently",
        "refusals",
        refuse_system_calls,
    ),
    Experiment(
        "failed-flushes",
        "each flush failed, once or permanently; then power loss",
        "flushes",
        fail_flushes,
        unavailable=lambda: None if hasattr(os, "fdatasync") else "the system has no fdatasync",
    ),
)
