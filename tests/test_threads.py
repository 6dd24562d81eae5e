"""Any number of threads may call any member; what they see makes sense together."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import MIN_MAX_BYTES, scaled, seeded_random
from support.clock import FakeClock
from support.keys import TRICKY
from support.stores import OpenStore
from support.threads import Operation, linearizable, run_together
from support.values import sized_value

from kvstore import KeyExistsError, KeyNotFoundError, KVStore, StoreClosedError, StoreFullError
from kvstore.check import check_file

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


def test_the_history_of_each_key_makes_sense(store: KVStore) -> None:
    """Creates, deletes and reads of few keys by many threads: linearizable key by key."""
    random = seeded_random()
    keys = ["a", "b", "é" * 16 + "1", "é" * 16 + "2"]
    moments, marks = itertools.count(), itertools.count(1)
    for _ in range(scaled(20)):
        histories: dict[str, list[list[Operation]]] = {key: [] for key in keys}
        tasks = []
        for _thread in range(THREADS):
            mine: dict[str, list[Operation]] = {key: [] for key in keys}
            for key in keys:
                histories[key].append(mine[key])
            plan = [(random.choice(keys), random.choice("ccddr")) for _ in range(40)]

            def work(plan: Any = plan, mine: Any = mine) -> None:
                for key, kind in plan:
                    mine[key].append(_operate(store, key, kind, moments, marks))

            tasks.append(work)
        run_together(*tasks)
        for key, threads in histories.items():
            final = store.get(key)
            last = next(moments)
            mark = None if final is None else final["mark"]
            threads.append([Operation("read", last, last, mark)])
            assert linearizable(threads), threads
            if final is not None:
                store.delete(key)


def _operate(
    store: KVStore, key: str, kind: str, moments: Iterator[int], marks: Iterator[int]
) -> Operation:
    start = next(moments)
    if kind == "c":
        mark = next(marks)
        try:
            store.create(key, {"mark": mark, "p": "x" * (mark % 7 * 100)})
        except KeyExistsError:
            return Operation("create", start, next(moments), mark, done=False)
        return Operation("create", start, next(moments), mark)
    if kind == "d":
        try:
            store.delete(key)
        except KeyNotFoundError:
            return Operation("delete", start, next(moments), done=False)
        return Operation("delete", start, next(moments))
    value = store.get(key)
    if value is not None:
        assert value["p"] == "x" * (value["mark"] % 7 * 100)
    return Operation("read", start, next(moments), None if value is None else value["mark"])


def test_histories_that_make_no_sense_are_told_from_those_that_do() -> None:
    """The judge of the test above, judged."""
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


def test_threads_with_keys_of_their_own_each_see_what_they_did(open_store: OpenStore) -> None:
    """Mixed work on shared segments and extents; at the end the store is all models together."""
    store = open_store()
    random = seeded_random()
    models: list[dict[str, Any]] = [{} for _ in range(THREADS + 2)]
    seeds = [random.random() for _ in models]

    def work(number: int) -> None:
        mine, dice = models[number], type(random)(seeds[number])
        for step in range(scaled(1500)):
            key = f"{number}:{dice.randrange(150)}"
            chance = dice.random()
            if chance < 0.4:
                value = sized_value(int(2 ** dice.uniform(3.6, 12)), step)
                if key in mine:
                    with pytest.raises(KeyExistsError):
                        store.create(key, value)
                else:
                    store.create(key, value, ttl=None if step % 3 else 10**6)
                    mine[key] = value
            elif chance < 0.7:
                if key in mine:
                    store.delete(key)
                    del mine[key]
                else:
                    with pytest.raises(KeyNotFoundError):
                        store.delete(key)
            elif chance < 0.98:
                assert store.get(key) == mine.get(key)
                assert (key in store) == (key in mine)
            elif chance < 0.99:
                seen = {k: v for k, v in store.items() if k.startswith(f"{number}:")}
                assert seen == mine
            else:
                assert len(store) >= len(mine)
                assert store.purge_expired() == 0

    run_together(*(lambda number=number: work(number) for number in range(len(models))))
    union = {key: value for mine in models for key, value in mine.items()}
    assert dict(store) == union
    assert len(store) == len(union)
    store.close()
    assert dict(open_store()) == union


def test_threads_that_fill_a_store_lose_nothing(open_store: OpenStore) -> None:
    """Full and not full again, many times over, by all of them at once."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    random = seeded_random()
    models: list[dict[str, Any]] = [{} for _ in range(THREADS)]
    seeds = [random.random() for _ in models]
    refusals: list[int] = []

    def work(number: int) -> None:
        mine, dice = models[number], type(random)(seeds[number])
        for step in range(scaled(600)):
            key, value = f"{number}:{step}", sized_value(dice.choice([500, 4000, 16_384]), step)
            try:
                store.create(key, value)
            except StoreFullError:
                refusals.append(number)
                assert key not in store
                for gone in dice.sample(sorted(mine), len(mine) // 2):
                    assert store.read(gone) == mine.pop(gone)
                    store.delete(gone)
            else:
                mine[key] = value

    run_together(*(lambda number=number: work(number) for number in range(THREADS)))
    assert refusals
    assert dict(store) == {key: value for mine in models for key, value in mine.items()}
    assert store.path.stat().st_size <= MIN_MAX_BYTES


def test_iteration_while_others_write_misses_and_repeats_nothing_that_stays(
    store: KVStore,
) -> None:
    stable = {f"stable:{number}": {"n": number} for number in range(1500)}
    for key, value in stable.items():
        store.create(key, value)
    writing = threading.Event()
    writing.set()
    left = itertools.count(1)

    def write(number: int) -> None:
        for step in range(6000):
            store.create(f"{number}:{step}", {"n": step})
            if step % 3 == 0:
                store.delete(f"{number}:{step}")
        if next(left) == 4:
            writing.clear()

    def iterate_keys() -> None:
        again = True
        while again:
            again = writing.is_set()
            seen = [key for key in store if key in stable]
            assert len(seen) == len(set(seen)) == len(stable)

    def iterate_items() -> None:
        again = True
        while again:
            again = writing.is_set()
            seen = [(key, value) for key, value in store.items() if key in stable]
            assert len(seen) == len(stable)
            assert dict(seen) == stable

    run_together(
        *(lambda number=number: write(number) for number in range(4)), iterate_keys, iterate_items
    )
    assert len(store) == len(stable) + 4 * 4000


def test_len_counts_what_stays_whatever_comes_and_goes_meanwhile(store: KVStore) -> None:
    """A key that is replaced by another during the count may be counted with it, or neither."""
    for number in range(500):
        store.create(f"stable:{number}", {})
    working = threading.Event()
    working.set()

    def churn(number: int) -> None:
        for step in range(scaled(1000)):
            store.create(f"{number}:{step}", {})
            store.delete(f"{number}:{step}")
        working.clear()

    def count() -> None:
        while working.is_set():
            assert 500 <= len(store) <= 500 + 4 * 16

    run_together(*(lambda number=number: churn(number) for number in range(4)), count)
    assert len(store) == 500


@pytest.mark.parametrize("closers", [1, 4])
def test_close_while_others_work_gives_them_store_closed_error_and_nothing_else(
    open_store: OpenStore, closers: int
) -> None:
    """What was acknowledged stands, and what got StoreClosedError did not happen."""
    for round_number in range(scaled(12)):
        store = open_store()
        models: list[dict[str, Any]] = [{} for _ in range(THREADS)]
        before = dict(store)
        busy = threading.Barrier(THREADS + closers)

        def work(
            number: int,
            store: KVStore = store,
            mine: Any = models,
            busy: threading.Barrier = busy,
            name: int = round_number,
        ) -> None:
            with pytest.raises(StoreClosedError):
                for step in itertools.count():
                    if step == 20:
                        busy.wait()
                    key = f"{name}:{number}:{step}"
                    store.create(key, {"n": step})
                    mine[number][key] = {"n": step}
                    assert store.read(key) == {"n": step}
                    if step % 2:
                        store.delete(key)
                        del mine[number][key]
                    if step % 50 == 0:
                        assert len(dict(store.items())) >= len(mine[number])
                        store.purge_expired()
                        store.sync()

        def close(store: KVStore = store, busy: threading.Barrier = busy) -> None:
            busy.wait()
            store.close()
            assert store.closed

        run_together(
            *(lambda number=number: work(number) for number in range(THREADS)), *[close] * closers
        )
        with open_store() as again:
            expected = before
            for mine in models:
                expected |= mine
            assert dict(again) == expected


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


def test_close_while_others_make_the_file_grow_durably(open_store: OpenStore) -> None:
    """Flushes, and what is written after them, race with `close`."""
    for round_number in range(scaled(10)):
        store = open_store(durable=True)
        before = set(store)
        created: list[str] = []
        busy = threading.Barrier(5)

        def work(
            number: int,
            store: KVStore = store,
            name: int = round_number,
            created: list[str] = created,
            busy: threading.Barrier = busy,
        ) -> None:
            with pytest.raises(StoreClosedError):
                for step in itertools.count():
                    if step == 10:
                        busy.wait()
                    store.create(f"{name}:{number}:{step}", sized_value(16_384, step))
                    created.append(f"{name}:{number}:{step}")

        def close(store: KVStore = store, busy: threading.Barrier = busy) -> None:
            busy.wait()
            store.close()

        run_together(*(lambda number=number: work(number) for number in range(4)), close)
        assert check_file(store.path) == []
        with open_store() as again:
            assert set(again) == before | set(created)


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
