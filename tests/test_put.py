"""`put` stores a value whatever was there before: value and time-to-live are replaced together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import MIN_MAX_BYTES, edge_values, scaled, seeded_random
from support.clock import FakeClock
from support.files import change_byte, open_size
from support.keys import IMPOSSIBLE, TRICKY
from support.stores import OpenStore, after_death
from support.values import Value, identical, sized_value

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    KVStoreError,
    StoreFullError,
    ValueTooLargeError,
)
from kvstore.format.layout import (
    RECORD_CHECKSUM_OFFSET,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    RECORD_KEY_SIZE_OFFSET,
    RECORD_STAMP_OFFSET,
)

# Of different size classes, back and forth.
SIZES = (12, 16_384, 2, 700, 100, 5_000, 16_383, 60, 61, 2)


# --- what it does ---------------------------------------------------------------------------------


def test_put_replaces_the_value(store: KVStore) -> None:
    store.create("k", {"n": 1})
    assert store.put("k", {"n": 2}) is None  # type: ignore[func-returns-value]
    assert store["k"] == store.read("k") == store.get("k") == {"n": 2}
    assert store.read_bytes("k") == b'{"n":2}'
    assert dict(store) == {"k": {"n": 2}}
    assert len(store) == 1
    with pytest.raises(KeyExistsError):
        store.create("k", {"n": 3})
    store.delete("k")
    assert "k" not in store
    assert len(store) == 0


def test_put_of_an_absent_key_stores_it(store: KVStore) -> None:
    store.put("k", {"n": 1})
    assert dict(store) == {"k": {"n": 1}}
    store.delete("k")
    store.put("k", {"n": 2})
    assert dict(store) == {"k": {"n": 2}}


def test_an_assignment_puts(store: KVStore) -> None:
    store["k"] = {"n": 1}
    assert store["k"] == {"n": 1}
    store["k"] = {"n": 2}
    store["l"] = {"n": 3}
    assert dict(store) == {"k": {"n": 2}, "l": {"n": 3}}


def test_put_replaces_the_time_to_live_as_well(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=10)
    clock.advance(4)
    store.put("k", {"n": 2}, ttl=20)
    assert store.ttl("k") == 20
    store.put("k", {"n": 3}, 5)
    assert store.ttl("k") == 5
    clock.advance(5)
    assert "k" not in store


@pytest.mark.parametrize("put", [KVStore.put, KVStore.__setitem__], ids=["put", "assignment"])
def test_without_ttl_the_key_no_longer_expires(
    store: KVStore, clock: FakeClock, put: Callable[[KVStore, str, Value], None]
) -> None:
    store.create("k", {"n": 1}, ttl=10)
    put(store, "k", {"n": 2})
    assert store.ttl("k") is None
    clock.advance(10**9)
    assert store.read("k") == {"n": 2}
    assert store.purge_expired() == 0


def test_a_key_that_never_expired_does_once_it_was_put_with_a_ttl(
    store: KVStore, clock: FakeClock
) -> None:
    store.create("k", {"n": 1})
    store.put("k", {"n": 2}, ttl=10)
    clock.advance(9.999)
    assert store.read("k") == {"n": 2}
    clock.advance(0.001)
    assert "k" not in store
    assert len(store) == 0
    assert store.purge_expired() == 1
    assert store.purge_expired() == 0


def test_put_takes_an_expired_key_again(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=5)
    clock.advance(5)
    store.put("k", {"n": 2})
    assert store.ttl("k") is None
    assert dict(store) == {"k": {"n": 2}}
    assert len(store) == 1
    assert store.purge_expired() == 0


def test_a_value_of_any_size_replaces_one_of_any_other(
    store: KVStore, open_store: OpenStore
) -> None:
    for mark, value_size in enumerate(SIZES):
        for key in ("k", "🐍" * 32):
            store.put(key, sized_value(value_size, mark))
            assert identical(store.read(key), sized_value(value_size, mark))
        assert len(store) == 2
    last = sized_value(SIZES[-1], len(SIZES) - 1)
    store.close()
    assert dict(open_store()) == {"k": last, "🐍" * 32: last}


def test_keys_that_share_their_first_32_bytes_are_replaced_one_by_one(
    store: KVStore, open_store: OpenStore
) -> None:
    """They share a slot's bytes: only their records tell them apart, and the record is replaced."""
    keys = ["🐍" * 8 + tail for tail in ("", "1", "2", "é", "é\0", "🐍" * 23 + "🐢", "🐍" * 24)]
    expected: dict[str, Value] = {}
    for round_number in range(3):
        for key in keys:
            expected[key] = {"key": key, "round": round_number}
            store.put(key, expected[key])
            assert dict(store) == expected
    store.delete(keys[2])
    del expected[keys[2]]
    assert dict(store) == expected
    store.close()
    assert dict(open_store()) == expected


