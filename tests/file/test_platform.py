"""The promises that do not depend on the operating system, and what each does to keep them."""

import errno
import gc
import mmap
import os
import shutil
import struct
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support import MIB
from support.consistency import assert_consistent
from support.files import size
from support.platforms import needs_linux, needs_posix, needs_windows
from support.processes import Child
from support.stores import OpenStore

from kvstore import KVStore, StoreFullError, location
from kvstore.backup import Copy
from kvstore.file.platform import system
from kvstore.format.layout import EXTENT_SIZE

VALUE = {"x": "x" * 1_000}

needs_real_windows = pytest.mark.skipif(sys.platform != "win32", reason="it calls Windows")


def fill(store: KVStore, count: int) -> None:
    for number in range(count):
        store.create(f"k{number}", VALUE)


# --- everywhere ----------------------------------------------------------------------------------


def test_file_is_no_larger_than_its_contents_once_it_is_closed(
    path: Path, open_store: OpenStore
) -> None:
    store = open_store()
    fill(store, 5_000)
    expected = store.stats().file_size
    store.close()
    assert size(path) == expected < 16 * MIB


def test_compacted_file_is_short_once_it_is_closed_and_has_no_more_than_before(
    path: Path, open_store: OpenStore
) -> None:
    store = open_store()
    fill(store, 5_000)
    for number in range(4_900):
        store.delete(f"k{number}")
    assert store.compact() > 0
    expected = store.stats().file_size
    fill(store, 10)
    store.close()
    assert size(path) == expected < 4 * MIB
    store = open_store()
    assert len(store) == 110


def test_what_a_compaction_cut_off_does_not_come_back_after_a_kill(path: Path) -> None:
    script = """
        store = KVStore(sys.argv[1])
        for number in range(5_000):
            store.create(f"k{number}", {"x": "x" * 1_000})
        for number in range(4_900):
            store.delete(f"k{number}")
        store.compact()
        say("compacted")
        hear()
    """
    with Child(script, path) as child:
        child.expect("compacted")
        child.kill()
    with KVStore(path) as store:
        assert set(store) == {f"k{number}" for number in range(4_900, 5_000)}
        fill(store, 4_000)
    assert_consistent(path)
    assert size(path) < 16 * MIB


def test_open_file_can_be_copied_and_read_by_others(path: Path, open_store: OpenStore) -> None:
    """A lock must not keep others from reading: the holder's number, or all for a backup."""
    store = open_store()
    store.create("key", VALUE)
    copy = shutil.copyfile(path, path.with_suffix(".copy"))
    with KVStore(copy) as opened:
        assert dict(opened) == {"key": VALUE}


