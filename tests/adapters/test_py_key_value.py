"""`KVStoreStore` is a store of py-key-value-aio, and keeps times-to-live to the microsecond."""

import asyncio
import doctest
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, ParamSpec, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import processes
from support.clock import FakeClock
from support.files import change_byte
from support.threads import run_together

from kvstore import KVStore, StoreClosedError, StoreFullError, StoreLockedError

pytest.importorskip(
    "key_value.aio", reason="py-key-value-aio is not installed; the extra [py-key-value] has it"
)

from key_value.aio._utils import managed_entry, time_to_live
from key_value.aio.errors import (
    DeserializationError,
    InvalidTTLError,
    SerializationError,
    ValueTooLargeError,
)
from key_value.aio.protocols.key_value import (
    AsyncCullProtocol,
    AsyncDestroyCollectionProtocol,
    AsyncDestroyStoreProtocol,
    AsyncEnumerateCollectionsProtocol,
    AsyncEnumerateKeysProtocol,
    AsyncKeyValue,
)

from kvstore.adapters import py_key_value as adapter
from kvstore.adapters.py_key_value import KVStoreStore
from kvstore.adapters.records import record_key

Arguments = ParamSpec("Arguments")

MICROSECOND: Final = 1e-6


def in_event_loop(
    test: Callable[Arguments, Coroutine[Any, Any, None]],
) -> Callable[Arguments, None]:
    """Have a test that is a coroutine run in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> None:
        asyncio.run(test(*arguments, **options))

    return run


class OpenStore(Protocol):
    def __call__(self, **options: Any) -> KVStoreStore: ...


@pytest.fixture
def open_store(path: Path, request: pytest.FixtureRequest) -> OpenStore:
    """A function that opens a store at `path`; closed as the test ends."""

    def open_one(**options: Any) -> KVStoreStore:
        store = KVStoreStore(path, **options)
        request.addfinalizer(store.store.close)
        return store

    return open_one


@pytest.fixture
def kv(open_store: OpenStore) -> KVStoreStore:
    return open_store()


@pytest.fixture
def both_clocks(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The clock of every store and of py-key-value, in the test's hands."""
    monkeypatch.setattr(time_to_live, "now", lambda: shown_by(clock))
    monkeypatch.setattr(managed_entry, "now", lambda: shown_by(clock))
    return clock


def shown_by(clock: FakeClock) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=clock() // 1000)


# --- values, collections, keys ---------------------------------------------------------------


def test_it_offers_all_protocols_of_the_library(kv: KVStoreStore) -> None:
    for protocol in (
        AsyncKeyValue,
        AsyncCullProtocol,
        AsyncDestroyCollectionProtocol,
        AsyncDestroyStoreProtocol,
        AsyncEnumerateCollectionsProtocol,
        AsyncEnumerateKeysProtocol,
    ):
        assert isinstance(kv, protocol)


@in_event_loop
async def test_a_value_is_there_after_put_and_gone_after_delete(kv: KVStoreStore) -> None:
    assert await kv.get("key") is None
    await kv.put("key", {"n": 1, "of": [1.5, None, {"a": "b"}]})
    assert await kv.get("key") == {"n": 1, "of": [1.5, None, {"a": "b"}]}
    assert await kv.ttl("key") == ({"n": 1, "of": [1.5, None, {"a": "b"}]}, None)
    await kv.put("key", {})
    assert await kv.get("key") == {}
    assert await kv.delete("key") is True
    assert await kv.delete("key") is False
    assert await kv.ttl("key") == (None, None)


