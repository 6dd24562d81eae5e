"""Work on a full disk. Run these functions in a child: what they must not do is die of a signal."""

import json
import os
import resource
import signal
from errno import EDQUOT, EFBIG, ENOSPC
from itertools import count
from pathlib import Path
from typing import Any

from kvstore import KVStore, StoreFullError

from . import disks
from .whole import assert_whole
from .workload import Value, make_value

# The largest first: what has no room for one of these may have it for the next.
SIZES = (12_000, 3_000, 700, 100, 10)


def work_on_full_disk(
    path: str, copy_on_write: bool, durable: bool, copied: bool
) -> dict[str, int]:
    """Fill the disk while the store is open, and do everything that must work then, and after."""
    file = Path(path)
    live: dict[str, Value] = {}
    with KVStore(file) as store:
        for number in range(200):
            _create(store, live, f"early {number}", SIZES[number % len(SIZES)])
    if copied:
        disks.replace_by_copy(file)
    store = KVStore(file, durable=durable)
    for number in range(100):
        _create(store, live, f"second {number}", SIZES[number % len(SIZES)])
    # What is on the disk already is what a copy-on-write file system needs room to change.
    store.sync()
    disks.fill(file.parent)
    created = create_until_full(store, live)
    store.sync()
    _assert_holds(store, live)
    deleted = delete_some(store, live, copy_on_write)
    _assert_holds(store, live)
    again = create_into_freed(store, live, deleted, copy_on_write)
    _assert_holds(store, live)
    assert store.purge_expired() == 0
    store.sync()
    store.close()
    try:
        store = KVStore(file)
    except StoreFullError as error:
        # There was no room to mark it clean, and there is none to recover it.
        if not copy_on_write:
            raise
        _assert_full_disk(error)
    else:
        with store:
            _assert_holds(store, live)
            deleted = delete_some(store, live, copy_on_write)
            create_into_freed(store, live, deleted, copy_on_write)
            _assert_holds(store, live)
    work_once_there_is_room(path, live)
    return {"created": created, "deleted": len(deleted), "again": again}


def fill_by_itself(path: str) -> int:
    """Let the store alone fill the disk; everything that it took is there."""
    file = Path(path)
    live: dict[str, Value] = {}
    with KVStore(file) as store:
        created = create_until_full(store, live)
        _assert_holds(store, live)
        delete_some(store, live, copy_on_write=False)
        _assert_holds(store, live)
    assert_whole(file)
    with KVStore(file) as store:
        _assert_holds(store, live)
    return created


def die_on_full_disk(path: str, notes: str, copy_on_write: bool) -> None:
    """Fill the disk, note what was acknowledged in a file elsewhere, and end by SIGKILL."""
    file = Path(path)
    store = KVStore(file)
    live: dict[str, Value] = {}
    for number in range(200):
        _create(store, live, f"early {number}", SIZES[number % len(SIZES)])
    disks.fill(file.parent)
    create_until_full(store, live)
    delete_some(store, live, copy_on_write)
    Path(notes).write_text(json.dumps(live))
    os.kill(os.getpid(), signal.SIGKILL)


def recover_on_full_disk(path: str, notes: str, copy_on_write: bool) -> str:
    """Open what `die_on_full_disk` left, on the disk that is still full; then with room."""
    live = json.loads(Path(notes).read_text())
    outcome = "recovered"
    try:
        store = KVStore(path)
    except StoreFullError as error:
        if not copy_on_write:
            raise
        _assert_full_disk(error)
        outcome = "refused"
    else:
        with store:
            _assert_holds(store, live)
            deleted = delete_some(store, live, copy_on_write)
            create_into_freed(store, live, deleted, copy_on_write)
            _assert_holds(store, live)
    work_once_there_is_room(path, live)
    return outcome


def create_on_full_disk(path: str) -> None:
    """A new file has no room: refused as that, and nothing stays that would be in the way."""
    file = Path(path)
    disks.fill(file.parent)
    for _ in range(2):
        try:
            KVStore(file).close()
        except StoreFullError as error:
            _assert_full_disk(error)
        else:
            raise AssertionError("a store of 2 MiB was created on a full disk")
    work_once_there_is_room(path, {})


def open_on_full_disk(path: str, expected: str) -> str:
    """Open a file whose blocks may be holes, or shared, on a full disk, and do what can be done.

    `expected` is a file that tells what it holds. Every call works or raises `StoreFullError`.
    """
    live = json.loads(Path(expected).read_text())
    outcome = "worked"
    try:
        store = KVStore(path)
    except StoreFullError as error:
        _assert_full_disk(error)
        outcome = "refused"
    else:
        with store:
            _assert_holds(store, live)
            create_until_full(store, live)
            deleted = delete_some(store, live, copy_on_write=True)
            create_into_freed(store, live, deleted, copy_on_write=True)
            _assert_holds(store, live)
    work_once_there_is_room(path, live)
    return outcome


