"""Structures of a file taken apart for showing: the way of a lookup, a slot, a record, an extent.

Each is told in pieces, with what does not fit named beside the bytes that it was seen in. Nothing
is trusted: a damaged file gives pieces too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_HEADER_SIZE,
    BUCKET_SHIFT,
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_MAGIC,
    IDENTITY,
    IDENTITY_OFFSETS,
    KIND_SEGMENT,
    KIND_SLAB,
    NEVER,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SLAB_ENTRY,
    SLOT,
    SLOT_COUNT,
    SLOT_KEY_SIZE,
    SLOT_SIZE,
    STATE,
    STATE_OFFSET,
    U16,
    bucket_marker,
    key_hash,
    map_entry_offset,
    record_checksum,
    slot_offset,
)
from kvstore.format.records import is_valid_record, size_class_at

from .fields import (
    BUCKET_STRUCTURE,
    DIRECTORY_STRUCTURE,
    FREE_BLOCK_STRUCTURE,
    IDENTITY_STRUCTURE,
    RECORD_STRUCTURE,
    SEGMENT_ENTRY_STRUCTURE,
    SLAB_ENTRY_STRUCTURE,
    SLOT_STRUCTURE,
    STATE_STRUCTURE,
    Field,
    control_meaning,
    hexadecimal,
)
from .image import Image
from .terminal import escaped, moment

_POSITION: Final = EXTENT_SIZE - 1  # mask: where in its extent an offset is


@dataclass
class Piece:
    """One structure: its fields, then text as it is in the file, what to know, what is wrong."""

    title: str
    fields: list[Field] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    dump: tuple[int, bytes] | None = None
    """Offset and bytes of what has no fields."""


# --- the way of a lookup -------------------------------------------------------------------------


def lookup(image: Image, key: bytes, now_ms: int) -> Iterator[Piece]:
    """Yield what a lookup of `key` goes through, to the record or to where it ends without."""
    hash_of_key = key_hash(key, image.seed)
    yield _hash_piece(image, key, hash_of_key)
    entry = DIRECTORY_OFFSET + 2 * (hash_of_key >> DIRECTORY_SHIFT)
    raw = image[entry : entry + U16.size]
    extent = int.from_bytes(raw, "little")
    piece = Piece("The directory's entry", list(DIRECTORY_STRUCTURE.fields(raw, entry)))
    piece.notes.append(f"directory + 2 x {hash_of_key >> DIRECTORY_SHIFT:,} = byte {entry:,}")
    yield piece
    if not FIXED_EXTENTS <= extent < image.extent_count:
        piece.problems.append(f"no segment can be in extent {extent:,}")
        yield Piece("The end of the way", problems=["the directory leads nowhere"])
        return
    yield map_piece(image, extent, KIND_SEGMENT)
    yield from _search(image, key, hash_of_key, extent, now_ms)


def _hash_piece(image: Image, key: bytes, hash_of_key: int) -> Piece:
    fields = [
        each
        for offset in IDENTITY_OFFSETS
        for each in IDENTITY_STRUCTURE.fields(image[offset : offset + IDENTITY.size], offset)
        if each.name == "hash_seed" and each.value == image.seed
    ]
    fingerprint = hash_of_key >> FINGERPRINT_SHIFT & 0xFF
    code = FINGERPRINT_CODES[fingerprint]
    return Piece(
        "The key and its hash",
        fields[:1],
        [
            f"key       {hexadecimal(key)}",
            f"key_hash  0x{hash_of_key:016X} = xxh3_64(key, hash_seed)",
            f"bits 63..49  directory index  {hash_of_key >> DIRECTORY_SHIFT:,}",
            f"bits 11..4   fingerprint      {fingerprint:02X}, as a control byte {code:02X}",
            f"bits 3..0    home bucket      {hash_of_key & BUCKET_COUNT - 1}",
        ],
    )


def _search(
    image: Image, key: bytes, hash_of_key: int, extent: int, now_ms: int
) -> Iterator[Piece]:
    """Yield the buckets that are searched, and what each candidate in them leads to."""
    home = hash_of_key & BUCKET_COUNT - 1
    code = FINGERPRINT_CODES[hash_of_key >> FINGERPRINT_SHIFT & 0xFF]
    for step in range(BUCKET_COUNT):
        number = (home + step) % BUCKET_COUNT
        bucket = (extent << EXTENT_SHIFT) + (number << BUCKET_SHIFT)
        page = image[bucket : bucket + BUCKET_SIZE]
        piece = bucket_piece(page, bucket)
        piece.title = f"Bucket {number}, {'the home bucket' if not step else 'the next one'}"
        control = page[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT]
        indices = [index for index, byte in enumerate(control) if byte == code]
        piece.notes += [
            f"control byte {index} at byte {bucket + CONTROL_OFFSET + index:,} is {code:02X}: "
            f"slot {index} may be the key's"
            for index in indices
        ] or [f"no control byte is {code:02X}: no slot of it can be the key's"]
        yield piece
        if piece.problems:
            yield Piece("The end of the way", problems=["what is in a damaged page is lost to it"])
            return
        for index in indices:
            slot = slot_offset(bucket, index)
            yield slot_piece(image, slot)
            packed = image[slot : slot + SLOT_SIZE]
            start, _, offset, _, key_size = SLOT.unpack(packed)
            if (start, key_size) != (_start(key), len(key)):
                yield Piece("Not the key's slot", notes=["another key with the same fingerprint"])
                continue
            pieces = list(record_pieces(image, offset, now_ms))
            rest = image[offset + RECORD_HEADER_SIZE :][: len(key)] if len(key) > 32 else key
            if rest == key or any(each.problems for each in pieces):
                yield from pieces
                yield from _compared(packed, image[offset : offset + RECORD.size])
                return
            yield Piece("Not the key's record", notes=["another key that begins alike"])
        if CONTROL_EMPTY in control:
            break
    yield Piece(
        "The end of the way",
        notes=["a bucket with an empty slot ends it, or the sixteenth"],
        problems=["the key is absent"],
    )


def _compared(slot: bytes, header: bytes) -> Iterator[Piece]:
    """Yield in what a slot and the record that it points to do not agree."""
    if len(header) == RECORD.size:
        _, slot_expires, _, *slot_sizes = SLOT.unpack(slot)
        _, value_size, key_size, _, _, expires_at, _ = RECORD.unpack(header)
        if (slot_expires, *slot_sizes) != (expires_at, value_size, key_size):
            yield Piece("The slot and its record", problems=["they differ in expiry or sizes"])


def _start(key: bytes) -> bytes:
    return key[:SLOT_KEY_SIZE].ljust(SLOT_KEY_SIZE, b"\0")


# --- structures ----------------------------------------------------------------------------------


def map_piece(image: Image, extent: int, expected: int | None = None) -> Piece:
    """Return the extent map's entry on an extent, which is to be of the kind `expected`."""
    offset = map_entry_offset(extent)
    entry = image.map_entry(extent)
    structure = SEGMENT_ENTRY_STRUCTURE if entry[:1] == _KIND_SEGMENT else SLAB_ENTRY_STRUCTURE
    piece = Piece(f"The extent map's entry {extent:,}", list(structure.fields(entry, offset)))
    if len(entry) < SLAB_ENTRY.size:
        piece.problems.append("the file is cut off here")
    elif expected is not None and entry[0] != expected:
        wanted = "segment" if expected == KIND_SEGMENT else "slab"
        piece.problems.append(f"its kind is {entry[0]}, where a {wanted} ({expected}) should be")
    return piece


