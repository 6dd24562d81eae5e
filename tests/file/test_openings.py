"""Openings where the system around the store is an odd one, and what is said where they fail.

What stops an opening is what the store cannot do without, and nothing else; one that fails leaves
what was there before. What a store needs later on it has since it was opened.
"""

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import pytest
from support.consistency import assert_consistent
from support.platforms import (
    PLATFORM,
    needs_fallocate,
    needs_linux,
    needs_posix,
    needs_pwrite,
    needs_symbolic_links,
)
from support.processes import Child, run_script

import kvstore.file.platform
import kvstore.recovery.rebuild
from kvstore import KVStore, StoreFullError, StoreLockedError
from kvstore.format.layout import FIRST_FILE_SIZE, HOLDER, HOLDER_OFFSET

needs_root = pytest.mark.skipif(
    PLATFORM != "linux" or os.geteuid() != 0, reason="only root on Linux can do this"
)

# What a script of a child can ask Linux for that this Python has no function for.
LINUX = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)

def linux(name, *arguments):
    if getattr(libc, name)(*arguments):
        say("cannot", name, os.strerror(ctypes.get_errno()))
        os._exit(0)

NEW_MOUNTS, NEW_PIDS, PRIVATE = 0x20000, 0x20000000, 1 << 18 | 1 << 14
"""


def said_by(script: str, *arguments: object) -> list[str]:
    """Return the lines that a child says; skip the test where Linux refuses what it asks for."""
    lines = run_script(LINUX + textwrap.dedent(script), *arguments).splitlines()
    if lines and lines[0].startswith("cannot"):
        pytest.skip(f"this system {lines[0]}")
    return lines


# --- the table of mounts -------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("used", [False, True], ids=["another mount", "the mount that is used"])
def test_mount_with_a_name_that_is_no_utf8_stops_no_opening(tmp_path: Path, used: bool) -> None:
    """One such mount anywhere made every opening on the machine raise UnicodeDecodeError."""
    script = """
        linux("unshare", NEW_MOUNTS)
        linux("mount", b"none", b"/", None, PRIVATE, None)
        name = os.fsencode(sys.argv[1]) + b"/caf\\xe9\\r \\x1c\\x85 - x"
        os.mkdir(name)
        linux("mount", b"none", name, b"tmpfs", 0, None)
        folder = os.fsdecode(name) if sys.argv[2] == "True" else sys.argv[1]
        with KVStore(folder + "/test.kvs") as store:
            store.create("key", {})
            say("in place:", store._file.in_place)
        with KVStore(folder + "/test.kvs") as store:
            say(*store)
    """
    lines = said_by(script, tmp_path, used)
    assert lines[1:] == ["key"]
    if used:
        assert lines[0] == "in place: True"


ROW = b"36 35 98:0 / /mnt rw,noatime master:1 - ext4 /dev/root rw\n"


@needs_linux
@pytest.mark.parametrize(
    ("mounts", "name"),
    [
        (ROW, "ext4"),
        (b"35 1 0:1 / /caf\xe9 rw - tmpfs \xff rw\n" + ROW, "ext4"),
        (ROW.replace(b"/mnt", b"/a\rb\x0b\x85"), "ext4"),
        (ROW.replace(b"ext4", b"\xff"), ""),
        (ROW.replace(b" - ", b" "), ""),
        (b"36 35", ""),
        (b"\n\xff\xfe\0" * 9, ""),
        (b"", ""),
    ],
)
def test_file_system_is_told_from_a_table_of_any_bytes_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch, mounts: bytes, name: str
) -> None:
    tables = {"fdinfo": b"pos:\t0\nmnt_id:\t36\n", "mountinfo": mounts}

    def give(path: str, mode: str) -> BytesIO:
        assert mode == "rb"
        return BytesIO(next(text for part, text in tables.items() if part in path))

    monkeypatch.setattr(kvstore.file.platform.linux, "open", give, raising=False)
    assert kvstore.file.platform.linux.file_system(0) == name
    KVStore(path).close()
    assert_consistent(path)


@needs_linux
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), PermissionError(1, "x"), ValueError(), LookupError()]
)
@pytest.mark.parametrize("probe", ["kvstore.file.platform.linux.open", "fcntl.ioctl"])
def test_probe_that_fails_in_any_way_stops_no_opening(
    path: Path, monkeypatch: pytest.MonkeyPatch, probe: str, error: Exception
) -> None:
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", _not_in_place)
    monkeypatch.setattr(probe, _raiser(error), raising=False)
    with KVStore(path, durable=True) as store:
        store.create("key", {})
    assert_consistent(path)


_overwrites_in_place = kvstore.file.platform.system.overwrites_in_place


def _not_in_place(fd: int) -> bool:
    _overwrites_in_place(fd)
    return False


def _raiser(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@needs_fallocate
@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get
)
def test_blocks_that_may_not_be_reserved_are_written_instead(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """EPERM is what a filter of system calls says, as containers have."""
    monkeypatch.setattr(os, "posix_fallocate", _raiser(OSError(number, os.strerror(number))))
    for _ in range(2):
        with KVStore(path) as store:
            store.create(f"k{len(store)}", {"x": "x" * 16_000})
    assert path.stat().st_blocks * 512 >= FIRST_FILE_SIZE
    assert_consistent(path)


# --- file systems that cannot keep the promises ---------------------------------------------------

_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "vboxsf", "fakeowner")
_SERVED = ("fuse", "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gvfsd-fuse", "fuse.grpcfuse")
_LOCAL = ("ext4", "xfs", "btrfs", "zfs", "bcachefs", "f2fs", "tmpfs", "overlay", "aufs", "vfat")
_LOCAL_TOO = ("ntfs3", "exfat", "fuseblk", "fuse.fuse-overlayfs", "fusectl", "")


def _say_that_it_is(kind: str) -> Callable[[int], str]:
    return lambda fd: kind


@needs_linux
@pytest.mark.parametrize("kind", [*_REMOTE, *_SERVED, *_LOCAL, *_LOCAL_TOO])
def test_on_linux_the_type_of_the_mount_tells_what_others_serve(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from kvstore.file.platform import linux

    monkeypatch.setattr(linux, "file_system", _say_that_it_is(kind))
    is_remote = kind in (*_REMOTE, *_SERVED)
    assert kvstore.file.platform.system.remote_kind(0) == (kind if is_remote else "")


def test_a_file_system_that_cannot_keep_the_promises_is_told_once_for_each_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the line that opened the store, whichever way the warning's filter has it shown."""
    monkeypatch.setattr(kvstore.file.platform.system, "remote_kind", _say_that_it_is("nfs4"))
    with pytest.warns(RuntimeWarning, match=r"the store on a local disk") as caught:
        store = KVStore(path)
    (said,) = caught
    assert f"{path} is on a file system of type nfs4," in str(said.message)
    assert said.filename == __file__
    with store:
        store.create("key", {})
    with KVStore(path) as store:  # a warning would be an error here
        assert store.read("key") == {}
    other = path.with_name("other.kvs")
    with pytest.warns(RuntimeWarning, match=re.escape(str(other))), KVStore(other):
        pass