def share_while_open(path: str, copy: str) -> None:
    """Have a copy share the blocks of the open file, fill the disk, and go on working."""
    file = Path(path)
    live: dict[str, Value] = {}
    with KVStore(file) as store:
        for number in range(500):
            _create(store, live, f"early {number}", SIZES[number % len(SIZES)])
        store.sync()
        disks.share_blocks(file, Path(copy))
        disks.fill(file.parent)
        create_until_full(store, live)
        _assert_holds(store, live)
        deleted = delete_some(store, live, copy_on_write=True)
        create_into_freed(store, live, deleted, copy_on_write=True)
        _assert_holds(store, live)
    # `close` may have had no room for the mark that the index is whole, and an index that has to be
    # rebuilt overwrites what is shared.
    try:
        store = KVStore(file)
    except StoreFullError as error:
        _assert_full_disk(error)
    else:
        with store:
            _assert_holds(store, live)
    work_once_there_is_room(path, live)


def fill_under_file_size_limit(path: str, limit: int) -> dict[str, int]:
    """Have the system refuse files larger than `limit`, and fill the store until it says so."""
    _limit_file_size(limit)
    file = Path(path)
    live: dict[str, Value] = {}
    with KVStore(file) as store:
        created = create_until_full(store, live, of_disk=False)
        _assert_holds(store, live)
        deleted = delete_some(store, live, copy_on_write=False)
        create_into_freed(store, live, deleted, copy_on_write=False)
        _assert_holds(store, live)
        size = file.stat().st_size
    with KVStore(file) as store:
        _assert_holds(store, live)
    assert_whole(file)
    assert file.stat().st_size <= limit
    return {"created": created, "size": size}


def fill_after_limit_was_lowered(path: str) -> None:
    """Lower the limit to the file's size, or less, while the store is open."""
    file = Path(path)
    live: dict[str, Value] = {}
    with KVStore(file) as store:
        for number in range(200):
            _create(store, live, f"early {number}", SIZES[number % len(SIZES)])
        _limit_file_size(file.stat().st_size + 100_000)
        create_until_full(store, live, of_disk=False)
        _assert_holds(store, live)
        deleted = delete_some(store, live, copy_on_write=False)
        create_into_freed(store, live, deleted, copy_on_write=False)
        _assert_holds(store, live)
    assert_whole(file)


def read_beyond_file_size_limit(path: str, limit: int, expected: str) -> None:
    """Open a file that is larger than the system now allows: it reads, and does not grow."""
    live = json.loads(Path(expected).read_text())
    file = Path(path)
    size = file.stat().st_size
    assert size > limit
    _limit_file_size(limit)
    with KVStore(file) as store:
        _assert_holds(store, live)
        create_until_full(store, live, of_disk=False)
        _assert_holds(store, live)
        for key in list(live)[::2]:
            store.delete(key)
            del live[key]
        _assert_holds(store, live)
    assert file.stat().st_size == size
    with KVStore(file) as store:
        _assert_holds(store, live)


# --- steps -------------------------------------------------------------------------------------


def create_until_full(store: KVStore, live: dict[str, Value], of_disk: bool = True) -> int:
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


def delete_some(store: KVStore, live: dict[str, Value], copy_on_write: bool) -> dict[str, Value]:
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


def create_into_freed(
    store: KVStore, live: dict[str, Value], deleted: dict[str, Value], copy_on_write: bool
) -> int:
    """Create again what was deleted; return how many had room."""
    created = 0
    for key, value in deleted.items():
        try:
            store.create(key, value)
        except StoreFullError as error:
            if not copy_on_write:
                raise
            _assert_full_disk(error)
        else:
            live[key] = value
            created += 1
    return created


def work_once_there_is_room(path: str, live: dict[str, Value]) -> None:
    """Take the filler away: the store holds what it must and works as ever."""
    file = Path(path)
    disks.empty(file.parent)
    with KVStore(file) as store:
        _assert_holds(store, live)
        for number in range(1_000):
            _create(store, live, f"late {number}", SIZES[number % len(SIZES)])
        for key in list(live)[::2]:
            store.delete(key)
            del live[key]
        _assert_holds(store, live)
    assert_whole(file)
    with KVStore(file) as store:
        _assert_holds(store, live)


def _is_slow(store: KVStore) -> bool:
    """Tell whether each change takes milliseconds, as on a full btrfs."""
    return store.path.parent.name.startswith("btrfs")


def _create(store: KVStore, live: dict[str, Value], key: str, size: int) -> None:
    value = make_value(key, len(live), size)
    store.create(key, value)
    live[key] = value


def _assert_holds(store: KVStore, live: dict[str, Value]) -> None:
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


def _limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