_KIND_SEGMENT: Final = bytes([KIND_SEGMENT])


def bucket_piece(page: bytes, bucket: int) -> Piece:
    """Return the header of the bucket at file offset `bucket`."""
    piece = Piece(f"The bucket at byte {bucket:,}", list(BUCKET_STRUCTURE.fields(page, bucket)))
    if len(page) < BUCKET_SIZE:
        piece.problems.append("the file is cut off here")
        return piece
    marker, *_, control = BUCKET_HEADER.unpack_from(page)
    empty, tombstones = control.count(CONTROL_EMPTY), control.count(CONTROL_TOMBSTONE)
    if bucket & _POSITION:
        # Depth and prefix are bucket 0's.
        piece.fields = [each for each in piece.fields if each.name not in ("depth", "prefix")]
    live = SLOT_COUNT - empty - tombstones
    piece.notes.append(f"{live} live slots, {tombstones} tombstones, {empty} empty")
    if marker != bucket_marker(bucket):
        piece.problems.append("it has not the marker of this page, so it is damaged")
    if empty and tombstones:
        piece.problems.append("a bucket with an empty slot should have no tombstone")
    return piece


def slot_piece(image: Image, slot: int) -> Piece:
    """Return the slot at a file offset."""
    bucket, index = slot & -BUCKET_SIZE, (slot & BUCKET_SIZE - 1) - BUCKET_HEADER_SIZE
    piece = Piece(f"The slot at byte {slot:,}")
    piece.fields += SLOT_STRUCTURE.fields(image[slot : slot + SLOT_SIZE], slot)
    if index < 0 or index % SLOT_SIZE:
        piece.problems.append("no slot begins here")
        return piece
    index //= SLOT_SIZE
    control = image[bucket + CONTROL_OFFSET + index : bucket + CONTROL_OFFSET + index + 1]
    if not control or len(piece.fields) < len(SLOT_STRUCTURE.names):
        piece.problems.append("the file is cut off here")
        return piece
    number = (bucket & _POSITION) >> BUCKET_SHIFT
    piece.notes.append(
        f"slot {index} of bucket {number} in extent {slot >> EXTENT_SHIFT:,}; its control byte is "
        f"{hexadecimal(control)}: {control_meaning(control[0])}"
    )
    marker = image[bucket : bucket + 8]
    if marker != bucket_marker(bucket).to_bytes(8, "little"):
        piece.problems.append("it is in no bucket: the page has not the marker of one")
    return piece


