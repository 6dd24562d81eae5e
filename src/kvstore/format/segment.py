"""One segment of the table as bytes: partitioned and built, knowing nothing of files.

Used where a segment is rewritten or built anew. The one-key operations in `slots` work on the
mapped file itself.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, compress, repeat
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_64_digest

from .layout import (
    BUCKET_COUNT,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    BUCKET_WORDS,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    DIRECTORY_SHIFT,
    EARLIEST_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    NO_EXPIRY,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_EXPIRY,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_OFFSET,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SLOT_SIZE,
    SLOT_WHOLE,
    U64,
    bucket_marker,
    segment_run,
)
from .members import Members, count_members, fingerprints_of, place_members

if TYPE_CHECKING:
    from mmap import mmap

_HEADER_PADDING: Final = bytes(BUCKET_HEADER_SIZE - BUCKET_WORDS.size)
_IS_LIVE: Final = bytes(control > CONTROL_TOMBSTONE for control in range(256))
_SHORT_KEY_SIZES: Final = bytes(range(SLOT_KEY_SIZE + 1))


def _of_bucket(of_slot: str, *, shift: int = 0) -> Struct:
    """Return the struct of one part of all slots of a page, which begin `shift` bytes later."""
    return Struct(f"<{BUCKET_HEADER_SIZE + shift}x{of_slot * SLOT_COUNT}{-shift}x")


_SLOTS: Final = _of_bucket(SLOT_WHOLE.format)
_EXPIRIES: Final = _of_bucket(SLOT_EXPIRY.format.lstrip("<"))
_ENDINGS: Final = _of_bucket(f"{SLOT_RECORD_OFFSET}xQ")  # record and sizes
# The keys, where the byte before each slot is the size of its key.
_KEYS: Final = _of_bucket(f"{1 + SLOT_KEY_SIZE}p{SLOT_SIZE - SLOT_KEY_SIZE - 1}x", shift=-1)


def partition_slots(
    mapped: "mmap | bytes",
    file_size: int,
    extent: int,
    depth: int,
    prefix: int,
    now_ms: int,
    hash_seed: int,
) -> tuple[Members, Members, list[bytes], int]:
    """Partition the live slots of the segment in `extent`, whose pages the caller has checked.

    `mapped` are the bytes of the file, of which `file_size` are there: keys longer than 32 bytes
    and the expiries that count are in the records.

    Returns:
        The members in the lower half of the segment's hashes, those in the upper half, the slots
        that expired, and how many were left out: their hash does not lead here, or was another one
        when they were stored and their record is of another key. Such a one, whose key was damaged
        into that of another slot, would be found in its place.
    """
    # What can be is done for all slots by one call; so is looked for what is rare.
    start = extent << EXTENT_SHIFT
    image = mapped[start : start + EXTENT_SIZE]
    slots: Sequence[bytes] = tuple(_unpack(_SLOTS, image))
    stay = _controls(image).translate(_IS_LIVE)
    expired: list[bytes] = []
    if _may_have_expired(image, now_ms):
        is_due = [
            0 < expires_at <= now_ms and expires_at == _record_expiry(mapped, file_size, slot)
            for expires_at, slot in zip(_unpack(_EXPIRIES, image), slots, strict=True)
        ]
        expired = list(compress(compress(slots, stay), compress(is_due, stay)))
        stay = bytes(live and not due for live, due in zip(stay, is_due, strict=True))
    slots = list(compress(slots, stay))
    keys = _keys(image, stay, mapped, file_size)
    hashes = list(map(xxh3_64_digest, keys, repeat(hash_seed)))
    first = prefix << DIRECTORY_SHIFT
    run = segment_run(depth) << DIRECTORY_SHIFT
    lowest, middle, highest = (
        each.to_bytes(U64.size, "big") for each in (first, first + run // 2, first + run - 1)
    )
    joined = b"".join(hashes)
    fingerprints = fingerprints_of(joined)
    controls = bytes(compress(_controls(image), stay))
    lost = 0
    if (
        _is_any_outside(joined, lowest, highest)
        or fingerprints.translate(FINGERPRINT_CODES) != controls
    ):
        is_here = [
            lowest <= each <= highest
            and (FINGERPRINT_CODES[number] == control or _has_its_key(mapped, file_size, slot))
            for each, number, control, slot in zip(
                hashes, fingerprints, controls, slots, strict=True
            )
        ]
        lost = is_here.count(False)
        slots = list(compress(slots, is_here))
        joined = b"".join(compress(hashes, is_here))
        fingerprints = bytes(compress(fingerprints, is_here))
    byte = depth // 8  # the one that tells the halves apart
    halves = joined[byte :: U64.size].translate(bytes(middle[byte]).ljust(256, b"\1"))
    lower, upper = place_members(slots, joined, fingerprints, halves)
    return lower, upper, expired, lost


def _unpack(part: Struct, image: bytes | bytearray) -> Iterator[Any]:
    """Yield one part of each slot of a segment."""
    return chain.from_iterable(part.iter_unpack(image))


def _controls(image: bytes) -> bytes:
    """Return the control bytes of all slots of a segment."""
    starts = range(CONTROL_OFFSET, EXTENT_SIZE, BUCKET_SIZE)
    return b"".join([image[start : start + SLOT_COUNT] for start in starts])


def _may_have_expired(image: bytes, now_ms: int) -> bool:
    """Return whether by the headers of its buckets a segment may have expired slots."""
    return any(
        U64.unpack_from(image, page + EARLIEST_OFFSET)[0] <= now_ms
        for page in range(0, EXTENT_SIZE, BUCKET_SIZE)
    )


def _keys(image: bytes, stay: bytes, mapped: "mmap | bytes", file_size: int) -> list[bytes]:
    """Return the keys of those slots of a segment that stay; empty where a record cannot be."""
    with_sizes = bytearray(image)
    sizes = b""
    for page in range(0, EXTENT_SIZE, BUCKET_SIZE):
        first, end = page + BUCKET_HEADER_SIZE, page + BUCKET_SIZE
        of_page = image[first + SLOT_KEY_SIZE_OFFSET : end : SLOT_SIZE]
        with_sizes[first - 1 : end - 1 : SLOT_SIZE] = of_page
        sizes += of_page
    keys: list[bytes] = list(compress(_unpack(_KEYS, with_sizes), stay))
    if sizes.translate(None, _SHORT_KEY_SIZES):
        for number, ending in enumerate(compress(_unpack(_ENDINGS, image), stay)):
            size = ending >> SLOT_KEY_SIZE_SHIFT & 0xFF
            if size > SLOT_KEY_SIZE:
                start = (ending & SLOT_RECORD_MASK) + RECORD_HEADER_SIZE
                keys[number] = mapped[start : start + size] if start + size <= file_size else b""
    return keys


def _is_any_outside(hashes: bytes, lowest: bytes, highest: bytes) -> bool:
    """Return whether any of the hashes of a segment, all in one piece, are not in its range.

    For that is one of bytes: of all before it there is one, and of those after it there are all.
    """
    return any(
        hashes[byte :: U64.size].translate(None, bytes(range(low, high + 1)))
        for byte, (low, high) in enumerate(zip(lowest, highest, strict=True))
        if (low, high) != (0, 0xFF)
    )


def _has_its_key(mapped: "mmap | bytes", file_size: int, slot: bytes) -> bool:
    """Return whether a slot's record has the key, or its first 32 bytes, that the slot has."""
    size = min(slot[SLOT_KEY_SIZE_OFFSET], SLOT_KEY_SIZE)
    offset = U64.unpack_from(slot, SLOT_RECORD_OFFSET)[0] & SLOT_RECORD_MASK
    start = offset + RECORD_HEADER_SIZE
    return start + size <= file_size and mapped[start : start + size] == slot[:size]


