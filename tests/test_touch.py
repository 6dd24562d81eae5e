"""`touch` gives a key that is there another time-to-live, and nothing else."""

from typing import Any

import pytest
from support import MIN_MAX_BYTES, edge_values, scaled
from support.clock import FakeClock
from support.files import change_byte, open_size
from support.keys import IMPOSSIBLE, TRICKY
from support.stores import OpenStore, after_death
from support.values import sized_value

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    StoreFullError,
)
from kvstore.format.layout import RECORD_EXPIRES_OFFSET, RECORD_HEADER_SIZE, RECORD_STAMP_OFFSET


def test_touch_gives_a_new_time_to_live_from_now_on(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=10)
    clock.advance(9)
    assert store.touch("k", 60) is None  # type: ignore[func-returns-value]
    assert store.ttl("k") == 60
    clock.advance(59)
    assert store.read("k") == {"n": 1}
    store.touch("k", ttl=2)
    assert store.ttl("k") == 2
    clock.advance(2)
    assert "k" not in store


def test_touch_with_none_makes_a_key_stay_for_ever(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=10)
    store.touch("k", None)
    assert store.ttl("k") is None
    clock.advance(10**9)
    assert store.read("k") == {"n": 1}
    assert store.purge_expired() == 0


def test_touch_makes_a_key_expire_that_never_did(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1})
    store.touch("k", 1)
    assert store.ttl("k") == 1
    clock.advance(1)
    assert len(store) == 0
    assert store.purge_expired() == 1


def test_touch_must_be_told_for_how_long(store: KVStore) -> None:
    store.create("k", {}, ttl=10)
    with pytest.raises(TypeError):
        store.touch("k")  # type: ignore[call-arg]


@pytest.mark.parametrize("key", ["k", "é" * 16 + "x", "🐍" * 32])
@pytest.mark.parametrize("value_size", [2, 60, 1_000, 16_384])
def test_touch_leaves_the_value_as_it_is(
    store: KVStore, open_store: OpenStore, clock: FakeClock, key: str, value_size: int
) -> None:
    store.create(key, sized_value(value_size), ttl=10)
    before = store.read_bytes(key)
    for ttl in (100, None, 10**10, 50):
        store.touch(key, ttl)
        assert store.read_bytes(key) == before
        assert store.ttl(key) == ttl
    clock.advance(1)
    assert after_death(store) == {key: sized_value(value_size)}
    store.close()
    again = open_store()
    assert again.read_bytes(key) == before
    assert again.ttl(key) == 49
    assert len(again) == 1


def test_touch_leaves_all_other_keys_as_they_are(store: KVStore, clock: FakeClock) -> None:
    for number, key in enumerate(TRICKY):
        store.create(key, {"n": number}, ttl=1000)
    clock.advance(1)
    for number, key in enumerate(TRICKY):
        store.touch(key, 2000 + number)
    for number, key in enumerate(TRICKY):
        assert store.ttl(key) == 2000 + number
        assert store.read(key) == {"n": number}
    store.touch(TRICKY[3], None)
    assert [key for key in TRICKY if store.ttl(key) is None] == [TRICKY[3]]


def test_touch_never_revives_a_key_that_has_expired(
    store: KVStore, clock: FakeClock, open_store: OpenStore
) -> None:
    store.create("k", {"n": 1}, ttl=10)
    clock.advance(10)
    for ttl in (10, None):
        with pytest.raises(KeyNotFoundError):
            store.touch("k", ttl)
        assert "k" not in store
    assert len(store) == 0
    assert after_death(store) == {}
    store.create("k", {"n": 2})
    store.close()
    assert dict(open_store()) == {"k": {"n": 2}}


def test_a_touched_key_that_has_expired_stays_away(store: KVStore, clock: FakeClock) -> None:
    """Its former record would have lived on."""
    store.create("k", {"n": 1})
    store.sync()
    store.touch("k", 5)
    clock.advance(5)
    assert after_death(store) == {}
    assert store.purge_expired() == 1
    assert after_death(store) == {}


