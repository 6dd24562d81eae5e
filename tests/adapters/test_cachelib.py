"""`KVStoreCache` is a cache of cachelib that survives restarts, in one process."""

import doctest
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import processes
from support.clock import FakeClock
from support.files import change_byte
from support.threads import run_together

from kvstore import (
    InvalidKeyError,
    InvalidValueError,
    KVStore,
    StoreClosedError,
    StoreFullError,
    StoreLockedError,
    ValueTooLargeError,
)

pytest.importorskip("cachelib", reason="cachelib is not installed; the extra [cachelib] has it")

from cachelib import BaseCache
from cachelib.serializers import BaseSerializer, JSONSerializer

from kvstore.adapters import cachelib as adapter
from kvstore.adapters.cachelib import KVStoreCache


class OpenCache(Protocol):
    def __call__(self, path: Path | None = None, **options: Any) -> KVStoreCache: ...


@pytest.fixture
def open_cache(path: Path) -> Iterator[OpenCache]:
    """A function that opens a cache, at `path` unless told else; closed as the test ends."""
    usual = path
    with ExitStack() as closing:

        def open_one(path: Path | None = None, **options: Any) -> KVStoreCache:
            cache = KVStoreCache(path or usual, **options)
            closing.callback(cache.store.close)
            return cache

        yield open_one


@pytest.fixture
def cache(open_cache: OpenCache) -> KVStoreCache:
    return open_cache()


# --- one key ---------------------------------------------------------------------------------


def test_a_value_is_there_after_set_and_gone_after_delete(cache: KVStoreCache) -> None:
    assert cache.get("key") is None
    assert not cache.has("key")
    assert cache.set("key", "value") is True
    assert cache.get("key") == "value"
    assert cache.has("key")
    assert cache.delete("key") is True
    assert cache.delete("key") is False
    assert cache.get("key") is None


def test_set_replaces_and_add_does_not(cache: KVStoreCache, clock: FakeClock) -> None:
    assert cache.add("key", 1, timeout=10) is True
    assert cache.add("key", 2) is False
    assert cache.get("key") == 1
    cache.set("key", 3, timeout=10)
    assert cache.get("key") == 3
    clock.advance(10)
    assert cache.add("key", 4) is True
    assert cache.get("key") == 4


@pytest.mark.parametrize(
    "value",
    [None, False, 0, 1.5, "", "text", [], [1, [2]], {}, {"a": {"b": None}}, b"\x00\xff", (1, (2,))],
)
def test_a_value_need_not_be_a_dict(cache: KVStoreCache, value: Any) -> None:
    cache.set("key", value)
    back = cache.get("key")
    assert back == value
    assert type(back) is type(value)
    assert cache.has("key")


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9)))
def test_any_strings_are_keys_and_each_is_its_own(
    open_cache: OpenCache, tmp_path_factory: pytest.TempPathFactory, values: dict[str, int]
) -> None:
    cache = open_cache(tmp_path_factory.mktemp("any") / "cache.kvs")
    assert cache.set_many(values) == list(values)
    assert cache.get_dict(*values) == values
    cache.store.close()


@pytest.mark.parametrize("key", ["", "k" * 10_000, "a\x00b", "é" * 33, "session:" + "x" * 43])
def test_a_key_of_any_length_has_a_record_of_32_characters_that_names_it(
    cache: KVStoreCache, key: str
) -> None:
    cache.set(key, 1)
    [(record_key, record)] = cache.store.items()
    assert len(record_key) == 32
    assert record == {"key": key, "value": 1}
    assert cache.get(key) == 1


@pytest.mark.parametrize("key", [5, b"key", None, ("a", 1)])
def test_a_key_that_is_no_string_is_refused(cache: KVStoreCache, key: Any) -> None:
    for call in (cache.get, cache.has, cache.delete, cache.inc, lambda key: cache.set(key, 1)):
        with pytest.raises(InvalidKeyError, match="allowed is a str"):
            call(key)


def test_of_a_very_long_key_an_error_tells_the_beginning(cache: KVStoreCache) -> None:
    with pytest.raises(ValueTooLargeError, match=r"key 'page/kkk.*kk…': value is 20,") as raised:
        cache.set("page/" + "k" * 20_000, 1)
    assert len(str(raised.value)) < 300


