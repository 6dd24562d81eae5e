"""`get_many`, `put_many`, `delete_many` do for many keys what single operations do for one."""

import itertools
import threading
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import MIN_MAX_BYTES, scaled, seeded_random
from support.clock import FakeClock
from support.disks import quick_folder
from support.files import change_byte
from support.images import before_each_flush
from support.keys import IMPOSSIBLE, TRICKY
from support.platforms import needs_fork, needs_linux, needs_signals
from support.processes import run_script
from support.stores import OpenStore, after_death
from support.threads import run_together
from support.values import Value, identical, sized_value

from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    KVStore,
    StoreClosedError,
    StoreFullError,
    ValueTooLargeError,
)

# The place of a key among many: in the first group, at its ends, in a later one.
PLACES = (0, 1, 31, 32, 33, 100)


class Text(str):
    """A string of another type."""

    __slots__ = ()


class Given:
    """What has `keys` and items as a mapping has, and is none."""

    def __init__(self, contents: dict[str, Value]) -> None:
        self._contents = contents

    def keys(self) -> Iterable[str]:
        return list(self._contents)

    def __getitem__(self, key: str) -> Value:
        return self._contents[key]


def numbered(count: int) -> dict[str, Value]:
    """Return so many keys with values."""
    return {f"k{number}": {"n": number} for number in range(count)}


def crowd(count: int = 200) -> dict[str, Value]:
    """Return keys of all kinds with values of all sizes."""
    sizes = (12, 100, 2, 700, 5_000, 61, 16_384)
    keys = (*TRICKY, *(f"{'é' * (number % 3 * 10)}{number}" for number in range(count)))
    return {key: sized_value(sizes[mark % len(sizes)], mark) for mark, key in enumerate(keys)}


class StopHereError(Exception):
    """What a test's own iterators raise."""


