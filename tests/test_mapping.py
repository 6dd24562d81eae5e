"""The store is a mutable mapping; its iterators bear every change that is made meanwhile."""

import gc
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from support.clock import FakeClock
from support.files import change_byte
from support.stores import OpenStore, after_death

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    KeyNotFoundError,
    KVStore,
    StoreClosedError,
)
from kvstore.all_keys import AllKeys
from kvstore.index.segments import Segments

# Enough for several splits of segments after a store of some hundred keys.
MANY = 20_000


def _fill(store: KVStore, count: int, name: str = "k") -> dict[str, Any]:
    contents = {f"{name}{number}": {"n": number} for number in range(count)}
    for key, value in contents.items():
        store.create(key, value)
    return contents


def test_a_store_reads_like_the_dict_it_holds(store: KVStore) -> None:
    contents = _fill(store, 1000)
    assert dict(store) == contents
    assert dict(store.items()) == contents
    assert sorted(store) == sorted(store.keys()) == sorted(contents)
    assert sorted(value["n"] for value in store.values()) == list(range(1000))
    assert len(store) == 1000
    assert {**store} == contents
    assert [*store] == list(store.keys())


def test_keys_values_and_items_agree_in_their_order(store: KVStore) -> None:
    _fill(store, 100)
    assert list(zip(store.keys(), store.values(), strict=True)) == list(store.items())


def test_keys_values_and_items_can_be_gone_through_more_than_once(store: KVStore) -> None:
    contents = _fill(store, 10)
    keys, values, items = store.keys(), store.values(), store.items()
    for _ in range(2):
        assert set(keys) == contents.keys()
        assert sorted(value["n"] for value in values) == list(range(10))
        assert dict(items) == contents
    store.delete("k0")
    del contents["k0"]
    assert set(keys) == contents.keys()
    assert dict(items) == contents


def test_keys_values_and_items_have_a_length_and_know_what_is_in_them(store: KVStore) -> None:
    _fill(store, 10)
    assert len(store.keys()) == len(store.values()) == len(store.items()) == 10
    assert "k3" in store.keys()  # noqa: SIM118
    assert "k10" not in store.keys()  # noqa: SIM118
    assert {"n": 3} in store.values()
    assert {"n": 10} not in store.values()
    assert ("k3", {"n": 3}) in store.items()
    assert ("k3", {"n": 4}) not in store.items()
    assert ("k10", {"n": 10}) not in store.items()


def test_get_gives_the_value_or_the_default(store: KVStore) -> None:
    store.create("k", {"n": 1})
    assert store.get("k") == store.get("k", 5) == {"n": 1}
    assert store.get("absent") is None
    assert store.get("absent", 5) == 5
    default = object()
    assert store.get("absent", default) is default


def test_get_of_what_cannot_be_a_key_raises_all_the_same(store: KVStore) -> None:
    with pytest.raises(InvalidKeyError):
        store.get("", 5)


def test_in_is_false_for_anything_that_cannot_be_a_key(store: KVStore) -> None:
    store.create("1", {})
    store.create("None", {})
    for nothing in (1, None, b"1", "", "x" * 33, "\ud800", 1.0, [], {}, ("1",), object()):
        assert nothing not in store
    assert "1" in store


def test_the_operators_are_the_methods(store: KVStore) -> None:
    store.create("k", {"n": 1})
    assert store["k"] == {"n": 1}
    del store["k"]
    with pytest.raises(KeyNotFoundError):
        store["k"]
    with pytest.raises(KeyNotFoundError):
        del store["k"]
    with pytest.raises(InvalidKeyError):
        store[""]


def test_a_store_is_a_mutable_mapping(store: KVStore) -> None:
    assert isinstance(store, MutableMapping)
    for name in dir(MutableMapping):
        if not name.startswith("_"):
            assert callable(getattr(store, name))


def test_a_store_equals_itself_only_and_can_be_hashed(
    store: KVStore, open_store: OpenStore, tmp_path: Any
) -> None:
    other = open_store(tmp_path / "other.kvs")
    assert store == store  # noqa: PLR0124
    assert store != other
    assert store != {}
    assert {store: "one", other: "other"}[store] == "one"
    before = hash(store)
    store.create("k", {})
    other.create("k", {})
    assert store != other
    assert store != dict(store)
    assert hash(store) == before
    store.close()
    assert hash(store) == before
    assert store == store  # noqa: PLR0124
    assert store != other


# --- members that write ---------------------------------------------------------------------------


def test_setdefault_stores_the_value_only_where_the_key_is_absent(store: KVStore) -> None:
    assert store.setdefault("k", {"n": 1}) == {"n": 1}
    assert store.setdefault("k", {"n": 2}) == {"n": 1}
    assert dict(store) == {"k": {"n": 1}}
    store.delete("k")
    assert store.setdefault("k", {"n": 3}) == {"n": 3}
    assert after_death(store) == dict(store) == {"k": {"n": 3}}


