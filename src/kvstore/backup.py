"""A copy of a store in another file: read while other threads go on, written under another name.

A copy gets its name once it is whole, verified and on stable storage. Until then it is in a file
beside that name, and whoever makes it holds that file's lock. So one that nobody has locked was
left behind by a process that was killed.

The store is read segment by segment: first the table's pages, all at once, then each record by
itself. No lock is held for longer than one of these is copied, nor while a record is verified or
written.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from errno import EEXIST, EISDIR
from threading import RLock
from time import monotonic
from typing import Final

from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from .changes import NewRecord
from .errors import (
    CorruptStoreError,
    KeyExistsError,
    KeyNotFoundError,
    KVStoreError,
    StoreClosedError,
    StoreFullError,
    StoreLockedError,
)
from .file.datafile import DataFile
from .file.lock import FileLock
from .file.platform import raise_if_full, system
from .format.bucket import live_slots
from .format.layout import (
    BUCKET_COUNT,
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_OFFSET,
    DIRECTORY_ENTRIES,
    DIRECTORY_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    MAX_FILE_SIZE,
    SLOT_COUNT,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_OFFSET,
    slot_offset,
)
from .index.buckets import advice
from .parts import Parts

logger = logging.getLogger("kvstore")

CarriedRecord = tuple[str, bytes, int, int]
"""A key, its value as JSON, created_at and expires_at in ms; the latter 0 for never."""

Progress = Callable[[int, int], object]
"""Called now and then with how much of the way is done, and the whole of it."""

_PROGRESS_SECONDS: Final = 10.0
# What is flushed at a time, so that the disk is not asked for all of a large file at once.
_FLUSHED_SIZE: Final = 32 * 1024 * 1024
_MOST_NAMES: Final = 1_000
# Of a name, what is left when others are made of it: no name has more than 255 bytes.
_NAME_SIZE: Final = 200
_CONTROL_END: Final = CONTROL_OFFSET + SLOT_COUNT
# Where an open file cannot be renamed, a copy is without its lock as it gets its name: no other
# thread may take it for one that was left behind, or have it or what has that name open.
_naming: Final[AbstractContextManager[object]] = (
    nullcontext() if system.renames_open_files else RLock()
)


# --- reading -------------------------------------------------------------------------------------


def records_of(
    parts: Parts, now_ms: Callable[[], int], progress: Progress
) -> Iterator[CarriedRecord]:
    """Yield the records of an open store that have not expired by `now_ms`.

    Each key comes once, as it was at some moment after the first was asked for; one that is there
    throughout surely comes. For a segment is copied with all its keys at once, and each of them is
    read by itself then, wherever it is by that time. The next segment begins where the hashes of
    that one end, so that a split or a merge meanwhile neither hides a key nor repeats one.

    Raises:
        CorruptStoreError: a record, or what leads to it, is damaged.
        StoreClosedError: the store is closed, or was opened before a fork.
    """
    position = 0
    while position < DIRECTORY_ENTRIES:
        progress(position, DIRECTORY_ENTRIES)
        pages, long_keys, positions = parts.all_keys.copy_segment(position)
        moment = now_ms()
        for key_hash, encoded_key in _keys(parts.file, pages, long_keys, positions):
            if key_hash >> DIRECTORY_SHIFT < position:
                continue  # another segment had it, which is a part of this one by now
            try:
                key = encoded_key.decode()
                record = parts.one_key.read_record(key, encoded_key, moment)
            except KeyNotFoundError:  # it has expired, or was deleted meanwhile
                continue
            except UnicodeDecodeError as error:
                raise CorruptStoreError(
                    f"{parts.file.path}: a slot's key is no UTF-8: {error}"
                ) from error
            yield key, *record
        position = positions.stop
    progress(position, DIRECTORY_ENTRIES)


def _keys(
    file: DataFile, pages: bytes, long_keys: dict[int, bytes], positions: range
) -> Iterator[tuple[int, bytes]]:
    """Yield the keys of a copied segment, with their hashes.

    Raises:
        CorruptStoreError: one is where no lookup finds it: its slot or its record is damaged.
    """
    seed = file.hash_seed
    buckets = [pages[start : start + BUCKET_SIZE] for start in range(0, EXTENT_SIZE, BUCKET_SIZE)]
    is_full = [CONTROL_EMPTY not in page[CONTROL_OFFSET:_CONTROL_END] for page in buckets]
    for number, page in enumerate(buckets):
        for index, _, slot in live_slots(page):
            size = slot[SLOT_KEY_SIZE_OFFSET]
            key = slot[:size]
            if size > SLOT_KEY_SIZE:
                key = long_keys[slot_offset(number * BUCKET_SIZE, index)]
            key_hash = xxh3_64_intdigest(key, seed)
            home = key_hash % BUCKET_COUNT
            if not (
                page[CONTROL_OFFSET + index]
                == FINGERPRINT_CODES[key_hash >> FINGERPRINT_SHIFT & 0xFF]
                and key_hash >> DIRECTORY_SHIFT in positions
                and (home == number or _is_passed(is_full, home, number))
                and key[:SLOT_KEY_SIZE] == slot[: min(size, SLOT_KEY_SIZE)]
            ):
                raise CorruptStoreError(
                    f"{file.path}: key {key.decode(errors='replace')!r}: slot {index} of bucket "
                    f"{number} of the segment at directory entry {positions.start} is where no "
                    f"lookup finds this key; {advice(file)}"
                )
            yield key_hash, key


def _is_passed(is_full: list[bool], home: int, number: int) -> bool:
    """Return whether a lookup that begins in bucket `home` comes to another one."""
    end = number + (BUCKET_COUNT if number < home else 0)
    return all(is_full[bucket % BUCKET_COUNT] for bucket in range(home, end))


def logged(path: str, out: str) -> Progress:
    """Return what logs now and then how far a backup is."""
    due = monotonic() + _PROGRESS_SECONDS

    def progress(done: int, whole: int) -> None:
        nonlocal due
        if monotonic() >= due:
            due = monotonic() + _PROGRESS_SECONDS
            logger.info("%s: backup to %s: %d of %d parts read", path, out, done, whole)

    return progress


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def new_copy(out: str, *, source: str, overwrite: bool) -> Iterator["Copy"]:
    """Give a copy that is to be written and verified; once that is done it gets the name `out`.

    Where anything goes wrong, `out` is as it was, and it is said of `out`.

    Args:
        out: absolute path.
        source: the file that is copied.
        overwrite: replace what is at `out`. A link there is replaced, not followed.

    Raises:
        FileExistsError: something is at `out` and not to be overwritten; or that is the source.
        StoreFullError: the disk has no room for it.
        OSError: what else the operating system said.
    """
    with _naming:
        _check_name(out, source, overwrite)
    for number in range(1, _MOST_NAMES):
        copy = Copy(out, number)
        try:
            with copy.errors():
                with _naming:
                    is_open = copy.open()
                if is_open:
                    yield copy
                    copy.name(overwrite)
                    return
        finally:
            copy.close()
    raise FileExistsError(EEXIST, f"{_MOST_NAMES:,} other backups to it are under way", out)


def _check_name(out: str, source: str, overwrite: bool) -> None:
    with suppress(FileNotFoundError):
        if os.path.samefile(out, source):
            raise FileExistsError(EEXIST, "this is the very file that is to be copied", out)
    if os.path.isdir(out) and not os.path.islink(out):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), out)
    if os.path.lexists(out) and not overwrite:
        raise _exists_error(out)


def _exists_error(out: str) -> FileExistsError:
    return FileExistsError(EEXIST, f"{os.strerror(EEXIST)}, and is not to be overwritten", out)


class Copy:
    """A copy on its way to the name `out`, in a file beside that.

    Only who holds its lock removes it; that is held until it has its name.

    Attributes:
        count: how many records it has so far.
    """

    def __init__(self, out: str, number: int) -> None:
        self._out = out
        self._folder, name = os.path.split(out)
        # What is cut amid a character, or was no text, is left out.
        name = os.fsencode(name)[:_NAME_SIZE].decode(sys.getfilesystemencoding(), "ignore")
        self._path = os.path.join(self._folder, f".{name}.backup-{number}")
        self._parts: Parts | None = None
        self._lock: FileLock | None = None
        self._is_made = self._is_named = False
        self.count = 0
        self._digest = 0  # of all records, in whatever order

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Have errors name `out`, and not a file that nobody has heard of."""
        try:
            yield
        except (StoreFullError, CorruptStoreError) as error:
            error.args = tuple(str(each).replace(self._path, self._out) for each in error.args)
            raise
        except OSError as error:
            if error.filename == self._path:
                error.filename = self._out
                error.filename2 = None
            raise_if_full(error, self._out, "write the copy")
            raise

    def open(self) -> bool:
        """Make the file; False where somebody else is writing to it."""
        _remove_unlocked(self._path)
        if os.path.lexists(self._path):
            return False
        self._is_made = True
        try:
            self._parts = parts = Parts(
                self._path, max_bytes=MAX_FILE_SIZE, timeout=0.0, durable=False, create=True
            )
        except StoreLockedError:
            self._is_made = False
            return False
        except OSError as error:
            if error.filename == self._path:
                error.filename = self._folder
            raise
        parts.extents.let_grow()  # what expires meanwhile is not taken back
        self._lock = parts.file.keep_lock()
        parts.file.call_after_fork(parts.detach_after_fork)
        parts.locks.closed = False
        parts.one_key.begin()
        return True

    def write(self, records: Iterable[CarriedRecord]) -> None:
        """Write records; of several of one key the first.

        Raises:
            StoreFullError: the disk, or the longest file that a store can have, has no room.
            OSError: what else the operating system said.
        """
        parts = self._open_parts()
        seed, store = parts.file.hash_seed, parts.changes.store
        unflushed = 0
        for key, encoded, created_at, expires_at in records:
            encoded_key = key.encode()
            key_hash = xxh3_64_intdigest(encoded_key, seed)
            # Nobody else is in the file, so no stripe is taken; and nothing in it has expired.
            new = NewRecord(key, key_hash, encoded_key, encoded, 0, expires_at, created_at)
            with suppress(KeyExistsError):
                store(new, replace=False)
                self.count += 1
                self._digest += _digest(encoded_key, encoded, created_at, expires_at)
            unflushed += new.size
            if unflushed > _FLUSHED_SIZE:
                parts.file.flush()
                unflushed = 0

    def verify(self, progress: Progress) -> None:
        """Cut, flush and close the file, and raise unless it is whole and holds what was written.

        Raises:
            CorruptStoreError: it is not.
            OSError: the disk did not take it.
        """
        from .recovery.check import check_file  # for copies only

        parts = self._open_parts()
        parts.compactor().cut()
        count = digest = 0
        for key, encoded, created_at, expires_at in records_of(parts, lambda: 0, progress):
            count += 1
            digest += _digest(key.encode(), encoded, created_at, expires_at)
        parts.close()
        problems = check_file(self._path)
        if problems:
            raise CorruptStoreError(f"{self._out}: the copy is damaged, and removed: {problems[0]}")
        if (count, digest) != (self.count, self._digest):
            raise CorruptStoreError(
                f"{self._out}: the copy does not hold what was read, and is removed: it has "
                f"{count:,} records of {self.count:,}, or others"
            )

    def _open_parts(self) -> Parts:
        if self._parts is None:
            raise ValueError(f"{self._out}: the copy is not open")
        return self._parts

    def name(self, overwrite: bool) -> None:
        """Give the verified file its name, and have that on stable storage."""
        if self._lock is None or self._lock.owned_by_parent:
            raise StoreClosedError(f"{self._out}: a forked process makes no backup of its parent's")
        with _naming:
            if not system.renames_open_files:
                self._lock.release()
            if overwrite:
                os.replace(self._path, self._out)
            else:
                self._name_if_free()
            self._is_named = True
            system.flush_folder(self._out)

    def _name_if_free(self) -> None:
        try:
            if not system.renames_open_files:
                os.rename(self._path, self._out)  # which replaces nothing there
                return
            os.link(self._path, self._out)
        except FileExistsError:
            raise _exists_error(self._out) from None
        except OSError:  # a file system without hard links
            if os.path.lexists(self._out):
                raise _exists_error(self._out) from None
            os.rename(self._path, self._out)
        else:
            os.unlink(self._path)

    def close(self) -> None:
        """Remove the file unless it has got its name, and release its lock."""
        try:
            if self._parts is not None and not self._parts.file.released:
                self._parts.locks.set_closed()
                self._parts.give_up()
        finally:
            try:
                if self._lock is not None and not (self._is_named or self._lock.owned_by_parent):
                    with suppress(OSError):
                        self._lock.remove()
            finally:
                if self._lock is not None:
                    self._lock.release()
                elif self._is_made:  # and nobody came to know its lock
                    _remove_unlocked(self._path)


def _remove_unlocked(path: str) -> None:
    """Remove a file that a backup left behind; not one that somebody is writing to."""
    with _naming, suppress(KVStoreError, OSError):
        lock = FileLock(path, 0.0, create=False)
        try:
            lock.remove()
        finally:
            lock.release()


def _digest(key: bytes, encoded: bytes, created_at: int, expires_at: int) -> int:
    return xxh3_128_intdigest(b"%d %d %d %b%b" % (created_at, expires_at, len(key), key, encoded))
