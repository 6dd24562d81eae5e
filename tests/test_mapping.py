"""The store reads like a mapping; its iterators bear every change that is made meanwhile."""

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support.clock import FakeClock
from support.stores import OpenStore

from kvstore import InvalidKeyError, KeyNotFoundError, KVStore, StoreClosedError

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


def test_items_cannot_be_assigned(store: KVStore) -> None:
    """`create` never replaces, and an assignment that raised would be a surprise."""
    with pytest.raises((TypeError, AttributeError)):
        store["k"] = {}  # type: ignore[index]
    assert len(store) == 0


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
