"""Any number of threads may call any member; what they see makes sense together.

Here are the examples; `faults.histories` has many threads do anything at random.
"""

import contextlib
import itertools
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from support import MIN_MAX_BYTES, scaled, seeded_random
from support.clock import START_SECONDS, FakeClock
from support.keys import TRICKY
from support.stores import OpenStore, after_death
from support.threads import Operation, linearizable, run_together
from support.values import Value, sized_value
from support.workload import make_value

from kvstore import KeyExistsError, KeyNotFoundError, KVStore, StoreClosedError, StoreFullError
from kvstore.recovery.check import check_file

pytestmark = pytest.mark.usefixtures("frequent_switches")

THREADS = 8


def test_of_many_threads_that_create_one_key_exactly_one_wins(store: KVStore) -> None:
    keys = [*TRICKY, *(f"key:{number}" for number in range(scaled(300)))]
    winners: list[list[str]] = [[] for _ in range(16)]

    def create_all(number: int) -> None:
        for key in keys:
            try:
                store.create(key, {"winner": number})
            except KeyExistsError:
                assert "winner" in store.read(key)
            else:
                winners[number].append(key)

    run_together(*(lambda number=number: create_all(number) for number in range(16)))
    assert sorted(key for won in winners for key in won) == sorted(keys)
    for number, won in enumerate(winners):
        assert all(store.read(key) == {"winner": number} for key in won)


def test_of_many_threads_that_delete_one_key_exactly_one_succeeds(store: KVStore) -> None:
    keys = [f"key:{number}" for number in range(scaled(300))]
    for key in keys:
        store.create(key, {})
    deleted: list[str] = []

    def delete_all() -> None:
        for key in keys:
            try:
                store.delete(key)
            except KeyNotFoundError:
                assert key not in store
            else:
                deleted.append(key)

    run_together(*[delete_all] * 16)
    assert sorted(deleted) == sorted(keys)
    assert len(store) == 0


def test_of_many_threads_that_create_an_expired_key_exactly_one_wins(
    store: KVStore, clock: FakeClock
) -> None:
    keys = [f"key:{number}" for number in range(scaled(300))]
    for key in keys:
        store.create(key, {"winner": None}, ttl=1)
    clock.advance(1)
    won: list[str] = []

    def create_all(number: int) -> None:
        for key in keys:
            try:
                store.create(key, {"winner": number})
            except KeyExistsError:
                assert store.read(key)["winner"] is not None
            else:
                won.append(key)

    run_together(*(lambda number=number: create_all(number) for number in range(8)))
    assert sorted(won) == sorted(keys)
    assert len(store) == len(keys)


def test_histories_that_make_no_sense_are_told_from_those_that_do() -> None:
    """The classify of the laboratory's histories, judged."""
    create, other = Operation("create", 0, 1, 7), Operation("create", 2, 3, 8)
    assert linearizable([[create], [Operation("read", 2, 3, 7)]])
    assert linearizable([[create], [Operation("read", 0, 3, None)]])
    assert not linearizable([[create], [Operation("read", 2, 3, None)]])
    assert not linearizable([[create], [other]])
    assert linearizable([[create], [other], [Operation("delete", 1, 4)]])
    assert not linearizable([[create], [other], [Operation("delete", 1, 4)] * 3])
    assert linearizable([[Operation("create", 0, 5, 9, done=False)], [create]])
    assert not linearizable([[Operation("create", 0, 1, 9, done=False)]])
    assert not linearizable([[Operation("delete", 0, 1)]])
    assert not linearizable([[create], [Operation("full", 2, 3)]])
    assert not linearizable([[create], [Operation("look", 2, 3, done=False)]])