def and_stop(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items, then raise."""
    yield from items
    raise StopHereError


# --- get_many -------------------------------------------------------------------------------------


def test_get_many_gives_those_that_are_there(store: KVStore) -> None:
    store.create("a", {"n": 1})
    store.create("b", {"n": [2, {"deep": None}]})
    assert store.get_many(["a", "absent", "b"]) == {"a": {"n": 1}, "b": {"n": [2, {"deep": None}]}}
    assert store.get_many(["absent"]) == {}
    assert store.get_many([]) == {}


def test_get_many_gives_what_single_reads_give(store: KVStore) -> None:
    contents = crowd()
    for key, value in contents.items():
        store.create(key, value)
    asked = [key for each in contents for key in (each, f"no {each}"[:32])]
    seeded_random().shuffle(asked)
    found = store.get_many(asked)
    assert identical(found, {key: store.read(key) for key in asked if key in contents})
    assert list(found) == [key for key in asked if key in contents]
    assert found == {key: contents[key] for key in found}


def test_get_many_takes_any_iterable_and_each_value_is_a_new_dict(store: KVStore) -> None:
    contents = numbered(50)
    store.put_many(contents)
    for keys in (tuple(contents), set(contents), contents, contents.keys(), iter(contents), store):
        assert store.get_many(keys) == contents
    assert store.get_many(key for key in contents) == contents
    one, other = store.get_many(["k0"]), store.get_many(["k0"])
    assert one == other
    assert one["k0"] is not other["k0"]


def test_a_key_that_is_asked_for_twice_is_there_once(store: KVStore) -> None:
    store.put_many(numbered(3))
    assert store.get_many(["k1", "k2", "k1"] * 20) == {"k1": {"n": 1}, "k2": {"n": 2}}


def test_the_keys_of_what_is_found_are_those_that_were_given(store: KVStore) -> None:
    store.put_many(numbered(3))
    keys = ["k0", Text("k1"), f"k{len(store) - 1}"]
    for key, given in zip(store.get_many(keys), keys, strict=True):
        assert key is given


def test_an_expired_key_is_absent_for_get_many(store: KVStore, clock: FakeClock) -> None:
    store.put_many(numbered(50), ttl=10)
    store.put_many({"k7": {"n": 7}, "k40": {"n": 40}})
    assert store.get_many(numbered(50)) == numbered(50)
    clock.advance(10)
    assert store.get_many(numbered(50)) == {"k7": {"n": 7}, "k40": {"n": 40}}


@pytest.mark.parametrize("name", ["get_many", "delete_many"])
@pytest.mark.parametrize("key", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_a_key_is_refused_wherever_it_is(
    store: KVStore, key: Any, name: str
) -> None:
    contents = numbered(5)
    store.put_many(contents)
    for place in PLACES:
        keys = [f"no {number}" for number in range(place)] + [key, *contents]
        with pytest.raises(InvalidKeyError) as caught:
            getattr(store, name)(keys)
        with pytest.raises(InvalidKeyError) as single:
            store.read(key)
        assert str(caught.value) == str(single.value)
    assert dict(store) == contents


@pytest.mark.parametrize("place", PLACES)
def test_get_many_names_the_key_whose_value_is_damaged(
    store: KVStore, open_store: OpenStore, place: int
) -> None:
    contents = {**numbered(place), "unlucky": {"text": "damaged"}, "last": {}}
    store.put_many(contents)
    store.close()
    change_byte(store.path, store.path.read_bytes().index(b"damaged"), 1)
    store = open_store(check=False)
    with pytest.raises(CorruptStoreError, match="'unlucky'"):
        store.get_many(contents)
    del contents["unlucky"]
    assert store.get_many(contents) == contents
    store.put("unlucky", {"text": "new"})
    assert store.get_many(["unlucky"]) == {"unlucky": {"text": "new"}}


def test_what_the_iterable_raises_comes_through(store: KVStore) -> None:
    store.put_many(numbered(3))
    with pytest.raises(StopHereError):
        store.get_many(and_stop(["k0", "k1"]))
    for name in ("get_many", "put_many", "delete_many"):
        for nothing in (None, 7):
            with pytest.raises(TypeError):
                getattr(store, name)(nothing)
    assert dict(store) == numbered(3)


# --- put_many -------------------------------------------------------------------------------------


GIVEN: dict[str, Callable[[dict[str, Value]], Any]] = {
    "dict": dict,
    "mapping": UserDict,
    "keys": Given,
    "view": lambda contents: contents.items(),
    "list": lambda contents: list(contents.items()),
    "iterator": lambda contents: iter(contents.items()),
    "lists": lambda contents: [list(pair) for pair in contents.items()],
    "generator": lambda contents: (pair for pair in contents.items()),
    "other strings": lambda contents: ((Text(key), value) for key, value in contents.items()),
    "iterators": lambda contents: map(iter, contents.items()),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("name", ["put_many", "update"])
def test_put_many_takes_what_the_update_of_a_dict_takes(
    store: KVStore, open_store: OpenStore, name: str, given: Callable[[dict[str, Value]], Any]
) -> None:
    contents = crowd()
    assert getattr(store, name)(given(contents)) is None
    assert identical(dict(store), contents)
    assert len(store) == len(contents)
    assert after_death(store) == contents
    store.close()
    assert dict(open_store()) == contents


def test_put_many_of_nothing_does_nothing(store: KVStore) -> None:
    nothing: Any
    for nothing in ({}, [], (), iter(()), ""):
        store.put_many(nothing)
    assert len(store) == 0


def test_put_many_replaces_value_and_time_to_live(store: KVStore, clock: FakeClock) -> None:
    store.put_many(numbered(50), ttl=10)
    assert {store.ttl(key) for key in store} == {10}
    clock.advance(4)
    store.put_many({f"k{number}": {"new": number} for number in range(40)}, 20)
    store.put_many({"k49": {"n": -1}})
    assert store.ttl("k0") == store.ttl("k39") == 20
    assert store.ttl("k40") == 6
    assert store.ttl("k49") is None
    clock.advance(6)
    assert len(store) == 41
    assert store.read("k39") == {"new": 39}
    clock.advance(14)
    assert dict(store) == {"k49": {"n": -1}}
    store.put_many(numbered(50))
    assert dict(store) == numbered(50)
    assert after_death(store) == numbered(50)


def test_of_a_key_that_is_put_twice_the_last_value_stays(store: KVStore) -> None:
    for count in (2, 31, 200):
        store.put_many(("same", {"n": number}) for number in range(count))
        assert dict(store) == {"same": {"n": count - 1}}
        store.put_many((f"{n % 7}", {"n": n}) for n in range(count))
        store.delete_many(set(store) - {"same"})


def test_a_value_is_stored_as_it_was_when_it_was_given(store: KVStore) -> None:
    """Whoever reads rows may fill the same dict for each of them."""

    def rows() -> Iterator[tuple[str, Value]]:
        row: Value = {}
        for number in range(100):
            row["n"] = number
            yield f"k{number}", row

    store.put_many(rows())
    assert dict(store) == numbered(100)


REFUSED: dict[str, tuple[Any, type[Exception]]] = {
    "no key": (("", {}), InvalidKeyError),
    "bytes for a key": ((b"bad", {}), InvalidKeyError),
    "no dict": (("bad", None), InvalidValueError),
    "what JSON does not have": (("bad", {"when": object()}), InvalidValueError),
    "too large": (("bad", sized_value(16_385)), ValueTooLargeError),
    "one thing": (("bad",), ValueError),
    "three things": (("bad", {}, None), ValueError),
    "a number": (7, TypeError),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("refused", REFUSED)
def test_those_before_what_is_refused_are_stored_and_no_other(
    store: KVStore, refused: str, place: int
) -> None:
    item, error = REFUSED[refused]
    store.put_many({f"k{place}": {"old": True}, "after": {"old": True}, "bad": {"old": True}})
    before = {f"k{number}": {"n": number} for number in range(place)}
    given = iter([*before.items(), item, ("after", {}), (f"k{place}", {})])
    with pytest.raises(error) as caught:
        store.put_many(given)
    if error is not TypeError and type(item[0]) is str and len(item) == 2:
        with pytest.raises(error) as single:
            store.put(*item)
        assert str(caught.value) == str(single.value)
    assert next(given) == ("after", {})  # was not taken
    old = {key: {"old": True} for key in (f"k{place}", "after", "bad")}
    assert dict(store) == {**old, **before}
    assert after_death(store) == dict(store)


@pytest.mark.parametrize("ttl", [0, -1, True, 1.5, "1", 10**10 + 1])
def test_a_ttl_that_is_refused_stores_nothing(store: KVStore, ttl: Any) -> None:
    with pytest.raises(InvalidTTLError, match="'k0'"):
        store.put_many(numbered(50), ttl)
    assert len(store) == 0


@pytest.mark.parametrize("place", PLACES)
def test_what_an_iterable_gave_before_it_raised_is_stored(store: KVStore, place: int) -> None:
    with pytest.raises(StopHereError):
        store.put_many(and_stop(numbered(place).items()))
    assert dict(store) == numbered(place)
    with pytest.raises(KeyboardInterrupt):
        store.put_many(_interrupted(place))
    assert len(store) == 2 * place


def _interrupted(place: int) -> Iterator[tuple[str, Value]]:
    for number in range(place):
        yield f"again {number}", {}
    raise KeyboardInterrupt


def test_a_full_store_has_those_before_the_one_that_is_named(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    store.put("old", {"n": 1})
    given = ((f"large {number}", sized_value(16_384, number)) for number in itertools.count())
    with pytest.raises(StoreFullError, match=r"key 'large \d+': .*test.kvs") as caught:
        store.put_many(given)
    stored = len(store) - 1
    assert f"'large {stored}'" in str(caught.value)
    expected = {f"large {number}": sized_value(16_384, number) for number in range(stored)}
    assert dict(store) == {"old": {"n": 1}, **expected}
    assert store.delete_many(expected) == stored
    store.put_many(expected)
    assert dict(store) == {"old": {"n": 1}, **expected}


def refuse(
    store: KVStore, monkeypatch: pytest.MonkeyPatch, step: str, refused: str, error: Exception
) -> None:
    """Have what stores or deletes one key raise the error for that key."""
    real = getattr(store._one_key, step)

    def take(key: str, *arguments: Any, **named: Any) -> Any:
        if key == refused:
            raise error
        return real(key, *arguments, **named)

    monkeypatch.setattr(store, "_fast", None)
    monkeypatch.setattr(store._one_key, step, take)


def test_what_the_system_refuses_says_for_which_key(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(store, monkeypatch, "store", "k2", OSError(5, "refused"))
    with pytest.raises(OSError, match="refused") as caught:
        store.put_many(numbered(5))
    assert caught.value.__notes__ == ["key 'k2' was not put; those before it were"]
    assert dict(store) == numbered(2)
    refuse(store, monkeypatch, "delete", "k1", OSError(5, "refused"))
    with pytest.raises(OSError, match="refused") as caught:
        store.delete_many(numbered(2))
    assert caught.value.__notes__ == ["key 'k1' was not deleted; those before it were"]
    assert list(store) == ["k1"]


def test_a_full_disk_that_refuses_a_deletion_says_of_which_key(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_many(numbered(5))
    refuse(store, monkeypatch, "delete", "k2", StoreFullError("/a/file: no room to overwrite"))
    with pytest.raises(StoreFullError, match=r"^key 'k2': /a/file: no room to overwrite$"):
        store.delete_many(numbered(5))
    assert sorted(store) == ["k2", "k3", "k4"]


def test_put_many_takes_another_store_and_even_itself(
    store: KVStore, open_store: OpenStore, tmp_path: Path
) -> None:
    contents = numbered(2000)
    store.put_many(contents)
    other = open_store(tmp_path / "other.kvs")
    other.put_many(store)
    assert dict(other) == contents
    store.put_many(store)
    assert dict(store) == contents
    assert store.delete_many(other) == len(contents)


def test_what_gives_the_items_may_use_the_store(store: KVStore) -> None:
    """Nothing is held while they are given."""
    contents = numbered(100)
    store.put_many(contents)
    store.put_many((f"new {key}", store.pop(key)) for key in contents)
    assert dict(store) == {f"new {key}": value for key, value in contents.items()}
    assert store.get_many(key for key in store if store[key]["n"] < 3) == {
        f"new k{number}": {"n": number} for number in range(3)
    }
    assert store.delete_many(key for key in store if len(store)) == 100
    assert len(store) == 0


# --- delete_many ----------------------------------------------------------------------------------


def test_delete_many_says_how_many_were_there_and_are_gone(
    store: KVStore, open_store: OpenStore
) -> None:
    contents = crowd()
    store.put_many(contents)
    keys = list(contents)
    assert store.delete_many([]) == 0
    assert store.delete_many(["absent", keys[0], "absent as well", keys[1]]) == 2
    assert store.delete_many(keys[:100] + keys[50:120]) == 118
    left = {key: contents[key] for key in keys[120:]}
    assert dict(store) == left
    assert after_death(store) == left
    assert store.delete_many(key for key in keys) == len(left)
    assert store.delete_many(keys) == 0
    assert len(store) == 0
    store.close()
    assert dict(open_store()) == {}


def test_a_key_that_is_deleted_twice_counts_once(store: KVStore) -> None:
    store.put_many(numbered(3))
    assert store.delete_many(["k0", "k0", Text("k1"), "k1"] * 20) == 2
    assert dict(store) == {"k2": {"n": 2}}


def test_an_expired_key_is_not_counted_as_deleted(store: KVStore, clock: FakeClock) -> None:
    store.put_many(numbered(50), ttl=10)
    store.put_many({"k7": {"n": 7}}, ttl=11)
    clock.advance(10)
    assert store.delete_many(numbered(50)) == 1
    assert len(store) == 0


def test_delete_many_removes_what_is_damaged(store: KVStore, open_store: OpenStore) -> None:
    store.put_many({**numbered(40), "unlucky": {"text": "damaged"}})
    store.close()
    change_byte(store.path, store.path.read_bytes().index(b"damaged"), 1)
    store = open_store()
    assert store.delete_many([*numbered(40), "unlucky"]) == 41
    assert len(store) == 0


@pytest.mark.parametrize("place", PLACES)
def test_those_before_what_cannot_be_a_key_are_gone_and_no_other(
    store: KVStore, place: int
) -> None:
    contents = numbered(place + 50)
    store.put_many(contents)
    keys = list(contents)
    given = iter([*keys[:place], "x" * 33, *keys[place:]])
    with pytest.raises(InvalidKeyError):
        store.delete_many(given)
    assert list(given) == keys[place:]
    assert dict(store) == {key: contents[key] for key in keys[place:]}
    with pytest.raises(StopHereError):
        store.delete_many(and_stop(keys[place : place + 40]))
    assert dict(store) == {key: contents[key] for key in keys[place + 40 :]}


def test_what_was_deleted_does_not_come_back_with_what_it_had_replaced(store: KVStore) -> None:
    store.put_many(numbered(100))
    store.sync()
    store.put_many({key: {"new": True} for key in numbered(100)})
    assert store.delete_many(numbered(90)) == 90
    expected = {f"k{number}": {"new": True} for number in range(90, 100)}
    assert dict(store) == after_death(store) == expected


# --- all of them ----------------------------------------------------------------------------------


def test_batches_lose_nothing_while_the_table_grows(store: KVStore) -> None:
    """Each of its segments is split amid some group of keys, of which half go elsewhere then."""
    contents = numbered(20_000)
    twice = ((key, value) for key in contents for value in ({}, contents[key]))
    store.put_many(twice)
    assert store.stats().segments > 16
    assert store.get_many(contents) == contents
    assert sorted(store) == sorted(contents)
    assert store.delete_many(contents) == len(contents)
    assert not store


def test_random_batches_leave_what_a_dictionary_holds(
    store: KVStore, open_store: OpenStore
) -> None:
    random = seeded_random()
    expected: dict[str, Value] = {}
    for mark in range(scaled(100)):
        keys = [
            f"{'é' * 16 if random.random() < 0.3 else ''}{random.randrange(300)}"
            for _ in range(random.choice((1, 10, 100)))
        ]
        match random.randrange(5):
            case 0:
                gone = sum(expected.pop(key, None) is not None for key in keys)
                assert store.delete_many(keys) == gone
            case 1:
                found = {key: expected[key] for key in keys if key in expected}
                assert store.get_many(keys) == found
            case _:
                value = sized_value(random.choice((12, 100, 600, 3_000)), mark)
                store.put_many((key, value) for key in keys)
                expected.update((key, value) for key in keys)
        if random.random() < 0.1:
            store.sync()
    assert dict(store) == expected == after_death(store)


CALLS: dict[str, Callable[[KVStore, Iterable[str]], object]] = {
    "get_many": KVStore.get_many,
    "put_many": lambda store, keys: store.put_many(zip(keys, itertools.repeat({"n": 1}))),
    "delete_many": KVStore.delete_many,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closed_store_takes_no_batch_be_it_empty(store: KVStore, call: Any) -> None:
    store.put_many(numbered(3))
    store.close()
    for keys in ([], ["k0"], ["absent", ""]):
        with pytest.raises(StoreClosedError):
            call(store, keys)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_batch_ends_where_the_store_is_closed_amid_it(
    store: KVStore, open_store: OpenStore, call: Any
) -> None:
    store.put_many(numbered(100))

    def keys() -> Iterator[str]:
        yield from numbered(50)
        store.close()
        yield from itertools.cycle(numbered(100))

    with pytest.raises(StoreClosedError):
        call(store, keys())
    left = set(open_store())
    assert {f"k{number}" for number in range(50, 100)} <= left <= set(numbered(100))


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_threads_have_their_turn_amid_a_batch(
    open_store: OpenStore, call: Any, durable: bool
) -> None:
    """These never end by themselves, nor run any Python of the caller's; another thread closes."""
    store = open_store(durable=durable)
    store.put_many(numbered(100))
    started = threading.Event()

    def go_on() -> None:
        started.set()
        with suppress(StoreClosedError):
            call(store, itertools.cycle([*numbered(100)]))

    def work_and_close() -> None:
        started.wait(60)
        for number in range(20):
            store.put("other", {"n": number})
            assert store.read("other") == {"n": number}
        store.close()

    run_together(go_on, work_and_close)
    assert store.closed


def test_each_value_is_the_old_one_or_the_new_one(store: KVStore) -> None:
    keys = list(numbered(100))
    store.put_many((key, {"by": 0, "of": [key] * 20}) for key in keys)
    done = threading.Event()

    def put() -> None:
        for turn in range(1, scaled(50) + 1):
            store.put_many((key, {"by": turn, "of": [key] * 20}) for key in keys)
        done.set()

    def read() -> None:
        seen = dict.fromkeys(keys, 0)
        while not done.is_set():
            for key, value in store.get_many(keys).items():
                assert value["of"] == [key] * 20
                assert value["by"] >= seen[key]
                seen[key] = value["by"]
            assert seen.keys() == set(keys)

    run_together(put, read, read)


def test_of_threads_that_delete_the_same_keys_each_key_is_counted_by_one(store: KVStore) -> None:
    for _ in range(scaled(10)):
        store.put_many(numbered(1000))
        counts: list[int] = []

        def delete(counts: list[int] = counts) -> None:
            counts.append(store.delete_many(numbered(1000)))

        run_together(delete, delete, delete)
        assert sum(counts) == 1000
        assert len(store) == 0


@needs_signals
@pytest.mark.parametrize("durable", [False, True])
def test_a_batch_that_is_interrupted_has_stored_the_first_of_its_items(
    path: Path, durable: bool
) -> None:
    """Whether the iterable runs Python or not: what comes is met within one group of items."""
    said = run_script(
        """
        import itertools
        store = KVStore(sys.argv[1], durable=sys.argv[2] == "True")
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        keys = [f"k{number}" for number in range(3000)]
        for turn in range(10):
            value = {"turn": turn}
            signal.setitimer(signal.ITIMER_REAL, 0.001 + turn / 1000)
            try:
                store.put_many(zip(keys, itertools.repeat(value)))
            except KeyboardInterrupt:
                pass
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            new = [key for key in keys if store.get(key) == value]
            assert new == keys[:len(new)], new[:5]
            signal.setitimer(signal.ITIMER_REAL, 0.001 + turn / 1000)
            try:
                while True:
                    store.get_many(itertools.cycle(keys))
            except KeyboardInterrupt:
                pass
        left = dict(store)
        store.close()
        with KVStore(sys.argv[1]) as store:
            assert dict(store) == left
        say("whole")
        """,
        path,
        durable,
    )
    assert said == "whole\n"


@needs_fork
@pytest.mark.parametrize("durable", [False, True])
def test_the_child_of_a_fork_amid_a_batch_disturbs_nobody(path: Path, durable: bool) -> None:
    said = run_script(
        """
        import itertools
        store = KVStore(sys.argv[1], durable=sys.argv[2] == "True")
        contents = {f"k{number}": {"n": number} for number in range(100)}
        for act in (
            store.get_many,
            lambda keys: store.put_many(zip(keys, itertools.repeat({}))),
            store.delete_many,
        ):
            store.put_many(contents)
            children = []
            def keys():
                yield from list(contents)[:50]
                children.append(os.fork())
                yield from list(contents)[50:]
            try:
                act(keys())
                outcome = 1
            except StoreClosedError:
                outcome = 0
            if not children[0]:
                os._exit(outcome)
            assert os.waitpid(children[0], 0)[1] == 0
            assert outcome == 1
        assert len(store) == 0
        store.close()
        say("undisturbed")
        """,
        path,
        durable,
    )
    assert said == "undisturbed\n"


# --- flushes --------------------------------------------------------------------------------------


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[KVStore]:
    """A durable store with a few keys, on a quick disk; its first changes are behind it."""
    with quick_folder(tmp_path) as folder, KVStore(folder / "test.kvs", durable=True) as store:
        store.put_many(numbered(10))
        store.delete("k9")
        yield store


@contextmanager
def flushes() -> Iterator[list[bytes]]:
    """Count flushes: the list gets an item for each."""
    count: list[bytes] = []
    with before_each_flush(lambda: count.append(b"")):
        yield count


@needs_linux
def test_a_durable_batch_has_one_flush(durable: KVStore) -> None:
    for act in (
        lambda: durable.put_many(numbered(200)),
        lambda: durable.update({"k1": {}, "k2": {}}, k3={}, k4={}),
        lambda: durable.put_many(((key, {"again": key}) for key in numbered(150)), ttl=60),
        lambda: durable.delete_many(["absent", *numbered(180)]),
        lambda: durable.delete_many([*numbered(181)]),
    ):
        with flushes() as count:
            act()
        assert len(count) == 1
    assert len(durable) == 19


@needs_linux
def test_a_batch_that_changes_nothing_does_not_wait_for_the_disk(durable: KVStore) -> None:
    with flushes() as count:
        durable.put_many({})
        durable.update()
        durable.delete_many([])
        durable.delete_many(["absent", "absent as well"])
        durable.get_many(numbered(10))
        with pytest.raises(InvalidKeyError):
            durable.put_many({"": {}})
    assert count == []


@needs_linux
@pytest.mark.parametrize("place", [1, 5, 40])
def test_those_before_an_error_are_flushed_before_it_is_raised(
    durable: KVStore, place: int
) -> None:
    given = [(f"new {number}", {"marker": f"<{number}>"}) for number in range(place)]
    at_flush: list[bytes] = []
    items: Any
    for items, error in (
        ([*given, ("bad", {"n": object()})], InvalidValueError),
        (and_stop(given), StopHereError),
    ):
        del at_flush[:]
        with (
            before_each_flush(lambda: at_flush.append(durable.path.read_bytes())),
            pytest.raises(error),
        ):
            durable.put_many(items)
        assert len(at_flush) == 1
        assert all(f"<{number}>".encode() in at_flush[0] for number in range(place))
    with flushes() as count, pytest.raises(StopHereError):
        durable.delete_many(and_stop(key for key, _ in given))
    assert len(count) == 1


@needs_linux
def test_a_batch_that_the_disk_does_not_take_raises_as_a_single_put_does(
    durable: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "refused")

    with monkeypatch.context() as patched:
        patched.setattr("kvstore.file.platform.system.flush_pages", refuse)
        patched.setattr("kvstore.file.platform.system.flush_file", refuse)
        with pytest.raises(OSError, match="refused"):
            durable.put_many(numbered(50))
    assert durable.get_many(numbered(50)) == numbered(50)
    for call in (
        partial(durable.put_many, {"k0": {}}),
        partial(durable.delete_many, ["k1"]),
        durable.close,
    ):
        with pytest.raises(OSError, match=r"earlier flush failed|refused"):
            call()


@needs_linux
def test_a_batch_of_a_store_that_is_not_durable_does_not_wait_for_the_disk(store: KVStore) -> None:
    store.put("first", {})
    with flushes() as count:
        store.put_many(numbered(500))
        store.delete_many(numbered(400))
    assert count == []
