"""One segment of the table as bytes: taken apart and put together, knowing nothing of files.

Used where a segment is looked at whole: rewriting, recovery, checking. The one-key operations in
`table` work on the mapped file itself.
"""

from collections.abc import Iterator

from .layout import (
    BUCKET_COUNT,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    BUCKET_WORDS,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    EXTENT_SHIFT,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    NO_EXPIRY,
    SLOT_COUNT,
    SLOT_EXPIRY,
    SLOT_WHOLE,
    bucket_marker,
)

_HEADER_PADDING = bytes(BUCKET_HEADER_SIZE - BUCKET_WORDS.size)


# A live slot on its way from one segment to another: hash of its key, expires_at, its 48 bytes.
Member = tuple[int, int, bytes]


def live_slots(bucket: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield index in the bucket, expires_at and the 48 bytes of each live slot of a page."""
    slots = bucket[BUCKET_HEADER_SIZE:]
    for index, control, (slot,), (expires_at,) in zip(
        range(SLOT_COUNT),
        bucket[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT],
        SLOT_WHOLE.iter_unpack(slots),
        SLOT_EXPIRY.iter_unpack(slots),
        strict=True,
    ):
        if control > CONTROL_TOMBSTONE:
            yield index, expires_at, slot


def build(extent: int, shape: int, members: list[Member]) -> tuple[bytes, int]:
    """Return the bytes of a segment in `extent` that holds `members`, and its earliest expiry.

    At most 1,280 members, whose hashes all belong there. `shape` is that of all its buckets: see
    `layout.bucket_shape`.
    """
    slots: list[list[bytes]] = [[] for _ in range(BUCKET_COUNT)]
    fingerprints = [bytearray() for _ in range(BUCKET_COUNT)]
    earliest = [NO_EXPIRY] * BUCKET_COUNT
    last_bucket, fingerprint_shift = BUCKET_COUNT - 1, FINGERPRINT_SHIFT
    for key_hash, expires_at, slot in members:
        bucket = key_hash & last_bucket
        slots[bucket].append(slot)
        fingerprints[bucket].append(key_hash >> fingerprint_shift & 0xFF)
        if expires_at and expires_at < earliest[bucket]:
            earliest[bucket] = expires_at
    _spill(slots, fingerprints, earliest)
    pages = []
    for bucket in range(BUCKET_COUNT):
        header = BUCKET_WORDS.pack(
            bucket_marker((extent << EXTENT_SHIFT) + bucket * BUCKET_SIZE),
            earliest[bucket],
            shape,
            fingerprints[bucket].translate(FINGERPRINT_CODES),
        )
        page = b"".join((header, _HEADER_PADDING, *slots[bucket]))
        pages.append(page.ljust(BUCKET_SIZE, b"\0"))
    return b"".join(pages), min(earliest)


def _spill(slots: list[list[bytes]], fingerprints: list[bytearray], earliest: list[int]) -> None:
    """Move what a bucket has no room for to the next ones, wrapping: where a lookup goes on."""
    for start in range(BUCKET_COUNT):
        bucket = start
        while len(slots[bucket]) > SLOT_COUNT:
            following = (bucket + 1) % BUCKET_COUNT
            slots[following] += slots[bucket][SLOT_COUNT:]
            fingerprints[following] += fingerprints[bucket][SLOT_COUNT:]
            del slots[bucket][SLOT_COUNT:], fingerprints[bucket][SLOT_COUNT:]
            earliest[following] = min(earliest[following], earliest[bucket])
            bucket = following
