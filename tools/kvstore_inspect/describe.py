"""Structures of a file decoded for people: the way of a lookup, a slot, a record, an extent.

Each becomes sections, which name what does not fit beside the bytes that it was seen in. Nothing is
trusted: a damaged file gives sections too.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Final

from kvstore.format.layout import (
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_COUNT,
    BUCKET_HEADER_SIZE,
    BUCKET_SHIFT,
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_OFFSET,
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
    MARKED_MAGIC,
    NEVER,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SLAB_ENTRY,
    SLOT_COUNT,
    SLOT_KEY_SIZE,
    SLOT_SIZE,
    STATE,
    STATE_OFFSET,
    U16,
    key_hash,
    map_entry_offset,
    record_checksum,
    slot_offset,
)
from kvstore.format.records import is_valid_record, size_class_at
from kvstore.format.superblock import State

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
    stamp_meaning,
)
from .file_view import FileView
from .table import bucket_counts, is_bucket, slot_key, unpack_slot
from .terminal import escaped, moment

_POSITION: Final = EXTENT_SIZE - 1  # mask: where in its extent an offset is


@dataclass
class Section:
    """One structure: its fields, then text as it is in the file, what to know, what is wrong."""

    title: str
    fields: list[Field] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    dump: tuple[int, bytes] | None = None
    """Offset and bytes of what has no fields."""


# --- the way of a lookup -------------------------------------------------------------------------


def lookup(view: FileView, key: bytes, now_ms: int) -> Iterator[Section]:
    """Yield what a lookup of `key` goes through, to the record or to where it ends without."""
    hash_of_key = key_hash(key, view.seed)
    yield _hash_section(view, key, hash_of_key)
    entry = DIRECTORY_OFFSET + 2 * (hash_of_key >> DIRECTORY_SHIFT)
    raw = view[entry : entry + U16.size]
    extent = int.from_bytes(raw, "little")
    section = Section("The directory's entry", list(DIRECTORY_STRUCTURE.fields(raw, entry)))
    section.notes.append(f"directory + 2 x {hash_of_key >> DIRECTORY_SHIFT:,} = byte {entry:,}")
    yield section
    if not FIXED_EXTENTS <= extent < view.extent_count:
        section.problems.append(f"no segment can be in extent {extent:,}")
        yield Section("The end of the way", problems=["the directory leads nowhere"])
        return
    yield map_section(view, extent, KIND_SEGMENT)
    yield from _search(view, key, hash_of_key, extent, now_ms)


def _hash_section(view: FileView, key: bytes, hash_of_key: int) -> Section:
    fields = [
        each
        for offset in IDENTITY_OFFSETS
        for each in IDENTITY_STRUCTURE.fields(view[offset : offset + IDENTITY.size], offset)
        if each.name == "hash_seed" and each.value == view.seed
    ]
    fingerprint = hash_of_key >> FINGERPRINT_SHIFT & 0xFF
    code = FINGERPRINT_CODES[fingerprint]
    return Section(
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
    view: FileView, key: bytes, hash_of_key: int, extent: int, now_ms: int
) -> Iterator[Section]:
    """Yield the buckets that are searched, and what each candidate in them leads to."""
    home = hash_of_key & BUCKET_COUNT - 1
    code = FINGERPRINT_CODES[hash_of_key >> FINGERPRINT_SHIFT & 0xFF]
    for step in range(BUCKET_COUNT):
        number = (home + step) % BUCKET_COUNT
        bucket = (extent << EXTENT_SHIFT) + (number << BUCKET_SHIFT)
        page = view[bucket : bucket + BUCKET_SIZE]
        section = bucket_section(page, bucket)
        section.title = f"Bucket {number}, {'the home bucket' if not step else 'the next one'}"
        control = page[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT]
        indices = [index for index, byte in enumerate(control) if byte == code]
        section.notes += [
            f"control byte {index} at byte {bucket + CONTROL_OFFSET + index:,} is {code:02X}: "
            f"slot {index} may be the key's"
            for index in indices
        ] or [f"no control byte is {code:02X}: no slot of it can be the key's"]
        yield section
        if section.problems:
            yield Section(
                "The end of the way", problems=["what is in a damaged page is lost to it"]
            )
            return
        for index in indices:
            if (yield from _candidate(view, key, slot_offset(bucket, index), now_ms)):
                return
        if CONTROL_EMPTY in control:
            break
    yield Section(
        "The end of the way",
        notes=["a bucket with an empty slot ends it, or the sixteenth"],
        problems=["the key is absent"],
    )


def _candidate(
    view: FileView, key: bytes, slot: int, now_ms: int
) -> Generator[Section, None, bool]:
    """Yield a slot with the fingerprint of `key`, and its record; return whether they are its."""
    yield slot_section(view, slot)
    packed = view[slot : slot + SLOT_SIZE]
    start, _, offset, _, key_size = unpack_slot(packed)
    if (start, key_size) != (slot_key(key), len(key)):
        yield Section("Not the key's slot", notes=["another key with the same fingerprint"])
        return False
    sections = list(record_sections(view, offset, now_ms))
    rest = view[offset + RECORD_HEADER_SIZE :][: len(key)] if len(key) > SLOT_KEY_SIZE else key
    if rest != key and not any(each.problems for each in sections):
        yield Section("Not the key's record", notes=["another key that begins alike"])
        return False
    yield from sections
    yield from _compared(packed, view[offset : offset + RECORD.size])
    return True


def _compared(slot: bytes, header: bytes) -> Iterator[Section]:
    """Yield in what a slot and the record that it points to do not agree."""
    if len(header) < RECORD.size:
        return
    _, slot_expires, _, *slot_sizes = unpack_slot(slot)
    magic, value_size, key_size, generation, _, expires_at, _ = RECORD.unpack(header)
    section = Section("The slot and its record")
    if (slot_expires, *slot_sizes) != (expires_at, value_size, key_size):
        section.problems.append("they differ in expiry or sizes")
    if generation or magic == MARKED_MAGIC:
        section.problems.append("the record was superseded or deleted, and the slot leads to it")
    if section.problems:
        yield section


# --- structures ----------------------------------------------------------------------------------


def map_section(view: FileView, extent: int, expected: int | None = None) -> Section:
    """Return the extent map's entry on an extent, which is to be of the kind `expected`."""
    offset = map_entry_offset(extent)
    entry = view.map_entry(extent)
    structure = SEGMENT_ENTRY_STRUCTURE if entry[:1] == _KIND_SEGMENT else SLAB_ENTRY_STRUCTURE
    section = Section(f"The extent map's entry {extent:,}", list(structure.fields(entry, offset)))
    if len(entry) < SLAB_ENTRY.size:
        section.problems.append("the file is cut off here")
    elif expected is not None and entry[0] != expected:
        wanted = "segment" if expected == KIND_SEGMENT else "slab"
        section.problems.append(f"its kind is {entry[0]}, where a {wanted} ({expected}) should be")
    return section