def test_setdefault_gives_its_ttl_only_to_what_it_stores(store: KVStore, clock: FakeClock) -> None:
    store.setdefault("k", {"n": 1}, ttl=10)
    assert store.ttl("k") == 10
    clock.advance(1)
    assert store.setdefault("k", {"n": 2}, 100) == {"n": 1}
    assert store.ttl("k") == 9
    clock.advance(9)
    assert store.setdefault("k", {"n": 3}) == {"n": 3}
    assert store.ttl("k") is None
    assert len(store) == 1


def test_setdefault_takes_what_create_takes(store: KVStore) -> None:
    for arguments, error in (
        (("", {}), InvalidKeyError),
        (("k", {"n": object()}), InvalidValueError),
        (("k", {}, 0), InvalidTTLError),
    ):
        with pytest.raises(error):
            store.setdefault(*arguments)
    assert len(store) == 0


def test_setdefault_does_not_take_a_damaged_value_for_an_absent_one(
    store: KVStore, open_store: OpenStore
) -> None:
    store.create("unlucky", {"text": "damaged"})
    store.close()
    change_byte(store.path, store.path.read_bytes().index(b"damaged"), 1)
    store = open_store(check=False)
    with pytest.raises(CorruptStoreError, match="unlucky"):
        store.setdefault("unlucky", {"text": "new"})
    assert "unlucky" in store
    with pytest.raises(CorruptStoreError, match="unlucky"):
        store.read("unlucky")


def test_update_takes_what_that_of_a_dict_takes(store: KVStore) -> None:
    expected: dict[str, Any] = {}
    for arguments, named in (
        (({"a": {"n": 1}, "b": {"n": 2}},), {}),
        (([("b", {"n": 3}), ("c", {"n": 4})],), {}),
        ((), {"c": {"n": 5}, "d": {"n": 6}}),
        (({"d": {"n": 7}},), {"e": {"n": 8}}),
        (({},), {}),
        ((), {}),
    ):
        expected.update(*arguments, **named)
        store.update(*arguments, **named)
        assert dict(store) == expected
    store.update((f"k{number}", {"n": number}) for number in range(3))
    assert len(store) == len(expected) + 3


def test_update_replaces_the_time_to_live_as_well(store: KVStore, clock: FakeClock) -> None:
    store.create("k", {"n": 1}, ttl=10)
    store.update(k={"n": 2})
    assert store.ttl("k") is None
    clock.advance(10)
    assert dict(store) == {"k": {"n": 2}}


def test_update_takes_another_store_and_even_itself(
    store: KVStore, open_store: OpenStore, tmp_path: Path
) -> None:
    contents = _fill(store, 2000)
    other = open_store(tmp_path / "other.kvs")
    other.create("k0", {"n": "other"})
    other.update(store)
    assert dict(other) == contents
    store.update(store)
    assert dict(store) == contents


def test_an_update_that_is_refused_has_stored_what_came_before(store: KVStore) -> None:
    with pytest.raises(InvalidValueError):
        store.update([("a", {}), ("b", {"n": object()}), ("c", {})])
    assert dict(store) == {"a": {}}


def test_a_store_is_true_where_any_key_is_there(store: KVStore, clock: FakeClock) -> None:
    assert not store
    store.create("k", {}, ttl=10)
    assert store
    clock.advance(10)
    assert not store
    store.create("l", {})
    assert store
    store.delete("l")
    assert not store
    clock.advance(-10)
    assert bool(store) == ("k" in store)
    _fill(store, 3000)
    assert store
    store.clear()
    assert bool(store) is False