def test_tricky_keys_keep_apart_however_often_they_are_replaced(store: KVStore) -> None:
    for round_number in range(3):
        for number, key in enumerate(TRICKY):
            store.put(key, {"n": number, "round": round_number})
    assert dict(store) == {key: {"n": number, "round": 2} for number, key in enumerate(TRICKY)}


def test_what_was_put_is_there_after_closing_and_opening_again(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    store.create("replaced", {"n": 1}, ttl=100)
    store.close()
    with open_store() as again:
        again.put("replaced", {"n": 2})
        again.put("short", {"n": 3}, ttl=60)
    clock.advance(1)
    again = open_store()
    assert dict(again) == {"replaced": {"n": 2}, "short": {"n": 3}}
    assert again.ttl("replaced") is None
    assert again.ttl("short") == 59


def test_a_durable_store_puts_like_any_other(open_store: OpenStore) -> None:
    with open_store(durable=True) as store:
        for number in range(40):
            store.put(f"k{number % 7}", sized_value(SIZES[number % len(SIZES)], number))
        for number in range(3):
            store.delete(f"k{number}")
        expected = dict(store)
        assert expected.keys() == {"k3", "k4", "k5", "k6"}
    assert dict(open_store()) == expected


def test_random_puts_leave_what_a_dictionary_holds(store: KVStore, open_store: OpenStore) -> None:
    random = seeded_random()
    expected: dict[str, Value] = {}
    for mark in range(scaled(3000)):
        key = f"{'é' * 16 if random.random() < 0.3 else ''}{random.randrange(60)}"
        if random.random() < 0.8:
            expected[key] = sized_value(random.choice((12, 100, 600, 3_000)), mark)
            store.put(key, expected[key])
        elif expected.pop(key, None) is not None:
            store.delete(key)
        if random.random() < 0.01:
            store.sync()
    assert dict(store) == expected
    assert len(store) == len(expected)
    store.close()
    assert dict(open_store()) == expected


# --- what it refuses ------------------------------------------------------------------------------


def outcome(call: Callable[..., object], *arguments: Any) -> str:
    """Return in words what comes of a call."""
    try:
        return f"returned {call(*arguments)!r}"
    except KVStoreError as error:
        return f"{type(error).__name__}: {error}"


def empty(store: KVStore) -> None:
    """Remove all keys, for less than `clear` costs."""
    while store:
        store.popitem()


def test_put_takes_and_refuses_exactly_what_create_does(store: KVStore) -> None:
    arguments: list[tuple[Any, ...]] = [
        *((key, {"n": 1}) for key in (*IMPOSSIBLE.values(), *TRICKY)),
        *(("k", value) for value in edge_values.VALUES),
        *(("k", {"member": member}) for member in edge_values.MEMBERS),
        *(("k", {"n": 1}, ttl) for ttl in edge_values.TTLS),
    ]
    taken = 0
    for each in arguments:
        told = outcome(store.create, *each)
        created = dict(store)
        empty(store)
        assert outcome(store.put, *each) == told
        assert dict(store) == created
        taken += bool(created)
        store.put("k", {"old": True}, 100)
        assert outcome(store.put, *each) == told
        empty(store)
    assert taken > len(TRICKY)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("", {}), InvalidKeyError),
        (("x" * 33, {}), InvalidKeyError),
        ((b"k", {}), InvalidKeyError),
        (("k", None), InvalidValueError),
        (("k", {"when": object()}), InvalidValueError),
        (("k", sized_value(16_385)), ValueTooLargeError),
        (("k", {"n": 2}, 0), InvalidTTLError),
        (("k", {"n": 2}, True), InvalidTTLError),
    ],
)
def test_a_put_that_is_refused_leaves_the_old_value_and_its_ttl(
    store: KVStore, clock: FakeClock, arguments: tuple[Any, ...], error: type[KVStoreError]
) -> None:
    store.create("k", {"n": 1}, ttl=10)
    clock.advance(1)
    with pytest.raises(error):
        store.put(*arguments)
    assert dict(store) == {"k": {"n": 1}}
    assert store.ttl("k") == 9


# --- full stores ----------------------------------------------------------------------------------


