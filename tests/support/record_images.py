"""The bytes of a file that was not closed, with records forged in it."""

from collections.abc import Callable
from typing import Final

from xxhash import xxh3_64_intdigest

from kvstore.format.layout import (
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY,
    RECORD,
    RECORD_MAGIC,
    STAMP_SHIFT,
    STATE,
    STATE_OFFSET,
)
from kvstore.format.superblock import unpack_state

from .components import NOW_MS

STAMP: Final = NOW_MS << STAMP_SHIFT

Hash = Callable[[bytes, int], int]


class Image:
    """The bytes of a file that was not closed, to forge records in."""

    def __init__(self, contents: bytes, digest: Hash = xxh3_64_intdigest) -> None:
        self.contents = bytearray(contents)
        self.seed = IDENTITY.unpack_from(contents)[4]
        self.digest = digest

    def extents(self, kind: int | None = None) -> list[int]:
        """Return where the extents begin that can hold records, all or those of one kind."""
        return [
            extent * EXTENT_SIZE
            for extent in range(FIXED_EXTENTS, len(self.contents) // EXTENT_SIZE)
            if kind in (None, self.contents[EXTENT_MAP_OFFSET + 16 * extent])
        ]

    def forge(
        self,
        offset: int,
        key: bytes,
        value: bytes,
        stamp: int = STAMP,
        expires_at: int = 0,
        generation: int = 0,
        magic: int = RECORD_MAGIC,
    ) -> None:
        """Put a record at `offset`, with a true checksum whatever else is wrong with it."""
        seed = self.digest(key, self.seed) ^ stamp ^ expires_at << 16 ^ offset
        record = RECORD.pack(
            magic,
            len(value),
            len(key),
            generation,
            stamp,
            expires_at,
            self.digest(value, seed & 2**64 - 1),
        )
        self.put(offset, record + key + value)

    def set_void_stamp(self, stamp: int) -> None:
        """Say that all records up to this stamp are void."""
        state = unpack_state(bytes(self.contents[STATE_OFFSET:][: STATE.size]), self.seed)
        self.put(STATE_OFFSET, state._replace(stamp=stamp).pack(self.seed))

    def put(self, offset: int, data: bytes | bytearray) -> None:
        """Overwrite what is at `offset`, no further than the end of the file."""
        self.contents[offset : offset + len(data)] = data[: len(self.contents) - offset]
