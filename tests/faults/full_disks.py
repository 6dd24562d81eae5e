"""Real disks that are full: filled by the store itself, or by someone else while it is open.

A trial mounts a small disk, in a mount namespace of its own, which goes with it however it ends.
Its process is what a full disk must not kill.
"""

import ctypes
import functools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

from support import MIB, disks
from support.consistency import assert_consistent
from support.workload import Value, make_value

from kvstore import KVStore, StoreFullError

from .laboratory import Experiment
from .refusals import through

# The largest first: what has no room for one of these may have it for the next.
SIZES = (12_000, 3_000, 700, 100, 10)
_CLONE_NEWNS: Final = 0x0002_0000  # linux/sched.h

State = dict[str, Value]


@dataclass
class Disk:
    """A mounted disk, empty but for what its scenarios leave in it."""

    kind: str
    folder: Path

    @property
    def may_refuse(self) -> bool:
        """Whether it may need room to change what is reserved, if that is shared or was copied."""
        return self.kind in disks.SHARING

    def fill(self, leave: int = 0) -> None:
        disks.fill(self.folder, leave)

    def clear(self) -> None:
        """Remove every file."""
        disks.fill(self.folder)
        disks.empty(self.folder)
        for file in self.folder.glob("*.kvs*"):
            file.unlink()


# --- scenarios: each returns how many faults it tried ------------------------------------------


def fill_while_open(disk: Disk, rng: random.Random) -> int:
    """Someone else fills the disk; the store reads, deletes, creates into what it freed, closes.

    A file that the store did not make itself, but another program copied, has none of the
    attributes that the store may have given it.
    """
    file = disk.folder / "data.kvs"
    copied = rng.random() < 0.5
    copy_on_write = copied and disk.kind in disks.COPY_ON_WRITE
    live = make_store(file, 200)
    if copied:
        disks.replace_by_copy(file)
    store = KVStore(file, durable=rng.random() < 0.2)
    for number in range(50):
        _create(store, live, f"second {number}", SIZES[number % len(SIZES)])
    # What is on the disk already is what a copy-on-write file system needs room to change.
    store.sync()
    disk.fill()
    create_until_full(store, live)
    store.sync()
    _assert_holds(store, live)
    change_on_full_disk(store, live, copy_on_write)
    assert store.purge_expired() == 0
    store.sync()
    store.close()
    with KVStore(file) as store:
        _assert_holds(store, live)
        change_on_full_disk(store, live, copy_on_write)
        compact_on_full_disk(store, live, copy_on_write)
    work_once_there_is_room(file, live)
    return 2


def fill_by_itself(disk: Disk, _rng: random.Random) -> int:
    """The store alone fills the disk; everything that it took is there."""
    file = disk.folder / "data.kvs"
    live: State = {}
    with KVStore(file) as store:
        create_until_full(store, live)
        _assert_holds(store, live)
        change_on_full_disk(store, live, copy_on_write=False)
    assert_consistent(file)
    assert file.stat().st_size > disks.SIZES[disk.kind] / 2
    with KVStore(file) as store:
        _assert_holds(store, live)
    return 1


def kill_on_full_disk(disk: Disk, rng: random.Random) -> int:
    """A process is killed on the full disk, and its file is recovered there."""
    file = disk.folder / "data.kvs"
    live = make_store(file, 200)
    disk.fill()
    # What the child does, and what it makes of `live`, is known beforehand.
    doomed = rng.sample(sorted(live), 60)
    child = os.fork()
    if child == 0:
        try:
            with KVStore(file) as store:
                for key in doomed[:40]:
                    store.delete(key)
                for key in doomed[:20]:
                    store.create(key, live[key])
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "could not work on a full disk"
    for key in doomed[20:40]:
        del live[key]
    with KVStore(file) as store:
        _assert_holds(store, live)
        change_on_full_disk(store, live, copy_on_write=False)
        compact_on_full_disk(store, live, copy_on_write=False)
    work_once_there_is_room(file, live)
    return 1


def create_on_full_disk(disk: Disk, _rng: random.Random) -> int:
    """A new file has no room: refused as that, and nothing stays that would be in the way."""
    file = disk.folder / "data.kvs"
    disk.fill()
    for _ in range(2):
        try:
            KVStore(file).close()
        except StoreFullError as error:
            _assert_full_disk(error)
        else:
            raise AssertionError("a store of 2 MiB was created on a full disk")
    work_once_there_is_room(file, {})
    return 2