def _record_expiry(mapped: "mmap | bytes", file_size: int, slot: bytes) -> int:
    """Return expires_at of a slot's record; 0 where none can be."""
    offset = U64.unpack_from(slot, SLOT_RECORD_OFFSET)[0] & SLOT_RECORD_MASK
    if offset + RECORD_HEADER_SIZE > file_size:
        return 0
    # As through a view of words, wherever a damaged slot leads.
    expires_at: int = U64.unpack_from(mapped, offset + RECORD_EXPIRES_OFFSET & -U64.size)[0]
    return expires_at


def build_segment(extent: int, shape: int, members: Members) -> tuple[bytes, int]:
    """Return the bytes of a segment in `extent` that holds `members`, and its earliest expiry.

    Their hashes all belong there. `shape` is that of all its buckets: see `layout.bucket_shape`.

    Raises:
        ValueError: these are more than 1,280 members.
    """
    count = count_members(members)
    if count > SEGMENT_SLOTS:
        raise ValueError(f"{count:,} members, a segment has {SEGMENT_SLOTS:,} slots")
    slots, fingerprints = _spill(members)
    pages = []
    earliest = NO_EXPIRY
    for bucket in range(BUCKET_COUNT):
        body = b"".join(slots[bucket])
        expiries = memoryview(body).cast("Q")[SLOT_EXPIRES_OFFSET >> 3 :: SLOT_SIZE >> 3].tolist()
        # One pass where all have one.
        earliest_of_bucket = min(expiries, default=0) or min(
            filter(None, expiries), default=NO_EXPIRY
        )
        earliest = min(earliest, earliest_of_bucket)
        header = BUCKET_WORDS.pack(
            bucket_marker((extent << EXTENT_SHIFT) + bucket * BUCKET_SIZE),
            earliest_of_bucket,
            shape,
            fingerprints[bucket].translate(FINGERPRINT_CODES),
        )
        pages.append((header + _HEADER_PADDING + body).ljust(BUCKET_SIZE, b"\0"))
    return b"".join(pages), earliest


def _spill(members: Members) -> tuple[list[list[bytes]], list[bytearray]]:
    """Return what each bucket gets: what is too much for one, the next ones have, wrapping.

    That is where a lookup goes on.
    """
    slots, fingerprints = members.slots.copy(), members.fingerprints.copy()
    for start in range(BUCKET_COUNT):
        bucket = start
        while len(slots[bucket]) > SLOT_COUNT:
            following = (bucket + 1) % BUCKET_COUNT
            slots[following] = slots[following] + slots[bucket][SLOT_COUNT:]
            fingerprints[following] = fingerprints[following] + fingerprints[bucket][SLOT_COUNT:]
            slots[bucket] = slots[bucket][:SLOT_COUNT]
            fingerprints[bucket] = fingerprints[bucket][:SLOT_COUNT]
            bucket = following
    return slots, fingerprints
