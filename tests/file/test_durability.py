"""Flushes, and disks that fail: what `sync`, `close` and `durable=True` ask of the disk.

What they are worth when power is lost is tried by `faults.power`.
"""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

import pytest
from support.clock import FakeClock
from support.components import FaultyWrites
from support.consistency import assert_consistent
from support.disks import quick_folder
from support.images import (
    before_each_flush,
    write_image,
)
from support.platforms import needs_posix
from support.processes import PATIENCE_SECONDS

from kvstore import CorruptStoreError, KVStore, KVStoreError
from kvstore.file.platform import system
from kvstore.file.platform.interface import address_of
from kvstore.format.layout import (
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FREE_MAGIC,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC_BYTES,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SPLIT_AT,
    STRIPE_SHIFT,
    U64,
    key_hash,
)

flushes_pages: Final = pytest.mark.skipif(
    not system.can_flush_pages(), reason="the system flushes whole files only"
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
    assert_consistent(path)


def test_buffered_operations_do_not_wait_for_the_disk(path: Path) -> None:
    with KVStore(path) as store:
        store.create("first", {})
        with flushes() as count:
            for number in range(500):
                store.create(f"{number}", {})
                store.delete(f"{number}")
        assert count == []
    assert_consistent(path)


def test_durable_reads_do_not_wait_for_the_disk(path: Path) -> None:
    with KVStore(path, durable=True) as store:
        store.create("key", {})
        with flushes() as count:
            store.read("key")
            assert "key" in store
            assert len(store) == 1
            assert list(store) == ["key"]
        assert count == []
    assert_consistent(path)


@needs_posix
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
    assert_consistent(path)


class Gate:
    """Stands in for the disk: flushes wait until they are let through, and are noted.

    `log` holds "start 1", "end 1" and so on, besides what the test adds, in the order it happened.
    """

    def __init__(self) -> None:
        self._real = system.flush_file
        self._real_of_pages = system.flush_pages
        self._lock = threading.Condition()
        self._allowed = 0
        self.started = 0
        self.log: list[str] = []

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(system, "flush_file", partial(self._pass, self._real))
        patch.setattr(system, "flush_pages", partial(self._pass, self._real_of_pages))

    def _pass(self, flush: Callable[..., None], *arguments: object) -> None:
        with self._lock:
            self.started += 1
            number = self.started
            self.log.append(f"start {number}")
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: self._allowed >= number, PATIENCE_SECONDS)
        flush(*arguments)
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
        gate.stand_in(monkeypatch)

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
    assert_consistent(path)


def test_operations_go_on_while_a_flush_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVStore(path) as store:
        store.create("before", {"n": 1})
        gate = Gate()
        gate.stand_in(monkeypatch)
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
    assert_consistent(path)


# --- what a durable operation asks for ---------------------------------------------------------

# A flush: of everything, or of the bytes from a start to an end.
Flush = tuple[int, int] | None
EVERYTHING: Final = None
LARGE: Final = {"text": "x" * 9_000}


@contextmanager
def asked_of_the_disk() -> Iterator[list[Flush]]:
    """List flushes, as they start."""
    real, real_of_pages = system.flush_file, system.flush_pages
    asked: list[Flush] = []

    def flush(fd: int, mapped: mmap.mmap | None = None) -> None:
        asked.append(EVERYTHING)
        real(fd, mapped)

    def flush_pages(mapped: mmap.mmap, start: int, end: int) -> None:
        asked.append((start, end))
        real_of_pages(mapped, start, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "flush_file", flush)
        patch.setattr(system, "flush_pages", flush_pages)
        yield asked


@contextmanager
def other_threads(store: KVStore, act: Callable[[], object]) -> Iterator[None]:
    """Have `act` happen once, between a durable operation's change and its flush."""
    flush, flush_record = store._file.flush, store._file.flush_record
    waiting = [act]

    def act_first(real: Callable[..., None], *arguments: int) -> None:
        if waiting:
            waiting.pop()()
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._file, "flush", partial(act_first, flush))
        patch.setattr(store._file, "flush_record", partial(act_first, flush_record))
        yield