def test_text_that_is_executed_without_a_name_is_warned_as_well(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk to the line that opened the store raised KeyError, and nothing was opened."""
    monkeypatch.setattr(kvstore.file.platform.system, "remote_kind", _say_that_it_is("nfs4"))
    with pytest.warns(RuntimeWarning, match="type nfs4"):
        exec("open_store(path).close()", {"open_store": KVStore, "path": path})


def test_where_warnings_are_errors_nothing_is_opened_or_left_each_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.with_name("old.kvs")
    with KVStore(old) as store:
        store.create("key", {})
    before = old.read_bytes()
    monkeypatch.setattr(kvstore.file.platform.system, "remote_kind", _say_that_it_is("nfs4"))
    for each in (path, old, path, old):
        with pytest.raises(RuntimeWarning, match="nfs4"):
            KVStore(each)
        assert not path.exists()
    monkeypatch.undo()
    assert old.read_bytes() == before
    for each in (path, old):
        KVStore(each).close()
        assert_consistent(each)


def test_a_backup_there_is_not_warned_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy needs no lock once it is made, and is verified."""
    with KVStore(path) as store:
        store.create("key", {})
        monkeypatch.setattr(kvstore.file.platform.system, "remote_kind", _say_that_it_is("nfs4"))
        assert store.backup(path.with_name("copy.kvs")) == 1


@contextmanager
def _served_folder(tmp_path: Path, *options: str) -> Iterator[Path]:
    """A folder that bindfs serves, whose files are really in another one. Skips without it."""
    served, real = tmp_path / "served", tmp_path / "real"
    served.mkdir()
    real.mkdir()
    try:
        subprocess.run(["bindfs", *options, real, served], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("bindfs is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"bindfs serves nothing here: {error.stderr.decode().strip()}")
    try:
        yield served
    finally:
        subprocess.run(["umount", served], check=True, capture_output=True)


@needs_root
def test_a_store_on_a_real_fuse_file_system_works_and_is_warned_of(tmp_path: Path) -> None:
    with _served_folder(tmp_path) as folder:
        path = folder / "test.kvs"
        with pytest.warns(RuntimeWarning, match="type fuse"), KVStore(path, durable=True) as store:
            for number in range(2000):
                store.put(f"key {number % 1500}", {"number": number})
        with KVStore(path) as store:
            assert len(store) == 1500
            assert store.read("key 7") == {"number": 1507}
        assert_consistent(path)


@needs_root
def test_a_real_file_system_that_maps_no_files_is_an_error_that_names_the_path(
    tmp_path: Path,
) -> None:
    with _served_folder(tmp_path, "-o", "direct_io") as folder:
        path = folder / "test.kvs"
        with pytest.raises(OSError, match="keep the store on a local one") as caught:
            KVStore(path)
        assert caught.value.filename == str(path)
        assert os.listdir(folder) == []


@needs_pwrite
def test_a_map_that_does_not_show_what_is_written_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a network file system that writes past the page cache; reads would be of old bytes."""
    KVStore(path).close()
    before = path.read_bytes()
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", _not_in_place)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: len(data))
    with pytest.raises(OSError, match="does not show in a mapped file") as caught:
        KVStore(path)
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    KVStore(path).close()


# --- no descriptor left --------------------------------------------------------------------------

USE_EVERYTHING = """
import kvstore.file.platform, resource, shutil, time
if sys.argv[2] != "as it is":
    kvstore.file.platform.system.overwrites_in_place = lambda _: sys.argv[2] == "in place"
store = KVStore(sys.argv[1], durable=sys.argv[3] == "durable", max_bytes=8 << 20)
loaded = set(sys.modules)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))

def attempt(kind, act):
    try:
        act()
    except kind:
        return
    say("no", kind.__name__)

class Odd(dict):
    pass

attempt(OSError, lambda: os.open(sys.argv[1], os.O_RDONLY))
store.create("key", {"n": [1, 2.5, None, True, "\\u00e9", {"deep": []}], "t": (1,)})
store.create("brief", {}, ttl=1000)
for value in ({"x": float("nan")}, {"x": object()}, {1: 2}, {"x": time}, {"x": "\\ud800"}, 5):
    attempt(InvalidValueError, lambda: store.create("bad", value))
attempt(InvalidKeyError, lambda: store.create("", {}))
attempt(InvalidTTLError, lambda: store.create("k", {}, ttl=0))
attempt(KeyExistsError, lambda: store.create("key", {}))
attempt(KeyNotFoundError, lambda: store.read("absent"))
assert store.read("key")["n"][1] == 2.5
assert store.get("absent") is None and store.read_bytes("brief") == b"{}"
assert 0 < store.ttl("brief") <= 1000
many = 40 if store._durable else 3000
for number in range(many):
    store.create(f"k{number}", {"n": number})
    if number % 3 == 0:
        store.delete(f"k{number}")
assert len(store) == len(list(store)) == len(dict(store.items())) == len(list(store.values()))
kvstore.clock.time_ns = lambda: time.time_ns() + 10**13
assert store.purge_expired() == 1
store.sync()
store.stats()
repr(store), store.path, store.closed
try:
    for number in range(10**6):
        store.create(f"large{number}", {"x": "x" * 16000})
except StoreFullError:
    pass
store.delete("large0")
pid = os.fork()
if pid == 0:
    attempt(StoreClosedError, store.sync)
    store.close()
    os._exit(0)
os.waitpid(pid, 0)
left = len(store)
store.close()
store.close()
attempt(StoreClosedError, lambda: store.read("key"))
say("loaded later:", *sorted(set(sys.modules) - loaded))
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
with KVStore(sys.argv[1]) as store:
    assert len(store) == left and "key" in store
say("end")
"""


@needs_posix
@pytest.mark.parametrize("durable", ["durable", "buffered"])
@pytest.mark.parametrize("place", ["as it is", "in place", "by pwrite"])
@pytest.mark.parametrize("pure", ["0", "1"], ids=["compiled", "plain"])
def test_every_member_works_where_the_process_has_no_descriptor_left(
    path: Path, place: str, durable: str, pure: str
) -> None:
    """The first durable flush imported ctypes; that this failed was taken for a failed flush."""
    with Child(USE_EVERYTHING, path, place, durable, KVSTORE_PURE=pure) as child:
        assert child.end().splitlines() == ["loaded later:", "end"]
        assert child.errors() == ""
    assert_consistent(path)


@needs_posix
def test_store_left_open_is_closed_at_exit_where_no_descriptor_is_left(path: Path) -> None:
    script = """
        import resource
        store = KVStore(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        store.create("key", {})
    """
    with Child(script, path) as child:
        child.end()
        assert child.errors() == ""
    assert_consistent(path)


@needs_linux
@pytest.mark.parametrize(
    "error", [ImportError("no _ctypes"), OSError(errno.EMFILE, "x"), AttributeError("msync")]
)
def test_durable_store_without_a_way_to_flush_pages_flushes_everything(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Such as in a Python without ctypes. It is found out at opening, not at the first flush."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _: True)
    monkeypatch.setattr(kvstore.file.platform.linux, "_msync", _raiser(error))
    flushes = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        flushes.append(fd)
        real(fd)

    with KVStore(path, durable=True) as store:
        monkeypatch.setattr(os, "fdatasync", fdatasync)
        store.create("key", {})
        store.delete("key")
        assert len(flushes) == 2
    assert_consistent(path)


# --- a first opening that fails ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken"), MemoryError(), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize(
    "where",
    [
        "kvstore.file.platform.system.flush_folder",
        "kvstore.file.platform.system.reserve",
        "kvstore.file.platform.system.write_at",
        "kvstore.file.platform.system.flush_file",
        "kvstore.file.opening.is_state",
        "kvstore.file.platform.system.map_file",
        "kvstore.file.platform.system.read_ahead",
        "kvstore.file.flushing.GroupCommit",
        "kvstore.file.lock.FileLock.open_again",
        "kvstore.recovery.rebuild.rebuild",
        "kvstore.parts.Segments",
    ],
)
@pytest.mark.parametrize("before", [None, b""], ids=["missing", "empty"])
def test_first_opening_that_fails_leaves_what_was_there_before(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes | None,
    where: str,
    error: BaseException,
) -> None:
    """It left 2 MiB, which a second opening took for a store that only had not been closed."""
    if before is not None:
        path.write_bytes(before)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(where, _raiser(error))
            with pytest.raises(type(error)):
                KVStore(path)
        assert os.listdir(path.parent) == ([] if before is None else [path.name])
        if before is not None:
            assert path.read_bytes() == before
    with KVStore(path) as store:
        store.create("key", {})
    assert_consistent(path)


@pytest.mark.parametrize(
    "where",
    [
        "kvstore.file.platform.system.map_file",
        "kvstore.recovery.opening.index_checksum",
        "kvstore.parts.Segments",
    ],
)
def test_later_opening_that_fails_leaves_the_store_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with KVStore(path) as store:
        store.create("key", {"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(where, _raiser(MemoryError()))
        with pytest.raises(MemoryError):
            KVStore(path)
    with KVStore(path) as store:
        assert store.read("key") == {"n": 1}
    assert_consistent(path)


@needs_posix
def test_who_waits_for_a_first_opening_that_fails_makes_a_file_of_his_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that he has open is removed; he must not use it, nor take it for the one there."""
    script = """
        say("trying")
        store = KVStore(sys.argv[1], timeout=100)
        store.create("key", {})
        store.close()
        say("closed")
    """
    started: list[Child] = []

    def fail(*_: object) -> NoReturn:
        # Begun amid the opening, when this process has the lock.
        started.append(Child(script, path))
        started[0].expect("trying")
        # By the time that another one was refused, it is most likely waiting.
        assert run_script("say(try_open(sys.argv[1]))", path).startswith("locked")
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(kvstore.file.platform.system, "flush_file", fail)
        with pytest.raises(OSError, match="broken"):
            KVStore(path)
    with started[0] as waiting:
        waiting.expect("closed")
        waiting.end()
    with KVStore(path) as store:
        assert list(store) == ["key"]
    assert_consistent(path)


@needs_posix
def test_file_that_another_opener_was_first_to_fill_is_not_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was created here, and locked and filled by another process before this one locked it."""
    system = kvstore.file.platform.system
    real = system.lock

    def lock(fd: int) -> bool:
        monkeypatch.setattr(system, "lock", real)
        script = "store = KVStore(sys.argv[1]); store.create('theirs', {}); store.close()"
        run_script(script, path)
        return real(fd)

    monkeypatch.setattr(system, "lock", lock)
    monkeypatch.setattr(system, "map_file", _raiser(MemoryError()))
    with pytest.raises(MemoryError):
        KVStore(path)
    monkeypatch.undo()
    with KVStore(path) as store:
        assert list(store) == ["theirs"]
    assert_consistent(path)


@needs_symbolic_links
def test_link_to_where_nothing_is_becomes_a_store_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "test.kvs")
    with KVStore(link) as store:
        store.create("key", {})
    assert link.is_symlink()
    assert_consistent(tmp_path / "there" / "test.kvs")


# --- address space -------------------------------------------------------------------------------


@needs_linux
def test_address_space_that_is_too_small_is_said_and_leaves_no_file(path: Path) -> None:
    """As with `ulimit -v`: a bare ENOMEM, and 2 MiB left behind."""
    script = """
        import resource
        with open("/proc/self/status") as lines:
            used = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
        say(used + (300 << 20))
        for again in range(2):
            try:
                KVStore(sys.argv[1])
            except OSError as error:
                say(error.errno, error.filename, error)
            say(os.path.exists(sys.argv[1]))
        with KVStore(sys.argv[1], max_bytes=100_000_000) as store:
            store.create("key", {})
    """
    limit, *lines = run_script(script, path).splitlines()
    for said, left in zip(lines[::2], lines[1::2], strict=True):
        assert said.startswith(f"{errno.ENOMEM} {path} ")
        for fact in ("smaller max_bytes", "1,000,000,000", "RLIMIT_AS", f"{int(limit):,}"):
            assert fact in said
        assert left == "False"
    assert_consistent(path)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOMEM, "max_bytes"), (errno.EAGAIN, "max_bytes"), (errno.ENODEV, "file system")],
)
def test_file_that_cannot_be_mapped_says_what_to_do(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    """EAGAIN is said after `mlockall`, beyond what may be locked."""
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(kvstore.file.platform.system, "map_file", _raiser(error))
    with pytest.raises(OSError, match=advice) as caught:
        KVStore(path)
    assert caught.value.errno == number
    assert caught.value.filename == str(path)


# --- the folder's flush --------------------------------------------------------------------------

CANNOT = [errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS]


@contextmanager
def flushes_of_folders(fail: BaseException | None = None) -> Iterator[list[str]]:
    """Note which folders are flushed; have that fail."""
    real, folders = os.fsync, []

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            folders.append(os.path.realpath(f"/proc/self/fd/{fd}"))
            if fail is not None:
                raise fail
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield folders


@needs_linux
@pytest.mark.parametrize("number", CANNOT)
def test_folder_that_cannot_be_flushed_stops_neither_a_first_nor_a_second_opening(
    path: Path, number: int
) -> None:
    with flushes_of_folders(OSError(number, os.strerror(number))):
        for _ in range(2):
            with KVStore(path) as store:
                store.sync()
    assert_consistent(path)


@needs_root
def test_folder_that_may_not_be_read_takes_a_store() -> None:
    """It may be written and searched, and that is all that it takes."""
    script = """
        import kvstore.recovery.rebuild  # this user may not be able to read what it is loaded from
        folder = sys.argv[1] + "/drop"
        os.mkdir(folder)
        os.chown(folder, 12345, 12345)
        os.chmod(folder, 0o300)
        os.chdir(folder)
        os.setuid(12345)
        for _ in range(2):
            with KVStore(folder + "/test.kvs") as store:
                say(len(store))
    """
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    try:
        assert run_script(script, folder).splitlines() == ["0", "0"]
    finally:
        subprocess.run(["rm", "-r", folder], check=True)


@needs_linux
def test_folder_whose_flush_fails_leaves_nothing_that_opens_without_it(path: Path) -> None:
    """The second opening found a valid file, and flushed the folder no more."""
    with flushes_of_folders(OSError(errno.EIO, "broken")) as folders:
        for _ in range(3):
            with pytest.raises(OSError, match="broken"):
                KVStore(path)
            assert not path.exists()
    assert len(folders) == 3
    with flushes_of_folders() as folders, KVStore(path):
        assert folders == [str(path.parent)]


@needs_linux
def test_folder_is_flushed_before_the_file_is_a_store(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, a process left a store whose name no later opening put on the disk."""
    real = kvstore.file.platform.system.flush_folder
    sizes = []

    def flush(name: str) -> None:
        sizes.append(path.stat().st_size)
        real(name)

    monkeypatch.setattr(kvstore.file.platform.system, "flush_folder", flush)
    KVStore(path).close()
    assert sizes == [0]
    assert path.stat().st_size == FIRST_FILE_SIZE


@needs_linux
def test_folder_that_is_flushed_is_the_one_that_the_file_is_in(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "test.kvs")
    with flushes_of_folders() as folders, KVStore(tmp_path / "link"):
        assert folders == [str(tmp_path / "there")]


# --- what cannot be looked at --------------------------------------------------------------------

OUT_OF_SIGHT = """
store = KVStore(sys.argv[1])
store.create("key", {})
if sys.argv[2] == "removed":
    os.unlink(sys.argv[1])
elif sys.argv[2] == "locked away":
    os.chmod(os.path.dirname(sys.argv[1]), 0)
root = os.path.join(os.path.dirname(sys.argv[1]), "root")
os.mkdir(root)
if sys.argv[3] == "chroot":
    os.chroot(root)
elif sys.argv[3] == "chroot, another file there":
    os.makedirs(root + os.path.dirname(sys.argv[1]))
    with open(root + sys.argv[1], "x"):
        pass
    os.chroot(root)
else:
    os.chmod(os.path.dirname(sys.argv[1]), 0o700)
    os.setuid(12345)
for act in (store.sync, store.close):
    try:
        act()
        say("fine")
    except OSError as error:
        say(error)
say(store.closed)
"""


@needs_root
@pytest.mark.parametrize("act", ["setuid", "chroot", "chroot, another file there"])
def test_process_that_cannot_see_its_file_any_more_goes_on_and_closes_it(
    path: Path, act: str
) -> None:
    """It said "removed or replaced", or raised the PermissionError of looking."""
    assert run_script(OUT_OF_SIGHT, path, "there", act).splitlines() == ["fine", "fine", "True"]
    with KVStore(path) as store:
        assert list(store) == ["key"]
    assert_consistent(path)


@needs_root
@pytest.mark.parametrize("act", ["setuid", "chroot", "chroot, another file there"])
def test_file_that_was_removed_is_missed_even_where_its_place_cannot_be_seen(
    path: Path, act: str
) -> None:
    """The open file itself tells that no name leads to it any more."""
    sync, close, closed = run_script(OUT_OF_SIGHT, path, "removed", act).splitlines()
    assert "removed or replaced" in sync
    assert "removed or replaced" in close
    assert closed == "True"


@needs_posix
@pytest.mark.parametrize("replace", ["a file", "a loop of links"])
def test_folder_that_gives_way_to_something_else_takes_the_file_along(
    tmp_path: Path, replace: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    store = KVStore(folder / "test.kvs")
    folder.rename(tmp_path / "away")
    if replace == "a file":
        folder.touch()
    else:
        folder.symlink_to(folder)
    for act in (store.sync, store.close):
        with pytest.raises(OSError, match="removed or replaced"):
            act()
    assert_consistent(tmp_path / "away" / "test.kvs")


# --- leases --------------------------------------------------------------------------------------

# The lease is given up when the test says so, not when the system asks for it by SIGIO.
LEASE = """
    import fcntl
    signal.signal(signal.SIGIO, lambda *_: None)
    fd = os.open(sys.argv[1], os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, getattr(fcntl, sys.argv[2]))
    except OSError as error:
        say("cannot", error)
    else:
        say("holding")
    hear()
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    hear()
"""


@contextmanager
def lease(path: Path, kind: str) -> Iterator[Child]:
    with Child(LEASE, path, kind) as holder:
        said = holder.hear()
        if said != "holding":
            pytest.skip(f"no leases here: {said}")
        yield holder
        holder.say()
        holder.end()


@needs_linux
@pytest.mark.parametrize("kind", ["F_RDLCK", "F_WRLCK"])
def test_lease_of_another_process_is_waited_for(path: Path, kind: str) -> None:
    """The opening failed at once, with BlockingIOError, whatever `timeout` was."""
    KVStore(path).close()
    with lease(path, kind) as holder:
        script = "say('trying'); say(try_open(sys.argv[1], timeout=100))"
        with Child(script, path) as waiting:
            waiting.expect("trying")
            with pytest.raises(StoreLockedError, match="lease"):
                KVStore(path)
            holder.say("give it up")
            waiting.expect("opened")
            waiting.end()
    assert_consistent(path)


@needs_linux
@pytest.mark.parametrize("timeout", [0, 0.2])
def test_lease_that_is_not_given_up_is_what_is_said(path: Path, timeout: float) -> None:
    KVStore(path).close()
    with lease(path, "F_RDLCK"):
        with pytest.raises(StoreLockedError, match="somebody has a lease on it") as caught:
            KVStore(path, timeout=timeout)
        assert str(path) in str(caught.value)
        assert ("waited for 0.2 seconds" in str(caught.value)) == bool(timeout)


@needs_linux
def test_inspector_says_that_a_lease_keeps_it_from_looking(path: Path) -> None:
    KVStore(path).close()
    with lease(path, "F_WRLCK"):
        for options in ([], ["--unlocked"]):
            status, said = _inspect("info", str(path), *options)
            assert status == 3
            assert "lease" in said


# --- who has it ----------------------------------------------------------------------------------


def _name_holder(path: Path, pid: int) -> None:
    with path.open("r+b") as file:
        file.seek(HOLDER_OFFSET)
        file.write(HOLDER.pack(pid))


@needs_linux
@pytest.mark.parametrize("open_file", [False, True], ids=["unrelated", "reading the file"])
def test_number_that_now_belongs_to_another_process_is_not_named(
    path: Path, open_file: bool
) -> None:
    """A killed holder's number goes to somebody else, who may even have the file open."""
    script = "file = len(sys.argv) > 2 and open(sys.argv[1]); say('here'); hear()"
    arguments = (path, "open it") if open_file else (path,)
    with KVStore(path), Child(script, *arguments) as other:
        other.expect("here")
        assert f"process {os.getpid()} has" in _refusal(path)
        _name_holder(path, other.pid)
        assert "another process has" in _refusal(path)
        assert str(other.pid) not in _refusal(path)
        _name_holder(path, 1)
        assert "another process has" in _refusal(path)
        _name_holder(path, 2**32 - 1)
        assert "another process has" in _refusal(path)
        other.say()
        other.end()


def _refusal(path: Path) -> str:
    return run_script("say(try_open(sys.argv[1]))", path).strip()


HOLD_ELSEWHERE = """
    linux("unshare", NEW_PIDS)
    pid = os.fork()
    if pid == 0:
        store = KVStore(sys.argv[1])
        say("holding as", os.getpid())
        hear()
        store.close()
        os._exit(0)
    os.waitpid(pid, 0)
"""


@needs_root
def test_holder_of_another_pid_namespace_is_not_named_by_its_number_there(path: Path) -> None:
    """As in a container, where the holder is process 1, and so is the one that asks in its own."""
    script = LINUX + textwrap.dedent(HOLD_ELSEWHERE)
    with Child(script, path) as holder:
        said = holder.hear()
        if said.startswith("cannot"):
            pytest.skip(said)
        assert said == "holding as 1"
        refusal = _refusal(path)
        assert "another process has" in refusal
        assert "process 1 " not in refusal
        ask = """
            linux("unshare", NEW_PIDS | NEW_MOUNTS)
            pid = os.fork()
            if pid == 0:
                linux("mount", b"none", b"/", None, PRIVATE, None)
                linux("mount", b"proc", b"/proc", b"proc", 0, None)
                say(os.getpid(), try_open(sys.argv[1]))
                os._exit(0)
            os.waitpid(pid, 0)
        """
        (line,) = said_by(ask, path)
        assert line.startswith("1 locked: ")
        assert "another process has" in line
        assert "process 1 " not in line
        holder.say()
        holder.end()
    assert_consistent(path)


@needs_root
def test_holder_of_another_user_is_not_named_for_nobody_can_be_sure() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    path = folder / "test.kvs"
    try:
        with KVStore(path):
            path.chmod(0o666)
            said = run_script("os.setuid(12345); say(try_open(sys.argv[1]))", path)
        assert "another process has" in said
    finally:
        path.unlink()
        folder.rmdir()


# --- what to do ----------------------------------------------------------------------------------


def test_file_that_this_process_has_open_is_refused_with_the_line_that_opened_it(
    path: Path,
) -> None:
    line = sys._getframe().f_lineno + 1
    with KVStore(path), pytest.raises(StoreLockedError) as caught:
        KVStore(path)
    for fact in (str(path), f"{__file__}, line {line}", "this very process", "share", "close"):
        assert fact in str(caught.value)
    assert "timeout" not in str(caught.value), "nobody waits for himself"


def test_line_that_opened_it_is_the_one_of_the_program_and_not_of_the_package(path: Path) -> None:
    class Mine(KVStore):
        pass

    def make() -> KVStore:
        return Mine(path)

    line = make.__code__.co_firstlineno + 1
    with make(), pytest.raises(StoreLockedError, match=f"line {line};"):
        KVStore(path)


def test_file_that_another_process_has_open_is_refused_with_what_to_do(path: Path) -> None:
    with KVStore(path):
        said = _refusal(path)
        assert "timeout=SECONDS" in said
        assert "close it" in said
        waited = run_script("say(try_open(sys.argv[1], timeout=0.1))", path)
        assert "waited for 0.1 seconds" in waited


def test_command_lines_name_their_own_options_where_a_file_is_in_use(path: Path) -> None:
    with KVStore(path):
        for status, said in (
            _run("kvstore", "read", "--file", str(path), "key"),
            _inspect("info", str(path)),
            _inspect("load", str(path), os.devnull),
        ):
            assert status == 3
            assert "--wait SECONDS" in said
            assert "timeout=" not in said
            assert ("--unlocked" in said) == said.startswith("kvstore-inspect")


def _inspect(*arguments: str) -> tuple[int, str]:
    return _run("kvstore_inspect", *arguments)


def _run(module: str, *arguments: str) -> tuple[int, str]:
    """Return the exit status of a command, and what it says on standard error."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2] / "tools",
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("max_bytes", [32_000_000, 4 << 20])
def test_file_at_its_limit_is_refused_with_the_limit_that_was_given(
    path: Path, max_bytes: int
) -> None:
    """It named the next lower multiple of an extent, which nobody had asked for."""
    with KVStore(path, max_bytes=max_bytes) as store, pytest.raises(StoreFullError) as caught:
        for number in range(10_000):
            store.create(f"k{number}", {"x": "x" * 16_000})
    assert f"max_bytes is {max_bytes:,}" in str(caught.value)
    assert f"{path.stat().st_size:,} bytes" in str(caught.value)


@needs_posix
def test_limit_of_the_system_on_files_is_the_one_that_is_named(path: Path) -> None:
    script = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
        with KVStore(sys.argv[1]) as store:
            try:
                for number in range(1000):
                    store.create(f"k{number}", {"x": "x" * 16_000})
            except StoreFullError as error:
                say(error)
    """
    said = run_script(script, path)
    assert "5,000,000" in said
    assert "ulimit -f" in said
    assert "max_bytes" not in said
    assert_consistent(path)


@needs_posix
def test_file_that_the_file_system_lets_be_no_longer_is_used_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.ftruncate

    def ftruncate(fd: int, length: int) -> None:
        if length > FIRST_FILE_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        real(fd, length)

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    with KVStore(path) as store, pytest.raises(StoreFullError, match="file system") as caught:
        for number in range(10_000):
            store.create(f"k{number}", {"x": "x" * 16_000})
    assert "max_bytes" not in str(caught.value)
    assert_consistent(path)