@in_event_loop
async def test_the_same_key_is_another_in_another_collection(kv: KVStoreStore) -> None:
    await kv.put("key", {"in": "default"})
    await kv.put("key", {"in": "a"}, collection="a")
    await kv.put("key", {"in": "b"}, collection="b")
    assert await kv.get("key") == {"in": "default"}
    assert await kv.get("key", collection="a") == {"in": "a"}
    assert await kv.delete("key", collection="a")
    assert await kv.get("key", collection="b") == {"in": "b"}


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(st.tuples(any_text, any_text), st.integers(0, 9), max_size=8))
@in_event_loop
async def test_any_strings_are_collections_and_keys(
    tmp_path_factory: pytest.TempPathFactory, values: dict[tuple[str, str], int]
) -> None:
    async with KVStoreStore(tmp_path_factory.mktemp("any") / "state.kvs") as kv:
        merged = {
            (collection or kv.default_collection, key): n for (collection, key), n in values.items()
        }
        for (collection, key), number in values.items():
            await kv.put(key, {"n": number}, collection=collection)
        for (collection, key), number in merged.items():
            assert await kv.get(key, collection=collection) == {"n": number}
        assert set(await kv.collections()) == {collection for collection, _ in merged}
        for collection in await kv.collections():
            assert set(await kv.keys(collection)) == {key for of, key in merged if of == collection}


def test_no_two_pairs_of_names_run_into_each_other() -> None:
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("a\x00", "b"), ("a", "\x00b")]
    assert len({record_key(*pair) for pair in pairs}) == len(pairs)
    assert {len(record_key(*pair)) for pair in pairs} == {32}
    assert (
        record_key("users", "ada") == "Yl4p4W6QUeFlZqjMnQHGhWb2ZxTJ_CQf"
    )  # stays as it is on disk


@in_event_loop
async def test_a_record_tells_its_collection_and_key_of_any_length(kv: KVStoreStore) -> None:
    collection, key = "collection" * 100, "key" * 1000
    await kv.put(key, {"n": 1}, collection=collection)
    [(name, record)] = kv.store.items()
    assert len(name) == 32
    assert record["collection"] == collection
    assert record["key"] == key
    assert record["value"] == {"n": 1}
    assert await kv.get(key, collection=collection) == {"n": 1}


@in_event_loop
async def test_a_record_of_another_key_is_not_taken_for_this_one(kv: KVStoreStore) -> None:
    """No two keys are known to have one hash: these are put there by hand."""
    kv.store.put(
        record_key("c", "key"), {"version": 1, "collection": "c", "key": "no", "value": {}}
    )
    kv.store.put("a key of the program's own", {"key": "key", "collection": "c"})
    assert await kv.get("key", collection="c") is None
    assert await kv.get_many(["key"], collection="c") == [None]
    assert await kv.delete("key", collection="c") is False
    assert await kv.collections() == []
    assert await kv.keys("c") == []
    assert len(kv.store) == 2


# --- times-to-live ---------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.25, 1, 1.0, 2.5, 10, 86_400.000001])
@pytest.mark.parametrize("into_the_millisecond", [0, 0.0004, 0.000999])
@in_event_loop
async def test_a_value_stays_for_its_ttl_to_the_microsecond(
    kv: KVStoreStore, both_clocks: FakeClock, seconds: float, into_the_millisecond: float
) -> None:
    both_clocks.advance(into_the_millisecond)
    await kv.put("key", {"n": 1}, ttl=seconds)
    assert await kv.ttl("key") == ({"n": 1}, seconds)
    both_clocks.advance(seconds - MICROSECOND)
    assert await kv.get("key") == {"n": 1}
    assert await kv.keys() == ["key"]
    both_clocks.advance(MICROSECOND)
    assert await kv.get("key") is None
    assert await kv.ttl_many(["key"]) == [(None, None)]
    assert await kv.keys() == []
    assert await kv.collections() == []
    assert await kv.delete("key") is False


@in_event_loop
async def test_the_space_of_what_has_expired_comes_back_within_two_seconds(
    kv: KVStoreStore, both_clocks: FakeClock
) -> None:
    await kv.put("key", {"n": 1}, ttl=0.5)
    both_clocks.advance(0.6)
    assert await kv.get("key") is None
    both_clocks.advance(2)
    assert len(kv.store) == 0
    await kv.cull()
    assert kv.store.purge_expired() == 0