def test_failed_growth_leaves_a_file_of_its_length(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    fill(store, 1_000)
    before = store.stats().file_size

    def reserve(fd: int, start: int, end: int) -> None:
        system.write_at(fd, start, bytes(EXTENT_SIZE))
        raise OSError(errno.ENOSPC, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(system, "reserve", reserve)
        with pytest.raises(StoreFullError, match="no room on the disk"):
            for number in range(10_000):
                store.create(f"more{number}", VALUE)
    store.close()
    assert size(path) == before


# --- macOS ---------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_macos_flushes_as_far_as_a_file_system_can(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Those of others than Apple refuse F_FULLFSYNC; every `sync` there raised."""
    import fcntl

    from kvstore.file.platform.macos import MacOS

    flushed: list[int] = []

    def refuse(fd: int, command: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", flushed.append)
    MacOS().flush_file(7)
    assert flushed == [7]


@needs_posix
def test_macos_raises_what_a_flush_fails_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from kvstore.file.platform.macos import MacOS

    def fail(fd: int, command: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="broken"):
        MacOS().flush_file(7)


@needs_linux
@pytest.mark.parametrize("of", ["macOS", "Linux without fallocate"])
def test_what_is_wrongly_said_to_be_a_hole_is_not_lost(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """Zeros were written into each hole as a file was opened, where blocks cannot be reserved."""
    from kvstore.file.platform.macos import MacOS

    with open_store() as store:
        fill(store, 100)
    real = os.lseek

    def lie(fd: int, position: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            raise OSError(errno.ENXIO, "no data, it says")
        return real(fd, position, whence)

    monkeypatch.setattr(os, "lseek", lie)
    monkeypatch.delattr(os, "posix_fallocate")
    other = MacOS() if of == "macOS" else system
    for name in ("fill_holes", "data_ranges", "overwrites_in_place"):
        monkeypatch.setattr(system, name, getattr(other, name))
    with open_store() as store:
        assert len(dict(store)) == 100


@needs_posix
def test_macos_tells_of_what_is_not_on_this_machine() -> None:
    """As sys/mount.h has a `struct statfs`; the flags are those of `mount` on a Mac."""
    from kvstore.file.platform.macos import remote_kind

    def status(flags: int, name: bytes) -> bytes:
        numbers = struct.pack("=Ii5Q2iIIII", 4096, 1 << 20, 9, 8, 7, 6, 5, 1, 26, 501, 26, flags, 0)
        return numbers + name.ljust(16, b"\0") + bytes(2 * 1024 + 8 * 4)

    assert remote_kind(status(0x0480_D000, b"apfs")) == ""
    assert remote_kind(status(0x0000_0018, b"smbfs")) == "smbfs"


# --- Windows -------------------------------------------------------------------------------------


@needs_windows
def test_windows_keeps_a_file_long_as_long_as_somebody_has_a_view_of_it(path: Path) -> None:
    """As the traceback of an interrupted operation may; later openings find nothing wrong."""
    store = KVStore(path, max_bytes=8 * MIB)
    store.create("key", VALUE)
    view = memoryview(store._file.map)
    store.close()
    assert size(path) == 8 * MIB
    with KVStore(path, max_bytes=16 * MIB) as again:
        assert again._file.trusted
        assert dict(again) == {"key": VALUE}
    assert size(path) == 16 * MIB
    view.release()
    del store
    gc.collect()
    with KVStore(path) as again:
        assert again._file.trusted
        assert dict(again) == {"key": VALUE}
        expected = again.stats().file_size
    assert size(path) == expected < 8 * MIB
    assert_consistent(path)


@needs_windows
def test_windows_writes_no_zeros_where_a_file_that_cannot_be_cut_has_holes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill the file is as long as its limit; a virus scanner may have it mapped then."""
    from kvstore.file.platform import win32

    written: list[tuple[int, int]] = []
    with path.open("w+b") as file:
        file.write(bytes(MIB))
        file.flush()
        with mmap.mmap(file.fileno(), 0), monkeypatch.context() as patch:
            patch.setattr(
                win32, "allocated_ranges", lambda fd, start, end: [(start, start + EXTENT_SIZE)]
            )
            patch.setattr(
                system, "write_at", lambda fd, offset, data: written.append((offset, len(data)))
            )
            system.cut(file.fileno(), EXTENT_SIZE, MIB)
    assert written == [(EXTENT_SIZE, EXTENT_SIZE)]


@needs_windows
def test_windows_backup_that_cannot_be_renamed_leaves_nothing_under_its_name(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had both names then, and the error said that it had none."""
    real = Copy.name

    def name(copy: Copy, overwrite: bool) -> None:
        with open(copy._path, "rb"):  # as a virus scanner may have it
            real(copy, overwrite)

    monkeypatch.setattr(Copy, "name", name)
    out = path.with_name("copy.kvs")
    with pytest.raises(PermissionError):
        open_store().backup(out)
    assert not out.exists()
    monkeypatch.undo()
    assert open_store(path.with_name("other.kvs")).backup(out) == 0
    assert sorted(each.name for each in path.parent.iterdir() if "copy" in each.name) == [out.name]


@needs_windows
def test_windows_flushes_a_copy_once_more_when_it_has_its_name(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That puts the name on the disk, as the flush of a folder does elsewhere."""
    real, out = os.fsync, path.with_name("copy.kvs")
    has_name: list[bool] = []

    def fsync(fd: int) -> None:
        has_name.append(out.exists() and os.path.samestat(os.fstat(fd), os.stat(out)))
        real(fd)

    store = open_store()
    monkeypatch.setattr(os, "fsync", fsync)
    store.backup(out)
    assert has_name[-1]


@needs_real_windows
@pytest.mark.parametrize(("number", "times"), [(33, 2), (1117, 1)])
def test_windows_flush_is_tried_again_while_windows_writes_the_same_pages(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    """ERROR_LOCK_VIOLATION, as other databases met it; a failed flush would be final."""
    ctypes: Any = import_module("ctypes")
    kernel32: Any = import_module("kvstore.file.platform.win32")._kernel32
    store = KVStore(path)
    store.create("key", VALUE)
    real = kernel32.FlushViewOfFile
    refused: list[int] = []

    def flush(address: int, size: int) -> int:
        if len(refused) < times:
            refused.append(address)
            ctypes.set_last_error(number)
            return 0
        done: int = real(address, size)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(kernel32, "FlushViewOfFile", flush)
        if number == 33:
            store.sync()
            store.close()
        else:  # ERROR_IO_DEVICE
            with pytest.raises(OSError, match="WinError 1117"):
                store.sync()
            with pytest.raises(OSError, match="an earlier flush failed"):
                store.close()
    assert len(refused) == times


@needs_real_windows
def test_windows_parts_on_the_disk_are_told_within_what_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file system may tell of whole units of its own, which can be longer than an extent."""
    from kvstore.file.platform import win32

    def control(*arguments: Any) -> bool:
        *_, found, told = arguments
        found[:4] = 0, 2 * EXTENT_SIZE, 3 * EXTENT_SIZE, 10 * EXTENT_SIZE
        told.value = 32
        return True

    monkeypatch.setattr(win32, "_control", control)
    assert win32.allocated_ranges(0, EXTENT_SIZE, 5 * EXTENT_SIZE) == [
        (EXTENT_SIZE, 2 * EXTENT_SIZE),
        (3 * EXTENT_SIZE, 5 * EXTENT_SIZE),
    ]


@needs_windows
def test_windows_names_no_owner_of_what_is_in_the_temporary_folder_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "kvstore").write_bytes(b"")
    with pytest.raises(PermissionError, match=r"must be a folder \(no link\) for the store"):
        location._temporary_folder()


@needs_windows
def test_windows_tells_of_what_another_machine_serves(
    path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstore.file.platform import win32

    monkeypatch.setattr(win32, "final_path", lambda fd: rf"\\?\UNC\server\share\{path.name}")
    with pytest.warns(RuntimeWarning, match="a file system of type UNC"):
        open_store()


@needs_windows
def test_windows_refuses_what_the_store_never_asks_for(path: Path, open_store: OpenStore) -> None:
    """What the store avoids; so the tests mean something where the system is imitated."""
    open_store()
    with pytest.raises(PermissionError):
        path.unlink()
    with pytest.raises(PermissionError):
        path.rename(path.with_suffix(".other"))
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0),
        pytest.raises(OSError, match="Errno"),
    ):
        os.ftruncate(file.fileno(), 0)
    assert not hasattr(os, "pwrite")
    assert not hasattr(os, "fork")