def test_histories_of_what_replaces_are_judged_too() -> None:
    create, put = Operation("create", 0, 1, 7), Operation("put", 2, 5, 8)
    assert linearizable([[create], [put], [Operation("read", 3, 4, 7), Operation("read", 6, 7, 8)]])
    assert linearizable([[create], [put], [Operation("read", 3, 4, 8)]])
    assert not linearizable([[create], [put], [Operation("read", 3, 4, None)]])
    assert not linearizable([[create], [put], [Operation("read", 6, 7, 7)]])
    assert linearizable([[create], [Operation("put", 2, 5, done=False)], [Operation("look", 3, 4)]])
    assert not linearizable([[create], [Operation("touch", 2, 3, ttl=5, done=False)]])
    touch = Operation("touch", 2, 3, ttl=5)
    assert linearizable([[create, touch, Operation("ttl", 4, 5, ttl=5)]])
    assert not linearizable([[create, touch, Operation("ttl", 4, 5)]])
    assert not linearizable([[touch]])
    pop = Operation("pop", 6, 9, 8)
    assert linearizable([[create], [put], [pop], [Operation("pop", 7, 8, done=False)]])
    assert not linearizable([[create], [put], [pop], [Operation("pop", 7, 8, 8)]])
    assert not linearizable([[create], [put], [Operation("pop", 6, 9, 7)]])
    assert not linearizable([[create], [Operation("pop", 2, 3, done=False)]])


def test_histories_in_which_the_clock_is_set_are_judged_by_it() -> None:
    create = Operation("create", 0, 1, 7, ttl=2)
    on, back = Operation("clock", 2, 3, 2_000), Operation("clock", 4, 5, 0)
    there, gone = Operation("read", 6, 7, 7), Operation("read", 6, 7, None)
    assert not linearizable([[create, gone]])
    assert not linearizable([[create, there], [on]])
    assert linearizable([[create, gone], [on]])
    # What had expired may have been taken back, or not; once it was, it stays away.
    assert linearizable([[create, there], [on, back]])
    assert linearizable([[create, gone], [on, back]])
    assert not linearizable([[create, gone, Operation("read", 8, 9, 7)], [on, back]])
    assert linearizable([[create, Operation("ttl", 6, 7, ttl=2)], [on, back]])
    assert not linearizable([[create, Operation("ttl", 6, 7, ttl=1)], [on, back]])
    assert linearizable([[create, Operation("create", 4, 5, 8), Operation("read", 6, 7, 8)], [on]])


# --- replacing ------------------------------------------------------------------------------------

SIZES = (0, 0, 30, 200, 1_000, 6_000)


def value_of(key: str, mark: int) -> Value:
    """Return the one value of that mark; they are of many sizes."""
    return make_value(key, mark, SIZES[mark % len(SIZES)] + mark % 7)


def mark_of(key: str, value: Value) -> int:
    """Return the mark of a value, which must be one that was written under that key."""
    mark: int = value["mark"]
    assert value == value_of(key, mark), f"{key!r} has another's value, or a mixture: {value}"
    return mark


def read_each(store: KVStore, keys: list[str]) -> None:
    """Assert that each of the keys is there, for every member that reads one."""
    for key in keys:
        mark_of(key, store.read(key))
        assert key in store
        assert store.ttl(key) != 0
        mark_of(key, store.setdefault(key, {"not": "absent"}))


def read_all(store: KVStore, keys: list[str]) -> None:
    """Assert that all of the keys are there, for every member that reads all."""
    found = dict(store.items())
    assert found.keys() == set(keys)
    for key, value in found.items():
        mark_of(key, value)
    assert len(list(store)) == len(store) == len(keys)
    assert store