@in_event_loop
async def test_without_a_ttl_a_value_stays_and_a_put_gives_another_ttl(
    kv: KVStoreStore, both_clocks: FakeClock
) -> None:
    await kv.put("key", {"n": 1}, ttl=10)
    await kv.put("key", {"n": 2})
    await kv.put("long", {"n": 3}, ttl=2 * 10**10)  # longer than the store has
    both_clocks.advance(10**9)
    assert await kv.get("key") == {"n": 2}
    assert await kv.get("long") == {"n": 3}


@pytest.mark.parametrize("ttl", [0, -1, -0.5, True, "10"])
@in_event_loop
async def test_what_is_no_ttl_is_refused_by_the_librarys_own_error(
    kv: KVStoreStore, ttl: Any
) -> None:
    with pytest.raises((InvalidTTLError, TypeError)):
        await kv.put("key", {"n": 1}, ttl=ttl)
    assert await kv.get("key") is None


@in_event_loop
async def test_a_ttl_goes_on_while_the_store_is_closed(
    open_store: OpenStore, both_clocks: FakeClock
) -> None:
    kv = open_store()
    await kv.put("key", {"n": 1}, ttl=1.5)
    await kv.close()
    kv = open_store()
    assert await kv.ttl("key") == ({"n": 1}, 1.5)
    await kv.close()
    both_clocks.advance(1.5)
    assert await open_store().get("key") is None


# --- many at once ----------------------------------------------------------------------------


