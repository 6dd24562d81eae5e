"""Every misuse gets its named error, a message with the facts, and leaves the file as it was."""

import contextlib
import errno
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from support import MAX_MAX_BYTES, MIB, MIN_MAX_BYTES
from support.clock import FakeClock
from support.files import digest
from support.keys import IMPOSSIBLE
from support.platforms import needs_free_names, needs_linux
from support.stores import OpenStore
from support.values import nested, sized_value

import kvstore
import kvstore.file.platform
from kvstore import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    KVStoreError,
    StoreClosedError,
    StoreFullError,
    StoreLockedError,
    UnsupportedFormatError,
    ValueTooLargeError,
)


def _says(error: BaseException, *facts: object) -> bool:
    """Return whether the message has all of these, numbers with or without separators in them."""
    message = str(error)
    numbers = message.replace(",", "").replace("_", "")
    return all(str(fact) in (numbers if isinstance(fact, int) else message) for fact in facts)


# --- the classes ----------------------------------------------------------------------------------

ALSO: Final[dict[type[Exception], type[Exception]]] = {
    InvalidKeyError: ValueError,
    InvalidValueError: ValueError,
    InvalidTTLError: ValueError,
    ValueTooLargeError: InvalidValueError,
    KeyNotFoundError: KeyError,
    KeyExistsError: KVStoreError,
    StoreFullError: KVStoreError,
    StoreLockedError: KVStoreError,
    StoreClosedError: KVStoreError,
    CorruptStoreError: KVStoreError,
    UnsupportedFormatError: KVStoreError,
    KVStoreError: Exception,
}


@pytest.mark.parametrize(("error", "also"), ALSO.items())
def test_every_error_is_a_kvstore_error_and_what_a_caller_expects(
    error: type[Exception], also: type[Exception]
) -> None:
    assert issubclass(error, KVStoreError)
    assert issubclass(error, also)
    assert error.__doc__


def test_an_existing_key_is_no_value_error_and_a_full_store_no_os_error() -> None:
    """Each is told from the others by its class."""
    for error in (KeyExistsError, StoreFullError, StoreLockedError, StoreClosedError):
        assert not issubclass(error, ValueError | KeyError | OSError)


def test_the_package_exports_every_error_by_name() -> None:
    for error in ALSO:
        assert getattr(kvstore, error.__name__) is error
        assert error.__name__ in kvstore.__all__
    assert {"KVStore", "StoreStats"} <= set(kvstore.__all__)


# --- misuse leaves the file as it was -------------------------------------------------------------

BAD_KEYS: Final[dict[str, Callable[[KVStore, Any], object]]] = {
    "create": lambda store, key: store.create(key, {}),
    "read": lambda store, key: store.read(key),
    "[]": lambda store, key: store[key],
    "read_bytes": lambda store, key: store.read_bytes(key),
    "get": lambda store, key: store.get(key),
    "delete": lambda store, key: store.delete(key),
    "del": lambda store, key: store.__delitem__(key),
    "ttl": lambda store, key: store.ttl(key),
}

BAD_VALUES: Final[dict[str, Any]] = {
    "no dict": [1],
    "None": None,
    "NaN": {"v": math.nan},
    "deep NaN": {"v": [{"w": (1, math.nan)}]},
    "set": {"v": {1}},
    "surrogate": {"v": "\ud800"},
    "int key": {1: 1},
    "large int": {"v": 2**64},
    "101 deep": nested(101),
    "too large": sized_value(16_385),
}

BAD_TTLS: Final[tuple[Any, ...]] = (0, -1, 10**10 + 1, 1.0, True, "1")


def test_bad_input_changes_no_byte_of_a_file_just_opened(
    store: KVStore, open_store: OpenStore
) -> None:
    store.create("k", {"n": 1})
    store.close()
    again = open_store()
    before = digest(again.path)
    _misuse(again)
    assert digest(again.path) == before
    assert dict(again) == {"k": {"n": 1}}