@pytest.mark.parametrize("durable", [False, True])
def test_no_reader_finds_a_key_absent_or_a_mixture_while_it_is_replaced(
    open_store: OpenStore, durable: bool
) -> None:
    """With delete and create in place of `put`, 70 % of the reads found nothing."""
    store = open_store(durable=durable)
    keys = ["k", *("é" * 16 + tail for tail in ("", "1", "2")), "🐍" * 32]
    for key in keys:
        store.create(key, value_of(key, 0), ttl=10**6)
    done = threading.Event()
    left = itertools.count(1)

    def put(number: int) -> None:
        try:
            for mark in range(number, scaled(40 if durable else 800), 2):
                for key in keys:
                    store.put(key, value_of(key, mark), ttl=10**6 if mark % 3 else None)
                    store.touch(key, 10**6)
                if mark % 50 == 0:
                    store.sync()
        finally:
            if next(left) == 2:
                done.set()

    def read(look: Callable[[KVStore, list[str]], object]) -> None:
        while not done.is_set():
            look(store, keys)

    run_together(
        partial(put, 0), partial(put, 1), partial(read, read_each), partial(read, read_all)
    )
    last = {key: store[key] for key in keys}
    assert all(
        mark_of(key, value) >= scaled(40 if durable else 800) - 2 for key, value in last.items()
    )
    assert after_death(store) == last


@pytest.mark.parametrize("by_item", [False, True])
def test_what_is_popped_by_several_threads_each_value_goes_to_one_of_them(
    store: KVStore, by_item: bool
) -> None:
    """Others put meanwhile: a value is popped, or it was replaced; never both."""
    popped: list[tuple[str, int]] = []
    names = [f"{number}" for number in range(20)]
    done = threading.Event()

    def put(name: int) -> None:
        for number in range(scaled(500)):
            key = names[number % len(names)]
            store.put(key, value_of(key, number * 2 + name))
        store.put(f"last of {name}", value_of(f"last of {name}", 0))

    def pop() -> None:
        while not done.is_set():
            for key in names:
                if (value := store.pop(key, None)) is not None:
                    popped.append((key, mark_of(key, value)))

    def popitem() -> None:
        while not done.is_set():
            with contextlib.suppress(KeyNotFoundError):
                key, value = store.popitem()
                popped.append((key, mark_of(key, value)))

    def put_both() -> None:
        try:
            run_together(partial(put, 0), partial(put, 1))
        finally:
            done.set()

    run_together(put_both, *[popitem if by_item else pop] * 3)
    popped += [(key, mark_of(key, value)) for key, value in store.items()]
    assert len(popped) == len(set(popped))
    assert {("last of 0", 0), ("last of 1", 0)} <= set(popped)


def test_of_many_threads_that_set_a_default_all_get_the_same_value(store: KVStore) -> None:
    keys = [*TRICKY, *(f"key:{number}" for number in range(scaled(200)))]
    got: dict[str, list[Value]] = defaultdict(list)

    def set_all(number: int) -> None:
        for key in keys:
            got[key].append(store.setdefault(key, {"by": number}))

    run_together(*(partial(set_all, number) for number in range(THREADS)))
    for key in keys:
        assert got[key] == [store.read(key)] * THREADS
    assert len(store) == len(keys)


def test_a_default_that_is_popped_at_once_is_stored_once_only(open_store: OpenStore) -> None:
    """It was stored again where another thread popped it before it could be read back."""
    store = open_store(durable=True)  # there is time then
    popped: list[int] = []
    done = threading.Event()

    def set_default() -> None:
        try:
            for number in range(scaled(200)):
                assert store.setdefault("job", {"n": number})["n"] <= number
        finally:
            done.set()

    def pop() -> None:
        while not done.is_set():
            if (job := store.pop("job", None)) is not None:
                popped.append(job["n"])

    run_together(set_default, pop, pop)
    assert len(popped) == len(set(popped))


def test_updates_by_many_threads_replace_each_key_by_one_value_of_theirs(store: KVStore) -> None:
    names = [f"{number}" for number in range(50)]

    def update(number: int) -> None:
        for step in range(scaled(20)):
            store.update({key: value_of(key, THREADS * step + number) for key in names})

    run_together(*(partial(update, number) for number in range(THREADS)))
    assert {key: mark_of(key, value) // THREADS for key, value in store.items()} == dict.fromkeys(
        names, scaled(20) - 1
    )


