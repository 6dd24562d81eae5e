"""Writes that a copy-on-write disk refuses, even to roll back others: readers see the state before.

The fault laboratory refuses each write of each operation; these are the cases that once failed.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from support import MIN_MAX_BYTES
from support.clock import FakeClock
from support.components import FullDisk
from support.consistency import assert_consistent
from support.platforms import needs_fallocate, needs_pwrite
from support.values import sized_value

import kvstore.file.platform
from kvstore import CorruptStoreError, KVStore, StoreFullError
from kvstore.compiled.interface import OwnedLock
from kvstore.format.layout import STRIPE_SHIFT, key_hash

pytestmark = needs_pwrite


@pytest.fixture(autouse=True)
def copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files opened as on btrfs."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: False)
    monkeypatch.setattr(kvstore.file.platform.system, "may_be_mapped_privately", lambda _fd: True)


@contextmanager
def full_disk(fail_at: int = 1) -> Iterator[FullDisk]:
    """Refuse that write and all that follow."""
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(fail_at, lasting=True)
        patch.setattr(os, "pwrite", disk)
        yield disk


def count_writes_of_a_create(path: Path) -> int:
    with KVStore(path) as store:
        store.create("beside", {})
        with full_disk(1_000) as disk:
            store.create("key", {"n": 1})
        store.delete("key")
    return disk.calls


def test_room_is_made_once_the_disk_takes_what_it_refused(path: Path) -> None:
    """The store took itself for full until 64 KiB were freed."""
    with KVStore(path, max_bytes=MIN_MAX_BYTES) as store:
        for number in range(50):
            store.create(f"small {number}", sized_value(3_000))
        with suppress(StoreFullError):
            for number in count():
                store.create(f"large {number}", sized_value(16_000))
        for number in range(50):
            if number % 8:
                store.delete(f"small {number}")
        with full_disk(), pytest.raises(StoreFullError):
            store.create("new", sized_value(16_000))
        store.create("new", sized_value(16_000))


def test_key_whose_create_could_not_be_undone_is_absent(path: Path) -> None:
    """Its slot was published, and neither its record nor the slot could be written after that.

    The key used to seem damaged until the next opening.
    """
    last = count_writes_of_a_create(path)
    with KVStore(path) as store:
        store.delete("beside")
        store.create("beside", {})
        with full_disk(last), pytest.raises(StoreFullError):
            store.create("key", {"n": 1})
        assert dict(store) == {"beside": {}}
        assert store.get("key") is None
        assert "key" not in store
        assert len(store) == 1
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match="could not be undone"):
                store.create("key", {"n": 2})
    with KVStore(path) as store:
        assert dict(store) == {"beside": {}}
        store.create("key", {"n": 2})
    assert_consistent(path)


@pytest.mark.parametrize("fail_at", range(1, 5))
def test_delete_that_could_not_be_finished_is_undone_for_good(path: Path, fail_at: int) -> None:
    """A record that had lost its slot came back at the next opening.

    Its key was created and deleted again meanwhile, on a disk that had room again.
    """
    with KVStore(path) as store:
        store.create("beside", {})
        store.create("key", {"n": 1})
    with KVStore(path) as store:
        store.delete("beside")
        store.create("beside", {})
        with full_disk(fail_at), pytest.raises(StoreFullError):
            store.delete("key")
        assert dict(store) == {"beside": {}, "key": {"n": 1}}
        assert len(store) == 2
        try:
            store.delete("key")
            store.create("key", {"n": 2})
            store.delete("key")
        except CorruptStoreError:
            expected = {"beside": {}, "key": {"n": 1}}
        else:
            expected = {"beside": {}}
        assert dict(store) == expected
    with KVStore(path) as store:
        assert dict(store) == expected
    assert_consistent(path)


def test_delete_whose_slot_cannot_be_put_back_lets_nothing_more_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the map is not private, and the key is gone until the next opening."""
    monkeypatch.setattr(kvstore.file.platform.system, "may_be_mapped_privately", lambda _fd: False)
    with KVStore(path) as store:
        store.create("beside", {})
        store.create("key", {"n": 1})
        with full_disk(3), pytest.raises(StoreFullError):
            store.delete("key")
        with pytest.raises(CorruptStoreError, match="could not be undone"):
            store.create("key", {"n": 2})
    with KVStore(path) as store:
        assert dict(store) == {"beside": {}, "key": {"n": 1}}
    assert_consistent(path)