_KIND_SEGMENT: Final = bytes([KIND_SEGMENT])


def bucket_section(page: bytes, bucket: int) -> Section:
    """Return the header of the bucket at file offset `bucket`."""
    section = Section(f"The bucket at byte {bucket:,}", list(BUCKET_STRUCTURE.fields(page, bucket)))
    if len(page) < BUCKET_SIZE:
        section.problems.append("the file is cut off here")
        return section
    if bucket & _POSITION:
        # Depth and prefix are bucket 0's.
        section.fields = [each for each in section.fields if each.name not in ("depth", "prefix")]
    live, tombstones, empty = bucket_counts(page)
    section.notes.append(f"{live} live slots, {tombstones} tombstones, {empty} empty")
    if not is_bucket(page, bucket):
        section.problems.append("it has not the marker of this page, so it is damaged")
    if empty and tombstones:
        section.problems.append("a bucket with an empty slot should have no tombstone")
    return section


def slot_section(view: FileView, slot: int) -> Section:
    """Return the slot at a file offset."""
    bucket, index = slot & -BUCKET_SIZE, (slot & BUCKET_SIZE - 1) - BUCKET_HEADER_SIZE
    section = Section(f"The slot at byte {slot:,}")
    section.fields += SLOT_STRUCTURE.fields(view[slot : slot + SLOT_SIZE], slot)
    if index < 0 or index % SLOT_SIZE:
        section.problems.append("no slot begins here")
        return section
    index //= SLOT_SIZE
    control = view[bucket + CONTROL_OFFSET + index : bucket + CONTROL_OFFSET + index + 1]
    if not control or len(section.fields) < len(SLOT_STRUCTURE.names):
        section.problems.append("the file is cut off here")
        return section
    number = (bucket & _POSITION) >> BUCKET_SHIFT
    section.notes.append(
        f"slot {index} of bucket {number} in extent {slot >> EXTENT_SHIFT:,}; its control byte is "
        f"{hexadecimal(control)}: {control_meaning(control[0])}"
    )
    if not is_bucket(view[bucket : bucket + BUCKET_SIZE], bucket):
        section.problems.append("it is in no bucket: the page has not the marker of one")
    return section


def record_sections(view: FileView, offset: int, now_ms: int) -> Iterator[Section]:
    """Yield the record at a file offset, or what is there instead, and what it lies in."""
    extent = offset >> EXTENT_SHIFT
    if not 0 <= extent < view.extent_count or extent < FIXED_EXTENTS:
        yield Section(
            f"The record at byte {offset:,}",
            problems=[f"extent {extent:,} can have no record: there are {view.extent_count:,}"],
        )
        return
    yield map_section(view, extent, KIND_SLAB)
    contents = view.padded_extent(extent)
    position = offset & _POSITION
    if int.from_bytes(contents[position : position + 4], "little") == FREE_MAGIC:
        raw = contents[position : position + FREE_BLOCK.size]
        fields = list(FREE_BLOCK_STRUCTURE.fields(raw, offset))
        yield Section("A free block", fields, problems=["no record is here, its block is free"])
        return
    size_class = size_class_at(contents, position)
    header = contents[position : position + RECORD.size]
    section = Section(
        f"The record at byte {offset:,}", list(RECORD_STRUCTURE.fields(header, offset))
    )
    yield section
    magic = int.from_bytes(header[:4], "little")
    if len(header) < RECORD.size or magic not in (RECORD_MAGIC, MARKED_MAGIC):
        section.problems.append("no record begins here")
        return
    if size_class < 0:
        section.problems.append("its sizes are not those of a record, or no block is here")
        return
    section.notes += _standing(header)
    yield from _contents(view, contents, offset, now_ms)


