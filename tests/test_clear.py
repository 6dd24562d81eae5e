"""`clear` empties a store at one stroke and gives its room back."""

import mmap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MIN_MAX_BYTES, scaled
from support.clock import FakeClock
from support.files import change_byte, open_size
from support.stores import OpenStore, after_death
from support.threads import PATIENCE_SECONDS, run_together
from support.values import sized_value
from support.workload import make_value

import kvstore.file.platform
from kvstore import CorruptStoreError, KeyNotFoundError, KVStore, StoreClosedError, StoreFullError
from kvstore.file.state import DiskState


def fill(store: KVStore, value_size: int) -> int:
    """Create until the store is full; return how many keys there was room for."""
    number = 0
    with pytest.raises(StoreFullError):
        while True:
            store.create(f"fill {number}", sized_value(value_size, number))
            number += 1
    return number


def test_clear_removes_every_key(store: KVStore, clock: FakeClock) -> None:
    for number in range(2000):
        store.create(f"k{number}", {"n": number}, ttl=10 if number % 3 == 0 else None)
    for number in range(100):
        store.put(f"k{number}", {"again": number})
    clock.advance(10)
    assert store.clear() is None  # type: ignore[func-returns-value]
    assert len(store) == 0
    assert not store
    assert list(store) == []
    assert list(store.items()) == []
    assert store.get("k1") is None
    with pytest.raises(KeyNotFoundError):
        store.read("k1")
    assert store.purge_expired() == 0
    assert store.stats().records == 0
    clock.advance(-10)
    assert dict(store) == {}


def test_a_cleared_store_may_be_used_at_once(store: KVStore, open_store: OpenStore) -> None:
    for round_number in range(5):
        for number in range(500):
            store.create(f"k{number}", sized_value(300, number + round_number))
        assert len(store) == 500
        store.clear()
    store.create("k1", {"n": 1})
    assert dict(store) == after_death(store) == {"k1": {"n": 1}}
    store.close()
    assert dict(open_store()) == {"k1": {"n": 1}}


@pytest.mark.parametrize("durable", [False, True])
def test_a_cleared_store_is_empty_when_it_is_opened_again(
    open_store: OpenStore, durable: bool
) -> None:
    with open_store() as store:
        for number in range(500):
            store.create(f"k{number}", {"n": number})
    store = open_store(durable=durable)
    store.put("k1", {"n": -1})
    store.clear()
    assert after_death(store) == {}
    store.sync()
    assert after_death(store) == {}
    store.close()
    assert dict(open_store()) == {}


def test_clear_gives_back_all_space_but_the_smallest_files(
    store: KVStore, open_store: OpenStore
) -> None:
    smallest, fresh = open_size(store), store.stats()
    for number in range(3000):
        store.create(f"k{number}", sized_value(5_000, number))
    assert open_size(store) > 5 * smallest
    store.clear()
    assert open_size(store) == store.stats().file_size == smallest
    assert store.stats() == fresh
    store.close()
    assert open_size(store) == smallest
    assert open_store().stats() == fresh


@pytest.mark.parametrize("sizes", [(12, 16_384), (16_384, 12), (1_000, 1_000)])
def test_a_full_store_that_is_cleared_takes_as_much_as_a_new_one(
    tmp_path: Path, open_store: OpenStore, sizes: tuple[int, int]
) -> None:
    with open_store(tmp_path / "fresh.kvs", max_bytes=MIN_MAX_BYTES) as fresh:
        room = fill(fresh, sizes[1])
    store = open_store(max_bytes=MIN_MAX_BYTES)
    fill(store, sizes[0])
    store.clear()
    assert fill(store, sizes[1]) == room
    assert open_size(store) <= MIN_MAX_BYTES


def test_clear_of_an_empty_store_does_nothing(store: KVStore, open_store: OpenStore) -> None:
    store.clear()
    store.clear()
    assert len(store) == 0
    store.close()
    again = open_store()
    again.clear()
    assert dict(again) == {}