def asked_by(act: Callable[[], object]) -> list[Flush]:
    with asked_of_the_disk() as asked:
        act()
    return asked


def has_asked_for_its_record_alone(act: Callable[[], object]) -> bool:
    asked = asked_by(act)
    assert len(asked) == 1
    return asked != [EVERYTHING]


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "overwrites_in_place", lambda _: True)


@pytest.fixture
def durable(path: Path, in_place: None) -> Iterator[KVStore]:
    """A durable store that owes nothing, with records that keep their extents."""
    with KVStore(path, durable=True) as store:
        store.create("small", {})
        store.create("large", LARGE)
        store.sync()
        yield store
    KVStore(path).close()  # some leave it to be recovered
    assert_consistent(path)


@flushes_pages
def test_durable_create_flushes_its_record_alone(durable: KVStore) -> None:
    asked = asked_by(lambda: durable.create("key", {"n": 12_345}, ttl=60))
    assert len(asked) == 1
    assert asked[0] is not EVERYTHING
    start, end = asked[0]
    record = durable.path.read_bytes()[start:end]
    assert record.startswith(RECORD_MAGIC_BYTES)
    assert record[RECORD_HEADER_SIZE:] == b'key{"n":12345}'


@flushes_pages
def test_durable_delete_flushes_the_link_that_ends_its_record_alone(durable: KVStore) -> None:
    durable.create("key", {"n": 12_345})
    asked = asked_by(lambda: durable.delete("key"))
    assert len(asked) == 1
    assert asked[0] is not EVERYTHING
    start, end = asked[0]
    assert end - start == U64.size
    (link,) = U64.unpack(durable.path.read_bytes()[start:end])
    assert link & 0xFFFF_FFFF == FREE_MAGIC