def fill(store: KVStore, value_size: int = 16_384, ttl: int | None = None) -> list[str]:
    """Put new keys until the store is full; return them."""
    keys: list[str] = []
    with pytest.raises(StoreFullError):
        while True:
            store.put(f"fill {len(keys)}", sized_value(value_size, len(keys)), ttl)
            keys.append(f"fill {len(keys)}")
    return keys


def test_a_put_that_finds_no_room_changes_nothing(open_store: OpenStore, clock: FakeClock) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    store.create("k", {"n": 1}, ttl=10)
    keys = fill(store)
    clock.advance(1)
    for key in ("k", "new"):
        with pytest.raises(StoreFullError):
            store.put(key, sized_value(16_384))
    assert store.read("k") == {"n": 1}
    assert store.ttl("k") == 9
    assert "new" not in store
    assert len(store) == len(keys) + 1
    assert all(store[key] == sized_value(16_384, n) for n, key in enumerate(keys))


def test_put_takes_back_what_has_expired_before_it_finds_no_room(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    store.create("k", {"n": 1})
    fill(store, ttl=10)
    clock.advance(10)
    store.put("k", sized_value(16_384))
    assert dict(store) == {"k": sized_value(16_384)}


@pytest.mark.parametrize("value_size", [12, 1_000, 16_384])
def test_every_key_of_a_full_store_can_be_replaced_once_one_was_deleted(
    open_store: OpenStore, value_size: int
) -> None:
    """A replacement is written beside what it replaces: room for one record is room for all."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    keys = fill(store, value_size)
    store.delete(keys.pop())
    some = keys[:: max(1, len(keys) // 100)]
    for round_number in range(1, 4):
        for number, key in enumerate(some):
            store.put(key, sized_value(value_size, number + round_number))
        store.sync()
    for number, key in enumerate(some):
        assert store[key] == sized_value(value_size, number + 3)
    assert len(store) == len(keys)


def test_a_small_store_takes_any_number_of_replacements(open_store: OpenStore) -> None:
    """What was replaced is kept until the next flush of everything, and no longer."""
    store = open_store(max_bytes=MIN_MAX_BYTES)
    for number in range(scaled(2000)):
        store.put(f"k{number % 20}", sized_value(16_384, number))
        if number % 50 == 0:
            store.sync()
    assert len(store) == 20
    assert open_size(store) <= MIN_MAX_BYTES


def test_a_key_that_is_replaced_over_and_over_takes_no_more_room(store: KVStore) -> None:
    smallest = open_size(store)
    for number in range(scaled(5000)):
        store.put("hot", sized_value(4_000, number))
    assert open_size(store) == smallest


def test_what_was_replaced_takes_no_room_once_the_store_was_closed(
    tmp_path: Path, open_store: OpenStore
) -> None:
    with open_store(tmp_path / "rewritten.kvs") as store:
        for round_number in range(4):
            for number in range(50):
                store.put(f"k{number}", sized_value(900 if round_number < 3 else 90, number))
            store.sync()
    with open_store(tmp_path / "fresh.kvs") as store:
        for number in range(50):
            store.create(f"k{number}", sized_value(90, number))
    rewritten = open_store(tmp_path / "rewritten.kvs").stats()
    fresh = open_store(tmp_path / "fresh.kvs").stats()
    assert (rewritten.records, rewritten.live_size) == (fresh.records, fresh.live_size)


# --- after the death of the process ---------------------------------------------------------------


def test_what_was_put_is_there_after_the_death_of_the_process(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    for number in range(100):
        store.create(f"k{number}", {"n": number}, ttl=50)
    store.sync()
    for number in range(0, 100, 2):
        store.put(f"k{number}", sized_value(500, number), ttl=None if number % 4 else 70)
    for number in range(0, 100, 5):
        store.delete(f"k{number}")
    for number in range(0, 100, 10):
        store.put(f"k{number}", {"again": number})
    clock.advance(1)
    assert after_death(store) == dict(store)


def test_a_clock_set_back_makes_no_older_value_the_newer_one(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    for number in range(20):
        store.put("k", {"n": number})
        store.sync()
        clock.advance(-3600)
        assert after_death(store) == {"k": {"n": number}}


def test_an_expired_replacement_does_not_bring_back_what_it_replaced(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    store.create("k", {"n": 1})
    store.sync()
    store.put("k", {"n": 2}, ttl=10)
    clock.advance(10)
    assert after_death(store) == {}
    assert "k" not in store
    assert len(store) == 0
    assert store.purge_expired() == 1
    clock.advance(-5)
    assert "k" not in store
    assert after_death(store) == {}


@pytest.mark.parametrize("durable", [False, True])
def test_a_deleted_replacement_does_not_bring_back_what_it_replaced(
    open_store: OpenStore, durable: bool
) -> None:
    store = open_store(durable=durable)
    store.create("k", {"n": 1})
    store.sync()
    store.put("k", {"n": 2})
    store.delete("k")
    assert after_death(store) == {}
    store.create("k", {"n": 3})
    store.close()
    assert dict(open_store()) == {"k": {"n": 3}}


def test_a_purge_and_a_clock_set_back_do_not_bring_back_what_was_purged(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    store.create("k", {"n": 1})
    store.sync()
    store.put("k", {"n": 2}, ttl=10)
    clock.advance(10)
    assert store.purge_expired() == 1
    clock.advance(-3600)
    store.put("k", {"n": 3})
    store.delete("k")
    assert "k" not in store
    assert after_death(store) == {}


# --- damage ---------------------------------------------------------------------------------------

PARTS = {
    "magic": 0,
    "value size": RECORD_KEY_SIZE_OFFSET - 2,
    "key size": RECORD_KEY_SIZE_OFFSET,
    "stamp": RECORD_STAMP_OFFSET,
    "highest byte of the stamp": RECORD_STAMP_OFFSET + 7,
    "expiry": RECORD_EXPIRES_OFFSET,
    "checksum": RECORD_CHECKSUM_OFFSET,
    "value": RECORD_HEADER_SIZE + len("unlucky") + 5,
}


@pytest.mark.parametrize("part", PARTS)
def test_put_replaces_a_damaged_value(store: KVStore, open_store: OpenStore, part: str) -> None:
    for number in range(20):
        store.create(f"k{number}", {"n": number})
    store.create("unlucky", {"text": "damaged"})
    store.close()
    record = store.path.read_bytes().index(b'unlucky{"text"') - RECORD_HEADER_SIZE
    change_byte(store.path, record + PARTS[part])
    store = open_store()
    with pytest.raises(CorruptStoreError):
        store.read("unlucky")
    with pytest.raises(KeyExistsError):
        store.create("unlucky", {})
    store.put("unlucky", {"text": "new"})
    expected = {**{f"k{number}": {"n": number} for number in range(20)}, "unlucky": {"text": "new"}}
    assert dict(store) == expected
    assert after_death(store) == expected
    store.put("unlucky", {"text": "newer"})
    store.close()
    assert dict(open_store()) == {**expected, "unlucky": {"text": "newer"}}


@pytest.mark.parametrize("stamp", [b"\xff" * 8, b"\0" * 7 + b"\xf0", b"\0" * 8])
def test_a_damaged_stamp_is_no_reason_to_refuse_a_put_nor_moves_the_time_on(
    clock: FakeClock, store: KVStore, open_store: OpenStore, stamp: bytes
) -> None:
    """`put` was refused for ever, or gave all that was stored later a time in the year 10,000."""
    store.create("unlucky", {"text": "damaged"})
    store.close()
    record = store.path.read_bytes().index(b'unlucky{"text"') - RECORD_HEADER_SIZE
    with store.path.open("r+b") as file:
        file.seek(record + RECORD_STAMP_OFFSET)
        file.write(stamp)
    store = open_store()
    clock.advance(1)
    store.put("unlucky", {"text": "new"})
    assert after_death(store) == {"unlucky": {"text": "new"}}
    _, created_at, _ = store._whole("unlucky")
    assert created_at == clock.now_ms
    store.close()
    assert dict(open_store()) == {"unlucky": {"text": "new"}}


def test_a_put_key_is_gone_for_good_after_a_damaged_value_was_replaced_and_deleted(
    store: KVStore, open_store: OpenStore
) -> None:
    store.create("unlucky", {"text": "damaged"})
    store.close()
    record = store.path.read_bytes().index(b'unlucky{"text"') - RECORD_HEADER_SIZE
    change_byte(store.path, record + PARTS["value"])
    store = open_store()
    store.put("unlucky", {"text": "new"})
    store.delete("unlucky")
    with pytest.raises(KeyNotFoundError):
        store.read("unlucky")
    assert after_death(store) == {}


def test_key_that_was_replaced_and_deleted_stays_away_although_its_records_were_reclaimed(
    store: KVStore,
) -> None:
    """The disk may have lost that the first one was cleared, but not the deletion of the second."""
    store.put("k", {"v": 1})
    store.sync()
    store.put("k", {"v": 2})
    store._parts.reclaimer.reclaim()
    assert store._parts.versions.retired_size == 0
    store.delete("k")
    assert store._parts.versions.marks == 1