def test_touch_of_an_absent_key_says_so(store: KVStore) -> None:
    store.create("deleted", {})
    store.delete("deleted")
    for key in ("absent", "deleted"):
        with pytest.raises(KeyNotFoundError):
            store.touch(key, 10)
    assert len(store) == 0


@pytest.mark.parametrize("key", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_touch_of_what_cannot_be_a_key_is_refused(store: KVStore, key: Any) -> None:
    with pytest.raises(InvalidKeyError):
        store.touch(key, 10)


def test_touch_takes_and_refuses_the_times_to_live_that_create_does(
    store: KVStore, clock: FakeClock
) -> None:
    clock.advance(1)
    for ttl in edge_values.TTLS:
        told = taken = None
        try:
            store.create("created", {}, ttl)
            taken = store.ttl("created")
            store.delete("created")
        except InvalidTTLError as error:
            told = str(error).replace("created", "touched")
        store.put("touched", {"n": 1}, 7)
        if told is None:
            store.touch("touched", ttl)
            assert store.ttl("touched") == taken
        else:
            with pytest.raises(InvalidTTLError) as refused:
                store.touch("touched", ttl)
            assert str(refused.value) == told
            assert store.ttl("touched") == 7
        assert store.read("touched") == {"n": 1}


def test_a_touch_that_finds_no_room_changes_nothing(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    number = 0
    with pytest.raises(StoreFullError):
        while True:
            store.create(f"k{number}", sized_value(16_384, number), ttl=100)
            number += 1
    clock.advance(1)
    with pytest.raises(StoreFullError):
        store.touch("k0", 1000)
    assert store.ttl("k0") == 99
    assert store.read("k0") == sized_value(16_384, 0)
    store.delete("k1")
    for _ in range(10):
        store.touch("k0", 1000)
        store.sync()
    assert store.ttl("k0") == 1000


def test_a_session_that_is_touched_over_and_over_takes_no_more_room(store: KVStore) -> None:
    smallest = open_size(store)
    store.create("session", sized_value(4_000))
    for _ in range(scaled(3000)):
        store.touch("session", 3600)
    assert open_size(store) == smallest
    assert store.read("session") == sized_value(4_000)


def test_a_durable_store_touches_like_any_other(open_store: OpenStore, clock: FakeClock) -> None:
    with open_store(durable=True) as store:
        store.create("k", {"n": 1}, ttl=10)
        for ttl in (20, None, 30):
            store.touch("k", ttl)
    clock.advance(1)
    again = open_store()
    assert dict(again) == {"k": {"n": 1}}
    assert again.ttl("k") == 29


PARTS = {
    "stamp": RECORD_STAMP_OFFSET,
    "expiry": RECORD_EXPIRES_OFFSET,
    "value": RECORD_HEADER_SIZE + len("unlucky") + 10,
}


@pytest.mark.parametrize("part", PARTS)
def test_touch_does_not_launder_a_damaged_value_into_a_whole_record(
    store: KVStore, open_store: OpenStore, part: str
) -> None:
    store.create("unlucky", {"text": "damaged"}, ttl=1000)
    store.create("other", {"n": 1}, ttl=1000)
    store.close()
    record = store.path.read_bytes().index(b'unlucky{"text"') - RECORD_HEADER_SIZE
    change_byte(store.path, record + PARTS[part], 1)
    store = open_store(check=False)
    for ttl in (10, None):
        with pytest.raises(CorruptStoreError, match="unlucky"):
            store.touch("unlucky", ttl)
        with pytest.raises(CorruptStoreError, match="unlucky"):
            store.read("unlucky")
    with pytest.raises(KeyExistsError):
        store.create("unlucky", {})
    store.touch("other", 2000)
    assert store.ttl("other") == 2000
    assert sorted(store) == ["other", "unlucky"]
    store.delete("unlucky")
    assert dict(store) == {"other": {"n": 1}}
