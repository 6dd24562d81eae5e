"""The modules of the file format put together without a `KVStore`, and faults in its write path."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from kvstore import compiled
from kvstore.compiled.interface import Change
from kvstore.file.datafile import DataFile
from kvstore.format.layout import RECORD_HEADER_SIZE, U64, key_hash
from kvstore.index.extents import Extents
from kvstore.index.records import Records
from kvstore.index.segments import Segments
from kvstore.index.slab import Slab
from kvstore.index.slots import Slots
from kvstore.index.versions import Versions
from kvstore.recovery.opening import open_file
from kvstore.recovery.rebuild import rebuild

from . import MIB
from .clock import START_SECONDS

NOW_MS: Final = START_SECONDS * 1000
KEY: Final = b"a key"
VALUE: Final = b'{"b":1}'


class Components(NamedTuple):
    """An open file with its extents, slab and table."""

    file: DataFile
    extents: Extents
    slab: Slab
    records: Records
    slots: Slots
    segments: Segments

    def hash(self, key: bytes) -> int:
        """Return the hash of `key` in this file."""
        return key_hash(key, self.file.hash_seed)

    def store(self, key: bytes, value: bytes, expires_at: int = 0, now_ms: int = NOW_MS) -> int:
        """Store a record under a key that is not there; return the offset of its slot."""
        hash_of_key = self.hash(key)
        slot = self.slots.find(hash_of_key, key)
        assert slot < 0, "the key is there, or its segment is full"
        record = self.slab.allocate(RECORD_HEADER_SIZE + len(key) + len(value))
        self.records.write_record(record, key, value, hash_of_key, now_ms, expires_at)
        self.slots.insert(-slot, hash_of_key, key, record, len(value), expires_at)
        if not self.file.in_place:
            self.records.finish_record(record)
        return -slot

    def remove(self, key: bytes) -> None:
        """Delete a key that is there."""
        slot = self.slots.find(self.hash(key), key)
        assert slot > 0, "the key is not there"
        self.slots.delete(slot, key)


@contextmanager
def open_components(
    path: Path, max_bytes: int = 64 * MIB, now_ms: int = NOW_MS
) -> Iterator[Components]:
    """Open the file at `path`, ready to be changed; close it at the end."""
    file = open_file(str(path), max_bytes, 0.0, now_ms)
    try:
        extents = Extents(file)
        versions = Versions(file.path, durable=False)
        slab = Slab(file, extents, versions)
        if not file.trusted:
            rebuild(file, extents, now_ms)
        records = Records(file)
        versions.start_after(file.latest_stamp, now_ms)
        slots = Slots(file, slab, records, versions)
        segments = Segments(file, extents, slab, slots, versions, compiled.selected)
        file.mark_dirty()
        yield Components(file, extents, slab, records, slots, segments)
        if not file.closed:
            slab.free_spare()
            file.latest_stamp = versions.latest_stamp
    finally:
        file.close()


def take_written(
    parts: Components, key: bytes = KEY, value: bytes = VALUE, expires_at: int = 0
) -> int:
    """Write a record that no slot points to; return its offset."""
    record = parts.slab.allocate(32 + len(key) + len(value))
    parts.records.write_record(record, key, value, parts.hash(key), NOW_MS, expires_at)
    parts.records.finish_record(record)
    return record


def tail_of(record: int, key: bytes = KEY, value: bytes = VALUE) -> int:
    """Return the last word of a slot that points to a record."""
    return record | len(value) << 32 | len(key) << 48


def replace_writes(file: DataFile, write: Callable[[int, bytes], None]) -> None:
    """Have every change of `file` go through `write`, those of single words too."""

    def write_word(index: int, word: int) -> None:
        write(index << 3, U64.pack(word))

    file.live[1] = 0  # so that compiled code does not store by itself

    def write_all(changes: Sequence[Change]) -> None:
        for offset, data, _ in changes:
            file.write(offset, data)

    file.write, file.write_word, file.write_all = write, write_word, write_all


class FaultyWrites:
    """Stands in for the `write` of a data file and raises at one of the calls.

    Args:
        file: its writes are replaced.
        fail_at: the number of the call, from 1, that raises instead of writing.
        error: what it raises.
        lasting: so do all calls after it, as on a disk that stays full.
    """

    def __init__(
        self, file: DataFile, fail_at: int, error: BaseException, *, lasting: bool = False
    ) -> None:
        self._write = file.write
        self._fail_at = fail_at
        self._error = error
        self._lasting = lasting
        self.calls = 0
        replace_writes(file, self)

    def __call__(self, offset: int, data: bytes) -> None:
        self.calls += 1
        if self.calls == self._fail_at or (self._lasting and self.calls > self._fail_at):
            raise self._error
        self._write(offset, data)

    @property
    def reached(self) -> bool:
        """Whether it has raised."""
        return self.calls >= self._fail_at


class FullDisk:
    """Stands in for `os.pwrite` and refuses one of the calls for want of room.

    Args:
        fail_at: the number of the call, from 1, that raises instead of writing.
        lasting: so do all calls after it.
    """

    def __init__(self, fail_at: int, *, lasting: bool) -> None:
        self._pwrite = os.pwrite
        self._fail_at = fail_at
        self._lasting = lasting
        self.calls = 0

    def __call__(self, fd: int, data: bytes, offset: int, /) -> int:
        self.calls += 1
        if self.calls == self._fail_at or (self._lasting and self.calls > self._fail_at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._pwrite(fd, data, offset)

    @property
    def reached(self) -> bool:
        """Whether it has raised."""
        return self.calls >= self._fail_at