def _standing(header: bytes) -> Iterator[str]:
    """Yield why a record is no key's any more, where it is not."""
    magic, _, _, generation, *_ = RECORD.unpack(header)
    if magic == MARKED_MAGIC:
        yield "it is marked: its key was deleted, and it outranks older records of the key"
    elif generation:
        yield "it is retired: a later record of its key has superseded it"
    else:
        return
    yield "its block becomes free once a flush has made that safe"


def _contents(view: FileView, contents: bytes, offset: int, now_ms: int) -> Iterator[Section]:
    """Yield key and value of the record at `offset`, whose sizes are sane; whether it is whole."""
    position = offset & _POSITION
    _, value_size, key_size, _, stamp, expires_at, checksum = RECORD.unpack_from(contents, position)
    start = position + RECORD_HEADER_SIZE
    key = contents[start : start + key_size]
    value = contents[start + key_size : start + key_size + value_size]
    key_offset = offset + RECORD_HEADER_SIZE
    shown = escaped(key.decode(errors="replace"))
    yield Section("Its key", notes=[shown], dump=(key_offset, key))
    yield Section(f"Its value, {value_size:,} bytes", dump=(key_offset + key_size, value))
    hash_of_key = key_hash(key, view.seed)
    true = record_checksum(value, hash_of_key, stamp, expires_at, offset)
    block = BLOCK_SIZES[size_class_at(contents, position)]
    outcome = Section("Its checksum")
    outcome.notes.append(
        f"xxh3_64(value, key_hash ^ stamp ^ expires_at << 16 ^ offset) = 0x{true:016X}"
    )
    if is_valid_record(contents, position, offset - position, view.seed):
        size = RECORD_HEADER_SIZE + key_size + value_size
        outcome.notes.append(f"that is what it says: the record is whole, {size:,} of {block:,} B")
    else:
        outcome.problems.append(f"the record says 0x{checksum:016X}: it is damaged")
    if NEVER < expires_at <= now_ms:
        outcome.problems.append(f"the record has expired, at {moment(expires_at)}")
    yield outcome


def superblock(view: FileView) -> Iterator[Section]:
    """Yield the fields of extent 0."""
    for offset in IDENTITY_OFFSETS:
        raw = view[offset : offset + IDENTITY.size]
        yield Section(f"Identity at byte {offset:,}", list(IDENTITY_STRUCTURE.fields(raw, offset)))
    raw = view[STATE_OFFSET : STATE_OFFSET + STATE.size]
    section = Section("State", list(STATE_STRUCTURE.fields(raw, STATE_OFFSET)))
    section.problems += view.problems
    if view.state.intact:
        section.notes.append(_stamp_note(view.state))
    yield section


def _stamp_note(state: State) -> str:
    """Return what the stamp in a state says."""
    if state.clean:
        return f"no record is later than {stamp_meaning(state.stamp)}"
    if state.stamp:
        return f"all records up to {stamp_meaning(state.stamp)} are void: they were cleared at once"
    return "no records are void"


def blocks(view: FileView, extent: int) -> Iterator[tuple[int, str, bytes]]:
    """Yield offset, what it is, and the first bytes of each block of a slab extent."""
    _, size_class, _, _, fresh, *_ = SLAB_ENTRY.unpack(view.map_entry(extent))
    contents = view.extent(extent)
    for block in range(BLOCKS_PER_EXTENT[size_class]):
        position = block * BLOCK_SIZES[size_class]
        header = contents[position : position + RECORD_HEADER_SIZE]
        magic = int.from_bytes(header[:4], "little")
        if len(header) < RECORD_HEADER_SIZE:
            what = "cut off"
        elif magic in (RECORD_MAGIC, MARKED_MAGIC):
            _, value_size, key_size, generation, *_ = RECORD.unpack(header)
            key = contents[position + len(header) : position + len(header) + key_size]
            kind = "marked " if magic == MARKED_MAGIC else "retired " if generation else ""
            what = f"{kind}record, {value_size:,} B: {escaped(key.decode(errors='replace'))}"
        elif magic == FREE_MAGIC:
            what = "free block"
        else:
            what = "never used" if block >= fresh else "neither a record nor a free block"
        yield (extent << EXTENT_SHIFT) + position, what, header[:RECORD_HEADER_SIZE]
