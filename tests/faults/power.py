"""Power loss: what the disk may hold then, at every moment, and what a store makes of it.

Between two flushes a disk may write any part of what it was told, in any order. What it writes
whole is a sector of 512 bytes; where a file system writes pages, one of 4,096. So each change of
the file is recorded where it is made (the write path, and the file's length), and an image
is: a moment between any two changes; for each sector one of the contents that it went through since
it was last flushed; and one of the lengths. That tears whatever spans sectors: slots, records, free
lists and what they hang from, segments, the directory and the extent map.

A flush is of everything, and begins a new epoch; or of some pages only, as a durable operation asks
for. Then the sectors of these are no older than that, and all else is as it was. Before such an
operation gets its flush, those of other threads may come and go: here they do.

A trial is a row of lives of one file. In each the file is opened, worked on and closed, all of it
recorded. Images of moments of that life must open and keep every promise; the next life begins with
one of them. So recovery is cut off as well, and the recovery of what that leaves. Some lives are
ended by a kill: then the next one finds what no disk has yet.
"""

import itertools
import os
import random
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from support import MIB
from support.consistency import assert_consistent
from support.images import PAGE, SECTOR, write_image
from support.threads import run_together
from support.workload import Value, make_value, random_size
from support.writing import telling_of_changes

import kvstore.clock
import kvstore.file.platform
from kvstore import KVStore, StoreFullError
from kvstore.file.platform import system
from kvstore.format.layout import (
    EXTENT_MAP_OFFSET,
    EXTENT_MAP_SIZE,
    EXTENT_SHIFT,
    SLAB_ENTRY,
    SPLIT_AT,
    STRIPE_SHIFT,
    key_hash,
)

from .laboratory import Experiment

# Small, so that an image is quickly written and recovered.
MAX_BYTES: Final = 4 * MIB
ROOM_AFTERWARDS: Final = 16 * MIB

FEW_KEYS: Final = 8
LIVES: Final = 3
IMAGES: Final = 3  # of each life

YEAR: Final = 365 * 86_400
# Seconds to live; and jumps of the clock before a recovery, none of which ends near one of these.
LIFETIMES: Final = (None, None, None, 1_000, 10**9)
JUMPS: Final = (0, 0, 0, 10**5, 40 * YEAR, -40 * YEAR)


class Clock:
    """Stands in for `time.time_ns`: a millisecond passes with each look, unless it stands still."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000 * 10**9
        self.stands_still = False

    def __call__(self) -> int:
        self.now_ns += 0 if self.stands_still else 10**6
        return self.now_ns

    @property
    def seconds(self) -> int:
        return self.now_ns // 10**9

    def jump(self, seconds: int) -> None:
        """Move on, or back, but never to before 1970: the store takes that for 1970."""
        self.now_ns = max(self.now_ns + seconds * 10**9, 10**15)


# --- what the disk was told --------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a key may be: a value, and the second from which on it counts as absent."""

    value: Value
    expires: int | None = None

    def at(self, seconds: int) -> Value | None:
        return self.value if self.expires is None or seconds < self.expires else None

    def has_left(self, left: int | None, seconds: int) -> bool:
        """Return whether this is the state of a key of which the store says how long it lives."""
        if self.expires is None or left is None:
            return self.expires is left
        return abs(self.expires - seconds - left) < min(filter(None, LIFETIMES)) / 2


ABSENT: Final = None
Possible = dict[str, tuple[State | None, ...]]


@dataclass(frozen=True)
class Note:
    """From change number `index` on, a key may also be in `states`; or in no others, if certain."""

    index: int
    key: str
    states: tuple[State | None, ...]
    certain: bool