@flushes_pages
@pytest.mark.parametrize("remove", [KVStore.delete, KVStore.pop])
def test_durable_delete_of_a_record_that_has_moved_flushes_all_of_it(
    durable: KVStore, remove: Callable[[KVStore, str], object]
) -> None:
    """Of a mark that is not whole nothing counts: what it was moved from came back."""
    for number in range(40):
        durable.create(f"k{number}", {"n": number, **LARGE})
    durable.delete("k1")
    durable.sync()
    before = durable.path.read_bytes()
    durable._parts.reclaimer._mover.evacuate([place_of(durable, "k39") >> EXTENT_SHIFT])
    (key,) = (
        each
        for each in durable
        if not before.startswith(RECORD_MAGIC_BYTES, place_of(durable, each))
    )
    asked = asked_by(lambda: remove(durable, key))
    assert len(asked) == 1
    assert asked[0] is not EVERYTHING
    start, end = asked[0]
    page = mmap.PAGESIZE
    pages = slice(start // page * page, -(-end // page) * page)
    image = bytearray(before)
    image[pages] = durable.path.read_bytes()[pages]
    with KVStore(write_image(durable.path.with_suffix(".image"), bytes(image))) as after_power_loss:
        assert key not in after_power_loss


def place_of(store: KVStore, key: str) -> int:
    """Return the offset of a key's record."""
    encoded = key.encode()
    slot = store._parts.slots.find(key_hash(encoded, store._file.hash_seed), encoded)
    return store._file.words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK


@flushes_pages
def test_flush_of_pages_covers_whole_pages_from_the_first_to_the_last_byte(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a record that lies across pages, each is flushed."""
    from kvstore.file.platform import linux

    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    _, errno_of = linux._msync()
    calls = []

    def msync(address: int, size: int, flags: int) -> int:
        calls.append((address, size, flags))
        return 0

    monkeypatch.setattr(linux, "_msync", lambda: (msync, errno_of))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        address, page = address_of(mapped), mmap.PAGESIZE
        system.flush_pages(mapped, page + 32, page + 40)
        system.flush_pages(mapped, 2 * page - 32, 2 * page + 1)
    assert calls == [(address + page, 40, 4), (address + page, page + 1, 4)]


@flushes_pages
def test_flush_of_pages_that_fails_says_why(path: Path) -> None:
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        system.flush_pages(mapped, 0, 8)
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOMEM}\]"):
            system.flush_pages(mapped, 1 << 50, (1 << 50) + 8)


@needs_posix
def test_what_is_not_overwritten_in_place_is_flushed_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "overwrites_in_place", lambda _: False)
    with KVStore(path, durable=True) as store:
        store.create("small", {})
        assert asked_by(lambda: store.create("key", {})) == [EVERYTHING]
        assert asked_by(lambda: store.delete("key")) == [EVERYTHING]
    assert_consistent(path)


# What else could cost an operation its record has to be on the disk as well: see
# `DataFile.require_full_flush`.


@flushes_pages
def test_first_durable_operation_finds_the_index_marked_as_in_flux(
    path: Path, in_place: None
) -> None:
    with KVStore(path) as store:
        store.create("small", {})
    with KVStore(path, durable=True) as store:
        first, second = asked_by(lambda: store.create("key", {}))
        assert first == EVERYTHING
        assert second != EVERYTHING
    assert_consistent(path)


@flushes_pages
def test_growth_is_flushed_with_the_record_that_needed_it(durable: KVStore) -> None:
    """A file whose state does not yet count an extent is cut off before it."""
    asked = []
    for number in range(100):
        size = durable._file.size
        alone = has_asked_for_its_record_alone(lambda: durable.create(f"{number}", LARGE))  # noqa: B023
        asked.append((durable._file.size > size, alone))
    assert set(asked) == {(True, False), (False, True)}


@flushes_pages
def test_growth_of_another_thread_is_flushed_too(durable: KVStore) -> None:
    def grow() -> None:
        with durable._locks.space:
            durable._file.grow()

    with other_threads(durable, grow):
        assert not has_asked_for_its_record_alone(lambda: durable.create("key", {}))
    assert has_asked_for_its_record_alone(lambda: durable.create("other", {}))


@flushes_pages
def test_clear_that_was_refused_is_taken_back_with_the_next_record(
    durable: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk had been told that all records are void: power loss took those that were there."""
    durable.create("kept", {})

    def refuse(_fd: int, _length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        assert_raises_eio(durable.clear)
    assert "kept" in durable
    assert not has_asked_for_its_record_alone(lambda: durable.create("first", {}))
    assert has_asked_for_its_record_alone(lambda: durable.create("second", {}))


@flushes_pages
def test_extent_that_became_free_is_flushed_before_it_gets_another_class(durable: KVStore) -> None:
    """Two classes in an extent would be told apart by their bytes alone."""
    asked: list[list[Flush]] = []
    creating = partial(durable.create, "other class", {"text": "x" * 5_000})
    with other_threads(durable, lambda: asked.append(asked_by(creating))):
        durable.delete("large")
    assert asked == [[EVERYTHING]]
    assert has_asked_for_its_record_alone(lambda: durable.create("key", {}))


@flushes_pages
def test_only_record_of_its_size_comes_and_goes_without_a_flush_of_everything(
    durable: KVStore,
) -> None:
    """Each time an extent was freed and opened, and all else that was dirty flushed with it."""
    for _ in range(3):
        assert has_asked_for_its_record_alone(lambda: durable.delete("large"))
        assert has_asked_for_its_record_alone(lambda: durable.create("large", LARGE))


@flushes_pages
def test_delete_that_frees_an_extent_flushes_everything(durable: KVStore) -> None:
    """The one that was emptied before, and had stayed with its class until then."""
    assert has_asked_for_its_record_alone(lambda: durable.delete("large"))
    assert not has_asked_for_its_record_alone(lambda: durable.delete("small"))
    assert has_asked_for_its_record_alone(lambda: durable.create("small", {}))
    assert has_asked_for_its_record_alone(lambda: durable.create("large", LARGE))


@flushes_pages
def test_key_created_before_another_threads_delete_has_been_flushed(durable: KVStore) -> None:
    """On the disk there would be two records of one key; clocks tie, and are set back."""
    durable.create("key", {"n": 1})
    asked: list[list[Flush]] = []
    creating = partial(durable.create, "key", {"n": 2, "text": "x" * 200})
    with other_threads(durable, lambda: asked.append(asked_by(creating))):
        durable.delete("key")
    assert asked == [[EVERYTHING]]
    assert has_asked_for_its_record_alone(lambda: durable.create("other", {}))


def test_two_deletes_at_a_time_do_not_take_each_other_for_flushed(durable: KVStore) -> None:
    """Each may flush its own page alone only where the other's clearing is on the disk."""
    durable.create("one", {})
    durable.create("two", {})
    asked: list[list[Flush]] = []
    deleting = partial(durable.delete, "two")
    with other_threads(durable, lambda: asked.append(asked_by(deleting))):
        durable.delete("one")
    assert asked == [[EVERYTHING]]


@flushes_pages
def test_block_deleted_from_twice_before_the_first_is_flushed(durable: KVStore) -> None:
    durable.create("one", {})

    def reuse() -> None:
        durable.create("two", {})
        durable.delete("two")

    with other_threads(durable, reuse):
        durable.delete("one")
    assert has_asked_for_its_record_alone(lambda: durable.create("key", {}))


@flushes_pages
def test_delete_that_is_interrupted_is_flushed_with_what_comes_next(
    durable: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.create("key", {})

    def interrupt(_offset: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable._file, "record_cleared", interrupt)
        with pytest.raises(KeyboardInterrupt):
            durable.delete("key")
    assert not has_asked_for_its_record_alone(lambda: durable.create("key", {}))
    assert has_asked_for_its_record_alone(lambda: durable.create("other", {}))


@flushes_pages
def test_expired_holder_of_the_key_need_not_be_flushed_away(
    durable: KVStore, clock: FakeClock
) -> None:
    """It is superseded: where the clock is set back, the new record outranks it by its stamp."""
    durable.create("key", {"n": 1}, ttl=10)
    clock.advance(11)
    assert has_asked_for_its_record_alone(lambda: durable.create("key", {"n": 2}))


@flushes_pages
def test_what_was_purged_is_flushed_away_before_its_key_is_created(
    durable: KVStore, clock: FakeClock
) -> None:
    durable.create("key", {"n": 1}, ttl=10)
    clock.advance(11)
    asked: list[list[Flush]] = []
    creating = partial(durable.create, "key", {"n": 2})
    with other_threads(durable, lambda: asked.append(asked_by(creating))):
        assert durable.purge_expired() == 1
    assert asked == [[EVERYTHING]]
    assert has_asked_for_its_record_alone(lambda: durable.create("other", {}))


@flushes_pages
def test_what_a_rewritten_segment_dropped_is_flushed_away(
    path: Path, in_place: None, clock: FakeClock
) -> None:
    with KVStore(path) as store:
        full, other = (keys_of_stripe(store, number) for number in range(2))
        for number in range(SPLIT_AT):
            store.create(next(full), {}, ttl=10 if number % 2 else None)
    with KVStore(path, durable=True) as store:
        store.create(next(other), {})
        clock.advance(11)
        assert not has_asked_for_its_record_alone(lambda: store.create(next(full), {}))
        assert store.stats().records == SPLIT_AT // 2 + 2
        assert has_asked_for_its_record_alone(lambda: store.create(next(other), {}))
    assert_consistent(path)


def keys_of_stripe(store: KVStore, stripe: int) -> Iterator[str]:
    seed = store._file.hash_seed
    return (
        key for key in map(str, count()) if key_hash(key.encode(), seed) >> STRIPE_SHIFT == stripe
    )


@flushes_pages
@pytest.mark.parametrize("error", [MemoryError, CorruptStoreError])
def test_record_of_a_create_that_was_undone_is_flushed_away(
    error: type[Exception], durable: KVStore
) -> None:
    """It was whole for a moment, and the system may have written it then."""
    durable.create("first", {})  # else the next one opens an extent, in several writes
    file = durable._file
    write, write_word = file.write, file.write_word
    FaultyWrites(file, 3, error())  # after the block's entry and the record: the slot
    with pytest.raises(error):
        durable.create("key", {"n": 1})
    file.write, file.write_word = write, write_word
    assert not has_asked_for_its_record_alone(lambda: durable.create("key", {"n": 2}))
    assert has_asked_for_its_record_alone(lambda: durable.create("other", {}))


def test_buffered_store_keeps_no_account_of_what_it_cleared(path: Path, in_place: None) -> None:
    with KVStore(path) as store:
        for number in range(100):
            store.create(f"{number}", {})
            store.delete(f"{number}")
        assert store._file._flushing._group_commit._cleared == []
    assert_consistent(path)


@flushes_pages
def test_durable_count_waits_for_a_flush_of_everything(durable: KVStore) -> None:
    """A file shorter than that is taken for one that was cut off."""
    with durable._locks.space:
        durable._file.grow()
    grown = durable._file.size // EXTENT_SIZE
    assert durable._file._state.now.durable_count < grown
    durable._file._flushing._group_commit._owes_everything = (
        False  # as between growth and its owing
    )
    durable.create("key", {})
    assert durable._file._state.now.durable_count < grown
    durable.sync()
    assert durable._file._state.now.durable_count == grown


# --- a flush that fails ------------------------------------------------------------------------


@contextmanager
def failing_flushes(number: int = errno.EIO) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "flush_file", fail)
        patch.setattr(system, "flush_pages", fail)
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
    assert_consistent(path)


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
    assert_consistent(path)


def test_after_a_failed_flush_of_a_record_no_later_one_is_trusted(
    durable: KVStore, path: Path
) -> None:
    with failing_flushes():
        assert_raises_eio(lambda: durable.delete("small"))
    assert_raises_eio(lambda: durable.create("later", {}))
    assert_raises_eio(lambda: durable.delete("large"))
    assert_raises_eio(durable.sync)
    assert_raises_eio(durable.close)
    assert durable.closed


def test_flush_that_fails_in_close_is_raised_and_the_file_is_let_go(path: Path) -> None:
    store = KVStore(path)
    store.create("key", {"n": 1})
    with failing_flushes():
        assert_raises_eio(store.close)
        assert store.closed
        store.close()
    with KVStore(path) as store:
        assert store.read("key") == {"n": 1}
    assert_consistent(path)


def test_flush_that_fails_as_a_with_block_ends_is_raised(path: Path) -> None:
    with ExitStack() as stack:

        def use() -> None:
            with KVStore(path) as store:
                store.create("key", {})
                stack.enter_context(failing_flushes())

        assert_raises_eio(use)
    KVStore(path).close()
    assert_consistent(path)


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
    assert_consistent(path)


def test_flush_that_fails_at_creation_leaves_what_can_be_created_again(path: Path) -> None:
    with failing_flushes():
        assert_raises_eio(lambda: KVStore(path))
        assert_raises_eio(lambda: KVStore(path))
    with KVStore(path) as store:
        store.create("key", {})
    assert_consistent(path)


def test_flush_that_fails_in_recovery_leaves_what_can_be_recovered_again(path: Path) -> None:
    copy = path.with_suffix(".copy")
    with KVStore(path) as store:
        store.create("key", {"n": 1})
        write_image(copy, path.read_bytes())
    with failing_flushes():
        assert_raises_eio(lambda: KVStore(copy))
    with KVStore(copy) as store:
        assert store.read("key") == {"n": 1}
    assert_consistent(copy)


def test_threads_that_share_a_failed_flush_are_all_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KVStore(path, durable=True)
    store.create("key", {})
    started, let_fail = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        started.set()
        assert let_fail.wait(PATIENCE_SECONDS)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(system, "flush_file", fail)
    monkeypatch.setattr(system, "flush_pages", fail)
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
    assert_consistent(path)