@in_event_loop
async def test_many_keys_are_one_call_of_the_store_each(
    kv: KVStoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("get_many", "put_many", "delete_many"):
        method: Callable[..., Any] = getattr(KVStore, name)

        def noting(*arguments: Any, name: str = name, method: Any = method) -> Any:
            called.append(name)
            return method(*arguments)

        monkeypatch.setattr(KVStore, name, noting)
    keys = [f"key {number}" for number in range(50)]
    values = [{"n": number} for number in range(50)]
    await kv.put_many(keys, values, ttl=100)
    assert await kv.get_many(["absent", *keys, "key 0"]) == [None, *values, {"n": 0}]
    assert called == ["put_many", "get_many"]
    found = await kv.ttl_many(keys)
    assert [value for value, _ in found] == values
    assert all(ttl is not None and 90 < ttl <= 100 for _, ttl in found)
    called.clear()
    assert await kv.delete_many(["absent", *keys, "key 0"]) == 50
    assert called == ["get_many", "delete_many"]
    await kv.put_many([], [])
    assert await kv.get_many([]) == []
    assert await kv.delete_many([]) == 0


@in_event_loop
async def test_what_has_expired_is_not_counted_as_deleted(
    kv: KVStoreStore, both_clocks: FakeClock
) -> None:
    await kv.put_many(["a", "b"], [{}, {}], ttl=0.5)
    await kv.put("c", {})
    both_clocks.advance(0.5)
    assert await kv.delete_many(["a", "b", "c"]) == 1


# --- what cannot be stored, or not read any more ---------------------------------------------


@in_event_loop
async def test_a_value_over_16_kilobytes_is_refused_by_the_librarys_own_error(
    kv: KVStoreStore,
) -> None:
    await kv.put("page", {"text": "x" * 16_000}, collection="pages")
    with pytest.raises(ValueTooLargeError) as caught:
        await kv.put("page", {"text": "x" * 16_384}, collection="pages")
    assert caught.value.extra_info is not None
    size = caught.value.extra_info.pop("size")
    assert isinstance(size, int)
    assert 16_384 < size < 16_700
    assert caught.value.extra_info == {"max_size": 16_384, "collection": "pages", "key": "page"}
    assert await kv.get("page", collection="pages") == {"text": "x" * 16_000}


@in_event_loop
async def test_of_many_those_before_the_refused_one_are_stored(kv: KVStoreStore) -> None:
    with pytest.raises(ValueTooLargeError, match="key: second"):
        await kv.put_many(["first", "second", "third"], [{}, {"text": "x" * 17_000}, {}])
    assert await kv.keys() == ["first"]


class Pair(NamedTuple):
    first: str
    second: int


@in_event_loop
async def test_a_named_tuple_is_a_list_and_too_large_as_one(kv: KVStoreStore) -> None:
    await kv.put("key", {"pair": Pair("x", 1)})
    assert await kv.get("key") == {"pair": ["x", 1]}
    with pytest.raises(ValueTooLargeError, match=r"size: 20\d{3};"):
        await kv.put("key", {"pair": Pair("x" * 20_000, 1)})


@pytest.mark.parametrize(
    "member",
    [datetime(2026, 1, 1, tzinfo=UTC), b"bytes", {1, 2}, object(), float("nan"), {1: "one"}, 2**64],
    ids=lambda member: type(member).__name__,
)
@in_event_loop
async def test_what_does_not_read_back_equal_is_a_serialization_error(
    kv: KVStoreStore, member: Any
) -> None:
    with pytest.raises(SerializationError, match=r"key 'a key': value\['value'\]\['member'\]"):
        await kv.put("a key", {"member": member})
    assert await kv.get("a key") is None


@in_event_loop
async def test_a_mapping_that_is_no_dict_is_stored_as_one(kv: KVStoreStore) -> None:
    await kv.put("key", MappingProxyType({"n": 1}))
    assert await kv.get("key") == {"n": 1}


@in_event_loop
async def test_a_damaged_value_is_a_deserialization_error_until_it_is_deleted_or_replaced(
    open_store: OpenStore, path: Path
) -> None:
    kv = open_store()
    await kv.put_many(["good", "bad", "worse"], [{"n": 1}, {"is": "damaged"}, {"is": "spoiled"}])
    await kv.close()
    for word in (b"damaged", b"spoiled"):
        change_byte(path, path.read_bytes().index(word), 1)
    kv = open_store()
    for key in ("bad", "worse"):
        with pytest.raises(DeserializationError):
            await kv.get(key)
    assert await kv.get("good") == {"n": 1}
    assert await kv.delete("bad") is True
    await kv.put("worse", {"n": 2})
    assert await kv.get_many(["good", "bad", "worse"]) == [{"n": 1}, None, {"n": 2}]


@in_event_loop
async def test_what_is_damaged_is_in_no_list_but_an_error_until_it_is_deleted(
    open_store: OpenStore, path: Path
) -> None:
    kv = open_store()
    await kv.put_many(["good", "bad"], [{"n": 1}, {"is": "damaged"}])
    await kv.close()
    change_byte(path, path.read_bytes().index(b"damaged"), 1)
    kv = open_store()
    damaged = record_key(kv.default_collection, "bad")
    for listing in (kv.keys, kv.collections, lambda: kv.destroy_collection(kv.default_collection)):
        with pytest.raises(DeserializationError, match=damaged):
            await listing()
    kv.store.delete(damaged)
    assert await kv.keys() == ["good"]
    assert await kv.destroy_collection(kv.default_collection) is True


@in_event_loop
async def test_a_full_store_is_the_stores_own_error(open_store: OpenStore) -> None:
    kv = open_store(max_bytes=4 * 1024 * 1024)
    with pytest.raises(StoreFullError):
        for number in range(1000):
            await kv.put(f"page {number}", {"text": "x" * 16_000})
    assert await kv.get("page 0") == {"text": "x" * 16_000}


# --- listing, destroying ---------------------------------------------------------------------


@in_event_loop
async def test_all_is_listed_or_as_much_as_is_asked_for(kv: KVStoreStore) -> None:
    for number in range(30):
        await kv.put(f"key {number}", {}, collection=f"of {number % 3}")
    assert sorted(await kv.collections()) == ["of 0", "of 1", "of 2"]
    assert len(await kv.collections(limit=2)) == 2
    keys = await kv.keys("of 1")
    assert sorted(keys) == sorted(f"key {number}" for number in range(1, 30, 3))
    assert await kv.keys("of 1", limit=4) == keys[:4]
    assert await kv.keys() == []


@in_event_loop
async def test_a_collection_is_destroyed_and_the_others_stay(kv: KVStoreStore) -> None:
    await kv.put_many(["a", "b"], [{}, {}], collection="old")
    await kv.put("a", {"n": 1}, collection="new")
    assert await kv.destroy_collection("old") is True
    assert await kv.destroy_collection("old") is False
    assert await kv.collections() == ["new"]
    assert await kv.get("a", collection="new") == {"n": 1}
    assert await kv.destroy() is True
    assert await kv.collections() == []
    await kv.put("a", {"n": 2}, collection="new")
    assert await kv.get("a", collection="new") == {"n": 2}


# --- loops and threads -----------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
@in_event_loop
async def test_changes_run_in_the_event_loop_or_if_durable_in_a_thread(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    kv = open_store(durable=durable)
    threads: dict[str, bool] = {}
    for name in ("get_many", "put_many", "delete_many"):
        method: Callable[..., Any] = getattr(KVStore, name)

        def noting(*arguments: Any, name: str = name, method: Any = method) -> Any:
            threads[name] = threading.current_thread() is not threading.main_thread()
            return method(*arguments)

        monkeypatch.setattr(KVStore, name, noting)
    await kv.put("key", {"n": 1})
    await kv.get("key")
    assert threads == {"put_many": durable, "get_many": False}
    await kv.delete("key")
    assert threads["delete_many"] is durable
    await kv.put_many(["key"], [{"n": 2}])
    await kv.delete_many(["key"])
    assert threads["put_many"] is threads["delete_many"] is durable


@in_event_loop
async def test_the_loop_goes_on_while_a_durable_change_waits_for_the_disk(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = open_store(durable=True)
    await kv.setup()
    flushing, may_end = threading.Event(), threading.Event()
    put_many = KVStore.put_many

    def slowly(*arguments: Any) -> None:
        flushing.set()
        assert may_end.wait(processes.PATIENCE_SECONDS)
        put_many(*arguments)

    monkeypatch.setattr(KVStore, "put_many", slowly)
    putting = asyncio.create_task(kv.put("key", {"n": 1}))
    assert await asyncio.to_thread(flushing.wait, processes.PATIENCE_SECONDS)
    assert await kv.get("key") is None
    may_end.set()
    await putting
    assert await kv.get("key") == {"n": 1}


def test_event_loops_of_several_threads_share_one_store(kv: KVStoreStore) -> None:
    async def use(name: str) -> None:
        for number in range(50):
            await kv.put(f"{name} {number}", {"by": name}, collection=name)
            assert await kv.get(f"{name} {number}", collection=name) == {"by": name}

    run_together(*(lambda name=name: asyncio.run(use(name)) for name in "abcd"))
    assert len(kv.store) == 200


# --- opening and closing ---------------------------------------------------------------------


@in_event_loop
async def test_a_context_closes_the_store_and_a_close_may_come_twice(
    open_store: OpenStore,
) -> None:
    async with open_store(seed={"users": {"ada": {"name": "Ada"}}}) as kv:
        assert await kv.get("ada", collection="users") == {"name": "Ada"}
    assert kv.store.closed
    await kv.close()
    with pytest.raises(StoreClosedError):
        await kv.get("ada", collection="users")
    unused = open_store()
    await unused.close()
    assert unused.store.closed


@in_event_loop
async def test_the_default_collection_may_have_another_name(open_store: OpenStore) -> None:
    async with open_store(default_collection="mine") as kv:
        await kv.put("key", {})
        assert await kv.collections() == ["mine"]


def test_a_second_process_is_refused_and_told_what_to_do(kv: KVStoreStore, path: Path) -> None:
    code = (
        "import sys\n"
        "from kvstore import StoreLockedError\n"
        "from kvstore.adapters.py_key_value import KVStoreStore\n"
        "try:\n"
        "    KVStoreStore(sys.argv[1])\n"
        "except StoreLockedError as error:\n"
        "    print(error)\n"
    )
    told = processes.run_python(code, path)
    assert str(os.getpid()) in told
    assert "KVStoreStore is for a server of one process" in told


def test_a_second_store_of_the_same_process_is_refused_as_well(
    kv: KVStoreStore, open_store: OpenStore
) -> None:
    with pytest.raises(StoreLockedError, match=r"this very process.*one process"):
        open_store()


def test_the_examples_are_true() -> None:
    results = doctest.testmod(adapter)
    assert results.attempted
    assert not results.failed
