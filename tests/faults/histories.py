"""Threads that meet on few keys of a store in which everything else goes on as well.

Each call on a contended key is noted with the moments of its beginning and end; in the end every
key's history must be linearizable: see `support.threads`. The clock is one of the parties, set
forth and back while all others work. What is counted or listed is held against the same histories.
"""

import itertools
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any, Final

from support import MIN_MAX_BYTES
from support.clock import START_SECONDS, FakeClock
from support.consistency import assert_consistent
from support.threads import Operation, linearizable, run_together
from support.workload import Value, make_value

import kvstore.clock
from kvstore import KeyExistsError, KeyNotFoundError, KVStore, StoreClosedError, StoreFullError
from kvstore.index.extents import Extents
from kvstore.index.records import Records
from kvstore.index.segments import Segments
from kvstore.index.slab import Slab
from kvstore.index.slots import Slots

from .laboratory import Experiment

THREADS: Final = 8
ROUNDS: Final = 6  # of a trial, each with histories of its own
CALLS: Final = 30  # of a thread in a round
MOVES: Final = 1_500  # of a key, while others count
BRINK: Final = 16 * 1_090  # keys that fill 16 segments to where they are split
# Two that share a slot's 32 bytes, so that each is compared in its record.
CONTENDED: Final = ("a", "é" * 16 + "1", "é" * 16 + "2")
# In seconds, as long as the clock is set forth and back by.
TTLS: Final[tuple[tuple[int | None, ...], ...]] = ((None,), (None, 1, 2, 4), (1, 2))

_SWITCH_SECONDS: Final = 5e-6
_SWITCH_CHANCE: Final = 0.02


def switch_often(rng: random.Random) -> None:
    """Make the interpreter change threads far more often than it would, most of all amid a change.

    It is asked to a thousand times as often, and made to, now and then, where a step of an
    operation begins or ends: another thread that is not kept out by a lock gets its turn there.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    dice = random.Random(rng.random())
    for owner, names in _STEPS:
        for name in names:
            setattr(owner, name, _switching(getattr(owner, name), dice))


def _switching(step: Callable[..., Any], dice: random.Random) -> Callable[..., Any]:
    def take_turns(*arguments: Any, **named: Any) -> Any:
        if dice.random() < _SWITCH_CHANCE:
            sleep(_SWITCH_SECONDS)
        result = step(*arguments, **named)
        if dice.random() < _SWITCH_CHANCE:
            sleep(_SWITCH_SECONDS)
        return result

    return take_turns


_STEPS: Final[tuple[tuple[type, tuple[str, ...]], ...]] = (
    (Slots, ("find", "insert", "remove", "is_expired")),
    (Segments, ("split_or_compact", "merge", "count", "segment_keys", "purge")),
    (Slab, ("free", "_after_first_free", "_link", "_unlink")),
    (Records, ("write_record", "read_record")),
    (Extents, ("allocate", "free")),
)


# --- histories ---------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Makes calls on contended keys, and notes what came of them."""

    store: KVStore
    moments: "itertools.count[int]"
    marks: "itertools.count[int]"
    notes: dict[str, list[Operation]] = field(default_factory=lambda: defaultdict(list))

    def value(self, key: str, mark: int) -> Value:
        """Return the one value of that mark; some fit into any block, some need a large one."""
        return make_value(key, mark, (0, 100, 100, 600, 3_000, 15_000)[mark % 6])

    def note(
        self,
        key: str,
        kind: str,
        start: int,
        mark: int | None = None,
        done: bool = True,
        ttl: int | None = None,
    ) -> None:
        self.notes[key].append(Operation(kind, start, next(self.moments), mark, done, ttl))

    def mark_of(self, key: str, value: Value) -> int:
        """Return the mark of a value, which must be one that was written under that key."""
        mark: int = value["mark"]
        assert value == self.value(key, mark), f"{key!r} has another's value: {value}"
        return mark

    def create(self, key: str, ttl: int | None) -> None:
        mark, start = next(self.marks), next(self.moments)
        try:
            self.store.create(key, self.value(key, mark), ttl)
        except KeyExistsError:
            self.note(key, "create", start, done=False)
        except StoreFullError:
            self.note(key, "full", start)
        else:
            self.note(key, "create", start, mark, ttl=ttl)

    def put(self, key: str, ttl: int | None) -> None:
        mark, start = next(self.marks), next(self.moments)
        try:
            self.store.put(key, self.value(key, mark), ttl)
        except StoreFullError:
            self.note(key, "put", start, done=False)
        else:
            self.note(key, "put", start, mark, ttl=ttl)

    def pop(self, key: str) -> None:
        start = next(self.moments)
        try:
            value = self.store.pop(key)
        except KeyNotFoundError:
            self.note(key, "pop", start, done=False)
        else:
            self.note(key, "pop", start, self.mark_of(key, value))

    def delete(self, key: str) -> None:
        start = next(self.moments)
        try:
            self.store.delete(key)
        except KeyNotFoundError:
            self.note(key, "delete", start, done=False)
        else:
            self.note(key, "delete", start)

    def read(self, key: str) -> None:
        start = next(self.moments)
        value = self.store.get(key)
        self.note(key, "read", start, None if value is None else self.mark_of(key, value))

    def look(self, key: str) -> None:
        start = next(self.moments)
        self.note(key, "look", start, done=key in self.store)

    def ttl(self, key: str) -> None:
        start = next(self.moments)
        try:
            left = self.store.ttl(key)
        except KeyNotFoundError:
            self.note(key, "ttl", start, done=False)
        else:
            self.note(key, "ttl", start, ttl=left)

    def iterate(self, stable: set[str], with_values: bool) -> None:
        """List the store: what stays is there once, and what comes and goes fits its history."""
        start = next(self.moments)
        found: dict[str, int | None] = {}
        count = 0
        for key in self.store.items() if with_values else self.store:
            name, value = key if isinstance(key, tuple) else (key, None)
            if value is not None and name not in CONTENDED:
                text = value["text"]
                assert value == make_value(name, value["mark"], len(text)), f"{name!r}: {value}"
            assert name not in found, f"{name!r} was listed twice"
            found[name] = (
                self.mark_of(name, value) if value is not None and name in CONTENDED else None
            )
            count += name in stable
        assert count == len(stable), f"listed {count} of {len(stable)} keys that were there"
        for key in CONTENDED:
            if key in found and with_values:
                self.note(key, "read", start, found[key])
            else:
                self.note(key, "look", start, done=key in found)


