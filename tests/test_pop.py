"""`pop` and `popitem` remove a key and give its value, in one step."""

from typing import Any

import pytest
from support.clock import FakeClock
from support.files import change_byte
from support.keys import IMPOSSIBLE, TRICKY
from support.stores import OpenStore, after_death
from support.values import identical, sized_value

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
)
from kvstore.format.layout import BUCKET_SIZE, EXTENT_SIZE, SLOT_SIZE, key_hash
from kvstore.index.slots import control_offset_of


def test_pop_removes_the_key_and_returns_its_value(store: KVStore) -> None:
    store.create("k", {"n": 1, "deep": [{"er": None}]})
    store.create("l", {"n": 2})
    assert identical(store.pop("k"), {"n": 1, "deep": [{"er": None}]})
    assert "k" not in store
    assert dict(store) == {"l": {"n": 2}}
    assert store.pop("l", None) == {"n": 2}
    assert len(store) == 0


@pytest.mark.parametrize("value_size", [2, 60, 1_000, 16_384])
def test_pop_returns_values_of_any_size_and_of_any_key(store: KVStore, value_size: int) -> None:
    for mark, key in enumerate(TRICKY):
        store.create(key, sized_value(value_size, mark), ttl=100 if mark % 2 else None)
    for mark, key in enumerate(TRICKY):
        assert store.pop(key) == sized_value(value_size, mark)
        assert len(store) == len(TRICKY) - mark - 1


def test_pop_of_an_absent_key_raises_or_gives_the_default(store: KVStore) -> None:
    with pytest.raises(KeyNotFoundError, match="absent"):
        store.pop("absent")
    assert store.pop("absent", None) is None
    default = object()
    assert store.pop("absent", default) is default
    assert len(store) == 0


def test_an_expired_key_is_absent_for_pop(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=10)
    clock.advance(10)
    with pytest.raises(KeyNotFoundError):
        store.pop("k")
    assert store.pop("k", 7) == 7
    assert after_death(store) == {}


@pytest.mark.parametrize("key", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_the_default_does_not_stand_for_what_cannot_be_a_key(store: KVStore, key: Any) -> None:
    for default in ((), (None,)):
        with pytest.raises(InvalidKeyError):
            store.pop(key, *default)


def test_what_was_popped_stays_away(store: KVStore, open_store: OpenStore) -> None:
    for number in range(20):
        store.put("k", {"n": number})
        store.sync()
        store.put("k", {"n": -number})
        assert store.pop("k") == {"n": -number}
        assert after_death(store) == {}
    store.close()
    assert dict(open_store()) == {}


def test_a_durable_store_pops_like_any_other(open_store: OpenStore) -> None:
    with open_store(durable=True) as store:
        store.create("k", {"n": 1})
        store.put("k", {"n": 2})
        store.create("l", {"n": 3})
        assert store.pop("k") == {"n": 2}
        assert store.pop("k", None) is None
    assert dict(open_store()) == {"l": {"n": 3}}


def damage_unlucky(store: KVStore) -> None:
    """Close the store, whose key "unlucky" has the text "damaged", and change that in the file."""
    store.close()
    change_byte(store.path, store.path.read_bytes().index(b"damaged"), 1)


def test_pop_of_a_damaged_value_raises_and_leaves_it_where_it_is(
    store: KVStore, open_store: OpenStore
) -> None:
    """A repair may still find something in it."""
    store.create("unlucky", {"text": "damaged"})
    store.create("other", {"n": 1})
    damage_unlucky(store)
    store = open_store(check=False)
    for default in ((), (None,)):
        with pytest.raises(CorruptStoreError, match="unlucky"):
            store.pop("unlucky", *default)
    assert sorted(store) == ["other", "unlucky"]
    with pytest.raises(KeyExistsError):
        store.create("unlucky", {})
    assert store.pop("other") == {"n": 1}
    store.delete("unlucky")
    assert len(store) == 0


# --- popitem --------------------------------------------------------------------------------------


def test_popitem_empties_a_store_in_all(store: KVStore, open_store: OpenStore) -> None:
    expected = {f"k{number}": {"n": number} for number in range(3000)}
    store.update(expected)
    seen = []
    while store:
        seen.append(store.popitem())
    assert len(seen) == len(expected)
    assert dict(seen) == expected
    assert len(store) == 0
    assert after_death(store) == {}
    store.close()
    assert dict(open_store()) == {}


def test_popitem_of_an_empty_store_is_a_key_error(store: KVStore) -> None:
    with pytest.raises(KeyError):
        store.popitem()
    store.create("k", {"n": 1})
    assert store.popitem() == ("k", {"n": 1})
    with pytest.raises(KeyError):
        store.popitem()


def test_popitem_gives_nothing_that_has_expired(store: KVStore, clock: FakeClock) -> None:
    for number in range(100):
        store.create(f"short{number}", {"n": number}, ttl=10)
    store.create("k", {"n": 1})
    clock.advance(10)
    assert store.popitem() == ("k", {"n": 1})
    with pytest.raises(KeyError):
        store.popitem()


def test_popitem_does_not_remove_a_damaged_value(store: KVStore, open_store: OpenStore) -> None:
    store.create("unlucky", {"text": "damaged"})
    store.create("other", {"n": 1})
    damage_unlucky(store)
    store = open_store(check=False)
    for _ in range(3):
        try:
            assert store.popitem() == ("other", {"n": 1})
        except CorruptStoreError as error:
            assert "unlucky" in str(error)  # noqa: PT017
    assert "unlucky" in store


def test_popitem_comes_to_an_end_where_a_slot_is_not_in_its_place(
    store: KVStore, open_store: OpenStore
) -> None:
    """It was listed, and not found, and listed again: for ever."""
    store.create("astray", {"n": 1})
    seed = store._file.hash_seed
    slot = store._parts.slots.find(key_hash(b"astray", seed), b"astray")
    store.close()
    contents = bytearray(store.path.read_bytes())
    bucket = slot & -BUCKET_SIZE
    extent = bucket & -EXTENT_SIZE
    moved = extent + (bucket - extent + 5 * BUCKET_SIZE) % EXTENT_SIZE - bucket
    for start, length in ((slot, SLOT_SIZE), (control_offset_of(slot), 1)):
        contents[start + moved : start + moved + length] = contents[start : start + length]
        contents[start : start + length] = bytes(length)
    store.path.write_bytes(contents)
    store = open_store(check=False)
    assert "astray" not in store
    with pytest.raises((KeyError, CorruptStoreError)):
        store.popitem()
    store.clear()
    assert not store