def test_a_record_of_another_key_is_not_taken_for_this_one(cache: KVStoreCache) -> None:
    """No two keys are known to have one hash: this one is put there by hand."""
    cache.set("key", 1)
    [record_key] = cache.store
    cache.store.put(record_key, {"key": "another", "value": 2})
    assert cache.get("key") is None
    assert cache.get_many("key") == [None]


# --- timeouts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "timeout", "seconds"),
    [
        (300, None, 300),
        (300, 7, 7),
        (300, 0, None),
        (0, None, None),
        (0, 7, 7),
        (timedelta(minutes=1), None, 60),
        (300, timedelta(milliseconds=1200), 2),
        (300, timedelta(0), None),
        (300, 10**10, 10**10),
        (300, 10**11, None),
    ],
)
def test_a_value_stays_for_its_timeout_to_the_millisecond(
    open_cache: OpenCache, clock: FakeClock, default: Any, timeout: Any, seconds: int | None
) -> None:
    cache = open_cache(default_timeout=default)
    cache.set("set", 1, timeout)
    cache.add("add", 1, timeout)
    cache.set_many({"many": 1}, timeout)
    keys = ("set", "add", "many")
    if seconds is None:
        clock.advance(10**9)
        assert cache.get_many(*keys) == [1, 1, 1]
    else:
        clock.advance(seconds - 0.001)
        assert cache.get_many(*keys) == [1, 1, 1]
        clock.advance(0.001)
        assert cache.get_many(*keys) == [None, None, None]
        assert not any(map(cache.has, keys))
        assert not any(map(cache.delete, keys))


def test_a_timeout_below_zero_has_passed_already(cache: KVStoreCache) -> None:
    cache.set("key", 1)
    assert cache.add("key", 2, timeout=-1) is False
    assert cache.get("key") == 1
    cache.set("key", 2, timeout=-1)
    assert cache.get("key") is None
    assert cache.add("key", 3, timeout=-1) is True
    assert cache.get("key") is None


def test_a_timeout_that_is_no_number_is_refused_and_nothing_is_stored(cache: KVStoreCache) -> None:
    with pytest.raises(TypeError, match="timeout must be an int"):
        cache.set("key", 1, timeout="60")  # type: ignore[arg-type]
    assert not cache.has("key")


# --- many keys -------------------------------------------------------------------------------


def test_many_keys_are_one_call_of_the_store_each(
    cache: KVStoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("get_many", "put_many", "delete_many"):
        method: Callable[..., Any] = getattr(KVStore, name)

        def counting(
            *arguments: Any, name: str = name, method: Any = method, **options: Any
        ) -> Any:
            called.append(name)
            return method(*arguments, **options)

        monkeypatch.setattr(KVStore, name, counting)
    values = {f"key {number}": number for number in range(100)}
    assert cache.set_many(values) == list(values)
    assert cache.get_many(*values, "absent") == [*values.values(), None]
    assert cache.delete_many(*values, "absent") == [*values, "absent"]
    assert cache.get_dict("key 1", "key 2") == {"key 1": None, "key 2": None}
    assert called == ["put_many", "get_many", "delete_many", "get_many"]


def test_clear_removes_everything(cache: KVStoreCache) -> None:
    cache.set_many({"a": 1, "b": 2})
    assert cache.clear() is True
    assert cache.get_many("a", "b") == [None, None]
    assert len(cache.store) == 0


# --- counting --------------------------------------------------------------------------------


def test_inc_and_dec_count_from_nothing(cache: KVStoreCache, clock: FakeClock) -> None:
    assert cache.inc("up") == 1
    assert cache.inc("up", 5) == 6
    assert cache.dec("up", 2) == 4
    assert cache.dec("down") == -1
    assert cache.get_many("up", "down") == [4, -1]
    clock.advance(cache.default_timeout)
    assert cache.inc("up") == 1


def test_threads_that_count_miss_nothing(cache: KVStoreCache, frequent_switches: None) -> None:
    def count() -> None:
        for _ in range(300):
            cache.inc("hits", 2)
            cache.dec("hits")

    run_together(count, count, count, count)
    assert cache.get("hits") == 4 * 300


def test_what_another_thread_sets_is_never_counted_over(
    cache: KVStoreCache, frequent_switches: None
) -> None:
    """A set between the reading and the writing of `inc` would be lost: there is no such moment."""
    rounds = 300
    cache.set("hits", 0)

    def count() -> None:
        for _ in range(rounds):
            cache.inc("hits")

    def raise_the_count() -> None:
        for number in range(1, 11):
            cache.set_many({"hits": 1000 * number})

    run_together(count, raise_the_count)
    assert cache.get("hits") >= 10_000


def test_of_threads_that_add_one_wins(cache: KVStoreCache, frequent_switches: None) -> None:
    won: list[int] = []

    def add(number: int) -> None:
        won.extend(key for key in range(50) if cache.add(f"key {key}", number))

    run_together(*(lambda number=number: add(number) for number in range(4)))
    assert sorted(won) == list(range(50))


# --- what cannot be stored, or not read any more --------------------------------------------


class User:
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (User(), r"\['value'\]: .*User"),
        ({"user": [User()]}, r"\['value'\]\['user'\]\[0\]: .*User"),
        (float("nan"), "nan"),
        (2**64, "65 bits"),
        (timedelta(1), "timedelta"),
    ],
)
def test_what_is_no_json_is_refused_by_name_and_nothing_is_pickled(
    cache: KVStoreCache, value: Any, where: str
) -> None:
    for store in (
        lambda: cache.set("a long name of a key, more than 32", value),
        lambda: cache.add("a long name of a key, more than 32", value),
        lambda: cache.set_many({"first": 1, "a long name of a key, more than 32": value}),
    ):
        with pytest.raises(InvalidValueError, match=rf"key 'a long name.*: value.*{where}"):
            store()
    assert cache.get("first") == 1  # each is stored by itself, in order
    assert len(cache.store) == 1