class Round:
    """Everybody at work at the same time, for a while."""

    def __init__(self, store: KVStore, rng: random.Random, clock: FakeClock, stable: set[str]):
        self._store = store
        self._rng = rng
        self._clock = clock
        self._stable = stable
        self._moments = itertools.count()
        self._marks = itertools.count(1)
        self._recorders: list[Recorder] = []

    def run(
        self, fillers: Callable[[int], None], with_values: bool, ttls: Sequence[int | None]
    ) -> int:
        """Let threads work, classify each key's history, and return how many calls there were."""
        start_ms = self._clock.now_ms
        settings: list[Operation] = []
        dice = [random.Random(self._rng.random()) for _ in range(THREADS)]
        lister = self._recorder()
        run_together(
            *(
                lambda own=own, recorder=self._recorder(): self._call(recorder, own, ttls)  # noqa: B008
                for own in dice
            ),
            lambda: self._look_at_all(lister, with_values),
            lambda: fillers(self._rng.getrandbits(32)),
            self._tidy_up,
            lambda: self._set_clock(settings),
        )
        last = self._recorder()
        for key in CONTENDED:
            last.ttl(key)
            last.read(key)
        for key in CONTENDED:
            histories = [recorder.notes[key] for recorder in self._recorders]
            assert linearizable([*histories, settings], start_ms), (
                f"{key!r}: its history makes no sense: {[*histories, settings]}"
            )
            with suppress(KeyNotFoundError):
                self._store.delete(key)
        return sum(len(notes) for each in self._recorders for notes in each.notes.values())

    def _recorder(self) -> Recorder:
        recorder = Recorder(self._store, self._moments, self._marks)
        self._recorders.append(recorder)
        return recorder

    def _call(self, recorder: Recorder, dice: random.Random, ttls: Sequence[int | None]) -> None:
        for _ in range(CALLS):
            key, chance = dice.choice(CONTENDED), dice.random()
            if chance < 0.25:
                recorder.create(key, dice.choice(ttls))
            elif chance < 0.45:
                recorder.put(key, dice.choice(ttls))
            elif chance < 0.65:
                dice.choice((recorder.delete, recorder.pop))(key)
            else:
                dice.choice((recorder.read, recorder.read, recorder.look, recorder.ttl))(key)

    def _look_at_all(self, recorder: Recorder, with_values: bool) -> None:
        recorder.iterate(self._stable, with_values)
        assert len(self._store) >= len(self._stable)

    def _tidy_up(self) -> None:
        for _ in range(3):
            self._store.purge_expired()
            self._store._parts.reclaimer.reclaim()
            self._store._all_keys.merge_segments()
        self._store.compact()

    def _set_clock(self, settings: list[Operation]) -> None:
        dice = random.Random(self._rng.random())
        for _ in range(8):
            start = next(self._moments)
            self._clock.set(START_SECONDS + dice.choice((0, 1, 2, dice.uniform(0, 6))))
            settings.append(Operation("clock", start, next(self._moments), self._clock.now_ms))


