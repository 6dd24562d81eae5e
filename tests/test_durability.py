"""Flushes, and disks that fail: what `sync`, `close` and `durable=True` ask of the disk.

What they are worth when power is lost is tried by `faults.power`.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.children import PATIENCE_SECONDS
from support.disks import quick_folder
from support.images import (
    before_each_flush,
    write_image,
)
from support.whole import assert_whole

from kvstore import KVStore, KVStoreError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="flushes are seen and made to fail at os.fdatasync"
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


# --- every promise has its flush ---------------------------------------------------------------


@contextmanager
def flushes() -> Iterator[list[bytes]]:
    """Count flushes: the list gets an item for each."""
    count: list[bytes] = []
    with before_each_flush(lambda: count.append(b"")):
        yield count


def test_sync_flushes_what_was_written_before_it(path: Path) -> None:
    with KVStore(path) as store:
        store.create("key", {"text": "marker of this value"})
        at_flush: list[bytes] = []
        with before_each_flush(lambda: at_flush.append(path.read_bytes())):
            store.sync()
        assert b"marker of this value" in at_flush[-1]
    assert_whole(path)


def test_buffered_operations_do_not_wait_for_the_disk(path: Path) -> None:
    with KVStore(path) as store:
        store.create("first", {})
        with flushes() as count:
            for number in range(500):
                store.create(f"{number}", {})
                store.delete(f"{number}")
        assert count == []
    assert_whole(path)


def test_durable_reads_do_not_wait_for_the_disk(path: Path) -> None:
    with KVStore(path, durable=True) as store:
        store.create("key", {})
        with flushes() as count:
            store.read("key")
            assert "key" in store
            assert len(store) == 1
            assert list(store) == ["key"]
        assert count == []
    assert_whole(path)


def test_new_file_has_its_folder_flushed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose name is not on the disk is lost with all that was synced into it."""
    real = os.fsync
    folders = []

    def fsync(descriptor: int) -> None:
        folders.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with KVStore(path):
        assert os.path.realpath(path.parent) in folders
    assert_whole(path)


class Gate:
    """Stands in for `os.fdatasync`: flushes wait until they are let through, and are noted.

    `log` holds "start 1", "end 1" and so on, besides what the test adds, in the order it happened.
    """

    def __init__(self) -> None:
        self._real = os.fdatasync
        self._open = threading.Event()
        self._lock = threading.Condition()
        self._allowed = 0
        self.started = 0
        self.log: list[str] = []

    def __call__(self, descriptor: int) -> None:
        with self._lock:
            self.started += 1
            number = self.started
            self.log.append(f"start {number}")
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: self._allowed >= number, PATIENCE_SECONDS)
        self._real(descriptor)
        self.note(f"end {number}")

    def note(self, what: str) -> None:
        with self._lock:
            self.log.append(what)
            self._lock.notify_all()

    def wait_for_start(self, number: int) -> None:
        with self._lock:
            assert self._lock.wait_for(lambda: self.started >= number, PATIENCE_SECONDS)

    def let_through(self, number: int) -> None:
        """Let flushes up to that number run to their end."""
        with self._lock:
            self._allowed = max(self._allowed, number)
            self._lock.notify_all()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that gives no sign of its own."""
    never = threading.Event()
    for _ in range(PATIENCE_SECONDS * 1000):
        if condition():
            return
        never.wait(0.001)
    raise AssertionError("waited in vain")


def test_durable_operations_that_wait_at_the_same_time_share_a_flush(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread's flush is held up; seven more operations arrive; one flush serves them all.

    None of the seven returns before a flush that began after it had written.
    """
    with KVStore(path, durable=True) as store:
        for number in range(3):
            store.create(f"old {number}", {})
        gate = Gate()
        monkeypatch.setattr(os, "fdatasync", gate)

        def create(key: str) -> None:
            store.create(key, {"key": key})
            gate.note(f"return {key}")

        def delete(key: str) -> None:
            store.delete(key)
            gate.note(f"return {key}")

        late = [(create, f"new {number}") for number in range(4)]
        late += [(delete, f"old {number}") for number in range(3)]
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(create, "leader")]
            try:
                gate.wait_for_start(1)
                futures += [pool.submit(action, key) for action, key in late]
                # Others see a change before it is durable.
                wait_until(lambda: all((key in store) == (act is create) for act, key in late))
                assert not [what for what in gate.log if what.startswith("return")]
                gate.let_through(1)
                futures[0].result(PATIENCE_SECONDS)
                gate.wait_for_start(2)
                assert [what for what in gate.log if what.startswith("return")] == ["return leader"]
            finally:
                gate.let_through(1_000_000)
            for future in futures:
                future.result(PATIENCE_SECONDS)
        assert gate.started < 8, f"8 operations took {gate.started} flushes"
        second_end = gate.log.index("end 2")
        for _, key in late:
            assert gate.log.index(f"return {key}") > second_end, gate.log
        assert gate.log.index("return leader") > gate.log.index("end 1")
        monkeypatch.undo()
    assert_whole(path)