def restore_with_holes(disk: Disk, rng: random.Random) -> int:
    """The file was restored with holes (cp --sparse=always) onto a disk that is full by now.

    A store through the map into a hole that the disk cannot fill would be a SIGBUS. Where writes
    report a full disk, such a file is at least open to readers.
    """
    file, whole = disk.folder / "data.kvs", disk.folder / "whole.kvs"
    live = make_store(whole, 100)
    disks.copy_with_holes(whole, file)
    whole.unlink()
    disk.fill(rng.choice((0, 100_000, MIB)))
    use_if_it_opens(file, live, must_open=disk.kind in disks.SHARING)
    work_once_there_is_room(file, live)
    return 1


def share_with_a_copy(disk: Disk, rng: random.Random) -> int:
    """The file shares its blocks with a copy (cp --reflink): to overwrite one takes another.

    Also where its process was killed, so that it has to be recovered; it is open to readers.
    """
    file, copy = disk.folder / "data.kvs", disk.folder / "copy.kvs"
    live = make_store(file, 300, close=rng.random() < 0.5)
    disks.share_blocks(file, copy)
    disk.fill()
    use_if_it_opens(file, live, must_open=True)
    work_once_there_is_room(file, live)
    return 1


def share_while_open(disk: Disk, _rng: random.Random) -> int:
    """A copy comes to share the blocks of the open file, and the disk is filled."""
    file, copy = disk.folder / "data.kvs", disk.folder / "copy.kvs"
    live = make_store(file, 300)
    with KVStore(file) as store:
        store.sync()
        disks.share_blocks(file, copy)
        disk.fill()
        create_until_full(store, live)
        _assert_holds(store, live)
        change_on_full_disk(store, live, copy_on_write=True)
        compact_on_full_disk(store, live, copy_on_write=True)
    # `close` may have had no room for the mark that the index is whole.
    use_if_it_opens(file, live, must_open=True)
    work_once_there_is_room(file, live)
    return 1


Scenario = Callable[[Disk, random.Random], int]
SCENARIOS: Final[dict[str, tuple[Scenario, ...]]] = {
    "tmpfs": (
        fill_while_open,
        fill_by_itself,
        kill_on_full_disk,
        create_on_full_disk,
        restore_with_holes,
    ),
    "ext4": (
        fill_while_open,
        fill_by_itself,
        kill_on_full_disk,
        create_on_full_disk,
        restore_with_holes,
    ),
    "btrfs": (
        fill_while_open,
        kill_on_full_disk,
        create_on_full_disk,
        restore_with_holes,
        share_with_a_copy,
        share_while_open,
    ),
    "xfs": (
        fill_while_open,
        kill_on_full_disk,
        create_on_full_disk,
        restore_with_holes,
        share_with_a_copy,
        share_while_open,
    ),
}


def try_all_on(kind: str, folder: Path, rng: random.Random) -> int:
    """Mount a disk and try every scenario on it; return how often the disk was full."""
    enter_mount_namespace()
    tried = 0
    with disks.mounted(kind, folder) as mount_point:
        disk = Disk(kind, mount_point)
        for scenario in SCENARIOS[kind]:
            try:
                tried += scenario(disk, rng)
            except BaseException as error:
                error.add_note(f"{kind}: {scenario.__name__}")
                raise
            disk.clear()
    return tried


