"""The data file: opened, locked, mapped, grown, flushed and closed here and nowhere else.

Invariants:
1. The map and the views on it never change while the file is open. It is as long as the file may
   ever become; pages past the end of the file are not touched until it has grown over them.
2. Every block of the file up to `size` is reserved on disk before a byte of it is touched, so a
   full disk is an error of `grow` or of opening, not a SIGBUS.
3. Every change of the file goes through one door: `write`, or for an aligned word `write_word`. On
   file systems known to overwrite in place both store through the map. Elsewhere they call
   `os.pwrite`, which reports a full disk where a store would kill the process: btrfs needs room
   even to overwrite what is reserved, XFS does for extents that a copy shares. Reads go through the
   map; both see the same page cache.
   There the map is a private one: what is stored through it stays in memory, for readers to see
   what the disk has no room for. That is done only once nothing more goes to the file.
4. The state on disk says "not clean" from before the first change until `close` has flushed.
5. Before it is known that the index can be used, or may be rebuilt, not a byte of the file is
   changed, nor its length.

Locks: `_state_lock` covers the state's fields and is taken last, but for `filelock`'s own.
"""

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from errno import EAGAIN, EDQUOT, EFBIG, ENODEV, ENOMEM, ENOSPC
from functools import partial
from operator import setitem
from threading import get_ident
from typing import Final, NoReturn, SupportsIndex

from xxhash import xxh3_64

from kvstore.compiled import Lock, compiled
from kvstore.errors import (
    CorruptStoreError,
    KVStoreError,
    QuotaError,
    StoreClosedError,
    StoreFullError,
    UnsupportedFormatError,
)
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_ENTRIES,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FILE_MAGIC,
    FIRST_FILE_SIZE,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    MAX_EXTENTS,
    MAX_FILE_SIZE,
    RECORD_MAGIC_BYTES,
    STATE,
    STATE_OFFSET,
    U64,
    map_entry_offset,
)
from kvstore.format.quick_check import count_by_map, count_records, index_is_consistent
from kvstore.format.superblock import (
    is_state,
    pack_identity,
    pack_state,
    unknown_format,
    unpack_identity,
)

from .group_commit import GroupCommit
from .lock import FileLock
from .platform import (
    can_flush_pages,
    disable_copy_on_write,
    find_last,
    flush_file,
    flush_folder,
    flush_pages,
    is_zero,
    limit_of_file_size,
    limits_of_memory,
    map_file,
    may_be_mapped_privately,
    overwrites_in_place,
    prefault,
    read_ahead,
    read_at,
    reserve,
    write_at,
)
from .reentry import leave, thread, waiting

# The disk, a quota, or a limit on the size of files leaves no room.
_NO_ROOM: Final = (ENOSPC, EDQUOT, EFBIG)
_SMALLEST_STEP: Final = 16  # extents: 1 MiB
_LARGEST_STEP: Final = 1024  # extents: 64 MiB


