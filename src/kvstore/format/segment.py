"""One segment of the table as bytes: partitioned and built, knowing nothing of files.

Used where a segment is rewritten or built anew. The one-key operations in `slots` work on the
mapped file itself.
"""

from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from .bucket import MEMBER, live_slots
from .layout import (
    BUCKET_COUNT,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    BUCKET_WORDS,
    DIRECTORY_SHIFT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    NO_EXPIRY,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_OFFSET,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SLOT_SIZE,
    U64,
    bucket_marker,
    segment_run,
)

if TYPE_CHECKING:
    from mmap import mmap

_HEADER_PADDING: Final = bytes(BUCKET_HEADER_SIZE - BUCKET_WORDS.size)


def partition_slots(
    mapped: "mmap | bytes",
    file_size: int,
    extent: int,
    depth: int,
    prefix: int,
    now_ms: int,
    hash_seed: int,
) -> tuple[bytes, bytes, list[bytes], int]:
    """Partition the live slots of the segment in `extent`, whose pages the caller has checked.

    `mapped` are the bytes of the file, of which `file_size` are there: keys longer than 32 bytes
    and the expiries that count are in the records.

    Returns:
        The members in the lower half of the segment's hashes, those in the upper half, the slots
        that expired, and how many were left out because their hash does not lead here.
    """
    halves: tuple[list[bytes], list[bytes]] = [], []
    expired: list[bytes] = []
    lost = 0
    digest, pack, bucket_size = xxh3_64_intdigest, MEMBER.pack, BUCKET_SIZE
    size_offset, most = SLOT_KEY_SIZE_OFFSET, SLOT_KEY_SIZE
    run = segment_run(depth) << DIRECTORY_SHIFT
    first = prefix << DIRECTORY_SHIFT
    middle, end = first + run // 2, first + run
    start = extent << EXTENT_SHIFT
    for bucket in range(start, start + EXTENT_SIZE, bucket_size):
        for _, expires_at, slot in live_slots(mapped[bucket : bucket + bucket_size]):
            if 0 < expires_at <= now_ms and expires_at == _record_expiry(mapped, file_size, slot):
                expired.append(slot)
                continue
            size = slot[size_offset]
            key = slot[:size] if size <= most else _record_key(mapped, file_size, slot)
            key_hash = digest(key, hash_seed)
            if first <= key_hash < end:
                halves[key_hash >= middle].append(pack(key_hash, slot))
            else:
                lost += 1
    lower, upper = halves
    return b"".join(lower), b"".join(upper), expired, lost


def _record_expiry(mapped: "mmap | bytes", file_size: int, slot: bytes) -> int:
    """Return expires_at of a slot's record; 0 where none can be."""
    offset = U64.unpack_from(slot, SLOT_RECORD_OFFSET)[0] & SLOT_RECORD_MASK
    if offset + RECORD_HEADER_SIZE > file_size:
        return 0
    # As through a view of words, wherever a damaged slot leads.
    expires_at: int = U64.unpack_from(mapped, offset + RECORD_EXPIRES_OFFSET & -U64.size)[0]
    return expires_at


def _record_key(mapped: "mmap | bytes", file_size: int, slot: bytes) -> bytes:
    """Return the key that a slot's record has; empty where none can be."""
    offset = U64.unpack_from(slot, SLOT_RECORD_OFFSET)[0] & SLOT_RECORD_MASK
    start = offset + RECORD_HEADER_SIZE
    end = start + slot[SLOT_KEY_SIZE_OFFSET]
    return mapped[start:end] if end <= file_size else b""


def build_segment(extent: int, shape: int, members: bytes) -> tuple[bytes, int]:
    """Return the bytes of a segment in `extent` that holds `members`, and its earliest expiry.

    Their hashes all belong there. `shape` is that of all its buckets: see `layout.bucket_shape`.

    Raises:
        ValueError: these are more than 1,280 members, or none.
    """
    if len(members) % MEMBER.size or len(members) > SEGMENT_SLOTS * MEMBER.size:
        raise ValueError(
            f"{len(members):,} bytes of members, a segment has {SEGMENT_SLOTS:,} slots of "
            f"{MEMBER.size}"
        )
    slots: list[list[bytes]] = [[] for _ in range(BUCKET_COUNT)]
    fingerprints = [bytearray() for _ in range(BUCKET_COUNT)]
    last_bucket, fingerprint_shift = BUCKET_COUNT - 1, FINGERPRINT_SHIFT
    for key_hash, slot in MEMBER.iter_unpack(members):
        bucket = key_hash & last_bucket
        slots[bucket].append(slot)
        fingerprints[bucket].append(key_hash >> fingerprint_shift & 0xFF)
    _spill(slots, fingerprints)
    pages = []
    earliest = NO_EXPIRY
    for bucket in range(BUCKET_COUNT):
        body = b"".join(slots[bucket])
        expiries = memoryview(body).cast("Q")[SLOT_EXPIRES_OFFSET >> 3 :: SLOT_SIZE >> 3].tolist()
        earliest_of_bucket = min(filter(None, expiries), default=NO_EXPIRY)
        earliest = min(earliest, earliest_of_bucket)
        header = BUCKET_WORDS.pack(
            bucket_marker((extent << EXTENT_SHIFT) + bucket * BUCKET_SIZE),
            earliest_of_bucket,
            shape,
            fingerprints[bucket].translate(FINGERPRINT_CODES),
        )
        pages.append((header + _HEADER_PADDING + body).ljust(BUCKET_SIZE, b"\0"))
    return b"".join(pages), earliest


def _spill(slots: list[list[bytes]], fingerprints: list[bytearray]) -> None:
    """Move what a bucket has no room for to the next ones, wrapping: where a lookup goes on."""
    for start in range(BUCKET_COUNT):
        bucket = start
        while len(slots[bucket]) > SLOT_COUNT:
            following = (bucket + 1) % BUCKET_COUNT
            slots[following] += slots[bucket][SLOT_COUNT:]
            fingerprints[following] += fingerprints[bucket][SLOT_COUNT:]
            del slots[bucket][SLOT_COUNT:], fingerprints[bucket][SLOT_COUNT:]
            bucket = following
