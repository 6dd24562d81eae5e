"""Pages and slots of the table, as bytes taken from a file."""

from collections.abc import Iterator
from typing import NamedTuple

from kvstore.format.bucket import live_slots
from kvstore.format.layout import (
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_TOMBSTONE,
    EXTENT_SHIFT,
    SHAPE_OFFSET,
    SLOT,
    SLOT_COUNT,
    SLOT_KEY_SIZE,
    SLOT_RECORD_MASK,
    U64,
    bucket_marker,
    slot_offset,
)


def slot_key(key: bytes) -> bytes:
    """Return what a slot holds of a key: all of it and zeros, or its first 32 bytes."""
    return key[:SLOT_KEY_SIZE].ljust(SLOT_KEY_SIZE, b"\0")


class Slot(NamedTuple):
    """What a slot tells: its part of the key, and of the record expiry, offset and sizes."""

    start: bytes
    expires_at: int
    record: int
    value_size: int
    key_size: int


def unpack_slot(packed: bytes) -> Slot:
    """Return what the 48 bytes of a slot tell."""
    slot = Slot(*SLOT.unpack(packed))
    return slot._replace(record=slot.record & SLOT_RECORD_MASK)


def key_in(packed: bytes) -> tuple[bytes, int]:
    """Return what a slot has of its key, and the size of that."""
    slot = unpack_slot(packed)
    return slot.start, slot.key_size


def slots_of(extent: int, contents: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the file offset and the bytes of each live slot of a segment."""
    for number in range(BUCKET_COUNT):
        bucket = (extent << EXTENT_SHIFT) + number * BUCKET_SIZE
        page = contents[number * BUCKET_SIZE : (number + 1) * BUCKET_SIZE]
        for index, _, packed in live_slots(page):
            yield slot_offset(bucket, index), packed


class BucketCounts(NamedTuple):
    """Slots of a bucket: live ones, tombstones, empty ones."""

    live: int
    dead: int
    empty: int


def bucket_counts(contents: bytes, bucket: int = 0) -> BucketCounts:
    """Count the slots of the bucket that begins in these bytes at `bucket`."""
    control = BUCKET_HEADER.unpack_from(contents, bucket)[-1]
    dead, empty = control.count(CONTROL_TOMBSTONE), control.count(CONTROL_EMPTY)
    return BucketCounts(SLOT_COUNT - dead - empty, dead, empty)


def is_bucket(page: bytes, bucket: int) -> bool:
    """Return whether these bytes begin with a page of the table that belongs at `bucket`."""
    return len(page) >= BUCKET_SIZE and U64.unpack_from(page)[0] == bucket_marker(bucket)


def shape(contents: bytes, bucket: int = 0) -> int:
    """Return the shape of a bucket that begins in these bytes at `bucket`."""
    found: int = U64.unpack_from(contents, bucket + SHAPE_OFFSET)[0]
    return found