def test_what_was_cleared_does_not_come_back(
    store: KVStore, open_store: OpenStore, clock: FakeClock
) -> None:
    """Neither by the death of the process, nor with a clock that is set back, nor of one key."""
    for number in range(100):
        store.put(f"k{number}", {"n": number})
    store.sync()
    for number in range(100):
        store.put(f"k{number}", {"n": -number})
    store.clear()
    clock.advance(-3600)
    store.put("k1", {"n": "new"})
    store.put("k2", {"n": "new"})
    store.delete("k2")
    store.put("k3", {"n": "new"}, ttl=5)
    clock.advance(5)
    assert after_death(store) == {"k1": {"n": "new"}}
    store.close()
    assert dict(open_store()) == {"k1": {"n": "new"}}


def test_clear_removes_damaged_values_too(store: KVStore, open_store: OpenStore) -> None:
    for number in range(10):
        store.create(f"k{number}", {"n": number})
    store.create("unlucky", {"text": "damaged"})
    store.close()
    change_byte(store.path, store.path.read_bytes().index(b"damaged"))
    store = open_store()
    with pytest.raises(CorruptStoreError):
        store.read("unlucky")
    store.clear()
    assert "unlucky" not in store
    store.create("unlucky", {"text": "new"})
    assert dict(store) == after_death(store) == {"unlucky": {"text": "new"}}


ITERATIONS: dict[str, Callable[[KVStore], Iterator[Any]]] = {
    "keys": iter,
    "items": lambda store: iter(store.items()),
    "values": lambda store: iter(store.values()),
}


@pytest.mark.parametrize("how", ITERATIONS)
def test_an_iterator_bears_that_the_store_is_cleared(store: KVStore, how: str) -> None:
    for number in range(5000):
        store.create(f"k{number}", {"n": number})
    iterator = ITERATIONS[how](store)
    first = [next(iterator) for _ in range(10)]
    store.clear()
    for number in range(10):
        store.create(f"new{number}", {"n": -1})
    rest = list(iterator)
    assert len(first) == 10
    assert len(rest) <= 5010
    assert list(store.values()) == [{"n": -1}] * 10


def test_threads_work_on_while_another_one_clears(store: KVStore) -> None:
    """What was acknowledged after the last `clear` had ended is there, and nothing is mixed up."""

    def work(name: int) -> None:
        for number in range(scaled(400)):
            key = f"{name}/{number % 50}"
            store.put(key, make_value(key, number, 40 * (number % 9)))
            for value in (store.get(key), store.pop(f"{name}/{(number + 7) % 50}", None)):
                if value is not None:
                    told = value["key"], value["mark"], len(value["text"])
                    assert value == make_value(*told)
        store.put(f"last of {name}", {"n": name})

    def clear() -> None:
        for _ in range(scaled(20)):
            store.clear()

    run_together(*(lambda name=name: work(name) for name in range(4)), clear)
    assert after_death(store) == dict(store)
    store.clear()
    run_together(*(lambda name=name: work(name) for name in range(4)))
    assert {f"last of {name}" for name in range(4)} <= set(store)


def test_a_flush_under_way_as_the_store_is_cleared_does_not_vouch_for_its_former_length(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after that, the file was "shorter than its contents", and not opened again."""
    for number in range(500):
        store.create(f"k{number}", sized_value(10_000, number))
    flush_file, set_shorter = kvstore.file.platform.system.flush_file, DiskState.set_shorter
    clearing, is_shorter = threading.Thread(target=store.clear), threading.Event()

    def clear_meanwhile(fd: int, mapped: mmap.mmap) -> None:
        monkeypatch.setattr(kvstore.file.platform.system, "flush_file", flush_file)
        flush_file(fd, mapped)
        clearing.start()
        assert is_shorter.wait(PATIENCE_SECONDS)

    def say_so(state: DiskState, count: int, void_stamp: int) -> None:
        set_shorter(state, count, void_stamp)
        is_shorter.set()

    monkeypatch.setattr(kvstore.file.platform.system, "flush_file", clear_meanwhile)
    monkeypatch.setattr(DiskState, "set_shorter", say_so)
    store.sync()
    clearing.join(PATIENCE_SECONDS)
    assert after_death(store) == {}


def test_a_store_that_is_closed_cannot_be_cleared(store: KVStore, open_store: OpenStore) -> None:
    store.create("k", {"n": 1})
    store.close()
    with pytest.raises(StoreClosedError):
        store.clear()
    assert dict(open_store()) == {"k": {"n": 1}}