def test_bad_input_changes_no_byte_of_a_file_in_use(store: KVStore) -> None:
    store.create("k", {"n": 1})
    store.create("gone", {"n": 2})
    store.delete("gone")
    before = digest(store.path)
    _misuse(store)
    with pytest.raises(KeyExistsError):
        store.create("k", {"n": 3}, ttl=5)
    for call in (store.read, store.read_bytes, store.delete, store.ttl):
        with pytest.raises(KeyNotFoundError):
            call("gone")
    assert digest(store.path) == before
    assert dict(store) == {"k": {"n": 1}}


def _misuse(store: KVStore) -> None:
    for key in IMPOSSIBLE.values():
        for call in BAD_KEYS.values():
            with pytest.raises(InvalidKeyError):
                call(store, key)
        assert key not in store
    for value in BAD_VALUES.values():
        with pytest.raises(InvalidValueError):
            store.create("new", value)
    for ttl in BAD_TTLS:
        with pytest.raises(InvalidTTLError):
            store.create("new", {}, ttl=ttl)
    assert "new" not in store


def test_bad_input_for_an_expired_key_leaves_it_where_it_is(
    store: KVStore, clock: FakeClock
) -> None:
    store.create("k", {"n": 1}, ttl=5)
    clock.advance(5)
    before = digest(store.path)
    with pytest.raises(InvalidValueError):
        store.create("k", {"v": math.nan})
    with pytest.raises(InvalidTTLError):
        store.create("k", {}, ttl=0)
    assert digest(store.path) == before


def test_a_store_works_on_after_every_misuse(store: KVStore) -> None:
    _misuse(store)
    store.create("new", {"n": 1})
    assert store.read("new") == {"n": 1}


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_the_message_for_a_long_key_names_limit_length_and_key(
    store: KVStore, call: Callable[[KVStore, Any], object]
) -> None:
    with pytest.raises(InvalidKeyError) as caught:
        call(store, "long" * 9)
    assert _says(caught.value, 32, 36, "longlonglong")


def test_the_message_for_other_bad_keys_says_what_was_given(store: KVStore) -> None:
    for key, facts in (
        ("", (32, 0)),
        (5, (32, "5", "int")),
        (b"key", (32, "b'key'", "bytes")),
        (None, (32, "None")),
        ("a\udc80", ("surrogate", "dc80")),
    ):
        with pytest.raises(InvalidKeyError) as caught:
            store.read(key)  # type: ignore[arg-type]
        assert _says(caught.value, *facts) or _says(caught.value, *map(_upper, facts))


def _upper(fact: object) -> object:
    return fact.upper() if fact == "dc80" else fact