def test_operations_go_on_while_a_flush_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVStore(path) as store:
        store.create("before", {"n": 1})
        gate = Gate()
        monkeypatch.setattr(os, "fdatasync", gate)
        with ThreadPoolExecutor(1) as pool:
            syncing = pool.submit(store.sync)
            try:
                gate.wait_for_start(1)
                for number in range(2_000):
                    store.create(f"{number}", {"n": number, "text": "x" * 1_000})
                    assert store.read(f"{number}")["n"] == number
                store.delete("before")
                assert len(store) == 2_000
                assert sum(1 for _ in store) == 2_000
                assert not syncing.done()
            finally:
                gate.let_through(1_000_000)
            syncing.result(PATIENCE_SECONDS)
        monkeypatch.undo()
    assert_whole(path)


# --- a flush that fails ------------------------------------------------------------------------


@contextmanager
def failing_flushes(number: int = errno.EIO) -> Iterator[None]:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        yield


def assert_raises_eio(act: Callable[[], object]) -> None:
    with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]") as error:
        act()
    assert not isinstance(error.value, KVStoreError)
    assert error.value.errno == errno.EIO


def test_after_a_failed_flush_no_later_one_is_trusted(path: Path) -> None:
    """The system may have dropped what it could not write, and call the next flush a success."""
    store = KVStore(path)
    store.create("key", {"n": 1})
    with failing_flushes():
        assert_raises_eio(store.sync)
    for _ in range(3):
        assert_raises_eio(store.sync)
    assert store.read("key") == {"n": 1}
    assert list(store) == ["key"]
    assert_raises_eio(store.close)
    assert store.closed
    store.close()
    with KVStore(path) as store:
        assert store.read("key") == {"n": 1}
        store.create("other", {})
        store.sync()
    assert_whole(path)


def test_after_a_failed_flush_durable_operations_go_on_raising(path: Path) -> None:
    store = KVStore(path, durable=True)
    store.create("key", {"n": 1})
    with failing_flushes():
        assert_raises_eio(lambda: store.create("unlucky", {}))
    assert_raises_eio(lambda: store.create("later", {}))
    assert_raises_eio(lambda: store.delete("key"))
    assert_raises_eio(store.sync)
    assert_raises_eio(store.close)
    assert store.closed
    with KVStore(path, durable=True) as store:
        store.create("works again", {})
        assert set(store) <= {"key", "unlucky", "later", "works again"}
    assert_whole(path)


def test_flush_that_fails_in_close_is_raised_and_the_file_is_let_go(path: Path) -> None:
    store = KVStore(path)
    store.create("key", {"n": 1})
    with failing_flushes():
        assert_raises_eio(store.close)
        assert store.closed
        store.close()
    with KVStore(path) as store:
        assert store.read("key") == {"n": 1}
    assert_whole(path)


def test_flush_that_fails_as_a_with_block_ends_is_raised(path: Path) -> None:
    with ExitStack() as stack:

        def use() -> None:
            with KVStore(path) as store:
                store.create("key", {})
                stack.enter_context(failing_flushes())

        assert_raises_eio(use)
    KVStore(path).close()
    assert_whole(path)


def test_flush_that_fails_before_the_first_change_stops_the_change(path: Path) -> None:
    with KVStore(path) as store:
        store.create("key", {"n": 1})
    store = KVStore(path)
    with failing_flushes():
        assert_raises_eio(lambda: store.create("other", {}))
    assert store.read("key") == {"n": 1}
    assert "other" not in store
    assert_raises_eio(store.sync)
    assert_raises_eio(store.close)
    with KVStore(path) as store:
        assert dict(store) == {"key": {"n": 1}}
    assert_whole(path)


def test_flush_that_fails_at_creation_leaves_what_can_be_created_again(path: Path) -> None:
    with failing_flushes():
        assert_raises_eio(lambda: KVStore(path))
        assert_raises_eio(lambda: KVStore(path))
    with KVStore(path) as store:
        store.create("key", {})
    assert_whole(path)


def test_flush_that_fails_in_recovery_leaves_what_can_be_recovered_again(path: Path) -> None:
    copy = path.with_suffix(".copy")
    with KVStore(path) as store:
        store.create("key", {"n": 1})
        write_image(copy, path.read_bytes())
    with failing_flushes():
        assert_raises_eio(lambda: KVStore(copy))
    with KVStore(copy) as store:
        assert store.read("key") == {"n": 1}
    assert_whole(copy)


def test_threads_that_share_a_failed_flush_are_all_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KVStore(path, durable=True)
    store.create("key", {})
    started, let_fail = threading.Event(), threading.Event()

    def fail(descriptor: int) -> None:
        started.set()
        assert let_fail.wait(PATIENCE_SECONDS)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(store.create, "leader", {})]
        assert started.wait(PATIENCE_SECONDS)
        futures += [pool.submit(store.create, f"{number}", {}) for number in range(7)]
        wait_until(lambda: len(store) == 9)
        let_fail.set()
        for future in futures:
            assert_raises_eio(lambda: future.result(PATIENCE_SECONDS))  # noqa: B023
    monkeypatch.undo()
    assert_raises_eio(store.close)
    KVStore(path).close()
    assert_whole(path)