class Recorder:
    """A thread's calls on contended keys, with what came of them."""

    def __init__(self, store: KVStore, moments: "itertools.count[int]") -> None:
        self._store = store
        self._moments = moments
        self.notes: dict[str, list[Operation]] = defaultdict(list)

    def call(self, kind: str, key: str, mark: int, ttl: int | None) -> None:
        """Do what `kind` says, and note it."""
        start = next(self._moments)
        told: int | None = None
        done = True
        lifetime: int | None = None
        try:
            match kind:
                case "create" | "put":
                    told, lifetime = mark, ttl
                    getattr(self._store, kind)(key, value_of(key, mark), ttl)
                case "setdefault":
                    told = mark_of(key, self._store.setdefault(key, value_of(key, mark), ttl))
                    kind = "create" if told == mark else "read"
                    lifetime = ttl if told == mark else None
                case "put_many":
                    kind, told, lifetime = "put", mark, ttl
                    self._store.put_many({key: value_of(key, mark)}, ttl)
                case "get_many":
                    kind = "read"
                    value = self._store.get_many([key]).get(key)
                    told = None if value is None else mark_of(key, value)
                case "delete_many":
                    kind = "delete"
                    done = self._store.delete_many([key]) == 1
                case "touch":
                    lifetime = ttl
                    self._store.touch(key, ttl)
                case "pop":
                    told = mark_of(key, self._store.pop(key))
                case "delete":
                    self._store.delete(key)
                case "ttl":
                    lifetime = self._store.ttl(key)
                case "read":
                    value = self._store.get(key)
                    told = None if value is None else mark_of(key, value)
        except (KeyNotFoundError, KeyExistsError):
            done, told, lifetime = False, None, None
        end = next(self._moments)
        self.notes[key].append(Operation(kind, start, end, told, done, lifetime))


KINDS = (
    *("create", "put", "put", "put_many", "setdefault", "touch"),
    *("pop", "delete", "delete_many", "ttl", "read", "read", "get_many"),
)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("ttls", [(None,), (None, 1, 2, 4)], ids=["for ever", "with ttl"])
def test_whatever_threads_do_to_a_key_makes_sense_in_some_order(
    open_store: OpenStore, clock: FakeClock, durable: bool, ttls: tuple[int | None, ...]
) -> None:
    """Each call seems to happen at one moment between its beginning and its end."""
    rng = seeded_random()
    store = open_store(durable=durable)
    keys = ("a", "é" * 16 + "1", "é" * 16 + "2")
    for _ in range(scaled(4 if durable else 20)):
        clock.set(START_SECONDS)
        start_ms = clock.now_ms
        moments, marks = itertools.count(), itertools.count(1)
        recorders = [Recorder(store, moments) for _ in range(4)]
        settings: list[Operation] = []

        def work(
            recorder: Recorder, dice: random.Random, marks: "itertools.count[int]" = marks
        ) -> None:
            for _ in range(25):
                kind, key = dice.choice(KINDS), dice.choice(keys)
                recorder.call(kind, key, next(marks), dice.choice(ttls))

        def set_clock(
            moments: "itertools.count[int]" = moments, settings: list[Operation] = settings
        ) -> None:
            for seconds in (1, 0, 2, 1, 5, 3):
                start = next(moments)
                clock.set(START_SECONDS + seconds)
                settings.append(Operation("clock", start, next(moments), clock.now_ms))

        run_together(
            *(partial(work, each, random.Random(rng.random())) for each in recorders),
            set_clock,
            store.purge_expired,
            store.sync,
        )
        for key in keys:
            recorders[0].call("ttl", key, 0, None)
            recorders[0].call("read", key, 0, None)
            histories = [recorder.notes[key] for recorder in recorders]
            assert linearizable([*histories, settings], start_ms), (
                f"{key!r}: {histories}, {settings}"
            )
        assert after_death(store) == dict(store)
        clock.set(START_SECONDS)  # so that none has expired
        for key in keys:
            store.pop(key, None)


