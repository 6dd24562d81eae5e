"""The data file: mapped, written to, grown, flushed and closed here and nowhere else.

Invariants:
1. The map and the views on it never change while the file is open. It is as long as the file may
   ever become; pages past the end of the file are not touched until it has grown over them.
2. Every block of the file up to `size` is reserved on disk before a byte of it is touched, so a
   full disk is an error of `grow` or of opening, not a SIGBUS.
3. Every change of the file goes through one write path: `write`, or for an aligned word
   `write_word`. On file systems known to overwrite in place both store through the map. Elsewhere
   they call `os.pwrite`, which reports a full disk where a store would kill the process: btrfs
   needs room even to overwrite what is reserved, XFS does for extents that a copy shares. Reads go
   through the map; both see the same page cache.
   There the map is a private one: what is stored through it stays in memory, for readers to see
   what the disk has no room for. That is done only once nothing more goes to the file.
4. The state on disk says "not clean" from before the first change until `close` has flushed.
5. Before it is known that the index can be used, or may be rebuilt, not a byte of the file is
   changed, nor its length: a `DataFile` is made once that is known.

Locks: that of `state` covers its fields and is taken last, but for `lock`'s own.
"""

import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import ENODEV
from typing import TYPE_CHECKING, NoReturn, SupportsIndex

from kvstore.errors import CorruptStoreError, KVStoreError, StoreClosedError, StoreFullError
from kvstore.format.layout import (
    EXTENT_SHIFT,
    EXTENT_SIZE,
    HOLDER_OFFSET,
    STATE_OFFSET,
    map_entry_offset,
)
from kvstore.format.quick_check import clean_state
from kvstore.format.superblock import pack_holder

from . import writers
from .flushing import Flushing
from .growth import Growth
from .held import HeldFile
from .lock import FileLock
from .mapping import FileMap
from .opening import FoundFile
from .platform import system
from .state import DiskState

if TYPE_CHECKING:
    from kvstore.compiled.interface import Change