def test_every_message_can_be_printed(store: KVStore) -> None:
    """A lone surrogate in what was given is not one in the message."""
    calls: list[Callable[[], object]] = [
        lambda: store.read("\ud800"),
        lambda: store.create("k", {"v": "\ud800"}),
        lambda: store.create("k", {"\ud800": 1}),
        lambda: store.create("k", "\ud800"),  # type: ignore[arg-type]
        lambda: store.create("k", {}, ttl="\ud800"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(KVStoreError) as caught:
            call()
        str(caught.value).encode()


def test_messages_stay_short_whatever_was_given(store: KVStore) -> None:
    long: Any = "x" * 1_000_000
    calls: list[Callable[[], object]] = [
        lambda: store.read(long),
        lambda: store.read([long]),  # type: ignore[arg-type]
        lambda: store.create("k", long),
        lambda: store.create("k", {"v": {long}}),
        lambda: store.create("k", {"v": long}),
        lambda: store.create("k", {}, ttl=long),
        lambda: store.create("k", {"v": 10**100_000}),
        lambda: store.create("k", {}, ttl=10**100_000),
        lambda: store.create("k", {long: {1}}),
    ]
    for call in calls:
        with pytest.raises(KVStoreError) as caught:
            call()
        assert len(str(caught.value)) < 1000


def test_the_message_for_a_large_value_names_key_limit_and_size(store: KVStore) -> None:
    with pytest.raises(ValueTooLargeError) as caught:
        store.create("user:1", sized_value(16_385))
    assert _says(caught.value, "user:1", 16_384, 16_385)


def test_the_message_for_a_refused_value_names_key_place_and_item(store: KVStore) -> None:
    cases: tuple[tuple[Any, tuple[object, ...]], ...] = (
        ({"outer": [0, {"inner": math.nan}]}, ("outer", "inner", "nan")),
        ({"outer": {"inner": {1}}}, ("outer", "inner", "set", "{1}")),
        ({"outer": 2**64}, ("outer", "2**64")),
        ({"outer": {5: 1}}, ("outer", "5", "int", "str")),
        ({"outer": "\ud800"}, ("outer", "surrogate")),
        ([1], ("list", "dict")),
        (nested(101), (100,)),
    )
    for value, facts in cases:
        with pytest.raises(InvalidValueError) as caught:
            store.create("user:1", value)
        assert _says(caught.value, "user:1", *facts), str(caught.value)


@pytest.mark.parametrize("ttl", [0, 10**10 + 1, 2.5, "60", True])
def test_the_message_for_a_bad_ttl_names_key_limit_and_ttl(store: KVStore, ttl: Any) -> None:
    with pytest.raises(InvalidTTLError) as caught:
        store.create("user:1", {}, ttl=ttl)
    assert _says(caught.value, "user:1", 10**10, ttl if type(ttl) is int else str(ttl))


def test_the_messages_about_a_key_name_it(store: KVStore) -> None:
    store.create("user:1", {})
    with pytest.raises(KeyExistsError, match="user:1"):
        store.create("user:1", {})
    for call in (store.read, store.read_bytes, store.delete, store.ttl, store.__getitem__):
        with pytest.raises(KeyNotFoundError, match="user:2") as caught:
            call("user:2")
        assert not str(caught.value).startswith(("'", '"')), "a sentence, not the repr of one"
        assert " " in str(caught.value)


def test_the_message_of_a_full_store_names_its_limit(open_store: OpenStore) -> None:
    store = open_store(max_bytes=MIN_MAX_BYTES)
    with pytest.raises(StoreFullError) as caught:
        for number in range(10_000):
            store.create(f"user:{number}", sized_value(16_384, number))
    assert _says(caught.value, MIN_MAX_BYTES)
    assert _says(caught.value, "user:") or _says(caught.value, str(store.path))


def test_the_message_of_a_closed_store_names_its_path(store: KVStore) -> None:
    store.close()
    with pytest.raises(StoreClosedError) as caught:
        store.read("k")
    assert _says(caught.value, str(store.path))


def test_the_message_of_a_locked_store_names_its_path_and_that_it_is_this_process(
    store: KVStore,
) -> None:
    with pytest.raises(StoreLockedError) as caught:
        KVStore(store.path)
    assert _says(caught.value, str(store.path), "this")


def test_the_message_for_a_foreign_file_names_its_path(path: Path) -> None:
    path.write_bytes(b"no store")
    with pytest.raises(UnsupportedFormatError) as caught:
        KVStore(path)
    assert _says(caught.value, str(path))


# --- arguments of the constructor -----------------------------------------------------------------


@pytest.mark.parametrize(
    "max_bytes", [MIN_MAX_BYTES - 1, 2 * MIB, 1, 0, -1, MAX_MAX_BYTES + 1, 2**40, -(2**40)]
)
def test_max_bytes_out_of_range_is_a_value_error_and_makes_no_file(
    path: Path, max_bytes: int
) -> None:
    with pytest.raises(ValueError, match="max_bytes") as caught:
        KVStore(path, max_bytes=max_bytes)
    assert not isinstance(caught.value, KVStoreError)
    assert _says(caught.value, max_bytes)
    assert _says(caught.value, MIN_MAX_BYTES) or _says(caught.value, "4 MiB")
    assert _says(caught.value, MAX_MAX_BYTES)
    assert not path.exists()


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, math.inf, -math.inf])
def test_a_timeout_that_is_negative_or_not_finite_is_a_value_error_and_makes_no_file(
    path: Path, timeout: float
) -> None:
    with pytest.raises(ValueError, match="timeout") as caught:
        KVStore(path, timeout=timeout)
    assert _says(caught.value, str(timeout))
    assert not path.exists()


def test_bad_arguments_leave_an_existing_file_alone(store: KVStore) -> None:
    store.create("k", {})
    store.close()
    before = digest(store.path)
    for arguments in ({"max_bytes": 1}, {"timeout": -1}, {"timeout": math.nan}):
        with pytest.raises(ValueError):  # noqa: PT011
            KVStore(store.path, **arguments)
    assert digest(store.path) == before