def test_what_was_put_while_another_thread_syncs_all_the_time_survives_the_process(
    open_store: OpenStore,
) -> None:
    """What is promised by a flush under way must not be taken for a value nobody was promised."""
    store = open_store()
    names = [f"{number}" for number in range(12)]
    expected: dict[str, Value] = {}
    for round_number in range(scaled(8)):
        done = threading.Event()
        left = itertools.count(1)

        def work(
            number: int,
            first: int = 1_000 * round_number,
            done: threading.Event = done,
            left: "itertools.count[int]" = left,
        ) -> None:
            try:
                for step in range(150):
                    key = names[4 * number + step % 4]
                    value = value_of(key, first + step)
                    store.put(key, value)
                    expected[key] = value
                    if step % 11 == 0:
                        store.delete(key)
                        del expected[key]
                    elif step % 13 == 0:
                        store.touch(key, None)
            finally:
                if next(left) == 3:
                    done.set()

        def sync(done: threading.Event = done) -> None:
            while not done.is_set():
                store.sync()

        run_together(*(partial(work, number) for number in range(3)), sync)
        assert dict(store) == expected
        assert after_death(store) == expected


@pytest.mark.parametrize("durable", [False, True])
def test_close_at_the_moment_of_the_first_change_is_like_close_at_any_other(
    open_store: OpenStore, clock: FakeClock, durable: bool
) -> None:
    """A store that has only been read so far; each thread's first change races with `close`."""
    expected: dict[str, Any] = {}
    with open_store() as store:
        for number in range(scaled(60)):
            store.create(f"short{number}", {}, ttl=number + 1)
            store.create(f"delete{number}", {"n": number})
            expected[f"delete{number}"] = {"n": number}
    for number in range(scaled(60)):
        clock.advance(1)
        store = open_store(durable=durable)

        def create(store: KVStore = store, number: int = number) -> None:
            store.create(f"create{number}", {"n": number})
            expected[f"create{number}"] = {"n": number}

        def delete(store: KVStore = store, number: int = number) -> None:
            store.delete(f"delete{number}")
            del expected[f"delete{number}"]

        def attempt(task: Any) -> None:
            with contextlib.suppress(StoreClosedError):
                task()

        run_together(
            *(
                lambda task=task: attempt(task)
                for task in (create, delete, store.purge_expired, store.sync, store.close)
            )
        )
        assert store.closed
        assert check_file(store.path) == []
    with open_store() as store:
        assert {key: store[key] for key in store if not key.startswith("short")} == expected


def test_threads_that_write_durably_share_their_flushes_and_lose_nothing(
    open_store: OpenStore,
) -> None:
    store = open_store(durable=True)

    def work(number: int) -> None:
        for step in range(10):
            store.create(f"{number}:{step}", {"n": step})
            if step % 2:
                store.delete(f"{number}:{step}")

    run_together(*(lambda number=number: work(number) for number in range(THREADS)))
    store.close()
    again = open_store()
    assert dict(again) == {
        f"{number}:{step}": {"n": step} for number in range(THREADS) for step in range(0, 10, 2)
    }


def test_expiry_under_threads_counts_every_key_once(
    open_store: OpenStore, clock: FakeClock
) -> None:
    """Purges by many threads at once take back each record exactly once between them."""
    store = open_store()
    for number in range(3000):
        store.create(f"k{number}", {"n": number}, ttl=10 if number % 3 else None)
    clock.advance(10)
    counts: list[int] = []
    run_together(*[lambda: counts.append(store.purge_expired())] * THREADS)
    assert sum(counts) == 2000
    assert len(store) == 1000


def test_threads_that_meet_at_a_store_full_of_expired_records_all_find_room(
    open_store: OpenStore, clock: FakeClock
) -> None:
    """One of them takes the space back; the others, who find nothing left to take, have room."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    value = sized_value(16_384)
    for round_number in range(scaled(20)):
        with pytest.raises(StoreFullError):
            for number in itertools.count():
                store.create(f"{round_number}:{number}", value, ttl=60)
        clock.advance(60)

        def create(number: int, name: int = round_number) -> None:
            store.create(f"{name}:new:{number}", value, ttl=1)

        run_together(*(lambda number=number: create(number) for number in range(THREADS)))
        assert len(store) == THREADS
        clock.advance(1)