class DataFile:
    """An open, locked and mapped data file: `kvstore.recovery.opening.open_file` makes one.

    Args:
        held: the file, which is this object's to close from now on, unless this raises.
        found: what was found in it.
        max_bytes: `grow` goes no further than this; a larger file opens and does not grow.
        distrust: why the index that was found cannot be used, in words; empty where it can.
        extent_count: how many extents are in use.
        durable: have at hand what `flush_record` needs to be faster than `flush`.

    Attributes:
        map: the mapped file; slices of it are copies, as bytes.
        words: the same as a view of 64-bit words.
        shorts: the same as a view of 16-bit numbers.
        directory: the directory as a view of 16-bit numbers.
        write: the write path for changes, `write(offset, data)`.
        write_word: likewise for the 64-bit word `words[index]`, `write_word(index, word)`.
        write_all: likewise for planned changes, one after the other.
        read_only: nothing more is written in this opening: see `make_read_only`.
        in_place: `write` stores through the map, and cannot be refused.
        private: the map is private memory wherever it is stored to.
        in_memory: changes are for readers in this opening only: see `use_private_map`.
        live: two words that never move, for compiled code: how many bytes of the file may be
            touched, which is `size`, and none once it is closed; and 1 exactly while changes are
            stored through the map into the file, by plain stores.
        size: bytes of the file that may be touched, a whole number of extents.
        pristine: nothing was changed since the file was opened clean.
        released: `close` has come to its end.
        trusted: the index on disk was found clean and whole; else it must be rebuilt before use.
        distrust: why not, in words.
        latest_stamp: no record has a later one; set by whoever rebuilds or closes.
        before_flush: called before each flush of everything that a caller is promised.

    Raises:
        StoreFullError: the disk has no room for the blocks that the file needs.
        OSError: what the operating system said, or the map does not show what is written.
    """

    write: Callable[[int, bytes], None]
    write_word: Callable[[int, int], None]
    write_all: "Callable[[Sequence[Change]], None]"

    def __init__(
        self,
        held: HeldFile,
        found: FoundFile,
        max_bytes: int,
        *,
        distrust: str,
        extent_count: int,
        durable: bool = False,
    ) -> None:
        self._held = held
        self.path = held.path
        self.hash_seed = found.hash_seed
        self.distrust = distrust
        self.trusted = self.pristine = not distrust
        self.in_place = held.in_place
        self.released = self.read_only = self.in_memory = False
        self.size = extent_count << EXTENT_SHIFT
        self.latest_stamp = found.state.stamp if found.state.intact else 0
        self.before_flush: Callable[[], object] = _do_nothing
        self._requires_rebuild = False
        self._state = DiskState(found, extent_count, self._put)
        # From here on the file is changed.
        self._mapping = mapping = FileMap(held, found.length, self.size, max_bytes)
        self.map, self.private = mapping.mapped, mapping.is_private
        self.words, self.shorts = mapping.words, mapping.shorts
        self.directory = mapping.directory
        self.live = array("Q", (self.size, 0))
        try:
            self._growth = Growth(held, mapping.max_extents, mapping.limit)
            self._flushing = Flushing(
                held, self.map, self._state, by_pages=durable and self.in_place
            )
            self._by_pwrite = writers.ByPwrite(held)
            if self.in_place:
                self._use(writers.ThroughMap(self.map, self.words))
            else:
                self._use(self._by_pwrite)
            self._write_holder(pack_holder(os.getpid()))
        except BaseException:
            self._unmap()
            raise

    def _write_holder(self, holder: bytes) -> None:
        """Write this process's number, and see that the map shows what is written to the file."""
        try:
            self.write(HOLDER_OFFSET, holder)
        except (StoreFullError, OSError):
            return  # it is only for another opener's message
        if self.map[HOLDER_OFFSET : HOLDER_OFFSET + len(holder)] != holder:
            raise OSError(
                ENODEV,
                "the file system does not show in a mapped file what is written to it; keep the "
                "store on a local one",
                self.path,
            )

    @property
    def fd(self) -> int:
        """The descriptor that the file is written and flushed by; -1 once it is closed."""
        return self._held.fd

    def read_ahead(self, wanted: bool) -> None:
        """Have the map read from end to end fast, or here and there, as it is after opening."""
        system.read_ahead(self.map, wanted)

    def prefault(self, extent: int) -> None:
        """Have the pages of an extent in memory that nothing was written to so far."""
        if self.in_place:
            system.prefault(self.map, extent << EXTENT_SHIFT, EXTENT_SIZE)

    # --- changing ------------------------------------------------------------------------------

    def _put(self, offset: int, data: bytes) -> None:
        """Write by whatever is the write path at the moment."""
        self.write(offset, data)

    def _use(self, writer: writers.ThroughMap | writers.ByPwrite | writers.Refusing) -> None:
        """Have all changes go through this writer from now on."""
        self.live[1] = 0
        self.write, self.write_word = writer.write, writer.write_word
        self.write_all = writer.write_all
        self.live[1] = writer.is_direct and self.in_place

    def mark_dirty(self) -> None:
        """Mark the file dirty on disk, once, before the first change.

        Flushes; the caller holds no lock.
        """
        with self._state.lock:
            self._state.mark_dirty()
            # Also where an earlier try failed here: its flush did, and says so again.
            if self.pristine:
                self._flushing.flush_contents()
                self.pristine = False

    def require_rebuild(self) -> None:
        """Have the next opening rebuild the index: a change was cut short and may have leaked."""
        self._requires_rebuild = True
        # A record may be gone in memory without anybody having owed a flush for it yet.
        self.require_full_flush()

    def accept_rebuilt_index(self) -> None:
        """Say that the index was rebuilt and flushed. The disk hears of it from `close`."""
        self.trusted = True

    @property
    def void_stamp(self) -> int:
        """Records with this stamp or an earlier one are void; 0 where none are."""
        return self._state.now.stamp

    def set_void_stamp(self, stamp: int) -> None:
        """Say on disk that records with this stamp or an earlier one are void; 0: none are."""
        with self._state.lock:
            self._state.set_void_stamp(stamp)

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
        refusing = writers.Refusing(
            kind,
            f"{self.path}: {what}; reading goes on, to write close the store and open it anew, "
            f"which rebuilds the index",
            why.__cause__ or why,
        )
        self._by_pwrite.refusing = refusing
        self._use(refusing)

    def use_private_map(self) -> None:
        """Have changes stay in this process's memory: for an index that the disk has no room for.

        The map must be private. `make_read_only` follows when the index is whole.
        """
        self.in_memory = True
        # It may be so since the disk refused to take back a change.
        self.read_only, self._by_pwrite.refusing = False, None
        self._use(writers.ThroughMap(self.map, self.words))

    # --- growing and flushing ------------------------------------------------------------------

    def grow(self) -> int:
        """Reserve more extents at the end and return their number. The caller holds the space lock.

        Raises as `Growth.grow`.
        """
        return self._growth.grow(self.extent_count, self._set_extent_count)

    def _set_extent_count(self, count: int) -> None:
        with self._state.lock:
            self._state.set_extent_count(count)
        # Until length and state are on the disk, records in the new extents may be cut off.
        self.require_full_flush()
        self.live[0] = self.size = count << EXTENT_SHIFT

    def cut(self, count: int, void_stamp: int) -> None:
        """Shorten the file to `count` extents; records with stamps up to this are void. Flushes.

        The caller has made sure that nobody else is in the file. What interrupts it leaves it as it
        was or as it is to be, or in between; then it is to be done again.

        Raises:
            StoreFullError, OSError: the disk did not take it; the file is as it was.
        """
        state, size = self._state, self.size
        with state.lock:
            before = state.now
            state.set_shorter(count, void_stamp)
        try:
            # First: a file that is shorter than its state says is refused.
            self._flushing.flush_contents()
            self.live[0] = self.size = count << EXTENT_SHIFT
            system.cut(self._held.fd, self.size, size)
        except OSError:
            # Where it is cut, that was a signal's handler.
            if os.fstat(self._held.fd).st_size >= size:
                self.live[0] = self.size = size
                with state.lock:
                    self.restore(STATE_OFFSET, before.pack(self.hash_seed))
                    state.now = before
                # The disk has heard of the shorter file, and of what is void in it.
                self.require_full_flush()
            raise

    @property
    def extent_count(self) -> int:
        """The file's length in extents."""
        return self._state.now.extent_count

    @property
    def max_extents(self) -> int:
        """The length in extents that the file does not grow past."""
        return self._growth.max_extents

    def flush(self) -> None:
        """As `Flushing.flush`."""
        self.before_flush()
        self._flushing.flush()

    def flush_record(self, offset: int, size: int) -> None:
        """As `Flushing.flush_record`."""
        self._flushing.flush_record(offset, size)

    def require_full_flush(self) -> None:
        """As `Flushing.require_full_flush`."""
        self._flushing.require_full_flush()

    def note_freed(self) -> None:
        """As `require_full_flush`, for an extent that became free, under the space lock."""
        self._flushing.note_freed()

    @property
    def freed_may_come_back(self) -> bool:
        """Whether power loss could bring back records of extents that became free."""
        return self._flushing.freed_may_come_back

    def record_cleared(self, offset: int) -> None:
        """As `Flushing.record_cleared`."""
        self._flushing.record_cleared(offset)

    def is_held_here(self, flushes: bool) -> bool:
        """Return whether this very thread holds a lock that an operation may need.

        Those of a flush, which it leads or follows, count only for an operation that `flushes`.
        """
        return (
            self._state.lock._is_owned()
            or self._held.lock.is_held_here()
            or (flushes and self._flushing.is_underway_here())
        )

    def flushing_threads(self) -> set[int]:
        """As `Flushing.threads`."""
        return self._flushing.threads()

    def check_path(self) -> None:
        """Raise OSError where the path no longer names this file."""
        self._held.lock.check_path()

    def call_after_fork(self, method: Callable[[], None]) -> None:
        """Have a forked child call this bound method. It does not keep its object alive."""
        self._held.lock.call_after_fork(method)

    # --- closing -------------------------------------------------------------------------------

    def keep_lock(self) -> FileLock:
        """Return the lock on the file, which `close` leaves to be released by the caller."""
        self._held.keeps_lock = True
        return self._held.lock

    @property
    def closed(self) -> bool:
        """Whether `close` was called here; a forked child's copy is not closed but refused."""
        return self._state.closed

    def give_up(self) -> None:
        """Close after an opening that failed in what comes after this file's own part."""
        self._held.has_failed = True
        self.require_rebuild()
        self.close()

    def close(self) -> None:
        """Flush, mark the index clean, unmap, and release the lock, whatever fails on the way.

        The caller has made sure that nothing reads or writes any more. A second call goes on where
        a first one was interrupted.

        Raises:
            OSError: a flush failed, or the path no longer names the file; all else was done.
        """
        with self._state.lock:
            was_closed, self._state.closed = self.closed, True
        # One in the other: what interrupts a step does not keep the next from being taken.
        try:
            if not (was_closed or (self._held.is_new and self._held.has_failed)):
                self._close_contents()
                self._held.lock.check_path()
        finally:
            try:
                self._unmap()
            finally:
                self._held.close()
            self.released = True

    def _unmap(self) -> None:
        self.live[1] = self.live[0] = 0
        self._mapping.close()
        system.cut_unmapped(self._held.fd, self.size)

    def _close_contents(self) -> None:
        try:
            if not (self.pristine and self._state.now.clean):
                self._flushing.flush_contents()
        finally:
            self._flushing.end()
        # On a full copy-on-write disk even the flag may not be written: then the next opening
        # rebuilds the index from the records, which have just been flushed.
        with suppress(StoreFullError, CorruptStoreError):
            if not (self.pristine or self._requires_rebuild or self._by_pwrite.has_failed):
                self._mark_clean()
            self.write(HOLDER_OFFSET, pack_holder(0))

    def _mark_clean(self) -> None:
        """Mark the index on disk as one that can be used as it is, if it can."""
        count = self.extent_count
        start = self.map[: map_entry_offset(count)]
        # In a torn copy, say, the counts of a segment may be older than its pages, and what was
        # created and deleted have made them impossible: the file would be refused.
        state = clean_state(start, count, self.hash_seed)
        if state is not None:
            self._state.write(state._replace(stamp=self.latest_stamp))
            self._flushing.flush_last()

    @property
    def owned_by_parent(self) -> bool:
        """Whether this is a forked child, and the open file its parent's."""
        return self._held.lock.owned_by_parent

    def detach_after_fork(self) -> None:
        """In a forked child: touch the parent's file no more, nor its lock. Idempotent."""
        message = f"{self.path}: the store belongs to the parent of this process"
        self._use(writers.Refusing(StoreClosedError, message))
        self._held.close_descriptor()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{self.path}: an open file cannot be copied")


def _do_nothing() -> None:
    """Nothing is to be done before a flush."""