def record_pieces(image: Image, offset: int, now_ms: int) -> Iterator[Piece]:
    """Yield the record at a file offset, or what is there instead, and what it lies in."""
    extent = offset >> EXTENT_SHIFT
    if not 0 <= extent < image.extent_count or extent < FIXED_EXTENTS:
        yield Piece(
            f"The record at byte {offset:,}",
            problems=[f"extent {extent:,} can have no record: there are {image.extent_count:,}"],
        )
        return
    yield map_piece(image, extent, KIND_SLAB)
    contents = image.extent(extent).ljust(EXTENT_SIZE, b"\0")
    position = offset & _POSITION
    if int.from_bytes(contents[position : position + 4], "little") == FREE_MAGIC:
        raw = contents[position : position + FREE_BLOCK.size]
        fields = list(FREE_BLOCK_STRUCTURE.fields(raw, offset))
        yield Piece("A free block", fields, problems=["no record is here, its block is free"])
        return
    size_class = size_class_at(contents, position)
    header = contents[position : position + RECORD.size]
    piece = Piece(f"The record at byte {offset:,}", list(RECORD_STRUCTURE.fields(header, offset)))
    yield piece
    if len(header) < RECORD.size or int.from_bytes(header[:4], "little") != RECORD_MAGIC:
        piece.problems.append("no record begins here")
        return
    if size_class < 0:
        piece.problems.append("its sizes or flags are not those of a record, or no block is here")
        return
    yield from _contents(image, contents, offset, now_ms)


def _contents(image: Image, contents: bytes, offset: int, now_ms: int) -> Iterator[Piece]:
    """Yield key and value of the record at `offset`, whose sizes are sane, and the verdict."""
    position = offset & _POSITION
    _, value_size, key_size, _, created_at, expires_at, checksum = RECORD.unpack_from(
        contents, position
    )
    start = position + RECORD_HEADER_SIZE
    key = contents[start : start + key_size]
    value = contents[start + key_size : start + key_size + value_size]
    key_offset = offset + RECORD_HEADER_SIZE
    shown = escaped(key.decode(errors="replace"))
    yield Piece("Its key", notes=[shown], dump=(key_offset, key))
    yield Piece(f"Its value, {value_size:,} bytes", dump=(key_offset + key_size, value))
    hash_of_key = key_hash(key, image.seed)
    true = record_checksum(value, hash_of_key, created_at, expires_at, offset)
    block = BLOCK_SIZES[size_class_at(contents, position)]
    verdict = Piece("Its checksum")
    verdict.notes.append(
        f"xxh3_64(value, key_hash ^ created_at ^ expires_at << 16 ^ offset) = 0x{true:016X}"
    )
    if is_valid_record(contents, position, offset - position, image.seed):
        size = RECORD_HEADER_SIZE + key_size + value_size
        verdict.notes.append(f"that is what it says: the record is whole, {size:,} of {block:,} B")
    else:
        verdict.problems.append(f"the record says 0x{checksum:016X}: it is damaged")
    if NEVER < expires_at <= now_ms:
        verdict.problems.append(f"the record has expired, at {moment(expires_at)}")
    yield verdict


def superblock(image: Image) -> Iterator[Piece]:
    """Yield the fields of extent 0."""
    for offset in IDENTITY_OFFSETS:
        raw = image[offset : offset + IDENTITY.size]
        yield Piece(f"Identity at byte {offset:,}", list(IDENTITY_STRUCTURE.fields(raw, offset)))
    raw = image[STATE_OFFSET : STATE_OFFSET + STATE.size]
    yield Piece(
        "State", list(STATE_STRUCTURE.fields(raw, STATE_OFFSET)), problems=list(image.problems)
    )


def blocks(image: Image, extent: int) -> Iterator[tuple[int, str, bytes]]:
    """Yield offset, what it is, and the first bytes of each block of a slab extent."""
    entry = image.map_entry(extent)
    size_class, fresh = SLAB_ENTRY.unpack(entry)[1], SLAB_ENTRY.unpack(entry)[4]
    contents = image.extent(extent)
    for block in range(BLOCKS_PER_EXTENT[size_class]):
        position = block * BLOCK_SIZES[size_class]
        header = contents[position : position + RECORD_HEADER_SIZE]
        magic = int.from_bytes(header[:4], "little")
        if len(header) < RECORD_HEADER_SIZE:
            what = "cut off"
        elif magic == RECORD_MAGIC:
            sizes = RECORD.unpack(header)
            key = contents[position + len(header) : position + len(header) + sizes[2]]
            what = f"record, {sizes[1]:,} B: {escaped(key.decode(errors='replace'))}"
        elif magic == FREE_MAGIC:
            what = "free block"
        else:
            what = "never used" if block >= fresh else "neither a record nor a free block"
        yield (extent << EXTENT_SHIFT) + position, what, header[:RECORD_HEADER_SIZE]
