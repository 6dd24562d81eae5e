"""Any string of 1 to 32 characters is a key, and a key of its own; anything else is refused."""

import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from support.keys import IMPOSSIBLE, TRICKY, any_key
from support.stores import OpenStore

from kvstore import InvalidKeyError, KeyNotFoundError, KVStore


def test_every_tricky_key_is_a_key_of_its_own(store: KVStore, open_store: OpenStore) -> None:
    """Also those that share their first 32 bytes, or differ in trailing NULs only."""
    for number, key in enumerate(TRICKY):
        assert key not in store
        store.create(key, {"n": number})
    assert sorted(store) == sorted(TRICKY)
    store.close()
    again = open_store()
    for number, key in enumerate(TRICKY):
        assert again.read(key) == {"n": number}


def test_deleting_one_tricky_key_leaves_the_others(store: KVStore) -> None:
    for number, key in enumerate(TRICKY):
        store.create(key, {"n": number})
    for number, key in enumerate(TRICKY):
        assert store.read(key) == {"n": number}
        store.delete(key)
        assert key not in store
        assert len(store) == len(TRICKY) - number - 1
        assert set(store) == set(TRICKY[number + 1 :])


@pytest.mark.parametrize("character", ["x", "é", "€", "🐍", "\U0010ffff", "\0"])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 10, 11, 16, 17, 31, 32])
def test_a_key_of_up_to_32_characters_works_whatever_its_bytes(
    store: KVStore, character: str, length: int
) -> None:
    key = character * length
    store.create(key, {"n": length}, ttl=1000)
    assert store.read(key) == {"n": length}
    assert store.ttl(key) is not None
    assert list(store) == [key]
    store.delete(key)
    assert len(store) == 0


@pytest.mark.parametrize("character", ["x", "é", "€", "🐍"])
def test_a_key_of_33_characters_is_refused_whatever_its_bytes(
    store: KVStore, character: str
) -> None:
    with pytest.raises(InvalidKeyError):
        store.create(character * 33, {})
    assert character * 33 not in store


def test_thousands_of_long_keys_that_share_their_first_32_bytes_do_not_mix(store: KVStore) -> None:
    """They look alike in the slot, so each is told from the others by its record."""
    keys = [f"{'é' * 16}{number:04}{'é' * (number % 12)}" for number in range(3000)]
    for number, key in enumerate(keys):
        store.create(key, {"n": number})
    for key in keys[::2]:
        store.delete(key)
    for number, key in enumerate(keys):
        assert store.get(key) == (None if number % 2 == 0 else {"n": number})
    assert set(store) == set(keys[1::2])


@pytest.mark.parametrize("tail", ["x", "\0"])
def test_thousands_of_keys_that_begin_alike_do_not_mix(store: KVStore, tail: str) -> None:
    """So many that hashes agree in all that a lookup goes by; then the lengths must tell."""
    keys = [f"{number:03}{tail * length}" for number in range(1000) for length in range(30)]
    for number, key in enumerate(keys):
        store.create(key, {"n": number})
    for number, key in enumerate(keys):
        assert store.read(key) == {"n": number}
    assert set(store) == set(keys)


def test_keys_of_nul_characters_differ_by_their_length(store: KVStore) -> None:
    keys = ["\0" * length for length in range(1, 33)]
    for key in keys:
        store.create(key, {"n": len(key)})
    assert sorted(store) == keys
    for key, longer in pairwise(keys):
        store.delete(key)
        assert store.read(longer) == {"n": len(longer)}


def test_a_key_is_not_normalized(store: KVStore) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    store.create(composed, {"form": "NFC"})
    assert decomposed not in store
    store.create(decomposed, {"form": "NFD"})
    assert {tuple(map(ord, key)) for key in store} == {(0xE9,), (0x65, 0x301)}


def test_a_subclass_of_str_is_the_key_it_equals(store: KVStore) -> None:
    class Name(str):
        __slots__ = ()

    store.create(Name("a"), {"n": 1})
    assert store.read("a") == {"n": 1}
    assert Name("a") in store
    assert [type(key) for key in store] == [str]


@given(any_key)
def test_any_drawn_key_is_created_read_listed_and_deleted(store: KVStore, key: str) -> None:
    store.create(key, {"key": key})
    assert store.read(key) == {"key": key}
    assert list(store) == [key]
    store.delete(key)
    with pytest.raises(KeyNotFoundError):
        store.read(key)
    assert len(store) == 0


@pytest.mark.parametrize("key", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_cannot_be_a_key_is_refused_and_is_in_no_store(store: KVStore, key: Any) -> None:
    for call in (
        lambda: store.create(key, {}),
        lambda: store.read(key),
        lambda: store[key],
        lambda: store.read_bytes(key),
        lambda: store.get(key),
        lambda: store.delete(key),
        lambda: store.__delitem__(key),
        lambda: store.ttl(key),
    ):
        with pytest.raises(InvalidKeyError):
            call()
    assert key not in store
    assert len(store) == 0


def test_a_key_whose_repr_raises_is_still_an_invalid_key(store: KVStore) -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    key: Any = Shy()
    with pytest.raises(InvalidKeyError):
        store.read(key)
    assert key not in store