class DataFile:
    """An open, locked and mapped data file. A missing, empty or all-zero one is created anew.

    Args:
        path: absolute path.
        max_bytes: `grow` goes no further than this; a larger file opens and does not grow.
        timeout: seconds to wait for another process.
        now_ms: the time of creation of a new file.
        create: create one; else nothing is changed, and a file without a store is an error.
        durable: have at hand what `flush_record` needs to be faster than `flush`.
        mending: open whatever can be opened: what would be lost by that was copied before.

    Attributes:
        map: the mapped file; slices of it are copies, as bytes.
        words: the same as a view of 64-bit words.
        shorts: the same as a view of 16-bit numbers.
        directory: the directory as a view of 16-bit numbers.
        write: the door for changes, `write(offset, data)`.
        write_word: likewise for the 64-bit word `words[index]`, `write_word(index, word)`.
        refuses: nothing more is written in this opening: see `make_read_only`.
        in_place: `write` stores through the map, and cannot be refused.
        private: the map is private memory wherever it is stored to.
        in_memory: changes are for readers in this opening only: see `use_private_map`.
        window: the same for the compiled twin; None where the plain one runs.
        size: bytes of the file that may be touched, a whole number of extents.
        pristine: nothing was changed since the file was opened clean.
        closed: `close` was called in this process; a forked child's copy is not closed but refused.
        released: `close` has come to its end.
        trusted: the index on disk was found clean and whole; else it must be rebuilt before use.
        distrust: why not, in words.

    Raises:
        StoreLockedError: as `FileLock`.
        UnsupportedFormatError: the file is no store, or of another format. It is unchanged.
        CorruptStoreError: both identities are damaged, the file is shorter than its contents, or
            its index is damaged and to rebuild it would lose records. It is unchanged.
        StoreFullError: the disk has no room for the blocks that the file needs.
        OSError: what the operating system said.
    """

    def __init__(
        self,
        path: str,
        max_bytes: int,
        timeout: float,
        now_ms: int,
        *,
        durable: bool = False,
        create: bool = True,
        mending: bool = False,
    ) -> None:
        self.path = path
        self._lock = FileLock(path, timeout, create=create)
        self._fd = -1
        self._identity: bytes = b""
        self.hash_seed: int = 0
        self._is_new = False
        self._has_failed = False
        self._is_mapped = False
        self._flushing: set[int] = set()  # threads that are amid a flush
        try:
            self._open(max_bytes, now_ms, durable, create, mending)
        except BaseException as error:
            self._has_failed = True
            self._let_go_of_file()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path
            raise

    # --- opening -------------------------------------------------------------------------------

    def _open(
        self, max_bytes: int, now_ms: int, durable: bool, create: bool, mending: bool
    ) -> None:
        self._fd = self._lock.open_again()
        self.in_place = overwrites_in_place(self._fd)
        self.private = not self.in_place and may_be_mapped_privately(self._fd)
        is_new = not self._load_identity()
        if is_new:
            if not create:
                raise UnsupportedFormatError(
                    f"{self.path}: no store is in the file: it is empty, or holds nothing but "
                    f"zeros; it was left as it is"
                )
            self._create(now_ms)
        size = self._load_state()
        self.distrust = "is being repaired" if mending else self._find_distrust(size)
        self.trusted = self._clean and not self.distrust
        if not (self.trusted or is_new or mending):
            self._check_records(size)
        # From here on the file is changed.
        if size > self.size:
            os.ftruncate(self._fd, self.size)
        self._reserve_all()
        self._map(max_bytes)
        self.write: Callable[[int, bytes], None]
        self.write_word: Callable[[int, int], None]
        if self.in_place:
            self._write_through_the_map()
        else:
            self.write, self.write_word = self._pwrite, self._pwrite_word
        self._state_lock = Lock()
        self._group_commit = GroupCommit(
            self._flush,
            self._flush_pages if durable and self.in_place and can_flush_pages() else None,
        )
        self.closed = False
        self.released = False
        self.read_only = False
        self.in_memory = False
        self._requires_rebuild = False
        self._cautious = False
        self.pristine = self.trusted
        # The number is only for another opener's message.
        with suppress(StoreFullError, OSError):
            self.write(HOLDER_OFFSET, HOLDER.pack(os.getpid()))

    def _load_identity(self) -> bool:
        """Find a valid identity. False: the file is empty or holds nothing but zeros."""
        copies = [read_at(self._fd, IDENTITY.size, offset) for offset in IDENTITY_OFFSETS]
        valid = []
        for copy in copies:
            identity = unpack_identity(copy)
            if identity is not None:
                if not identity.is_known_format:
                    raise UnsupportedFormatError(f"{self.path}: {unknown_format(identity)}")
                valid.append((copy, identity.hash_seed))
        if valid:
            # Two that differ are of two files: the state knows its own.
            state = read_at(self._fd, STATE.size, STATE_OFFSET)
            (self._identity, self.hash_seed), *_ = sorted(
                valid, key=lambda identity: not is_state(state, identity[1])
            )
            self._identity_damaged = any(copy != self._identity for copy in copies)
            if len({seed for _, seed in valid}) > 1 and not is_state(state, self.hash_seed):
                raise CorruptStoreError(
                    f"{self.path}: the copies of the identity, at bytes {IDENTITY_OFFSETS[0]} and "
                    f"{IDENTITY_OFFSETS[1]:,}, give different hash seeds, and the state at byte "
                    f"{STATE_OFFSET} fits neither; without the right one no record can be found"
                )
            return True
        if any(copy.startswith(FILE_MAGIC) for copy in copies):
            raise CorruptStoreError(
                f"{self.path}: both copies of the identity, at bytes {IDENTITY_OFFSETS[0]} and "
                f"{IDENTITY_OFFSETS[1]:,}, fail their checksums; without the hash seed in them no "
                f"record can be found"
            )
        size = os.fstat(self._fd).st_size
        if not any(map(any, copies)) and size <= MAX_FILE_SIZE and is_zero(self._fd, size):
            return False
        raise UnsupportedFormatError(
            f"{self.path}: not a kvstore file (it begins with {copies[0][:8]!r}, "
            f"expected {FILE_MAGIC!r}); it was left as it is"
        )

    def _create(self, now_ms: int) -> None:
        """Make an empty store that only needs its index built.

        A crash leaves zeros, or an identity that is on disk before anything else is. The name is
        there before that: a file that opens as a store is never made anew, nor its folder flushed.
        """
        self._is_new = True
        flush_folder(self.path)
        self.hash_seed = int.from_bytes(os.urandom(8), "little")
        self._identity = pack_identity(os.urandom(16), self.hash_seed, now_ms)
        extents = FIRST_FILE_SIZE >> EXTENT_SHIFT
        os.ftruncate(self._fd, 0)
        if not self.in_place:
            disable_copy_on_write(self._fd)
        try:
            reserve(self._fd, 0, FIRST_FILE_SIZE)
            write_at(self._fd, 0, self._identity)
            flush_file(self._fd)
            write_at(self._fd, IDENTITY_OFFSETS[1], self._identity)
            write_at(self._fd, STATE_OFFSET, self._pack_new_state(extents))
            flush_file(self._fd)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._disk_full_error(error, "create the file") from error
            raise
        self._identity_damaged = False

    def _take_back_new_file(self) -> None:
        """After a first opening that failed: leave what was there before it, nobody else saw it.

        Whoever waits for the lock finds the file gone when he has it, and makes another.
        """
        with suppress(OSError):
            if self._is_new:
                os.ftruncate(self._fd, 0)
            self._lock.remove_if_new()

    def _pack_new_state(self, extents: int) -> bytes:
        return pack_state(False, extents, extents, 0, 0, self.hash_seed)

    def _load_state(self) -> int:
        """Take over the state, and what follows from it; return the length of the file."""
        packed = read_at(self._fd, STATE.size, STATE_OFFSET)
        size = os.fstat(self._fd).st_size
        least = FIRST_FILE_SIZE >> EXTENT_SHIFT
        intact = is_state(packed, self.hash_seed) and STATE.unpack(packed)[1] >= least
        self._state_intact = intact
        if intact:
            clean, count, durable, records, checksum, _ = STATE.unpack(packed)
            self._records_at_close, self._index_checksum_at_close = records, checksum
        else:
            clean, count, durable = 0, min(size >> EXTENT_SHIFT, MAX_EXTENTS), 0
        # Power loss may take back a growth that was never flushed, but no more than that.
        least = max(count if clean else durable, least)
        if size < least * EXTENT_SIZE or count > MAX_EXTENTS:
            raise CorruptStoreError(
                f"{self.path}: the file is {size:,} bytes, shorter than its contents of "
                f"{least * EXTENT_SIZE:,}; it was cut off, or bytes were removed from it; "
                f"restore it from a copy. Where there is none, kvstore-inspect repair {self.path} "
                f"saves the records that are whole"
            )
        self._clean = bool(clean)
        self._extent_count: int = min(count, size >> EXTENT_SHIFT)
        self._durable_count: int = min(durable, self._extent_count)
        self.size = self._extent_count << EXTENT_SHIFT
        return size

    def _find_distrust(self, size: int) -> str:
        """Return why the index cannot be used as it is, in words; none where it can."""
        if not self._state_intact:
            return "its state is damaged"
        if not self._clean:
            holder = read_at(self._fd, HOLDER.size, HOLDER_OFFSET)
            if any(holder):
                return "was not closed"
            return "was closed after a change that was cut short, or that met damage"
        start = self._read_start(self._extent_count)
        if self._index_checksum(start) != self._index_checksum_at_close:
            return "was closed, but its index is damaged"
        if not index_is_consistent(start, self._extent_count):
            return "was closed, but its index contradicts itself"
        # A process that dies while it opens a file may leave zeros, of whole extents.
        if size > self.size and (
            size % EXTENT_SIZE or find_last(self._fd, b"", self.size, size) >= 0
        ):
            return "was closed, but is longer than its contents"
        return ""

    def _check_records(self, size: int) -> None:
        """Take into account what a rebuild of the index would lose; look at every record.

        Raises:
            CorruptStoreError: records that a repair could use.
        """
        from kvstore.recovery.evidence import find_shift, gather  # after a crash only

        beyond = find_last(self._fd, RECORD_MAGIC_BYTES, self.size, size)
        found = ""
        if self._clean or not self._state_intact:
            evidence = gather(self._read_extent, self._extent_count, self.hash_seed)
            expected = self._expected_records()
            if evidence.damaged or evidence.astray or beyond >= 0 or evidence.whole != expected:
                found = f"found were {evidence}"
                if expected < 0:
                    found += ", and the extent map, which tells of how many, is damaged too"
                elif evidence.whole != expected:
                    found += f", where there should be {expected:,}"
                if beyond >= 0:
                    found += f"; one that begins past the end, at byte {beyond:,}"
        else:
            shift = find_shift(self._read_extent, self._extent_count, size, self.hash_seed)
            if shift is not None:
                found = (
                    f"the record at byte {shift:,} is not in its place, as if bytes had been "
                    f"inserted or removed before it"
                )
            elif beyond >= 0:  # power loss took back the new length in the state, and not this
                self._extent_count = min(beyond + EXTENT_SIZE >> EXTENT_SHIFT, MAX_EXTENTS)
                self.size = self._extent_count << EXTENT_SHIFT
        if found:
            raise CorruptStoreError(
                f"{self.path}: {self.distrust}, and to rebuild the index would lose records: "
                f"{found}. The file was not changed; kvstore-inspect repair {self.path} rebuilds "
                f"the index from those records that are whole, and keeps a copy of the file"
            )

    def _expected_records(self) -> int:
        """Return how many records there should be; -1 where the file cannot tell.

        Where the state is damaged, those past the end of the file count: it may have been cut off.
        """
        if self._clean:
            return int(self._records_at_close)
        start = self._read_start(EXTENT_MAP_ENTRIES)
        # A new file, whose index was not made yet: it has no records.
        return count_by_map(start, EXTENT_MAP_ENTRIES) if any(start[EXTENT_MAP_OFFSET:]) else 0

    def _read_start(self, extent_count: int) -> bytes:
        """Read the file up to, and with, the entries of so many extents in the extent map."""
        size = map_entry_offset(extent_count)
        return read_at(self._fd, size, 0).ljust(size, b"\0")

    def _read_extent(self, extent: int) -> bytes:
        return read_at(self._fd, EXTENT_SIZE, extent << EXTENT_SHIFT).ljust(EXTENT_SIZE, b"\0")

    def _reserve_all(self) -> None:
        """Reserve the blocks of the whole file: a sparse restore leaves holes."""
        try:
            reserve(self._fd, 0, self.size)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            # Where writes report a full disk themselves, it is no danger to go on.
            if self.in_place:
                raise self._disk_full_error(error, "fill the holes of the file") from error

    def _map(self, max_bytes: int) -> None:
        """Map the file once and for all, as long as it may become."""
        limit = max(max_bytes >> EXTENT_SHIFT, self._extent_count)
        self._limit = f"max_bytes is {max_bytes:,}"
        try:
            os.ftruncate(self._fd, limit << EXTENT_SHIFT)
        except OSError as error:
            if error.errno != EFBIG:
                raise
            most = limit_of_file_size()
            limit = max(min(limit, (most or 0) >> EXTENT_SHIFT), self._extent_count)
            self._limit = "the file system takes no longer one"
            if most is not None:
                self._limit = (
                    f"this process may make files of {most:,} bytes (RLIMIT_FSIZE, ulimit -f)"
                )
            if limit > self._extent_count:
                os.ftruncate(self._fd, limit << EXTENT_SHIFT)
        try:
            self.map, self.private = map_file(self._fd, limit << EXTENT_SHIFT, self.private)
        except OSError as error:
            raise _not_mapped(error, self.path, limit << EXTENT_SHIFT, max_bytes) from error
        finally:
            os.ftruncate(self._fd, self.size)
        self.read_ahead(False)
        self._max_extents = limit
        self.window = None if compiled is None else compiled.Window(self.map, self.size)
        self._views = memoryview(self.map)
        self.words: memoryview[int] = self._views.cast("Q")
        self.shorts: memoryview[int] = self._views.cast("H")
        self.directory: memoryview[int] = self._views[
            DIRECTORY_OFFSET : DIRECTORY_OFFSET + DIRECTORY_SIZE
        ].cast("H")
        self._is_mapped = True

    def read_ahead(self, wanted: bool) -> None:
        """Have the map read from end to end fast, or here and there, as it is after opening."""
        read_ahead(self.map, wanted)

    def prefault(self, extent: int) -> None:
        """Have the pages of an extent in memory that nothing was written to so far."""
        if self.in_place:
            prefault(self.map, extent << EXTENT_SHIFT, EXTENT_SIZE)

    # --- changing ------------------------------------------------------------------------------

    def _write_through_the_map(self) -> None:
        self.write, self.write_word = _map_writer(self.map), _word_writer(self.words)

    def _pwrite(self, offset: int, data: bytes) -> None:
        if self.read_only:  # since this operation began, in another thread
            self.write(offset, data)
        try:
            written = os.pwrite(self._fd, data, offset)
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], offset + written)
        except OSError as error:
            # Whatever this cuts short may leak a block or an extent.
            self._requires_rebuild = True
            if error.errno in _NO_ROOM:
                raise self._disk_full_error(error, f"write {len(data):,} bytes") from error
            raise

    def _pwrite_word(self, index: int, word: int) -> None:
        self._pwrite(index << 3, U64.pack(word))

    def mark_dirty(self) -> None:
        """Have the disk know that the index is in flux, once, before the first change.

        Flushes; the caller holds no lock.
        """
        with self._state_lock:
            if self._identity_damaged:
                for offset in IDENTITY_OFFSETS:
                    self.write(offset, self._identity)
                self._identity_damaged = False
            if self._clean or not self._state_intact:
                was_clean, self._clean = self._clean, False
                try:
                    self._write_state()
                except BaseException:
                    self._clean = was_clean
                    raise
                self._state_intact = True
            # Also where an earlier try failed here: its flush did, and says so again.
            if self.pristine:
                self._group_commit()
                self.pristine = False

    def require_rebuild(self) -> None:
        """Have the next opening rebuild the index: a change was cut short and may have leaked."""
        self._requires_rebuild = True
        # A record may be gone in memory without anybody having owed a flush for it yet.
        self.require_full_flush()

    def accept_rebuilt_index(self) -> None:
        """Say that the index was rebuilt and flushed. The disk hears of it from `close`."""
        self.trusted = True

    def restore(self, offset: int, old: bytes) -> None:
        """Take back a write at `offset` that may have happened or not.

        Where the disk refuses even that, readers have what was there, if the map is private, and
        nothing more is written: see `make_read_only`.
        """
        # A copy-on-write file system that refused the write would refuse this one too.
        if self.map[offset : offset + len(old)] != old:
            try:
                self.write(offset, old)
            except BaseException as error:
                self.make_read_only(error)
                if self.private:
                    self.map[offset : offset + len(old)] = old
                if not isinstance(error, KVStoreError | OSError):
                    raise

    def make_read_only(self, why: BaseException) -> None:
        """Let nothing more be written: what the file holds is not what readers are to see."""
        if self.read_only:
            return
        self._requires_rebuild = True
        self.read_only = True
        kind: type[KVStoreError] = CorruptStoreError
        what = f"a change could not be undone ({why})"
        if self.in_memory:
            kind = StoreFullError
            what = f"the index could be rebuilt in memory only ({why})"

        def refuse(_place: int, _content: object) -> NoReturn:
            raise kind(
                f"{self.path}: {what}; reading goes on, to write close the store and open it anew, "
                f"which rebuilds the index"
            ) from why.__cause__ or why

        self.write = self.write_word = refuse

    def use_private_map(self) -> None:
        """Have changes stay in this process's memory: for an index that the disk has no room for.

        The map must be private. `make_read_only` follows when the index is whole.
        """
        self.in_memory = True
        self._write_through_the_map()

    def grow(self) -> int:
        """Reserve more extents at the end and return their number. The caller holds the space lock.

        By an eighth of the file, between 1 and 64 MiB; by less where the disk has no more.

        Raises:
            StoreFullError: the file is at its limit, or the disk has not room for one extent.
        """
        count = self._extent_count
        step = min(max(_SMALLEST_STEP, count // 8), _LARGEST_STEP, self._max_extents - count)
        if step <= 0:
            raise StoreFullError(
                f"{self.path}: the file is {self.size:,} bytes, grows by whole extents of "
                f"{EXTENT_SIZE:,}, and {self._limit}; delete something first"
            )
        if (
            self._cautious
        ):  # the disk was full a moment ago: ask for little, so that asking is cheap
            step = 1
        refused = False
        while True:
            try:
                reserve(self._fd, self.size, self.size + (step << EXTENT_SHIFT))
                break
            except OSError as error:
                os.ftruncate(self._fd, self.size)
                if error.errno not in _NO_ROOM:
                    raise
                self._cautious = refused = True
                if step == 1:
                    raise self._disk_full_error(error, "grow the file by 65,536 bytes") from error
                step //= 2
        with self._state_lock:
            self._extent_count = count + step
            try:
                self._write_state()
            except BaseException:
                self._extent_count = count
                raise
        # Until length and state are on the disk, records in the new extents may be cut off.
        self.require_full_flush()
        self.size = self._extent_count << EXTENT_SHIFT
        if self.window is not None:
            self.window.size = self.size
        self._cautious = refused
        return step

    @property
    def extent_count(self) -> int:
        """The file's length in extents."""
        return self._extent_count

    @property
    def max_extents(self) -> int:
        """The length in extents that the file does not grow past."""
        return self._max_extents

    def _write_state(self, records: int = 0, index_checksum: int = 0) -> None:
        self.write(
            STATE_OFFSET,
            pack_state(
                self._clean,
                self._extent_count,
                self._durable_count,
                records,
                index_checksum,
                self.hash_seed,
            ),
        )

    def _index_checksum(self, contents: mmap.mmap | bytes) -> int:
        digest = xxh3_64(seed=self.hash_seed)
        for start, end in (
            (DIRECTORY_OFFSET, DIRECTORY_OFFSET + DIRECTORY_SIZE),
            (EXTENT_MAP_OFFSET, map_entry_offset(self._extent_count)),
            (ALLOCATOR_OFFSET, ALLOCATOR_OFFSET + ALLOCATOR_SIZE),
        ):
            digest.update(contents[start:end])
        return digest.intdigest()

    def _disk_full_error(self, error: OSError, what: str) -> StoreFullError:
        message = f"{self.path}: no room on the disk to {what}: {error.strerror}"
        return QuotaError(message) if error.errno == EDQUOT else StoreFullError(message)

    # --- flushing and closing ------------------------------------------------------------------

    def _flush(self) -> None:
        flush_file(self._fd, self.map)

    def flush(self) -> None:
        """Return when everything written before the call is on stable storage.

        Threads that wait at the same time share a flush. The caller holds no lock.

        Raises:
            OSError: the disk did not take it, now or ever since the file was opened.
        """
        self._flush_inside(None)

    def flush_record(self, offset: int, size: int) -> None:
        """Return when the `size` bytes at `offset` are on stable storage, and all that is owed.

        For an operation that is durable: everything but its record, or the link that ends it, is
        index, which is rebuilt after power loss. Where the file is not overwritten in place, or
        something is owed, or others wait too, it is one flush of everything. The caller holds no
        lock.

        Raises:
            OSError: as `flush`.
        """
        self._flush_inside((offset, offset + size))

    def _flush_inside(self, part: tuple[int, int] | None) -> None:
        ident = get_ident()
        is_outermost = ident not in self._flushing
        try:
            with thread.inside:
                self._flushing.add(ident)
                count = self._extent_count
                if self._group_commit(part) and count > self._durable_count:
                    self._count_as_durable(count)
        finally:
            if is_outermost:
                self._flushing.discard(ident)
            if waiting:
                leave()

    def require_full_flush(self) -> None:
        """Have no durable operation return from now on before a flush of everything.

        Needed wherever something else than the operation's own bytes could cost it its record:
        - The file grew: its length and state, without which the new extents are cut off.
        - An extent became free. Records that were cleared in it, by whatever operation, could come
          back beside those of another size class, and only one class survives in an extent.
        - A record was cleared by anything else than a durable `delete`: it had expired, or its
          creation was undone. It could come back beside a later record of the same key, and be
          taken for the newer one, for clocks tie and are set back.
        - A change was cut short.

        The caller has made that change, and still holds the lock that others need to build on it:
        the space lock for extents, the stripe for keys.
        """
        self._group_commit.require_full()

    def note_freed(self) -> None:
        """As `require_full_flush`, for an extent that became free, under the space lock."""
        self._group_commit.require_full_flush_for_reuse()

    @property
    def freed_may_come_back(self) -> bool:
        """Whether power loss could bring back records of extents that became free."""
        return self._group_commit.reuse_waits

    def record_cleared(self, offset: int) -> None:
        """As `require_full_flush`, for the record at `offset` that a durable `delete` has cleared.

        The operation itself goes on to `flush_record`, which then is enough. Until it returns,
        those of other threads flush everything. The caller holds the key's stripe.
        """
        self._group_commit.record_cleared(offset)

    def _count_as_durable(self, count: int) -> None:
        with self._state_lock, suppress(StoreFullError):  # an old number is true as well
            if not self.closed and count > self._durable_count:
                self._durable_count = count
                self._write_state()

    def _flush_pages(self, start: int, end: int) -> None:
        flush_pages(self.map, start, end)

    def is_held_here(self, flushes: bool) -> bool:
        """Return whether this very thread holds a lock that an operation may need.

        Those of a flush, which it leads or follows, count only for an operation that `flushes`.
        """
        return (
            self._state_lock._is_owned()
            or self._lock.is_held_here()
            or (flushes and get_ident() in self._flushing)
        )

    def check_path(self) -> None:
        """Raise OSError where the path no longer names this file."""
        self._lock.check_path()

    def call_after_fork(self, method: Callable[[], None]) -> None:
        """Have a forked child call this bound method. It does not keep its object alive."""
        self._lock.call_after_fork(method)

    def give_up(self) -> None:
        """Close after an opening that failed in what comes after this file's own part."""
        self._has_failed = True
        self.require_rebuild()
        self.close()

    def close(self) -> None:
        """Flush, mark the index clean, unmap, and let go of the lock, whatever fails on the way.

        The caller has made sure that nothing reads or writes any more. A second call goes on where
        a first one was interrupted.

        Raises:
            OSError: a flush failed, or the path no longer names the file; all else was done.
        """
        with self._state_lock:
            was_closed, self.closed = self.closed, True
        # One in the other: what interrupts a step does not keep the next from being taken.
        try:
            if not (was_closed or (self._is_new and self._has_failed)):
                self._close_contents()
                self._lock.check_path()
        finally:
            self._let_go_of_file()
            self.released = True

    def _let_go_of_file(self) -> None:
        """Unmap the file, close it and release its lock, whatever fails on the way."""
        try:
            if self._is_mapped:
                if self.window is not None:
                    self.window.close()
                for view in (self.directory, self.words, self.shorts, self._views):
                    view.release()
                self.map.close()
        finally:
            try:
                if self._has_failed:
                    self._take_back_new_file()
                self._close_descriptor()
            finally:
                self._lock.release()

    def _close_contents(self) -> None:
        try:
            if not (self.pristine and self._clean):
                self._group_commit()
        finally:
            self._group_commit.end()
        # On a full copy-on-write disk even the flag may not be written: then the next opening
        # rebuilds the index from the records, which have just been flushed.
        with suppress(StoreFullError, CorruptStoreError):
            if not self.pristine and not self._requires_rebuild:
                # In a torn copy, say, the counts of a segment may be older than its pages, and what
                # was created and deleted have made them impossible: the file would be refused.
                start = self.map[: map_entry_offset(self._extent_count)]
                if index_is_consistent(start, self._extent_count):
                    self._clean = True
                    self._durable_count = self._extent_count
                    records = count_records(start[EXTENT_MAP_OFFSET:])
                    self._write_state(records, self._index_checksum(start))
                    self._flush()
            self.write(HOLDER_OFFSET, HOLDER.pack(0))

    @property
    def owned_by_parent(self) -> bool:
        """Whether this is a forked child, and the open file its parent's."""
        return self._lock.owned_by_parent

    def detach_after_fork(self) -> None:
        """In a forked child: touch the parent's file no more, nor its lock. Idempotent."""

        def refuse(_place: int, _content: object) -> NoReturn:
            raise StoreClosedError(f"{self.path}: the store belongs to the parent of this process")

        self.write = self.write_word = refuse
        if self.window is not None:
            self.window.direct = False
        self._close_descriptor()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{self.path}: an open file cannot be copied")

    def _close_descriptor(self) -> None:
        # Forgotten first: after a fork amid this, the number may be that of another file.
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)


def _not_mapped(error: OSError, path: str, size: int, max_bytes: int) -> OSError:
    """Say what to do where the system does not map the file."""
    why = str(error.strerror)
    if error.errno in (ENOMEM, EAGAIN):
        limits = limits_of_memory()
        why += (
            f": the file is mapped as long as it may become, {size:,} bytes of address space; "
            f"give a smaller max_bytes than {max_bytes:,}, or raise the limits of this process"
            f"{limits and f' ({limits})'}"
        )
    elif error.errno == ENODEV:
        why += ": the file system cannot map files into memory; keep the store on a local one"
    return OSError(error.errno, why, path)


def _map_writer(mapped: mmap.mmap) -> Callable[[int, bytes], None]:
    if compiled is not None:
        writer: Callable[[int, bytes], None] = compiled.MapWriter(mapped)
        return writer

    # A closure: one call and one slice assignment are all that most of a change costs.
    def write(offset: int, data: bytes) -> None:
        mapped[offset : offset + len(data)] = data

    return write


def _word_writer(words: "memoryview[int]") -> Callable[[int, int], None]:
    # No function of ours: a word costs a fifth of what its eight bytes would.
    return partial(setitem, words)
