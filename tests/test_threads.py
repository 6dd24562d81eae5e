"""Any number of threads may call any member; what they see makes sense together.

Here are the examples; `faults.histories` has many threads do anything at random.
"""

import contextlib
import itertools
from typing import Any

import pytest
from support import MIN_MAX_BYTES, scaled
from support.clock import FakeClock
from support.keys import TRICKY
from support.stores import OpenStore
from support.threads import Operation, linearizable, run_together
from support.values import sized_value

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
