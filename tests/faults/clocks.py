"""The wall clock set forth and back, by seconds or by centuries, while keys expire by it.

What must be there follows exactly: a key whose expiry is past by the clock, at the moment of an
operation, counts as absent for it. It may have been taken back at any moment when it was past, so
once it has been, it may stay away though the clock is set back. All else is there with its value.
"""

import random
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support import MIN_MAX_BYTES
from support.clock import START_SECONDS, FakeClock
from support.consistency import assert_consistent
from support.workload import Value, make_value

import kvstore.clock
from kvstore import KeyExistsError, KeyNotFoundError, KVStore, StoreFullError
from kvstore.format.layout import TIME_LIMIT
from kvstore.index.segments import Segments

from .laboratory import Experiment

STEPS: Final = 600  # of a trial
KEYS: Final = 3_000
LONGEST: Final = 10**10
YEAR: Final = 365 * 86_400
# The last moment that the store tells from later ones, in ms.
LAST_MS: Final = TIME_LIMIT - 1 - LONGEST * 1000


@dataclass
class Entry:
    """What was created; `may_be_gone` once its expiry was past."""

    value: Value
    expires_at: int | None  # ms
    may_be_gone: bool = False


class Clocks:
    """A store, the clock of it, and what it should hold."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._rng = rng
        self._clock = FakeClock()
        setattr(kvstore.clock, "time_ns", self._clock)  # noqa: B010 - typing
        self._file_count = 0
        self._folder = folder
        self._path = folder / "0.kvs"
        self._entries: dict[str, Entry] = {}
        self._set_clock_amid_purge()
        self._jump_in_purge = False
        self._store = KVStore(self._path, max_bytes=MIN_MAX_BYTES)
        self._marks = 0
        self.jumps = 0

    @property
    def _now(self) -> int:
        return min(max(0, self._clock.now_ms), LAST_MS)

    def _set_clock_amid_purge(self) -> None:
        segment_expiry = Segments.segment_expiry

        def set_and_look(segments: Segments, position: int, now_ms: int) -> tuple[int, int, bool]:
            if self._jump_in_purge and self._rng.random() < 0.3:
                self.set_clock()
            return segment_expiry(segments, position, now_ms)

        setattr(Segments, "segment_expiry", set_and_look)  # noqa: B010

    # --- the clock -----------------------------------------------------------------------------

    def set_clock(self) -> None:
        """Set the clock anywhere, most often somewhere that matters."""
        rng = self._rng
        kind = rng.choice(("seconds", "seconds", "years", "expiry", "expiry", "far", "usual"))
        if kind == "seconds":
            self._clock.advance(rng.randrange(-100_000, 100_000) / 1000)
        elif kind == "years":
            self._clock.advance(rng.uniform(-100, 100) * YEAR)
        elif kind == "expiry" and self._entries:
            expires_at = rng.choice(list(self._entries.values())).expires_at
            if expires_at is not None:
                self._clock.set((expires_at + rng.choice((-1, 0, 0, 1, 1000))) / 1000)
        elif kind == "far":
            self._clock.set(
                rng.choice(
                    (
                        0,
                        -1,
                        -(10**10),
                        LAST_MS // 1000,
                        TIME_LIMIT // 1000 - LONGEST,
                        TIME_LIMIT // 1000,
                        2**64 // 1000,
                    )
                )
            )
        else:
            self._clock.set(START_SECONDS)
        self.jumps += 1
        self._note_time()

    def _note_time(self) -> None:
        """Take note of what may be taken back by the clock's reading."""
        now = self._now
        for entry in self._entries.values():
            if entry.expires_at is not None and entry.expires_at <= now:
                entry.may_be_gone = True

    # --- operations ----------------------------------------------------------------------------

    def _expected(self, key: str) -> tuple[Entry | None, bool]:
        """Return what may be there now, and whether it must be."""
        entry = self._entries.get(key)
        if entry is None or (entry.expires_at is not None and entry.expires_at <= self._now):
            return None, False
        return entry, not entry.may_be_gone

    def _key(self) -> str:
        number = int(self._rng.triangular(0, KEYS, 0))
        return f"{'é' * 16 if number % 5 == 0 else ''}{number}"

    def create(self, key: str) -> None:
        """Create a key: refused exactly where it is there."""
        entry, must_be = self._expected(key)
        self._marks += 1
        value = make_value(key, self._marks, self._rng.choice((0, 30, 200, 2_000, 15_000)))
        ttl = self._rng.choice((None, 1, 10, 10, 100, YEAR, LONGEST))
        try:
            self._store.create(key, value, ttl)
        except KeyExistsError:
            assert entry is not None, f"{key!r} exists, but should have expired or never was"
            return
        except StoreFullError:
            assert not must_be, f"{key!r} was lost: it was taken for absent"
            for gone in self._rng.sample(sorted(self._entries), len(self._entries) // 3):
                self.delete(gone)
            return
        assert not must_be, f"{key!r} was lost: it was created again"
        expires_at = None if ttl is None else self._now + 1000 * ttl
        self._entries[key] = Entry(value, expires_at)

    def delete(self, key: str) -> None:
        """Delete a key: refused exactly where it is absent."""
        entry, must_be = self._expected(key)
        try:
            self._store.delete(key)
        except KeyNotFoundError:
            assert not must_be, f"{key!r} was lost: it could not be deleted"
            if entry is not None:
                del self._entries[key]
        else:
            assert entry is not None, f"{key!r} was deleted, but had expired or never was"
            del self._entries[key]

    def look(self, key: str) -> None:
        """Look at a key in every way: all agree, with each other and with the clock."""
        entry, must_be = self._expected(key)
        value = self._store.get(key)
        assert (key in self._store) == (value is not None)
        if value is None:
            assert not must_be, f"{key!r} was lost"
            for member in (self._store.ttl, self._store.read, self._store.read_bytes):
                with suppress(KeyNotFoundError):
                    raise AssertionError(f"{key!r}: {member(key)!r}, but get found nothing")
            return
        assert entry is not None, f"{key!r} is there, but should have expired or never was"
        assert value == entry.value
        left = None if entry.expires_at is None else -((self._now - entry.expires_at) // 1000)
        assert self._store.ttl(key) == left
        if entry.may_be_gone:  # it was looked for where it could have been taken back, and was not
            entry.may_be_gone = False

    def look_at_all(self) -> None:
        """List everything, count it, and look at each key that may be there."""
        listed = dict(self._store.items())
        assert len(self._store) == len(listed) == len(list(self._store))
        for key in listed.keys() | self._entries.keys():
            entry, must_be = self._expected(key)
            found = listed.get(key)
            if found is None:
                assert not must_be, f"{key!r} was lost"
            else:
                assert entry is not None, f"{key!r} is there, but should have expired or never was"
                assert found == entry.value

    def purge(self) -> None:
        """Take back what has expired, with the clock standing still or set amid it."""
        self._jump_in_purge = self._rng.random() < 0.5
        before = self._store.stats().records
        purged = self._store.purge_expired()
        assert self._store.stats().records == before - purged
        if not self._jump_in_purge:
            assert self._store.purge_expired() == 0
            assert self._store.stats().records == len(self._store)
        self._jump_in_purge = False

    def create_many(self) -> None:
        """Create so much that segments are rewritten."""
        for number in range(self._rng.randrange(600)):
            if number % 100 == 0 and self._rng.random() < 0.3:
                self.set_clock()
            self.create(self._key())

    def sync(self) -> None:
        self._store.sync()

    # --- openings ------------------------------------------------------------------------------

    def open_again(self) -> None:
        """Close and open, the clock set meanwhile or not."""
        self._store.close()
        assert_consistent(self._path)
        if self._rng.random() < 0.5:
            self.set_clock()
        self._store = KVStore(self._path, max_bytes=MIN_MAX_BYTES)
        self.look_at_all()

    def crash(self) -> None:
        """Go on with what the death of the process would have left, recovered by any clock."""
        self._file_count += 1
        path = self._folder / f"{self._file_count}.kvs"
        shutil.copyfile(self._path, path)
        self._store.close()
        self._path.unlink()
        self._path = path
        if self._rng.random() < 0.7:
            self.set_clock()
        self._store = KVStore(path, max_bytes=MIN_MAX_BYTES)
        self.look_at_all()
        if self._rng.random() < 0.5:
            self.purge()

    def end(self) -> None:
        """By the usual clock, at last."""
        self._clock.set(START_SECONDS)
        self._note_time()
        self.look_at_all()
        self._store.close()
        assert_consistent(self._path)

    def step(self) -> None:
        """Do anything."""
        chance = self._rng.random()
        if chance < 0.25:
            self.set_clock()
        elif chance < 0.5:
            self.create(self._key())
        elif chance < 0.65:
            self.delete(self._key())
        elif chance < 0.9:
            self.look(self._key())
        else:
            self._rng.choice(
                (
                    self.create_many,
                    self.purge,
                    self.look_at_all,
                    self.sync,
                    self.open_again,
                    self.crash,
                )
            )()


def set_clocks(folder: Path, rng: random.Random) -> int:
    """Set the clock again and again amid random operations; return how often."""
    clocks = Clocks(folder, rng)
    for _ in range(STEPS):
        clocks.step()
    clocks.end()
    return clocks.jumps


EXPERIMENTS = (
    Experiment("clock-jumps", "the clock set forth and back by any time", "settings", set_clocks),
)