def record_histories(folder: Path, rng: random.Random) -> int:
    """Work with many threads on few keys, classify each key's history; return how many calls."""
    switch_often(rng)
    clock = FakeClock()
    setattr(kvstore.clock, "time_ns", clock)  # noqa: B010 - a plain one is no valid typing
    path = folder / "store.kvs"
    kind = rng.choice(("small", "on the brink", "full"))
    store = KVStore(
        path,
        durable=rng.random() < 0.3,
        max_bytes=MIN_MAX_BYTES if kind == "full" else 10**9,
    )
    names = itertools.count()
    stable = {f"stable {number}" for number in range(BRINK if kind == "on the brink" else 300)}
    for key in stable:
        store.create(key, make_value(key, 0, 0))

    def fill(seed: int) -> None:
        """Make the file grow and segments be rewritten; or fill the file, and make room again."""
        dice, mine = random.Random(seed), []
        for _ in range(150 if kind == "on the brink" else 30):
            key = f"filler {next(names)}"
            size = dice.choice((0, 0, 30, 400, 15_000 if kind == "full" else 4_000))
            try:
                store.create(key, make_value(key, 6, size), dice.choice((None, 1, 3)))
                mine.append(key)
            except StoreFullError:
                for gone in mine[::2]:
                    with suppress(KeyNotFoundError):
                        store.delete(gone)

    if kind == "full":
        with suppress(StoreFullError):
            for number in itertools.count():
                key = f"ballast {number}"
                store.create(key, make_value(key, 5, 15_000))
                stable.add(key)
    calls = 0
    for _ in range(ROUNDS):
        clock.set(START_SECONDS)
        ttls = rng.choice(TTLS)
        calls += Round(store, rng, clock, stable).run(fill, kind != "on the brink", ttls)
    store.close()
    assert_consistent(path)
    with KVStore(path) as store:
        assert stable <= set(store)
    return calls


# --- counts ------------------------------------------------------------------------------------


def count_while_others_work(folder: Path, rng: random.Random) -> int:
    """Move keys about and create others: each count was true at a moment; return how many."""
    switch_often(rng)
    path = folder / "store.kvs"
    movers, makers = rng.choice(((1, 0), (1, 0), (2, 0), (3, 1)))
    stable = rng.choice((0, 1_000, BRINK))
    counts: list[int] = []
    created = [0, 0]  # begun, done
    left = itertools.count(1)
    done = threading.Event()
    with KVStore(path) as store:
        for number in range(stable):
            store.create(f"{number}", {})

        def move(name: int) -> None:
            """Have one key at any time, or none for a moment; never two."""
            for step in range(MOVES):
                if step:
                    store.delete(f"{name}/{step - 1}")
                store.create(f"{name}/{step}", {})
            if next(left) == movers + makers:
                done.set()

        def create() -> None:
            for number in range(MOVES):
                created[0] += 1
                store.create(f"more {number}", {})
                created[1] += 1
            if next(left) == movers + makers:
                done.set()

        def count(how: Callable[[], int]) -> None:
            while not done.is_set():
                least = stable + created[1]
                number = how()
                most = stable + created[0] + movers
                assert least <= number <= most, f"{number} counted, {least} to {most} were there"
                counts.append(number)

        hows: list[Callable[[], int]] = [store.__len__, lambda: store.stats().records]
        run_together(
            *(lambda name=name: move(name) for name in range(movers)),
            *[create] * makers,
            *(lambda how=how: count(how) for how in hows),
        )
        assert len(store) == store.stats().records == stable + created[1] + movers
    assert_consistent(path)
    return len(counts)


# --- keys of one's own -------------------------------------------------------------------------


