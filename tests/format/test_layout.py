"""The file format: what `layout`'s docstring says, its constants, and a real file agree."""

import os
import re
from pathlib import Path
from struct import Struct

import pytest
from support.clock import START_SECONDS, FakeClock
from xxhash import xxh3_64_intdigest

from kvstore import KVStore
from kvstore.format import layout
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_HEADER_SIZE,
    BUCKET_MARKER,
    BUCKET_SHIFT,
    BUCKET_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_MAP_SIZE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_MAGIC,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    MAX_EXTENTS,
    MAX_RECORD_SIZE,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SEGMENT_ENTRY,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLOT,
    SLOT_COUNT,
    SLOT_SIZE,
    STATE,
    STATE_OFFSET,
    bucket_marker,
    class_head_offset,
    key_hash,
    map_entry_offset,
    record_checksum,
    segment_run,
    slot_offset,
)
from kvstore.format.superblock import pack_identity, pack_state
from kvstore.recovery.check import check_image

EXAMPLE_SEED = 0x0123456789ABCDEF
EXAMPLE_TIME_MS = START_SECONDS * 1000
SECTOR = 512

_HEX_LINE = re.compile(r"^ +([0-9,]+)  ([0-9A-F]{2}(?: [0-9A-F]{2})*)$", re.MULTILINE)
_FIELD_LINE = re.compile(r"^ +([0-9]+)  (u8|u16|u32|u64|[0-9]+s) +(.+)$", re.MULTILINE)


def docstring() -> str:
    assert layout.__doc__ is not None
    return layout.__doc__


# --- the worked example ------------------------------------------------------------------------