def test_no_key_is_counted_to_tell_whether_there_is_any(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took 1.9 ms at 300,000 keys."""
    _fill(store, 100)

    def count(_self: AllKeys) -> int:
        raise AssertionError("counted")

    monkeypatch.setattr(AllKeys, "count", count)
    assert bool(store) is True
    with pytest.raises(AssertionError, match="counted"):
        len(store)


def test_one_segment_is_looked_at_where_a_key_was_found_before(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a store that was all but emptied, whose other segments hold nothing."""
    looked_at: list[int] = []
    any_key = Segments.any_key

    def look(segments: Segments, position: int, now_ms: int) -> tuple[str | None, int, str]:
        looked_at.append(position)
        return any_key(segments, position, now_ms)

    _fill(store, 3000)
    for number in range(2999):
        store.delete(f"k{number}")
    assert store
    monkeypatch.setattr(Segments, "any_key", look)
    assert store
    assert len(looked_at) == 1


def test_whether_a_closed_store_holds_a_key_cannot_be_told(store: KVStore) -> None:
    store.close()
    with pytest.raises(StoreClosedError):
        bool(store)


# --- iteration during writes ----------------------------------------------------------------------

ITERATIONS: dict[str, Callable[[KVStore], Iterable[Any]]] = {
    "iter": iter,
    "keys": KVStore.keys,
    "items": lambda store: (_checked(item) for item in store.items()),
}


def _checked(item: tuple[str, Any]) -> str:
    key, value = item
    assert value == {"n": int(key.lstrip("abcdefghijklmnopqrstuvwxyz"))}
    return key


@pytest.fixture(params=list(ITERATIONS.values()), ids=list(ITERATIONS))
def iterate(request: pytest.FixtureRequest) -> Callable[[KVStore], Iterable[str]]:
    chosen: Callable[[KVStore], Iterable[str]] = request.param
    return chosen


def test_keys_there_throughout_are_seen_once_though_the_table_grows_meanwhile(
    store: KVStore, iterate: Callable[[KVStore], Iterable[str]]
) -> None:
    stable = _fill(store, 2000, "stable")
    seen = []
    for place, key in enumerate(iterate(store)):
        seen.append(key)
        if place % 500 == 0 and place < 2000:
            _fill(store, MANY // 4, f"new{chr(97 + place // 500)}x")
    assert sorted(key for key in seen if key in stable) == sorted(stable)


def test_keys_there_throughout_are_seen_once_though_others_come_and_go(
    store: KVStore, iterate: Callable[[KVStore], Iterable[str]]
) -> None:
    stable = _fill(store, 1000, "stable")
    passing = _fill(store, 1000, "passing")
    seen = []
    for place, key in enumerate(iterate(store)):
        seen.append(key)
        if place < 1000:
            store.delete(f"passing{place}")
            store.create(f"later{place}", {"n": place})
    assert sorted(key for key in seen if key in stable) == sorted(stable)
    assert len(seen) == len(set(seen))
    assert set(store) == (stable.keys() | {f"later{n}" for n in range(1000)}) - passing.keys()


def test_keys_that_are_replaced_or_touched_meanwhile_are_seen_once(
    store: KVStore, iterate: Callable[[KVStore], Iterable[str]]
) -> None:
    """They are there throughout, though their records move about, and the table grows."""
    contents = _fill(store, 2000)
    seen = []
    for place, key in enumerate(iterate(store)):
        seen.append(key)
        store.put(f"k{place}", {"n": place}, ttl=1000)
        store.put(f"k{1999 - place}", {"n": 1999 - place})
        store.touch(f"k{place * 7 % 2000}", 500)
        if place == 1000:
            _fill(store, MANY // 4, "new")
        if place == 1999:
            break
    assert len(seen) == len(set(seen))
    seen = []
    for key in iterate(store):
        seen.append(key)
        store.put(key, store[key])
        store.touch(key, None)
    assert len(seen) == len(set(seen))
    assert set(seen) == contents.keys() | {f"new{number}" for number in range(MANY // 4)}


def test_every_key_can_be_deleted_while_it_is_iterated_over(
    store: KVStore, iterate: Callable[[KVStore], Iterable[str]]
) -> None:
    contents = _fill(store, 5000)
    seen = []
    for key in iterate(store):
        seen.append(key)
        store.delete(key)
    assert sorted(seen) == sorted(contents)
    assert len(store) == 0


def test_a_key_deleted_during_iteration_is_seen_at_most_once_and_never_with_a_wrong_value(
    store: KVStore,
) -> None:
    contents = _fill(store, 3000)
    items = iter(store.items())
    first = dict(next(items) for _ in range(10))
    for key in contents:
        if key not in first:
            store.delete(key)
    rest = list(items)
    assert len(rest) == len(dict(rest))
    for key, value in rest:
        assert key not in first
        assert value == contents[key]


def test_a_purge_during_iteration_disturbs_nothing(
    store: KVStore, clock: FakeClock, iterate: Callable[[KVStore], Iterable[str]]
) -> None:
    stable = _fill(store, 1000, "stable")
    for number in range(1000):
        store.create(f"short{number}", {"n": number}, ttl=10)
    iterator = iter(iterate(store))
    seen = [next(iterator) for _ in range(500)]
    clock.advance(10)
    assert store.purge_expired() == 1000
    seen += iterator
    assert sorted(key for key in seen if key in stable) == sorted(stable)
    assert len(seen) == len(set(seen))


def test_many_iterators_go_on_side_by_side(store: KVStore) -> None:
    contents = _fill(store, 300)
    iterators = [iter(store) for _ in range(5)]
    columns = list(zip(*iterators, strict=True))
    assert all(len(set(row)) == 1 for row in columns)
    assert {row[0] for row in columns} == contents.keys()


def test_an_iterator_given_up_holds_nothing_back(store: KVStore) -> None:
    _fill(store, 1000)
    iterators = [iter(store), iter(store.items()), iter(store.keys())]
    for iterator in iterators:
        next(iterator)
    for key in list(store):
        store.delete(key)
    _fill(store, 1000)
    store.close()


def test_a_store_stays_open_while_only_its_iterator_is_kept(path: Path) -> None:
    with KVStore(path) as store:
        _fill(store, 100)
    iterator = iter(KVStore(path))
    gc.collect()
    assert len(list(iterator)) == 100


def test_an_iterator_of_a_store_closed_meanwhile_says_so(store: KVStore) -> None:
    _fill(store, 1000)
    iterators: list[Any] = [iter(store), iter(store.items()), iter(store.values())]
    for iterator in iterators:
        next(iterator)
    store.close()
    for iterator in iterators:
        with pytest.raises(StoreClosedError):
            for _ in iterator:
                pass