class Owner:
    """A thread that has keys of its own, and knows what each of them must be."""

    def __init__(self, name: str, rng: random.Random, small: bool) -> None:
        self.name = name
        self.live: dict[str, Value] = {}
        self.calls = 0
        self._rng = random.Random(rng.random())
        self._sizes = (0, 50, 300) if small else (0, 50, 400, 3_000, 15_000)

    def work(self, store: KVStore) -> None:
        """Do anything until the store is closed."""
        with suppress(StoreClosedError):
            while True:
                self._step(store)
                self.calls += 1

    def _step(self, store: KVStore) -> None:
        rng, live = self._rng, self.live
        number = rng.randrange(200)
        key = f"{self.name}{'é' * 16 if number % 5 == 0 else ''}{number}"
        chance = rng.random()
        if chance < 0.3:
            self._create(store, key)
        elif chance < 0.5:
            self._put(store, key)
        elif chance < 0.65:
            self._delete(store, key)
        elif chance < 0.97:
            assert store.get(key) == live.get(key), f"{key!r} was lost, or has another's value"
            assert (key in store) == (key in live)
        elif chance < 0.98:
            assert {k: v for k, v in store.items() if k.startswith(self.name)} == live
        elif chance < 0.985:
            assert store.purge_expired() == 0
        elif chance < 0.99:
            assert len(store) >= len(live)
        else:
            store.sync()

    def _create(self, store: KVStore, key: str) -> None:
        live = self.live
        value = make_value(key, self.calls, self._rng.choice(self._sizes))
        try:
            store.create(key, value, self._rng.choice((None, None, 10**6)))
        except KeyExistsError:
            assert key in live, f"{key!r} exists, but was deleted or never created"
        except StoreFullError:
            assert key not in live, f"{key!r} was taken for absent"
            for gone in self._rng.sample(sorted(live), len(live) // 2):
                store.delete(gone)
                del live[gone]
        else:
            assert key not in live, f"{key!r} was created again while it was there"
            live[key] = value

    def _put(self, store: KVStore, key: str) -> None:
        value = make_value(key, self.calls, self._rng.choice(self._sizes))
        with suppress(StoreFullError):
            store.put(key, value, self._rng.choice((None, None, 10**6)))
            self.live[key] = value

    def _delete(self, store: KVStore, key: str) -> None:
        try:
            if self.calls % 2:
                assert store.pop(key) == self.live[key], f"{key!r} had another's value"
            else:
                store.delete(key)
        except KeyNotFoundError:
            assert key not in self.live, f"{key!r} was lost"
        else:
            assert key in self.live, f"{key!r} was deleted, but had been before"
            del self.live[key]


def work_until_closed(folder: Path, rng: random.Random) -> int:
    """Let threads work on keys of their own until some close the store; return how many calls."""
    switch_often(rng)
    path = folder / "store.kvs"
    is_full, durable, small = (rng.random() < chance for chance in (0.3, 0.3, 0.5))
    owners = [Owner(f"{number}/", rng, small) for number in range(THREADS)]
    for _ in range(rng.choice((2, 5))):
        store = KVStore(path, durable=durable, max_bytes=MIN_MAX_BYTES if is_full else 10**9)
        calls = sum(owner.calls for owner in owners)
        # Some close it before anybody has changed anything, some while all do.
        patience = rng.choice((0, 0, 100, 1_000, 2_500))
        has_room = rng.random() < 0.5

        def close(
            store: KVStore = store, enough: int = calls + patience, purge: bool = has_room
        ) -> None:
            with suppress(StoreClosedError):
                while sum(owner.calls for owner in owners) < enough:
                    if purge:
                        store.purge_expired()
                    else:
                        store.stats()
            store.close()
            assert store.closed

        closers = [close] * rng.choice((1, 1, 3))
        run_together(
            *(lambda owner=owner, store=store: owner.work(store) for owner in owners), *closers
        )
        assert_consistent(path)
        with KVStore(path) as store:
            assert dict(store) == {k: v for owner in owners for k, v in owner.live.items()}
    return sum(owner.calls for owner in owners)


EXPERIMENTS = (
    Experiment(
        "thread-histories",
        "threads on the same keys, the clock set meanwhile",
        "calls",
        record_histories,
        short=2,
    ),
    Experiment(
        "thread-counts",
        "len and stats while keys come and go",
        "counts",
        count_while_others_work,
        short=2,
    ),
    Experiment(
        "thread-closes",
        "threads on keys of their own, the store closed meanwhile",
        "calls",
        work_until_closed,
        short=2,
    ),
)