@pytest.fixture
def example(path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes of a file made as the docstring's example says."""
    randoms = {8: EXAMPLE_SEED.to_bytes(8, "little"), 16: bytes(range(16))}
    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", randoms.__getitem__)
        with KVStore(path) as store:
            store.create("user:1", {"name": "Ada"}, ttl=3600)
    image = path.read_bytes()
    assert not list(check_image(image))
    return image


def example_lines() -> dict[int, bytes]:
    """Return the bytes that the docstring's hex lines show, by their offsets in the file."""
    lines = {
        int(offset.replace(",", "")): bytes.fromhex(shown)
        for offset, shown in _HEX_LINE.findall(docstring())
    }
    assert lines, "the docstring of layout.py has no worked example"
    return lines


def test_every_hex_line_of_the_example_is_what_a_real_file_holds(example: bytes) -> None:
    for offset, shown in example_lines().items():
        assert example[offset : offset + len(shown)].hex(" ") == shown.hex(" "), f"byte {offset:,}"


def test_example_shows_every_structure_on_the_way_to_its_record(example: bytes) -> None:
    shown = {
        offset + index: byte
        for offset, line in example_lines().items()
        for index, byte in enumerate(line)
    }
    hash_of_key = key_hash(b"user:1", EXAMPLE_SEED)
    directory_entry = DIRECTORY_OFFSET + 2 * (hash_of_key >> 49)
    segment = int.from_bytes(example[directory_entry : directory_entry + 2], "little")
    bucket = segment * 65_536 + (hash_of_key & 15) * 4096
    slot = bucket + 256
    record = int.from_bytes(example[slot + 40 : slot + 44], "little")
    for name, offset, size in (
        ("identity", 0, 56),
        ("state", 512, 40),
        ("directory entry", directory_entry, 2),
        ("segment's entry", EXTENT_MAP_OFFSET + 16 * segment, 16),
        ("slab's entry", EXTENT_MAP_OFFSET + 16 * (record // 65_536), 16),
        ("bucket's marker", bucket, 8),
        ("bucket's shape", bucket + 16, 8),
        ("control byte", bucket + 32, 1),
        ("slot", slot, 48),
        ("record", record, 32 + len(b"user:1") + len(b'{"name":"Ada"}')),
    ):
        assert set(range(offset, offset + size)) <= shown.keys(), name
    assert bytes(shown[record + 32 + index] for index in range(20)) == b'user:1{"name":"Ada"}'


def test_numbers_that_the_example_computes_are_right(example: bytes) -> None:
    text = " ".join(docstring().split())
    hash_of_key = key_hash(b"user:1", EXAMPLE_SEED)
    shown = f"{hash_of_key:016X}"
    value = b'{"name":"Ada"}'
    expires_at = EXAMPLE_TIME_MS + 3_600_000
    stamp = EXAMPLE_TIME_MS << 16
    seed = (hash_of_key ^ stamp ^ expires_at << 16 ^ 0x160000) % 2**64
    for line in (
        f'xxh3_64("user:1", seed 0x{EXAMPLE_SEED:016X}) = 0x{shown}',
        f"directory index 0x{shown} >> 49 0x{hash_of_key >> 49:X} = {hash_of_key >> 49:,}",
        f"fingerprint 0x{shown} >> 4 & 0xFF 0x{hash_of_key >> 4 & 0xFF:02X}",
        f"home bucket 0x{shown} & 15 {hash_of_key & 15}",
        f"checksum 0x{xxh3_64_intdigest(example[:48]):016X} of bytes 0..47",
        f"checksum 0x{xxh3_64_intdigest(example[512:544], EXAMPLE_SEED):016X} of bytes 512..543",
        f"checksum 0x{xxh3_64_intdigest(value, seed):016X}",
        f"= 0x{seed:016X}",
        f"created_at {EXAMPLE_TIME_MS:,}",
        f"stamp {EXAMPLE_TIME_MS:,} << 16",
        f"expires_at {expires_at:,}",
    ):
        assert line in text


# --- the tables of fields ----------------------------------------------------------------------


def fields_after(heading: str) -> list[tuple[int, str]]:
    """Return offset and type of each field in the docstring's table after `heading`."""
    text = docstring()
    table = text[text.index(heading) :].split("::\n\n", 1)[1].split("\n\n", 1)[0]
    return [(int(offset), kind) for offset, kind, _ in _FIELD_LINE.findall(table)]


@pytest.mark.parametrize(
    ("heading", "struct", "size"),
    [
        ("``IDENTITY`` at", IDENTITY, 56),
        ("``STATE`` at", STATE, 40),
        ("is stored as 2 or 3. ``SLOT``", SLOT, SLOT_SIZE),
        ("class that holds it. ``RECORD``", RECORD, RECORD_HEADER_SIZE),
        ("begins with ``FREE_BLOCK``", FREE_BLOCK, 8),
    ],
)
def test_table_of_fields_in_the_docstring_is_what_the_struct_packs(
    heading: str, struct: Struct, size: int
) -> None:
    codes = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
    end = 0
    for offset, kind in fields_after(heading):
        assert offset == end, f"a gap or an overlap before byte {offset}"
        end += Struct("<" + codes.get(kind, kind)).size
    assert end == struct.size == size
    documented = "<" + "".join(codes.get(kind, kind) for _, kind in fields_after(heading))
    # A byte that is always zero may be an `x` of the struct.
    assert struct.format.replace("x", "B") == documented


@pytest.mark.parametrize(
    ("struct", "names"),
    [
        (IDENTITY, layout.IDENTITY_FIELDS),
        (STATE, layout.STATE_FIELDS),
        (SLAB_ENTRY, layout.SLAB_ENTRY_FIELDS),
        (SEGMENT_ENTRY, layout.SEGMENT_ENTRY_FIELDS),
        (BUCKET_HEADER, layout.BUCKET_HEADER_FIELDS),
        (SLOT, layout.SLOT_FIELDS),
        (RECORD, layout.RECORD_FIELDS),
        (FREE_BLOCK, layout.FREE_BLOCK_FIELDS),
    ],
)
def test_every_field_of_a_struct_has_its_name(struct: Struct, names: tuple[str, ...]) -> None:
    assert len(struct.unpack(bytes(struct.size))) == len(names)


# --- constants against each other --------------------------------------------------------------


def test_parts_of_the_superblock_are_apart_and_each_in_one_sector() -> None:
    parts = sorted(
        [
            *((offset, IDENTITY.size) for offset in IDENTITY_OFFSETS),
            (STATE_OFFSET, STATE.size),
            (HOLDER_OFFSET, HOLDER.size),
            (ALLOCATOR_OFFSET, ALLOCATOR_SIZE),
        ]
    )
    sectors = [offset // SECTOR for offset, _ in parts]
    assert len(set(sectors)) == len(sectors)
    for offset, size in parts:
        assert offset // SECTOR == (offset + size - 1) // SECTOR
        assert offset + size <= EXTENT_SIZE


def test_directory_and_extent_map_fill_the_fixed_extents() -> None:
    assert DIRECTORY_OFFSET == EXTENT_SIZE
    assert EXTENT_MAP_OFFSET == DIRECTORY_OFFSET + DIRECTORY_SIZE
    assert FIXED_EXTENTS * EXTENT_SIZE == EXTENT_MAP_OFFSET + EXTENT_MAP_SIZE
    assert map_entry_offset(MAX_EXTENTS) <= FIXED_EXTENTS * EXTENT_SIZE
    assert 1 << EXTENT_SHIFT == EXTENT_SIZE
    assert SLAB_ENTRY.size == SEGMENT_ENTRY.size == map_entry_offset(1) - map_entry_offset(0)


def test_slots_fill_a_bucket_and_buckets_a_segment() -> None:
    assert slot_offset(BUCKET_SIZE, SLOT_COUNT) == 2 * BUCKET_SIZE
    assert slot_offset(0, 0) == BUCKET_HEADER_SIZE
    assert BUCKET_COUNT * BUCKET_SIZE == EXTENT_SIZE
    assert BUCKET_HEADER.size <= BUCKET_HEADER_SIZE
    assert 1 << BUCKET_SHIFT == BUCKET_SIZE
    assert SLOT.size == SLOT_SIZE


def test_marker_of_a_bucket_tells_its_page() -> None:
    last = MAX_EXTENTS * EXTENT_SIZE - BUCKET_SIZE
    assert bucket_marker(0) == BUCKET_MARKER
    assert bucket_marker(last) == 0x4B425630 << 32 | last // 4096


def test_fingerprints_are_never_empty_or_tombstone() -> None:
    assert list(FINGERPRINT_CODES) == [2, 3, *range(2, 256)]


def test_size_classes_are_what_the_docstring_says() -> None:
    sizes = list(range(64, 513, 32))
    while sizes[-1] < 16_384:
        last = sizes[-1]
        sizes += [last + last // 8 * step for step in range(1, 9)]
    assert [*sizes, 16_544] == list(BLOCK_SIZES)
    assert all(size % BLOCK_ALIGNMENT == 0 for size in BLOCK_SIZES)
    assert BLOCK_SIZES[-1] == MAX_RECORD_SIZE == 32 + 128 + 16_384
    assert [EXTENT_SIZE // size for size in BLOCK_SIZES] == list(BLOCKS_PER_EXTENT)


def test_every_record_has_the_smallest_class_that_holds_it() -> None:
    for size in range(1, MAX_RECORD_SIZE + 1):
        size_class = SIZE_CLASSES[(size + 31) // 32]
        assert size <= BLOCK_SIZES[size_class]
        assert size_class == 0 or size > BLOCK_SIZES[size_class - 1]


def test_allocator_has_a_head_for_every_class() -> None:
    assert class_head_offset(len(BLOCK_SIZES)) <= ALLOCATOR_OFFSET + ALLOCATOR_SIZE


@pytest.mark.parametrize("magic", [RECORD_MAGIC, FREE_MAGIC])
def test_magics_hold_bytes_that_no_text_can(magic: int) -> None:
    stored = magic.to_bytes(4, "little")
    assert stored[:2] == b"\xff\xfe"
    for code in (*range(0xD800), *range(0xE000, 0x110000, 0x40)):
        assert not {0xFE, 0xFF} & set(chr(code).encode())
    assert RECORD_MAGIC.to_bytes(4, "little") == RECORD_MAGIC_BYTES


def test_runs_of_segments_halve_from_depth_to_depth() -> None:
    assert [segment_run(depth) for depth in range(4, 16)] == [2**n for n in range(11, -1, -1)]


# --- checksums ---------------------------------------------------------------------------------


def test_packed_identity_and_state_end_in_the_checksum_of_what_is_before_it() -> None:
    identity = pack_identity(b"i" * 16, 7, EXAMPLE_TIME_MS)
    assert identity[-8:] == xxh3_64_intdigest(identity[:-8]).to_bytes(8, "little")
    state = pack_state(True, 32, 31, 6, 5, 7)
    assert state[-8:] == xxh3_64_intdigest(state[:-8], 7).to_bytes(8, "little")
    assert STATE.unpack(state)[:5] == (1, 32, 31, 6, 5)


def test_checksum_of_a_record_depends_on_key_value_times_and_place() -> None:
    seed = 2**64 - 1
    hashes = [key_hash(key, seed) for key in (b"a", b"b")]
    seen = {
        record_checksum(value, hash_of_key, created_at, expires_at, offset)
        for value in (b"{}", b'{"a":1}')
        for hash_of_key in hashes
        for created_at in (0, EXAMPLE_TIME_MS)
        for expires_at in (0, EXAMPLE_TIME_MS, 2**47)
        for offset in (6 << 16, 6 << 16 | 64)
    }
    assert len(seen) == 2 * 2 * 2 * 3 * 2
    expected = xxh3_64_intdigest(b"{}", (hashes[0] ^ 5 ^ (2**60 << 16) ^ 64) % 2**64)
    assert record_checksum(b"{}", hashes[0], 5, 2**60, 64) == expected