def test_a_value_that_holds_itself_is_refused(cache: KVStoreCache) -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(InvalidValueError, match=r"'key'.*holds itself"):
        cache.set("key", circle)


def test_a_value_over_16_kilobytes_is_refused_by_its_name(cache: KVStoreCache) -> None:
    limit = 16_384 - len(b'{"key":"page","value":""}')
    cache.set("page", "x" * limit)
    assert cache.get("page") == "x" * limit
    with pytest.raises(ValueTooLargeError, match="key 'page': value is 16,385 bytes of JSON"):
        cache.set("page", "x" * (limit + 1))
    assert cache.get("page") == "x" * limit


def test_a_full_store_is_an_error_and_not_a_false(open_cache: OpenCache) -> None:
    cache = open_cache(max_bytes=4 * 1024 * 1024)
    with pytest.raises(StoreFullError):
        for number in range(1000):
            cache.set(f"page {number}", "x" * 16_000)
    assert cache.get("page 0") == "x" * 16_000


def test_a_damaged_value_is_absent_and_logged_and_the_others_are_there(
    open_cache: OpenCache, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    cache.set_many({"good": 1, "bad": "damaged"})
    cache.store.close()
    change_byte(path, path.read_bytes().index(b"damaged"), 1)
    cache = open_cache()
    with caplog.at_level(logging.WARNING):
        assert cache.get("bad") is None
        assert cache.get_many("good", "bad") == [1, None]
    assert "cache key 'bad' cannot be read" in caplog.text
    cache.set("bad", "mended")
    assert cache.get_many("good", "bad") == [1, "mended"]


def test_a_value_of_a_later_version_is_absent_and_logged(
    cache: KVStoreCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.set("key", 1)
    [record_key] = cache.store
    cache.store.put(record_key, {"key": "key", "value": {"$complex": [1, 2]}})
    assert cache.get("key") is None
    assert "unknown tag" in caplog.text


@pytest.mark.parametrize(
    "stored",
    [{"$decimal": "no number"}, {"$uuid": 1}, {"$set": [[1]]}, {"$dict": 1}, {"$datetime": "no"}],
)
def test_a_value_that_another_program_made_up_is_absent_and_logged(
    cache: KVStoreCache, caplog: pytest.LogCaptureFixture, stored: Any
) -> None:
    cache.set("key", 1)
    [record_key] = cache.store
    cache.store.put(record_key, {"key": "key", "value": stored})
    assert cache.get("key") is None
    assert "cache key 'key' cannot be read" in caplog.text


# --- another serializer ----------------------------------------------------------------------


def test_another_serializer_makes_bytes_that_are_stored_as_base64(
    cache: KVStoreCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.set("before", (1, 2))
    cache.serializer = BaseSerializer()  # pickle, which is the choice of who sets it
    cache.set("key", date(2026, 1, 2))
    assert cache.get_many("before", "key") == [(1, 2), date(2026, 1, 2)]
    cache.serializer = None
    assert cache.get("key") is None
    assert "another serializer" in caplog.text


def test_what_a_serializer_cannot_read_any_more_is_absent_and_logged(
    cache: KVStoreCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.serializer = BaseSerializer()
    cache.set("key", date(2026, 1, 2))
    cache.serializer = Locked()
    assert cache.get_many("key", "absent") == [None, None]
    assert "cache key 'key' cannot be read: the secret is another one" in caplog.text


class Locked(BaseSerializer):
    def loads(self, bvalue: bytes) -> Any:
        raise RuntimeError("the secret is another one")


def test_what_another_serializer_cannot_do_is_an_error(cache: KVStoreCache) -> None:
    cache.serializer = JSONSerializer()
    with pytest.raises(InvalidValueError, match="key 'key': JSONSerializer cannot serialize"):
        cache.set("key", b"bytes")


# --- restarts, processes ---------------------------------------------------------------------


def test_a_cache_is_as_it_was_after_a_restart(open_cache: OpenCache, clock: FakeClock) -> None:
    cache = open_cache()
    cache.set("short", 1, timeout=10)
    cache.set("long", (2, b"two"), timeout=0)
    cache.store.close()
    cache = open_cache()
    assert cache.get_many("short", "long") == [1, (2, b"two")]
    clock.advance(10)
    assert cache.get_many("short", "long") == [None, (2, b"two")]


def test_a_second_process_is_refused_and_told_what_to_do(cache: KVStoreCache, path: Path) -> None:
    code = (
        "import sys\n"
        "from kvstore import StoreLockedError\n"
        "from kvstore.adapters.cachelib import KVStoreCache\n"
        "try:\n"
        "    KVStoreCache(sys.argv[1])\n"
        "except StoreLockedError as error:\n"
        "    print(error)\n"
    )
    told = processes.run_python(code, path)
    assert f"process {os.getpid()}" in told or str(os.getpid()) in told
    assert "KVStoreCache is for a server of one process" in told
    assert "one worker with threads" in told
    assert " lock_timeout=SECONDS" in told
    assert " timeout=SECONDS" not in told  # which is the store's


def test_a_second_cache_of_the_same_process_is_refused_as_well(
    cache: KVStoreCache, open_cache: OpenCache
) -> None:
    with pytest.raises(StoreLockedError, match=r"this very process.*one process"):
        open_cache()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_worker_learns_that_the_cache_is_its_parents_and_does_not_hang(path: Path) -> None:
    """As another thread of the parent has its turn at that moment, too."""
    code = """
import os, sys, threading
from kvstore import StoreClosedError
from kvstore.adapters.cachelib import KVStoreCache
cache = KVStoreCache(sys.argv[1])
taken, let_go = threading.Event(), threading.Event()
def hold():
    with cache._turn:
        taken.set()
        let_go.wait()
threading.Thread(target=hold, daemon=True).start()
taken.wait()
child = os.fork()
if not child:
    try:
        cache.set("key", 1)
    except StoreClosedError:
        os._exit(7)
    os._exit(1)
_, status = os.waitpid(child, 0)
let_go.set()
print(os.waitstatus_to_exitcode(status), cache.set("key", 1))
"""
    with processes.Child(code, path, prelude="", PYTHONWARNINGS="ignore") as child:
        assert child.end().split() == ["7", "True"]


def test_a_closed_cache_says_so(cache: KVStoreCache) -> None:
    cache.store.close()
    for use in (lambda: cache.get("key"), lambda: cache.set("key", 1), cache.clear):
        with pytest.raises(StoreClosedError):
            use()


def test_every_public_method_of_cachelib_is_there() -> None:
    public = [name for name, method in vars(BaseCache).items() if not name.startswith("_")]
    assert isinstance(KVStoreCache, type)
    assert issubclass(KVStoreCache, BaseCache)
    own = {name for name in public if name in vars(KVStoreCache)}
    assert own == set(public) - {"get_dict"}  # which is made of get_many


def test_the_examples_are_true() -> None:
    results = doctest.testmod(adapter)
    assert results.attempted
    assert not results.failed
