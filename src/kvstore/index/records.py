"""Records in their blocks: written, read and verified one at a time.

A record belongs to whoever holds the stripe of its key.
"""

from struct import Struct
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from kvstore.errors import CorruptStoreError
from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    ENTRY_KIND_MASK,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_BLOCK,
    GENERATION_SHIFT,
    KIND_SLAB,
    MARKED_MAGIC,
    NEVER,
    RECORD,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    RECORD_STAMP_OFFSET,
    RECORD_WORDS,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_RECORD_MASK,
    SLOT_VALUE_SIZE_SHIFT,
    key_hash,
    record_checksum,
)

if TYPE_CHECKING:
    from kvstore.file.datafile import DataFile

_SEAL: Final = Struct("<QQQ")  # a header from its stamp on
_MAGIC: Final = 0xFFFF_FFFF
_FIRST_RECORD: Final = FIXED_EXTENTS << EXTENT_SHIFT


class Records:
    """Writes, reads and recognizes records of `file`."""

    def __init__(self, file: "DataFile") -> None:
        self._file = file
        self._map = file.map
        self._words = file.words

    def write_record(
        self,
        offset: int,
        key: bytes,
        value: bytes,
        key_hash: int,
        stamp: int,
        expires_at: int,
    ) -> None:
        """Write a record to the block at `offset`, which nothing points to yet.

        Where a write may be refused, without its magic: one that failed half-way, and that nothing
        can be written over, is then no record. `finish_record` follows when its slot is there.
        """
        record = (
            RECORD.pack(
                RECORD_MAGIC,
                len(value),
                len(key),
                0,
                stamp,
                expires_at,
                xxh3_64_intdigest(value, key_hash ^ stamp ^ expires_at << 16 ^ offset),
            )
            + key
            + value
        )
        if self._file.in_place:
            self._file.write(offset, record)
        else:
            self._file.write(offset + len(RECORD_MAGIC_BYTES), record[len(RECORD_MAGIC_BYTES) :])

    def finish_record(self, offset: int) -> None:
        """Set the magic that `write_record` left out."""
        self._file.write(offset, RECORD_MAGIC_BYTES)

    def seal(self, offset: int, slot_tail: int, key: bytes, stamp: int) -> None:
        """Give a damaged record, whatever value it has, this stamp, no expiry and a checksum."""
        _, value = self.read_record(slot_tail)
        checksum = record_checksum(value, key_hash(key, self._file.hash_seed), stamp, NEVER, offset)
        self._file.write(offset + RECORD_STAMP_OFFSET, _SEAL.pack(stamp, NEVER, checksum))

    def read_record(self, slot_tail: int) -> tuple[tuple[int, int, int, int], bytes]:
        """Copy the record that a slot's last word tells of: its header as four words, its value.

        The caller holds the key's stripe, and passes both to `verify` once it has let go of it.

        Raises:
            CorruptStoreError: there can be no record at that offset.
        """
        offset = slot_tail & SLOT_RECORD_MASK
        start = offset + RECORD_HEADER_SIZE + (slot_tail >> SLOT_KEY_SIZE_SHIFT)
        end = start + (slot_tail >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF)
        if end > self._file.size or offset < _FIRST_RECORD:
            raise no_record_error(self._file, offset, end)
        return RECORD_WORDS.unpack_from(self._map, offset), self._map[start:end]

    def contains_record_of(self, slot_tail: int, key: bytes) -> bool:
        """Return whether the block that a slot's last word tells of holds a record of `key`."""
        offset = slot_tail & SLOT_RECORD_MASK
        if not _FIRST_RECORD <= offset < self._file.size:
            return False
        entry = self._words[EXTENT_MAP_OFFSET + (offset >> EXTENT_SHIFT << 4) >> 3]
        size_class = entry >> 8 & 0xFF
        return (
            entry & ENTRY_KIND_MASK == KIND_SLAB
            and size_class < len(BLOCK_SIZES)
            and (offset & EXTENT_SIZE - 1) % BLOCK_SIZES[size_class] == 0
            and self._words[offset >> 3] == slot_tail ^ offset | RECORD_MAGIC
            and self.key_at(offset, len(key)) == key
        )

    def is_valid_record(self, slot_tail: int) -> bool:
        """Return whether a slot's last word leads to a whole record, whatever key that is of."""
        try:
            header, value = self.read_record(slot_tail)
        except CorruptStoreError:
            return False
        offset, key_size = slot_tail & SLOT_RECORD_MASK, slot_tail >> SLOT_KEY_SIZE_SHIFT
        hash_of_key = key_hash(self.key_at(offset, key_size), self._file.hash_seed)
        return verify(header, value, slot_tail, header[2], hash_of_key)

    def is_record(self, offset: int) -> bool:
        """Return whether the block at `offset`, one of ours once, still begins with a record.

        That may be retired by now.
        """
        return self._words[offset >> 3] & _MAGIC == RECORD_MAGIC

    def end_size(self, offset: int) -> int:
        """Return how many bytes from `offset` on say that the record there was deleted.

        The link of a free block; all of a record that is marked, for only what is whole outranks
        others, and of one that was moved the disk may have nothing as yet.
        """
        head = self._words[offset >> 3]
        if head & _MAGIC != MARKED_MAGIC:
            return FREE_BLOCK.size
        value_size, key_size = head >> SLOT_VALUE_SIZE_SHIFT, head >> SLOT_KEY_SIZE_SHIFT
        return RECORD_HEADER_SIZE + (key_size & 0xFF) + (value_size & 0xFFFF)

    def stamp_at(self, offset: int) -> int:
        """Return the stamp of the record at `offset`; 0 where none can be."""
        if offset + RECORD_HEADER_SIZE > self._file.size:
            return 0
        return self._words[offset + RECORD_STAMP_OFFSET >> 3]

    def expiry_at(self, offset: int) -> int:
        """Return expires_at of the record at `offset`; 0 where none can be."""
        if offset + RECORD_HEADER_SIZE > self._file.size:
            return 0
        return self._words[offset + RECORD_EXPIRES_OFFSET >> 3]

    def live_key_at(self, offset: int) -> bytes:
        """Copy the key of the record in a block; empty where it has none, or a retired one."""
        if offset + RECORD_HEADER_SIZE > self._file.size:
            return b""
        head = self._words[offset >> 3]
        if head & _MAGIC != RECORD_MAGIC or head >> GENERATION_SHIFT:
            return b""
        return self.key_at(offset, head >> SLOT_KEY_SIZE_SHIFT)

    def key_at(self, offset: int, size: int) -> bytes:
        """Copy the key of `size` bytes from the record at `offset`; empty where none can be."""
        start = offset + RECORD_HEADER_SIZE
        if start + size > self._file.size:
            return b""
        return self._map[start : start + size]


def verify(
    header: tuple[int, int, int, int],
    value: bytes,
    slot_tail: int,
    expires_at: int,
    key_hash: int,
) -> bool:
    """Return whether what `read_record` copied is the record that the slot and the key speak of."""
    sizes_and_magic, stamp, record_expires_at, checksum = header
    offset = slot_tail & SLOT_RECORD_MASK
    return (
        checksum == xxh3_64_intdigest(value, key_hash ^ stamp ^ record_expires_at << 16 ^ offset)
        and sizes_and_magic == slot_tail ^ offset | RECORD_MAGIC
        and record_expires_at == expires_at
    )


def no_record_error(file: "DataFile", offset: int, end: int) -> CorruptStoreError:
    """Return the error for a slot that points to where there can be no record."""
    return CorruptStoreError(
        f"{file.path}: a slot points to a record at bytes {offset:,} to {end:,}, records "
        f"are at multiples of {BLOCK_ALIGNMENT} from {_FIRST_RECORD:,} to {file.size:,}"
    )