def test_file_that_cannot_be_recovered_for_want_of_room_is_open_to_readers(path: Path) -> None:
    """As one whose blocks are shared with a copy, after an unclean end."""
    killed = path.with_name("killed.kvs")
    with KVStore(path) as store:
        for number in range(300):
            store.create(f"{number}", {"n": number})
        for number in range(0, 300, 3):
            store.delete(f"{number}")
        expected = dict(store)
        killed.write_bytes(path.read_bytes())
    with full_disk(), KVStore(killed) as store:
        assert dict(store) == expected
        assert len(store) == 200
        assert store.read("1") == {"n": 1}
        changes: list[Callable[[], None]] = [
            lambda: store.create("key", {}),
            lambda: store.delete("1"),
        ]
        for change in changes:
            with pytest.raises(StoreFullError, match="in memory only") as error:
                change()
            assert isinstance(error.value.__cause__, OSError)
            assert error.value.__cause__.errno == errno.ENOSPC
        store.sync()
    with KVStore(killed) as store:
        assert dict(store) == expected
        store.create("key", {})
    assert_consistent(killed)


def test_file_whose_first_write_fails_is_open_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process id that it holds is for messages only. The failure left the file locked."""
    with KVStore(path) as store:
        store.create("key", {"n": 1})

    def refuse(_fd: int, _data: bytes, _offset: int, /) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        store = KVStore(path)
        assert dict(store) == {"key": {"n": 1}}
    store.close()
    assert_consistent(path)


@needs_fallocate
def test_quota_is_a_full_disk(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as another error, for which nothing that had expired was taken back."""
    value = {"text": "x" * 16_000}

    def refuse(_fd: int, _start: int, _size: int, /) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with KVStore(path) as store:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(StoreFullError) as error:
            for number in range(100):
                store.create(f"{number}", value, ttl=10)
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno == errno.EDQUOT
        # A user who expects the plain error of the system gets that too.
        assert isinstance(error.value, OSError)
        assert error.value.errno == errno.EDQUOT
        assert "no room on the disk" in str(error.value)
        clock.advance(20)
        store.create("later", value)


class GapAfterUnlock:
    """A lock after whose first release `act` runs, once."""

    def __init__(self, lock: OwnedLock, act: Callable[[], None]) -> None:
        self._lock = lock
        self._acts = [act]

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        while self._acts:
            self._acts.pop()()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "refused"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("operation", "fail_at"), [("create", n) for n in range(1, 7)] + [("delete", n) for n in (3, 4)]
)
@pytest.mark.usefixtures("implementation")
def test_what_another_thread_creates_amid_an_undo_stays(
    path: Path,
    operation: str,
    fail_at: int,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It got the very block that the undone create had not, and that was then freed.

    Or its block was forgotten, and the next record was written over it.
    """
    store = KVStore(path)
    store.create("beside", {"n": 1})
    store.create("key", {"n": 1})
    calls = 0
    pwrite = os.pwrite

    def refuse_one(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += threading.current_thread() is threading.main_thread()
        if calls == fail_at:
            calls += 1
            raise error
        return pwrite(fd, data, offset)

    stripes = {key_hash(key, store._file.hash_seed) >> STRIPE_SHIFT for key in (b"new", b"key")}
    names = (f"another {number}" for number in count())
    another = next(
        name
        for name in names
        if key_hash(name.encode(), store._file.hash_seed) >> STRIPE_SHIFT not in stripes
    )

    def create_in_a_thread() -> None:
        thread = threading.Thread(target=store.create, args=(another, {"n": 2}))
        thread.start()
        thread.join()

    gap = GapAfterUnlock(store._slab.lock, create_in_a_thread)
    monkeypatch.setattr(store._slab, "lock", gap)
    monkeypatch.setattr(os, "pwrite", refuse_one)
    with pytest.raises((OSError, KeyboardInterrupt)):
        store.create("new", {"n": 3}) if operation == "create" else store.delete("key")
    monkeypatch.undo()
    store.create("later", {"n": 4})
    expected = {name: store.read(name) for name in ("beside", "key", another, "later")}
    assert [value["n"] for value in expected.values()] == [1, 1, 2, 4]
    assert dict(store) == expected
    store.close()
    with KVStore(path) as store:
        assert dict(store) == expected
    assert_consistent(path)