def enter_mount_namespace() -> None:
    """Have what this process mounts be its own, and go when it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    disks.mount_privately()


@functools.cache
def reason_not_to_mount(kind: str) -> str | None:
    """Return why no disk with that file system can be mounted here; None where it can."""
    if sys.platform != "linux":
        return "mounts a disk, which is written for Linux only"
    if os.geteuid() != 0:
        return "mounts a disk, which takes root"
    if kind != "tmpfs" and shutil.which(f"mkfs.{kind}") is None:
        return f"mkfs.{kind} is not installed"
    child = os.fork()
    if child == 0:
        try:
            enter_mount_namespace()
            os._exit(0)
        finally:
            os._exit(1)
    return "may not mount" if os.waitpid(child, 0)[1] else None


# --- steps -------------------------------------------------------------------------------------


def create_until_full(store: KVStore, live: State, of_disk: bool = True) -> int:
    """Create values of each size until there is no room for one; return how many there was for.

    Large ones only where each takes a while.
    """
    before = len(live)
    for size in SIZES[:2] if _is_slow(store) else SIZES:
        for number in count():
            try:
                _create(store, live, f"{size}/{before}/{number}", size)
            except StoreFullError as error:
                if of_disk:
                    _assert_full_disk(error)
                break
    return len(live) - before


def delete_some(store: KVStore, live: State, copy_on_write: bool) -> State:
    """Delete every third key and return what was deleted. On btrfs, which takes its time: a few."""
    deleted = {}
    for key in list(live)[:: 25 if _is_slow(store) else 3]:
        try:
            store.delete(key)
        except StoreFullError as error:
            if not copy_on_write:
                raise
            _assert_full_disk(error)
        else:
            deleted[key] = live.pop(key)
    return deleted


def replace_some(store: KVStore, live: State, copy_on_write: bool) -> None:
    """Put some keys, each with a value of the size that it has; delete some of these.

    What was retired is reclaimed where there is no room; on btrfs, which takes its time: a few.
    """
    for number, key in enumerate(list(live)[:: 30 if _is_slow(store) else 7]):
        value = make_value(key, -number, len(live[key]["text"]))
        try:
            store.put(key, value)
            live[key] = value
            if number % 3 == 0:
                store.delete(key)
                del live[key]
        except StoreFullError as error:
            if error.__cause__ is not None:
                _assert_full_disk(error)
            assert copy_on_write or key in store


def create_into_freed(store: KVStore, live: State, deleted: State, copy_on_write: bool) -> int:
    """Create again what was deleted; return how many had room."""
    created = 0
    for key, value in deleted.items():
        try:
            store.create(key, value)
        except StoreFullError as error:
            if not copy_on_write:
                raise
            # Without a cause, the file may not grow; blocks that could not be retired are lost.
            if error.__cause__ is not None:
                _assert_full_disk(error)
        else:
            live[key] = value
            created += 1
    return created


def make_store(file: Path, records: int, *, close: bool = True) -> State:
    """Make a store, and return what it holds; a closed one, or one whose process was killed."""
    live: State = {}
    with KVStore(file) as store:
        for number in range(records):
            _create(store, live, f"early {number}", SIZES[number % len(SIZES)])
        if not close:
            store._file.require_rebuild()
    return live


def use_if_it_opens(file: Path, live: State, *, must_open: bool) -> None:
    """Do everything with a file whose blocks may be holes, or shared: it works or is refused."""
    try:
        store = KVStore(file)
    except StoreFullError as error:
        if must_open:
            raise
        _assert_full_disk(error)
        return
    with store:
        _assert_holds(store, live)
        create_until_full(store, live)
        change_on_full_disk(store, live, copy_on_write=True)
        compact_on_full_disk(store, live, copy_on_write=True)


def change_on_full_disk(store: KVStore, live: State, copy_on_write: bool) -> None:
    """Delete, and create what was deleted; only a copy-on-write file system may refuse that."""
    deleted = delete_some(store, live, copy_on_write)
    _assert_holds(store, live)
    replace_some(store, live, copy_on_write)
    _assert_holds(store, live)
    create_into_freed(store, live, deleted, copy_on_write)
    _assert_holds(store, live)


def compact_on_full_disk(store: KVStore, live: State, copy_on_write: bool) -> None:
    """Delete most, and compact: only a copy-on-write file system may refuse that, halfway too."""
    for number, key in enumerate(list(live)):
        if number % 10:
            try:
                store.delete(key)
                del live[key]
            except StoreFullError as error:
                _assert_full_disk(error)
                assert copy_on_write
    size = store.stats().file_size
    try:
        assert store.compact() == size - store.stats().file_size
    except StoreFullError as error:
        _assert_full_disk(error)
        assert copy_on_write
    _assert_holds(store, live)


def work_once_there_is_room(file: Path, live: State) -> None:
    """Take the filler away: the store holds what it must and works as ever."""
    disks.empty(file.parent)
    with KVStore(file) as store:
        _assert_holds(store, live)
        for number in range(200):
            _create(store, live, f"late {number}", SIZES[number % len(SIZES)])
        for key in list(live)[::2]:
            store.delete(key)
            del live[key]
        _assert_holds(store, live)
    assert_consistent(file)
    with KVStore(file) as store:
        _assert_holds(store, live)


def _is_slow(store: KVStore) -> bool:
    """Return whether each change takes milliseconds, as on a full btrfs."""
    return store.path.parent.name.startswith("btrfs")


def _create(store: KVStore, live: State, key: str, size: int) -> None:
    value = make_value(key, len(live), size)
    store.create(key, value)
    live[key] = value


def _assert_holds(store: KVStore, live: State) -> None:
    found: dict[str, Any] = dict(store.items())
    assert found.keys() == live.keys(), (
        f"lost {sorted(live.keys() - found.keys())[:5]}, "
        f"extra {sorted(found.keys() - live.keys())[:5]}"
    )
    assert all(found[key] == live[key] for key in live)
    assert all(store.read(key) == live[key] for key in list(live)[::7])
    assert len(store) == len(live)


def _assert_full_disk(error: StoreFullError) -> None:
    cause = error.__cause__
    assert isinstance(cause, OSError), f"{error!r} has the cause {cause!r}"
    assert cause.errno in (ENOSPC, EDQUOT, EFBIG), repr(cause)


# --- a limit on the size of files --------------------------------------------------------------


def limit_file_size(folder: Path, rng: random.Random) -> int:
    """Set RLIMIT_FSIZE before the file is opened, while it is open, and below its size."""
    through(rng.choice(("map", "pwrite")))
    tried = 0
    for scenario in (fill_under_limit, lower_limit_while_open, open_beyond_limit, die_of_signal):
        _allow_files_of(None)
        file = folder / f"{scenario.__name__}.kvs"
        try:
            scenario(file, rng)
        except BaseException as error:
            error.add_note(scenario.__name__)
            raise
        tried += 1
    return tried


def fill_under_limit(file: Path, rng: random.Random) -> None:
    """The limit acts as max_bytes."""
    limit = rng.randrange(4 * MIB, 8 * MIB)
    _allow_files_of(limit)
    live: State = {}
    with KVStore(file) as store:
        create_until_full(store, live, of_disk=False)
        change_on_full_disk(store, live, copy_on_write=False)
    with KVStore(file) as store:
        _assert_holds(store, live)
    assert_consistent(file)
    assert limit - MIB < file.stat().st_size <= limit


def lower_limit_while_open(file: Path, rng: random.Random) -> None:
    live: State = {}
    with KVStore(file) as store:
        for number in range(200):
            _create(store, live, f"early {number}", SIZES[number % len(SIZES)])
        _allow_files_of(file.stat().st_size + rng.randrange(200_000))
        create_until_full(store, live, of_disk=False)
        change_on_full_disk(store, live, copy_on_write=False)
    assert_consistent(file)


def open_beyond_limit(file: Path, rng: random.Random) -> None:
    """A file that is larger than the limit reads; where writes can be refused, these may be."""
    live = make_store(file, 1_000)
    size = file.stat().st_size
    limit = rng.randrange(MIB, size)
    _allow_files_of(limit)
    with KVStore(file) as store:
        refusing = not store._file.in_place
        _assert_holds(store, live)
        create_until_full(store, live, of_disk=False)
        change_on_full_disk(store, live, copy_on_write=refusing)
    assert file.stat().st_size == size
    with KVStore(file) as store:
        _assert_holds(store, live)
    _allow_files_of(None)
    with KVStore(file) as store:
        _assert_holds(store, live)
    assert_consistent(file)


def die_of_signal(file: Path, rng: random.Random) -> None:
    """A program that has SIGXFSZ at its default, which Python does not, may die of it.

    With `max_bytes` up to the limit it does not. Either way nothing is lost.
    """
    limit = rng.randrange(5 * MIB, 8 * MIB)
    live = make_store(file, 200)
    lowered = rng.random() < 0.5
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        if not lowered:
            _allow_files_of(limit)
        try:
            with KVStore(file, max_bytes=limit) as store:
                if lowered:
                    _allow_files_of(file.stat().st_size)
                for number in count():
                    try:
                        store.create(f"{number}", make_value(f"{number}", number, 12_000))
                    except StoreFullError:
                        break
                    os.write(tell, b".")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(tell)
    acknowledged = 0
    while block := os.read(told, 65_536):
        acknowledged += len(block)
    os.close(told)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGXFSZ if lowered else 0), f"ended with {code}"
    for number in range(acknowledged):
        live[f"{number}"] = make_value(f"{number}", number, 12_000)
    with KVStore(file) as store:
        _assert_holds(store, live)
    assert_consistent(file)


def _allow_files_of(size: int | None) -> None:
    """Limit the files of this process to so many bytes, or not."""
    import resource  # of POSIX

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = resource.RLIM_INFINITY if size is None else size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


EXPERIMENTS = (
    *(
        Experiment(
            f"full-disk-{kind}",
            f"{kind} filled by others or itself; holes, shared blocks, a kill",
            "full disks",
            partial(try_all_on, kind),
            unavailable=partial(reason_not_to_mount, kind),
        )
        for kind in SCENARIOS
    ),
    Experiment(
        "file-size-limit",
        "RLIMIT_FSIZE below what the file has or wants",
        "limits",
        limit_file_size,
        unavailable=lambda: None if sys.platform == "linux" else "RLIMIT_FSIZE as on Linux",
    ),
)