def test_nobody_waits_for_a_store_that_this_very_process_has_open(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting could never end: whoever would close it is here."""

    def no_sleep(seconds: float) -> None:
        pytest.fail(f"waits {seconds} s")

    monkeypatch.setattr(time, "sleep", no_sleep)
    with pytest.raises(StoreLockedError):
        KVStore(store.path, timeout=3600)


# --- the path -------------------------------------------------------------------------------------


def test_trouble_with_the_path_is_the_os_error_that_python_users_know(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place, error in (
        (tmp_path / "missing" / "test.kvs", FileNotFoundError),
        (tmp_path / "file" / "test.kvs", OSError if os.name == "nt" else NotADirectoryError),
        (tmp_path, PermissionError if os.name == "nt" else IsADirectoryError),
        (tmp_path / ("x" * 300), OSError),
    ):
        with pytest.raises(error) as caught:
            KVStore(place)
        assert not isinstance(caught.value, KVStoreError)
        assert caught.value.filename == str(place)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_no_permission_is_a_permission_error(store: KVStore) -> None:
    store.close()
    store.path.chmod(0o000)
    with pytest.raises(PermissionError, match=store.path.name):
        KVStore(store.path)
    store.path.chmod(0o600)


@needs_free_names
def test_a_store_removed_while_open_says_so_at_sync_and_close(
    path: Path, open_store: OpenStore
) -> None:
    store = open_store(check=False)
    store.create("k", {"n": 1})
    path.unlink()
    with pytest.raises(OSError, match=path.name):
        store.sync()
    with pytest.raises(OSError, match=path.name):
        store.close()
    assert store.closed
    store.close()
    again = KVStore(path)
    assert len(again) == 0
    again.close()


@needs_free_names
def test_a_store_replaced_while_open_says_so_and_leaves_the_new_file_alone(
    path: Path, open_store: OpenStore, tmp_path: Path
) -> None:
    with KVStore(tmp_path / "other.kvs") as other:
        other.create("other", {"n": 2})
    store = open_store(check=False)
    store.create("k", {"n": 1})
    os.replace(tmp_path / "other.kvs", path)
    before = digest(path)
    with pytest.raises(OSError, match=path.name):
        store.sync()
    with pytest.raises(OSError, match=path.name):
        store.close()
    assert store.closed
    store.close()
    assert digest(path) == before
    with KVStore(path) as again:
        assert dict(again) == {"other": {"n": 2}}


# --- a failed flush -------------------------------------------------------------------------------


@contextlib.contextmanager
def _failing_flushes() -> Iterator[None]:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fail_pages(_mapped: mmap.mmap, _start: int, _end: int) -> None:
        fail(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvstore.file.platform.system, "flush_pages", fail_pages)
        patch.setattr(os, "fdatasync", fail)
        patch.setattr(os, "fsync", fail)
        yield


@needs_linux
def test_after_a_failed_flush_no_later_one_is_trusted_until_the_store_is_opened_anew(
    store: KVStore, open_store: OpenStore
) -> None:
    """The kernel may have dropped what it could not write; later flushes tell nothing of it."""
    store.create("before", {"n": 1})
    with _failing_flushes(), pytest.raises(OSError):  # noqa: PT011
        store.sync()
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011
            store.sync()
    assert store.read("before") == {"n": 1}
    with pytest.raises(OSError):  # noqa: PT011
        store.close()
    assert store.closed
    store.close()
    again = open_store()
    assert dict(again) == {"before": {"n": 1}}
    again.sync()


@needs_linux
def test_durable_operations_go_on_raising_after_a_failed_flush(open_store: OpenStore) -> None:
    store = open_store(durable=True)
    store.create("before", {"n": 1})
    with _failing_flushes(), pytest.raises(OSError):  # noqa: PT011
        store.create("during", {"n": 2})
    with pytest.raises(OSError):  # noqa: PT011
        store.create("after", {"n": 3})
    with pytest.raises(OSError):  # noqa: PT011
        store.delete("before")
    with pytest.raises(OSError):  # noqa: PT011
        store.close()
    assert store.closed
    with open_store() as again:
        again.create("anew", {"n": 4})
        assert again.read("anew") == {"n": 4}