@dataclass
class Epoch:
    """The time from one flush to the next.

    Attributes:
        base: the file as it was flushed.
        possible: what each key may be then.
        changes: an offset and the bytes written there; or None and the file's new length.
        notes: what else the keys may be, as it goes on.
        floors: how many changes had been made when the bytes from start to end were flushed.
    """

    base: bytes
    possible: Possible
    changes: list[tuple[int | None, bytes | int]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    floors: list[tuple[int, int, int]] = field(default_factory=list)

    def allowed(self, moment: int) -> Possible:
        """Return what each key may be after power was lost before change number `moment`."""
        allowed = dict(self.possible)
        for note in self.notes:
            if note.certain and note.index <= moment:
                allowed[note.key] = note.states
            elif not note.certain and note.index < moment:
                allowed[note.key] = (*allowed.get(note.key, (ABSENT,)), *note.states)
        return allowed


class Disk:
    """Records what is done to a file.

    Attributes:
        contents: of the file, as processes see it.
        epochs: from flush to flush, the last of them under way.
        acknowledged: what keys are since operations that returned in the last epoch.
        amid_flush: what others do before whoever flushes hears that it is done.
        is_told: the process lives.
    """

    def __init__(self, contents: bytes, possible: Possible) -> None:
        self.epochs = [Epoch(contents, possible)]
        self.contents = bytearray(contents)
        self.acknowledged: Possible = {}
        self.amid_flush: Callable[[], object] | None = None
        self.is_told = True
        self._under_way: dict[str, State | None] = {}

    def after_kill(self) -> "Disk":
        """Return a disk that has what this one has, and is told the same at first."""
        disk = Disk(b"", {})
        disk.epochs = self.epochs[-1:]
        disk.contents = self.contents
        disk.acknowledged = self.acknowledged
        return disk

    def write(self, offset: int, data: bytes) -> None:
        if not self.is_told:
            return
        self.epochs[-1].changes.append((offset, bytes(data)))
        end = offset + len(data)
        assert end <= len(self.contents), "a write behind the end of the file"
        self.contents[offset:end] = data

    def resize(self, length: int) -> None:
        if length != len(self.contents):
            self.epochs[-1].changes.append((None, length))
            del self.contents[length:]
            self.contents.extend(bytes(length - len(self.contents)))

    def reserve(self, end: int) -> None:
        self.resize(max(len(self.contents), end))

    def flush(self) -> None:
        """What was written is on the disk, and stays; so does what was acknowledged."""
        last = self.epochs[-1]
        possible = last.allowed(len(last.changes) + 1) | self.acknowledged
        self.acknowledged = {}
        for key, state in self._under_way.items():
            possible[key] = (*possible.get(key, (ABSENT,)), state)
        self.epochs.append(Epoch(bytes(self.contents), possible))

    def flush_pages(self, start: int, end: int) -> None:
        """Whole pages of these bytes are on the disk as they are now, or as they will be later."""
        epoch = self.epochs[-1]
        epoch.floors.append((len(epoch.changes), start // PAGE * PAGE, -(-end // PAGE) * PAGE))

    def intend(self, key: str, state: State | None) -> None:
        """An operation begins."""
        self._under_way[key] = state
        self._note(key, (state,), certain=False)

    def acknowledge(self, key: str, state: State | None) -> None:
        """It has returned: the next flush makes it certain."""
        self.has_ended(key)
        self.acknowledged[key] = (state,)

    def has_ended(self, key: str) -> None:
        """No operation on the key is under way."""
        self._under_way.pop(key, None)

    def promise(self, promised: Possible | None = None) -> None:
        """Whoever calls says that what was acknowledged, or this of it, is on stable storage."""
        for key, states in list(self.acknowledged.items()):
            if promised is None or promised.get(key) is states:
                self._note(key, states, certain=True)
                del self.acknowledged[key]

    def learn(self, key: str, states: tuple[State | None, ...]) -> None:
        """The file was found to hold this, and has been flushed since it was in doubt."""
        self._note(key, states, certain=True)

    def expired(self, key: str) -> None:
        """A value's time is up: it may be taken back, or come back with the time."""
        self._note(key, (ABSENT,), certain=False)
        if key in self.acknowledged:
            self.acknowledged[key] += (ABSENT,)

    def _note(self, key: str, states: tuple[State | None, ...], *, certain: bool) -> None:
        epoch = self.epochs[-1]
        epoch.notes.append(Note(len(epoch.changes), key, states, certain))


@contextmanager
def recording(disk: Disk, clock: Clock, *, in_place: bool) -> Iterator[None]:
    """Have `disk` hear of each change of the one file that is open meanwhile."""
    ftruncate, reserve, write_at = os.ftruncate, system.reserve, system.write_at

    def record_reserve(fd: int, start: int, end: int) -> None:
        reserve(fd, start, end)
        disk.reserve(end)

    def record_write_at(fd: int, offset: int, data: bytes) -> None:
        disk.write(offset, data)
        write_at(fd, offset, data)

    def record_ftruncate(fd: int, length: int) -> None:
        ftruncate(fd, length)
        disk.resize(length)

    def flush_file(*_: object) -> None:
        disk.flush()
        if disk.amid_flush is not None:
            disk.amid_flush()

    with pytest.MonkeyPatch.context() as patch, telling_of_changes(before=disk.write):
        patch.setattr(kvstore.file.platform.system, "reserve", record_reserve)
        patch.setattr(kvstore.file.platform.system, "write_at", record_write_at)
        patch.setattr(os, "ftruncate", record_ftruncate)
        patch.setattr(kvstore.file.platform.system, "flush_file", flush_file)
        patch.setattr(
            kvstore.file.platform.system,
            "flush_pages",
            lambda _, start, end: disk.flush_pages(start, end),
        )
        patch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _: in_place)
        patch.setattr(kvstore.clock, "time_ns", clock)
        yield


# --- what it may hold after power loss ---------------------------------------------------------


class Outage:
    """Images of power lost in one epoch. `unit` bytes reach the disk together."""

    def __init__(self, epoch: Epoch, unit: int) -> None:
        self._epoch = epoch
        self._unit = unit
        # For each unit that was changed: after which number of changes it became what.
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        self._lengths = [len(epoch.base)]
        longest = max([len(epoch.base), *(_end(*change) for change in epoch.changes)])
        self._contents = bytearray(epoch.base.ljust(-(-longest // PAGE) * PAGE, b"\0"))
        self._size = len(self._contents)
        for number, (offset, data) in enumerate(epoch.changes, 1):
            length = self._lengths[-1]
            if offset is not None:
                assert isinstance(data, bytes)
                self._change(number, offset, data)
                length = max(length, offset + len(data))
            else:
                assert isinstance(data, int)
                if data < length and any(cut := self._contents[data:length]):
                    self._change(number, data, bytes(len(cut)))
                length = data
            self._lengths.append(length)

    def _change(self, number: int, offset: int, data: bytes) -> None:
        contents, unit = self._contents, self._unit
        end = offset + len(data)
        starts = range(offset // unit * unit, end, unit)
        for start in starts:
            if start not in self._versions:
                self._versions[start] = [(0, bytes(contents[start : start + unit]))]
        contents[offset:end] = data
        for start in starts:
            self._versions[start].append((number, bytes(contents[start : start + unit])))

    def image(self, moment: int, rng: random.Random, whole_extents: float) -> bytes:
        """Return what the disk may hold where power was lost after so many changes."""
        image = bytearray(self._epoch.base.ljust(self._size, b"\0"))
        # The chance that a sector is as of the moment. Else it is as of the flush, or now and then
        # as of between the two. Neighbours often go together.
        share = rng.choice((0.1, 0.5, 0.9, 1.0))
        in_runs = rng.random() < 0.3
        between = rng.choice((0.0, 0.1, 1.0))
        # Of extents that got another kind or class, those that changed likewise go together.
        remade = self._remade(moment) if rng.random() < whole_extents else {}
        shares = {change: rng.choice((0.0, 1.0)) for change in sorted(set(remade.values()))}
        floors = self._floors(moment)
        for start in sorted(self._versions):
            versions = self._versions[start]
            count = bisect_right(versions, moment, key=_number)
            oldest = bisect_right(versions, floors.get(start, 0), key=_number) - 1
            if in_runs and rng.random() < 0.1:
                share = rng.choice((0.0, 1.0))
            if remade:
                share = shares.get(remade.get(start >> EXTENT_SHIFT, b""), 1.0)
            chosen = count - 1
            if rng.random() >= share:
                chosen = rng.randrange(oldest, count) if rng.random() < between else oldest
            image[start : start + self._unit] = versions[chosen][1]
        lengths = self._lengths[: moment + 1]
        length = rng.choice((lengths[0], lengths[-1], rng.choice(lengths)))
        return bytes(image[:length]).ljust(length, b"\0")

    def _remade(self, moment: int) -> dict[int, bytes]:
        """Return for each extent that is of another kind or class what it was and has become."""
        first, end = EXTENT_MAP_OFFSET, EXTENT_MAP_OFFSET + EXTENT_MAP_SIZE
        before = self._epoch.base[first:end]
        after = bytearray(before)
        for start in range(first, end, self._unit):
            versions = self._versions.get(start, ())
            for _, contents in versions[: bisect_right(versions, moment, key=_number)]:
                after[start - first : start - first + self._unit] = contents
        return {
            place // SLAB_ENTRY.size: before[place : place + 2] + after[place : place + 2]
            for place in range(0, len(before), SLAB_ENTRY.size)
            if before[place : place + 2] != after[place : place + 2]
        }

    def _floors(self, moment: int) -> dict[int, int]:
        """Return for each unit that was flushed by itself after how many changes it last was."""
        return {
            unit: index
            for index, start, end in self._epoch.floors
            if index <= moment
            for unit in range(start, end, self._unit)
        }


def _number(version: tuple[int, bytes]) -> int:
    return version[0]


def _end(offset: int | None, data: bytes | int) -> int:
    if offset is None:
        assert isinstance(data, int)
        return data
    assert isinstance(data, bytes)
    return offset + len(data)


# --- what a store makes of it ------------------------------------------------------------------


def assert_survives(
    path: Path, allowed: Possible, clock: Clock, rng: random.Random, room: int
) -> None:
    """Assert that the file opens, holds what was promised, works on, and is whole once closed."""
    with KVStore(path, max_bytes=room) as store:
        assert store.stats().file_size <= room
        contents = assert_allowed(store, allowed, clock.seconds)
        created = {}
        largest = rng.choice((100, 100, 1_000, 16_000))
        for number in range(rng.choice((10, 10, 40))):
            key = f"afterwards {number}"
            value = make_value(key, number, rng.randrange(largest))
            try:
                store.create(key, value)
            except StoreFullError:
                assert room < ROOM_AFTERWARDS, "there was room"
            else:
                created[key] = value
        for number, key in enumerate(list(contents)[:60]):
            if number % 3:
                value = make_value(key, number, rng.randrange(100))
                with suppress(StoreFullError):
                    store.put(key, value)
                    contents[key] = value
            if number % 3 < 2:
                store.delete(key)
                del contents[key]
        for key, value in (created | contents).items():
            assert store.read(key) == value
        assert len(store) == len(contents) + len(created)
    assert_consistent(path)


def assert_allowed(store: KVStore, allowed: Possible, seconds: int) -> dict[str, Value]:
    """Assert that each key is in a state that it may be in; return what there is."""
    contents = {key: store.read(key) for key in store}
    assert len(store) == len(contents)
    for key in contents.keys() | allowed.keys():
        found = contents.get(key)
        possible = [_at(state, seconds) for state in allowed.get(key, (ABSENT,))]
        assert found in possible, (
            f"key {key!r} is {_shown(found)} after the crash, "
            f"allowed: {', '.join(map(_shown, possible))}"
        )
        if found is None:
            assert key not in store
    return contents


def _at(state: State | None, seconds: int) -> Value | None:
    return state.at(seconds) if state else None


def _shown(value: Value | None) -> str:
    return "absent" if value is None else f"mark {value.get('mark')}"


# --- lives of a file ---------------------------------------------------------------------------


Store = Callable[[KVStore, str, Value, int | None], None]


class Life:
    """An open store whose operations are noted by `disk` as well as what they write.

    Where they are durable, others come before the flush of some, as those of other threads would.
    """

    def __init__(self, store: KVStore, disk: Disk, clock: Clock, rng: random.Random) -> None:
        self.store = store
        self.rng = rng
        self.live: dict[str, State] = {}
        self._disk = disk
        self._clock = clock
        allowed = disk.epochs[-1].allowed(len(disk.epochs[-1].changes) + 1)
        contents = assert_allowed(store, allowed, clock.seconds)
        for key, states in allowed.items():
            found = contents.get(key)
            # What was seen is what there is; an absent value may have expired and not be gone.
            seen = tuple(state for state in states if _at(state, clock.seconds) == found)
            if found is None:
                disk.learn(key, (*seen, ABSENT))
                continue
            # It may have been touched: of one value there are several lifetimes.
            left = store.ttl(key)
            there = tuple(each for each in seen if each and each.has_left(left, clock.seconds))
            assert there, f"key {key!r} has {left} s left after the crash"
            disk.learn(key, there)
            self.live[key] = there[0]
        self._marks = rng.getrandbits(32) << 20
        self._key = ""  # of the operation under way
        self._is_between = False
        self.has_others = False  # which do something while everything is flushed
        self._flush_record = store._file.flush_record
        setattr(store._file, "flush_record", self._flush_after_others)  # noqa: B010 - typing

    def _flush_after_others(self, offset: int, size: int) -> None:
        if not self._is_between and self.rng.random() < 0.3:
            self._is_between = True
            self._work_on(self._key, 3_000)
            if self.rng.random() < 0.3:
                self.work(1, population=40, largest=3_000)
            self._is_between = False
        self._flush_record(offset, size)

    def create(self, key: str, size: int) -> bool:
        """Create a key; tell whether there was room."""
        return self._store(KVStore.create, key, size)

    def put(self, key: str, size: int) -> bool:
        """Put a key, whether it is there or not; tell whether there was room."""
        return self._store(KVStore.put, key, size)

    def _store(self, store: Store, key: str, size: int) -> bool:
        self._marks += 1
        value = make_value(key, self._marks, size) if size else {"mark": self._marks}
        ttl = self.rng.choice(LIFETIMES)
        return self._change(key, value, ttl, lambda: store(self.store, key, value, ttl))

    def touch(self, key: str) -> bool:
        """Give a key that is there another time-to-live; tell whether there was room."""
        value, ttl = self.live[key].value, self.rng.choice(LIFETIMES)
        return self._change(key, value, ttl, lambda: self.store.touch(key, ttl))

    def _change(self, key: str, value: Value, ttl: int | None, act: Callable[[], object]) -> bool:
        state = State(value, ttl and self._clock.seconds + ttl)
        self._disk.intend(key, state)
        self._key = key
        before = self.live.get(key)
        self.live[key] = state
        try:
            act()
        except StoreFullError:
            self._disk.has_ended(key)
            if before is None:
                self._disk.expired(key)
                del self.live[key]
            else:
                self.live[key] = before
            return False
        # Unless another operation has come in between, and has returned already.
        if self.live.get(key) is state:
            self._disk.acknowledge(key, state)
        self._promise_if_durable()
        return True

    def delete(self, key: str) -> None:
        """Delete a key, or pop it."""
        self._disk.intend(key, ABSENT)
        self._key = key
        value = self.live.pop(key).value
        if self.rng.random() < 0.3:
            assert self.store.pop(key) == value
        else:
            self.store.delete(key)
        if key not in self.live:
            self._disk.acknowledge(key, ABSENT)
        self._promise_if_durable()

    def put_many(self, keys: list[str], largest: int) -> None:
        """Put different keys at once; where there is no room for one, none after it is put."""
        ttl = self.rng.choice(LIFETIMES)
        before = dict(self.live)
        states: dict[str, State] = {}
        for key in keys:
            self._marks += 1
            value = make_value(key, self._marks, min(random_size(self.rng), largest))
            states[key] = State(value, ttl and self._clock.seconds + ttl)
            self._disk.intend(key, states[key])
        self._key = keys[-1]
        self.live |= states
        missing: list[str] = []
        try:
            self.store.put_many(((key, state.value) for key, state in states.items()), ttl)
        except StoreFullError as error:
            missing = keys[next(n for n, key in enumerate(keys) if f"{key!r}:" in str(error)) :]
        for key, state in states.items():
            if key in missing:
                self._disk.has_ended(key)
                if key in before:
                    self.live[key] = before[key]
                else:
                    self._disk.expired(key)
                    del self.live[key]
            elif self.live.get(key) is state:
                self._disk.acknowledge(key, state)
        self._promise_if_durable()

    def delete_many(self, keys: list[str]) -> None:
        """Delete different keys at once, be they there or not.

        Of one that has expired nothing is deleted: it may come back with the time.
        """
        there = [key for key in keys if key in self.live]
        for key in there:
            self._disk.intend(key, ABSENT)
            del self.live[key]
        self._key = keys[-1]
        assert self.store.delete_many(keys) == len(there)
        for key in there:
            if key not in self.live:
                self._disk.acknowledge(key, ABSENT)
        self._promise_if_durable()

    def clear(self) -> None:
        """Remove all keys."""
        for key in self.live:
            self._disk.intend(key, ABSENT)
        self.store.clear()
        for key in self.live:
            self._disk.acknowledge(key, ABSENT)
        self._disk.promise()
        self.live = {}

    def reclaim(self) -> None:
        """Reclaim what was retired, as a thread of the store's own does now and then."""
        with self._others_amid_flushes():
            self.store._parts.reclaimer.reclaim()

    def _promise_if_durable(self) -> None:
        if self.store._durable:
            self._disk.promise()

    def sync(self) -> None:
        acknowledged = dict(self._disk.acknowledged)
        with self._others_amid_flushes():
            self.store.sync()
        self._disk.promise(acknowledged)

    @contextmanager
    def _others_amid_flushes(self) -> Iterator[None]:
        """Have another thread do something while everything is flushed, if it is to be so.

        What would wait for that flush is not done: durable operations, and a store's first change.
        """

        def work() -> None:
            if self.rng.random() < 0.5:
                self._disk.amid_flush = None
                run_together(lambda: self.work(self.rng.randrange(1, 5), FEW_KEYS, 500))
                self._disk.amid_flush = work

        if self.has_others and not (self.store._durable or self.store._file.pristine):
            self._disk.amid_flush = work
        try:
            yield
        finally:
            self._disk.amid_flush = None

    def let_time_pass(self, seconds: int) -> None:
        """Turn the clock forward; some values expire."""
        self._clock.jump(seconds)
        for key, state in list(self.live.items()):
            if state.at(self._clock.seconds) is None:
                self._disk.expired(key)
                del self.live[key]

    def disturb_clock(self) -> None:
        """Have the clock go or stand still, and set it back by less than any lifetime."""
        self._clock.stands_still = self.rng.random() < 0.5
        if self.rng.random() < 0.3:
            self._clock.jump(-self.rng.choice((1, 100)))

    def close(self) -> None:
        self.store.close()
        self._disk.promise()
        self._clock.stands_still = False

    def work(self, count: int, population: int = 120, largest: int = 16_000) -> None:
        """Create, put, touch and delete, one or some, at random the same keys again and again."""
        for _ in range(count):
            self._work_on(_key(self.rng.randrange(population)), largest)
            if self.rng.random() < 0.05:
                keys = [_key(number) for number in self.rng.sample(range(population), 3)]
                if self.rng.random() < 0.7:
                    self.put_many(keys, largest)
                else:
                    self.delete_many(keys)

    def _work_on(self, key: str, largest: int) -> None:
        size, chance = min(random_size(self.rng), largest), self.rng.random()
        if key not in self.live:
            store = self.create if chance < 0.6 else self.put
            store(key, size)
        elif chance < 0.5:
            self.delete(key)
        elif chance < 0.9:
            self.put(key, size)
        else:
            self.touch(key)


def _key(number: int) -> str:
    # One in five is longer than the 32 bytes of a slot, and agrees with others in these.
    return f"{'é' * 16 if number % 5 == 0 else ''}{number}"


Deed = Callable[[Life], None]


def work_at_random(life: Life) -> None:
    """Some operations, with syncs and time between them."""
    life.work(life.rng.choice((0, 50, 200)))
    life.sync()
    for _ in range(life.rng.randrange(4)):
        life.work(life.rng.choice((3, 30, 100)))
        if life.rng.random() < 0.3:
            life.let_time_pass(2_000)
        if life.rng.random() < 0.3:
            life.store.purge_expired()
        if life.rng.random() < 0.2:
            life.sync()


def touch_few_keys(life: Life) -> None:
    """Several generations of the same keys since the sync, in blocks of any class."""
    life.work(30, population=12, largest=3_000)
    life.sync()
    life.work(life.rng.choice((20, 100)), population=12, largest=3_000)


def work_durably(life: Life) -> None:
    """Some operations, between which the clock stands still, goes on or is set back a little."""
    for _ in range(life.rng.choice((1, 4))):
        life.disturb_clock()
        life.work(10, population=life.rng.choice((4, 40)), largest=3_000)
        if life.rng.random() < 0.3:
            life.let_time_pass(2_000)
            if life.rng.random() < 0.5:
                life.store.purge_expired()
            life.work(10, population=4, largest=3_000)


def change_classes_durably(life: Life) -> None:
    """Empty whole extents and fill them with records of another class, on few keys."""
    life.disturb_clock()
    for _ in range(3):
        size = life.rng.choice((2_500, 6_000, 16_000))
        keys = [_key(number) for number in range(65_536 // size + 1)]
        for key in keys:
            if key not in life.live:
                life.create(key, size)
        if life.rng.random() < 0.5:
            life.let_time_pass(2_000)
        for key in keys:
            if key in life.live:
                life.delete(key)


def replace_few_keys(life: Life) -> None:
    """Put, delete, sync and reclaim in any order, while others do so; and let replacements expire.

    Now and then the clock is set back, and keys that were purged are deleted again.
    """
    rng = life.rng
    life.work(rng.randrange(30), FEW_KEYS, 3_000)
    life.has_others = True
    for _ in range(rng.choice((3, 10, 30))):
        life.disturb_clock()
        life.work(rng.choice((1, 2, 10)), FEW_KEYS, rng.choice((100, 3_000)))
        chance = rng.random()
        if chance < 0.3:
            life.sync()
        elif chance < 0.6:
            life.reclaim()
        elif chance < 0.7:
            life.let_time_pass(2_000)
            if rng.random() < 0.5:
                life.store.purge_expired()
        elif chance < 0.72:
            life.clear()


def clear_all(life: Life) -> None:
    """Remove all keys, and store others, of the same names and larger."""
    rng = life.rng
    for _ in range(rng.choice((1, 2, 3))):
        life.disturb_clock()
        life.work(rng.choice((0, 10, 60)), 40)
        for number in range(rng.choice((0, 0, 60))):
            life.put(_key(number), 16_000)
        if rng.random() < 0.5:
            life.sync()
        life.work(rng.randrange(10), FEW_KEYS, 3_000)
        life.clear()
        life.work(rng.choice((0, 3, 30)), 40)


def grow_durably(life: Life) -> None:
    """Store more than a new file has room for."""
    for number in range(50):
        key = f"large {number}"
        if key not in life.live:
            life.create(key, 16_000)


def grow(life: Life) -> None:
    """Fill the file; where it is full, begin again."""
    sizes = life.rng.choice(((8_000, 16_000), (1_500, 3_000), (200, 16_000)))
    life.work(60)
    life.sync()
    size = life.store._file.size
    prefix = life.rng.getrandbits(30)
    for number in range(2_000):
        if not life.create(f"{prefix} {number}", life.rng.randrange(*sizes)):
            for key in life.rng.sample(sorted(life.live), len(life.live) * 3 // 4):
                life.delete(key)
            break
        if life.store._file.size > size:
            break
    life.work(30)


def change_classes(life: Life) -> None:
    """Delete all values of one size and create others: extents pass from class to class."""
    life.work(20, population=20, largest=100)
    for _ in range(life.rng.choice((2, 3))):
        size = life.rng.choice((0, 150, 400, 1_000, 2_500, 6_000, 16_000))
        prefix = f"{life.rng.getrandbits(20):x} of {size}:"
        keys = [f"{prefix}{number}" for number in range(min(120, 200_000 // (size + 300)))]
        for key in keys:
            life.create(key, size)
        if life.rng.random() < 0.7:
            life.sync()
        for key in life.rng.sample(keys, len(keys) - life.rng.choice((0, 0, 1))):
            if key in life.live:
                life.delete(key)
        life.work(10, population=20, largest=100)


def change_sizes_at_the_limit(life: Life) -> None:
    """Fill the file with records of one size, give most of them up, fill it with those of another.

    The smallest take half of it for their slots.
    """
    rng = life.rng
    sizes = rng.choice(((16_000, 0), (16_000, 0), (3_000, 0), (0, 16_000, 0)))
    for name, size in zip("abc", sizes, strict=False):
        life.sync()
        old = list(life.live)
        for key in old[rng.choice((0, 1, len(old) // 20)) :]:
            life.delete(key)
        if rng.random() < 0.1:
            life.sync()
        # Of the smallest so many need no extent for their slots but those that were deleted.
        for number in range(18_000 if rng.random() < 0.2 else 10**5):
            if not life.create(f"{name}{number}", size):
                break


def move_records(life: Life) -> None:
    """Delete most of a full file, so that what is left has to move for records of another size."""
    rng = life.rng
    for _ in range(rng.choice((1, 2))):
        size, other = rng.sample((700, 3_000, 6_000, 16_000), 2)
        name = f"{rng.getrandbits(30)}"
        for number in range(10**5):
            if not life.create(f"{name} {number}", size):
                break
        if rng.random() < 0.7:
            life.sync()
        for key in rng.sample(sorted(life.live), len(life.live) * 9 // 10):
            life.delete(key)
        if rng.random() < 0.3:
            life.sync()
        if rng.random() < 0.5:
            life.store.compact()
        for number in range(rng.choice((20, 10**5))):
            if not life.create(f"{name} {other} {number}", other):
                break
        life.work(rng.choice((3, 30)))
    if rng.random() < 0.5:
        life.store.compact()
    life.work(rng.choice((0, 10)))


def rewrite_segments(life: Life) -> None:
    """Fill a segment until it splits, or is rewritten because of its tombstones."""
    store, rng = life.store, life.rng
    seed, stripe = store._file.hash_seed, rng.randrange(2)
    mine = [key for key in life.live if key_hash(key.encode(), seed) >> STRIPE_SHIFT == stripe]
    if len(mine) > 800 and rng.random() < 0.6:
        for key in rng.sample(mine, len(mine) * 3 // 4):
            life.delete(key)
    keys = new_keys(life, stripe)
    for _ in range(rng.choice((1_000, 1_090, 1_110))):
        life.create(next(keys), 0)
    life.sync()
    for _ in range(rng.choice((30, 200))):
        if rng.random() < 0.1:
            life.put_many(list(itertools.islice(keys, 10)), 60)
        else:
            life.create(next(keys), rng.randrange(60))
        if rng.random() < 0.2:
            life.delete(rng.choice(sorted(life.live)))
    if rng.random() < 0.6:
        merge_segments(life, stripe)


def new_keys(life: Life, stripe: int) -> Iterator[str]:
    """Yield keys of one stripe that are not there."""
    seed, prefix = life.store._file.hash_seed, f"{life.rng.getrandbits(20):x}/"
    names = (f"{prefix}{number}" for number in itertools.count())
    return (name for name in names if key_hash(name.encode(), seed) >> STRIPE_SHIFT == stripe)


def merge_segments(life: Life, stripe: int) -> None:
    """Delete most keys of a stripe, merge its segments, and use the extents that this frees."""
    store, rng = life.store, life.rng
    seed = store._file.hash_seed
    mine = [key for key in life.live if key_hash(key.encode(), seed) >> STRIPE_SHIFT == stripe]
    for key in rng.sample(mine, len(mine) * 9 // 10):
        life.delete(key)
    store._all_keys.merge_segments()
    if rng.random() < 0.5:
        life.sync()
    for number in range(rng.randrange(6)):
        life.create(f"{rng.getrandbits(30)} {number}", rng.choice((300, 5_000, 16_000)))


def leave_little(life: Life) -> None:
    """Fill extents of two classes, have a segment split behind them, and delete most of all.

    Now and then so few of the segment's keys that it is to be moved, not merged.
    """
    rng = life.rng
    for size in rng.sample((700, 3_000, 6_000, 16_000), 2):
        for number in range(300_000 // size):
            life.create(f"{size} {number}", size)
    small = set(itertools.islice(new_keys(life, rng.randrange(2)), SPLIT_AT + 10))
    for key in sorted(small):
        life.create(key, 0)
    chance = rng.choice((0.3, 0.9))
    for key in sorted(life.live):
        if rng.random() < (chance if key in small else 0.9):
            life.delete(key)


def shrink_durably(life: Life) -> None:
    """Merge, compact, and store what takes the extents that are free then, as durably as all."""
    rng, store = life.rng, life.store
    for _ in range(rng.choice((1, 2))):
        for key in rng.sample(sorted(life.live), min(len(life.live), rng.randrange(20))):
            if key in life.live:  # others may have deleted it before the flush of another one
                life.delete(key)
        rng.choice((store._all_keys.merge_segments, store.compact))()
        for _ in range(rng.randrange(6)):
            life.create(f"{rng.getrandbits(30)}", rng.choice((300, 5_000, 16_000)))
        life.work(rng.randrange(10), FEW_KEYS, 3_000)


def open_and_close(life: Life) -> None:
    """At most a first change."""
    for _ in range(life.rng.randrange(3)):
        life.work(1)


@dataclass(frozen=True)
class Plan:
    """What a trial does in each life, and where it cuts lives off."""

    deeds: Sequence[Deed]
    durable: bool = False
    first: Deed | None = None  # instead, in the first life, which is not durable
    lives: int = LIVES
    images: int = IMAGES
    room: int = ROOM_AFTERWARDS  # that the file has in the opening after power was lost
    whole_extents: float = 0.1  # the chance that extents are old or new as wholes
    late: float = 0.0  # that power is lost before the last change of the longest epoch
    in_opening: float = 0.1  # the chance that power is lost while the store is being opened
    epochs: int = sys.maxsize  # then in one of so many first epochs

    def of_life(self, number: int) -> tuple[Sequence[Deed], bool]:
        """Return what may be done in a life, and whether it is durable."""
        return ((self.first,), False) if self.first and not number else (self.deeds, self.durable)


def lose_power(plan: Plan, unit: int, folder: Path, rng: random.Random) -> int:
    """Lead a file through its lives, and try images of each."""
    clock = Clock()
    contents, possible = b"", Possible()
    killed: Disk | None = None
    tried = 0
    for number in range(plan.lives):
        path = write_image(folder / f"life {number}", contents)
        disk = killed or Disk(contents, possible)
        for key, states in possible.items():
            if any(state and state.at(clock.seconds) is None for state in states):
                disk.expired(key)  # recovery takes it back
        is_killed = rng.random() < 0.3
        deeds, durable = plan.of_life(number)
        opened = live(deeds, path, disk, clock, rng, durable=durable, is_killed=is_killed)
        outages: dict[int, Outage] = {}
        now_ns = clock.now_ns
        for image_number in range(plan.images + 1):
            epoch, moment = choose_moment(disk, opened, plan, rng)
            if epoch not in outages:
                outages[epoch] = Outage(disk.epochs[epoch], unit)
            contents = outages[epoch].image(moment, rng, plan.whole_extents)
            possible = disk.epochs[epoch].allowed(moment)
            killed = None
            clock.now_ns = now_ns
            clock.jump(rng.choice(JUMPS))
            if image_number == plan.images:
                # The next life begins with this one, or with the file as it was left.
                if rng.random() < 0.5:
                    killed = disk.after_kill() if is_killed else None
                    last = disk.epochs[-1]
                    contents = bytes(disk.contents)
                    possible = last.allowed(len(last.changes) + 1)
                break
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kvstore.clock, "time_ns", clock)
                patch.setattr(kvstore.file.platform.system, "flush_file", lambda *_: None)
                try:
                    image = write_image(folder / "image", contents)
                    assert_survives(image, possible, clock, rng, plan.room)
                except BaseException as error:
                    error.add_note(
                        f"life {number}, image {image_number}: after change {moment} of "
                        f"{len(disk.epochs[epoch].changes)} in epoch {epoch} of "
                        f"{len(disk.epochs)}, opened in epoch {opened[0]}"
                    )
                    raise
            tried += 1
        path.unlink()
    return tried


def live(
    deeds: Sequence[Deed],
    path: Path,
    disk: Disk,
    clock: Clock,
    rng: random.Random,
    *,
    durable: bool,
    is_killed: bool,
) -> tuple[int, int]:
    """Open, work and close or die; return the epoch and the moment at which it was open."""
    with recording(disk, clock, in_place=rng.random() < 0.7):
        store = KVStore(path, max_bytes=MAX_BYTES, durable=durable)
        opened = len(disk.epochs) - 1, len(disk.epochs[-1].changes)
        life = Life(store, disk, clock, rng)
        rng.choice(deeds)(life)
        if not is_killed:
            life.close()
        assert bytes(disk.contents) == path.read_bytes(), "a change went past the write path"
    disk.is_told = False
    store.close()
    assert_consistent(path)
    return opened


def choose_moment(
    disk: Disk, opened: tuple[int, int], plan: Plan, rng: random.Random
) -> tuple[int, int]:
    """Return an epoch and how many of its changes had been made when power was lost."""
    if rng.random() < plan.in_opening:
        epoch = rng.randrange(min(opened[0] + 1, plan.epochs))
        last = opened[1] if epoch == opened[0] else len(disk.epochs[epoch].changes)
        return epoch, rng.randint(0, last)
    if rng.random() < plan.late:
        longest = max(range(len(disk.epochs)), key=lambda number: len(disk.epochs[number].changes))
        return longest, len(disk.epochs[longest].changes)
    if rng.random() < 0.3:
        epoch = rng.randrange(len(disk.epochs))
    else:
        counts = [len(each.changes) + 1 for each in disk.epochs]
        (epoch,) = rng.choices(range(len(counts)), counts)
    last = len(disk.epochs[epoch].changes)
    return epoch, rng.choice((last, rng.randint(0, last), rng.randint(0, last)))


PLANS: Final = {
    "work": (Plan((work_at_random,)), "power lost amid creates, deletes, expiry, syncs"),
    "generations": (Plan((touch_few_keys,)), "... amid keys deleted and created again and again"),
    "durable": (
        Plan((work_durably, work_durably, change_classes_durably, grow_durably), durable=True),
        "... amid operations that are durable",
    ),
    "replacing": (
        Plan((replace_few_keys,), lives=4),
        "... amid keys replaced, deleted and reclaimed, with flushes under way",
    ),
    "replacing-durably": (
        Plan((replace_few_keys,), durable=True, lives=4),
        "... likewise, where each operation is durable",
    ),
    "clearing": (Plan((clear_all,), lives=4), "... amid clear and what follows it"),
    "growth": (Plan((grow,)), "... while the file grows, or is full"),
    "classes": (Plan((change_classes,)), "... while extents pass between size classes"),
    "limit": (
        Plan(
            (change_sizes_at_the_limit,),
            lives=1,
            images=4,
            in_opening=0.0,
            room=MAX_BYTES,
            whole_extents=0.8,
            late=0.7,
        ),
        "... in a full file, whose records become smaller or larger",
    ),
    "moves": (
        Plan((move_records,), lives=2),
        "... while records move, to make room or to compact the file",
    ),
    "segments": (
        Plan((rewrite_segments,), lives=3),
        "... while segments are rewritten, split and merged",
    ),
    "shrinking-durably": (
        Plan((shrink_durably,), durable=True, first=leave_little),
        "... likewise, and while records move, where each operation is durable",
    ),
    "creation": (
        Plan((open_and_close,), lives=1, images=16, in_opening=1.0, epochs=2),
        "... while the file is created",
    ),
    "opening": (
        Plan((open_and_close,), in_opening=0.3),
        "... at opening, first change and close",
    ),
    "recovery": (
        Plan((work_at_random, touch_few_keys, change_classes), lives=4, in_opening=0.8),
        "... in recovery, and in the recovery of that",
    ),
}


def unavailable() -> str | None:
    """Return why what a disk is told cannot be recorded here; None where it can."""
    return None if sys.platform == "linux" else "changes of the file are recorded on Linux only"


EXPERIMENTS = tuple(
    Experiment(
        f"power-{name}-by-{word}",
        f"{fault}, by {word}",
        "images",
        partial(lose_power, plan, unit),
        unavailable=unavailable,
    )
    for name, (plan, fault) in PLANS.items()
    for word, unit in (("sector", SECTOR), ("page", PAGE))
)
