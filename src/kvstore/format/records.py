"""One record told from garbage in the bytes of an extent, without any index.

An aligned magic, sane sizes, a block of its class inside the extent, a stamp below the limit, and
the right checksum make a record. (A right checksum vouches for key and place.) It is whole whether
it is live, expired, retired or marked: which of those of a key counts is told by all of them only.
"""

from collections.abc import Iterator
from typing import Final

from .layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    EXTENT_SIZE,
    MARKED_MAGIC_BYTES,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_VALUE_SIZE,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC_BYTES,
    RECORD_MAGIC_SIZE,
    SIZE_CLASSES,
    STAMP_LIMIT,
    TIME_LIMIT,
    key_hash,
    record_checksum,
)

_MAGICS: Final = (RECORD_MAGIC_BYTES, MARKED_MAGIC_BYTES)
_BEGIN_OF_MAGICS: Final = b"\xff\xfeK"


def magics(contents: bytes) -> Iterator[int]:
    """Yield where a record's magic is in an extent, marked or not, aligned as a block is."""
    for position in places_of_magics(contents):
        if position % BLOCK_ALIGNMENT == 0:
            yield position


def places_of_magics(contents: bytes) -> Iterator[int]:
    """Yield where a record's magic is in an extent, marked or not, wherever it is."""
    position = contents.find(_BEGIN_OF_MAGICS)
    while position >= 0:
        if contents[position : position + RECORD_MAGIC_SIZE] in _MAGICS:
            yield position
        position = contents.find(_BEGIN_OF_MAGICS, position + 1)


def size_class_at(contents: bytes, position: int) -> int:
    """Return the size class that a magic in an extent goes with; -1 where it can be no record's."""
    if position % BLOCK_ALIGNMENT or position + RECORD_HEADER_SIZE > EXTENT_SIZE:
        return -1
    header: tuple[int, ...] = RECORD.unpack_from(contents, position)
    _, value_size, key_size, *_ = header
    if not 0 < key_size <= MAX_KEY_SIZE or not MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE:
        return -1
    size = RECORD_HEADER_SIZE + key_size + value_size
    size_class = SIZE_CLASSES[size + BLOCK_ALIGNMENT - 1 >> 5]
    if position % BLOCK_SIZES[size_class] or position + BLOCK_SIZES[size_class] > EXTENT_SIZE:
        return -1
    return size_class


def is_valid_record(contents: bytes, position: int, base: int, hash_seed: int) -> bool:
    """Return whether the record of sane sizes at `position` has the right checksum, and a stamp.

    `contents` are those of the extent at file offset `base`.
    """
    header: tuple[int, ...] = RECORD.unpack_from(contents, position)
    _, value_size, key_size, _, stamp, expires_at, checksum = header
    value_start = position + RECORD_HEADER_SIZE + key_size
    key = contents[position + RECORD_HEADER_SIZE : value_start]
    value = contents[value_start : value_start + value_size]
    # The checksum leaves out what it cannot be: the upper bits of an expiry past the limit.
    return (
        stamp < STAMP_LIMIT
        and expires_at < TIME_LIMIT
        and checksum
        == record_checksum(value, key_hash(key, hash_seed), stamp, expires_at, base + position)
    )
