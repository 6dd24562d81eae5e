"""Files whose every checksum is right, and in which something was forged: it is really followed.

What the index checksum covers, superblock, directory, extent map and allocator, is forged and then
signed. The table's pages, the links of free blocks and the records' headers carry none, or one that
is meant to fail.
"""

import random
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from kvstore import KVStore
from kvstore.format.layout import (
    BLOCK_SIZES,
    BUCKET_COUNT,
    BUCKET_SIZE,
    CLASS_HEADS_OFFSET,
    CONTROL_OFFSET,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    KIND_SEGMENT,
    KIND_SLAB,
    MIN_DEPTH,
    NO_BLOCK,
    SLOT,
    SLOT_COUNT,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SLOT_SIZE,
    STATE,
    STATE_OFFSET,
    STRIPE_SHIFT,
    U16,
    key_hash,
    map_entry_offset,
    slot_offset,
)

from . import MIB
from .corruptions import Corruption
from .damage import State, build
from .workload import make_value

MAX_BYTES: Final = 16 * MIB


U32: Final = Struct("<I")
DEPTH_OFFSET: Final = 16  # in a segment


class Field(NamedTuple):
    """A number in the file that may be forged: whose it is, its name, offset and size in bytes."""

    owner: str
    name: str
    offset: int
    size: int


# --- the original ------------------------------------------------------------------------------


def build_deep(path: Path, rng: random.Random) -> State:
    """Make a closed store as `build` does, with a segment split in two, twice, and free extents."""
    live = build(path, rng, keys=250)
    with KVStore(path) as store:
        for number in range(30):
            store.create(f"large {number}", make_value("large", number, 16_000))
        for number in range(28):
            store.delete(f"large {number}")
        seed = store._file.hash_seed
        in_one_stripe = (
            key for key in map("deep {}".format, count()) if _hash(key, seed) >> STRIPE_SHIFT == 5
        )
        deep = {key: {"deep": key} for key in islice(in_one_stripe, 660)}
        for key, value in deep.items():
            store.create(key, value)
        hash_of_one = _hash(next(iter(deep)), seed)
        # As when it is 7/8 full, which would take longer to make and to read.
        assert store._parts.segments.split_or_compact(hash_of_one, 0)
        # So that the two are few enough to be merged.
        for key in list(deep)[:40]:
            store.delete(key)
            del deep[key]
        return {**live, **deep, **{key: store[key] for key in ("large 28", "large 29")}}


def _hash(key: str, seed: int) -> int:
    return key_hash(key.encode(), seed)


class Forge:
    """A whole file, where its fields are, and numbers of it that one might be led to."""

    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        plant = Corruption(contents)
        kinds = [plant.slab_entry(extent)["kind"] for extent in range(plant.extent_count)]
        self.extent_count = plant.extent_count
        self.segments = [extent for extent, kind in enumerate(kinds) if kind == KIND_SEGMENT]
        self.halved = [
            extent
            for extent in self.segments
            if contents[(extent << EXTENT_SHIFT) + DEPTH_OFFSET] > MIN_DEPTH
        ]
        self.slabs = [extent for extent, kind in enumerate(kinds) if kind == KIND_SLAB]
        self.free = plant.free_extents()
        self.slots = list(self._live_slots())
        self.records = [
            SLOT.unpack_from(contents, slot)[2] & SLOT_RECORD_MASK for slot in self.slots
        ]
        self.free_blocks = list(self._free_blocks(plant))

    def _live_slots(self) -> Iterator[int]:
        for bucket in self.buckets():
            for index in range(SLOT_COUNT):
                if self.contents[bucket + CONTROL_OFFSET + index] > 1:
                    yield slot_offset(bucket, index)

    def buckets(self) -> Iterator[int]:
        for extent in self.segments:
            for number in range(BUCKET_COUNT):
                yield (extent << EXTENT_SHIFT) + number * BUCKET_SIZE

    def _free_blocks(self, plant: Corruption) -> Iterator[int]:
        for extent in self.slabs:
            entry = plant.slab_entry(extent)
            block = entry["first_free"]
            while block != NO_BLOCK:
                offset = (extent << EXTENT_SHIFT) + block * BLOCK_SIZES[entry["class"]]
                yield offset
                block = plant.u16(offset + 4)

    # --- fields, by what they are part of

    @cached_property
    def state(self) -> list[Field]:
        names = (("clean", 4), ("extent count", 4), ("durable count", 4), ("zero", 4))
        return [
            *_fields("state", STATE_OFFSET, names),
            Field("superblock", "holder", HOLDER_OFFSET, 4),
            Field("allocator", "fresh extent", FRESH_EXTENT_OFFSET, 2),
        ]

    @cached_property
    def directory(self) -> list[Field]:
        return [
            Field(f"directory {entry}", "entry", DIRECTORY_OFFSET + 2 * entry, 2)
            for entry in range(0, DIRECTORY_ENTRIES, 64)
        ]

    @cached_property
    def allocator(self) -> list[Field]:
        return [
            Field("allocator", "free extents", FREE_EXTENTS_OFFSET, 2),
            Field("allocator", "fresh extent", FRESH_EXTENT_OFFSET, 2),
            *(
                Field(f"class {number}", "head", CLASS_HEADS_OFFSET + 2 * number, 2)
                for number in range(64)
            ),
        ]

    @cached_property
    def extent_map(self) -> list[Field]:
        slab = (
            ("kind", 1), ("size class", 1), ("live", 2), ("first free", 2), ("fresh", 2),
            ("previous", 2), ("next", 2), ("zero", 4),
        )  # fmt: skip
        segment = (("kind", 1), ("zero", 1), ("live", 2), ("used", 2), ("zero", 2), ("earliest", 8))
        return [
            field
            for extent in range(self.extent_count)
            for field in _fields(
                f"extent {extent}",
                map_entry_offset(extent),
                segment if extent in self.segments else slab,
            )
        ]

    @cached_property
    def bucket_headers(self) -> list[Field]:
        names = (("marker", 8), ("earliest", 8), ("depth", 1), ("unused", 1), ("prefix", 2))
        return [
            field
            for bucket in self.buckets()
            for field in _fields(f"bucket {bucket:,}", bucket, names)
        ]

    @cached_property
    def controls(self) -> list[Field]:
        return [
            Field(f"bucket {bucket:,}", f"control byte {index}", bucket + CONTROL_OFFSET + index, 1)
            for bucket in self.buckets()
            for index in range(SLOT_COUNT)
        ]

    @cached_property
    def slot_fields(self) -> list[Field]:
        names = (
            ("key", 8), ("key", 8), ("key", 8), ("key", 8), ("expires_at", 8), ("record", 4),
            ("value size", 2), ("key size", 1), ("zero", 1),
        )  # fmt: skip
        return [field for slot in self.slots for field in _fields(f"slot {slot:,}", slot, names)]

    @cached_property
    def links(self) -> list[Field]:
        names = (("magic", 4), ("next", 2), ("zero", 2))
        return [
            field
            for block in self.free_blocks
            for field in _fields(f"free block {block:,}", block, names)
        ]

    @cached_property
    def record_headers(self) -> list[Field]:
        names = (
            ("magic", 4), ("value size", 2), ("key size", 1), ("generation", 1), ("stamp", 8),
            ("expires_at", 8), ("checksum", 8),
        )  # fmt: skip
        return [
            field
            for record in self.records
            for field in _fields(f"record {record:,}", record, names)
        ]

    # --- what may stand there instead

    def number(self, field: Field, fields: list[Field], rng: random.Random) -> int:
        """Return a number of interest in this place: as a rule, one that leads somewhere."""
        own = self._own(field)
        places = {
            1: [2, 3, 4, 5, 15, 16, 54, 55, 63, 128],
            2: [
                *(FIXED_EXTENTS, self.extent_count - 1, self.extent_count, 0x7FFF, NO_BLOCK),
                *(rng.choice(self.segments), rng.choice(self.slabs), rng.choice(self.free)),
                *(1, 2, 1_023, 1_279, 1_280, 1_281),
            ],
            4: [
                *(self.extent_count + 1, self.extent_count - 1, 31, 32, 15_258, 15_259),
                *(rng.choice(self.records), rng.choice(self.free_blocks), len(self.contents)),
                *(len(self.contents) - 32, len(self.contents) - 8, STATE_OFFSET, own ^ 8, own ^ 16),
                *(rng.choice(self.slots), rng.choice(self.segments) << EXTENT_SHIFT, own + 32),
                (rng.choice(self.slabs) << EXTENT_SHIFT) + EXTENT_SIZE - 32,
                (rng.choice(self.free) << EXTENT_SHIFT) + 64,
            ],
            8: [2**63, 2**48, 2**48 - 1, 1_600_000_000_000, 1_700_000_000_001],
        }[field.size]
        numbers = (
            0,
            1,
            (1 << 8 * field.size) - 1,
            own + rng.choice((-2, -1, 1, 2)),
            own ^ 1 << rng.randrange(8 * field.size),
            self._own(rng.choice(fields)),
            rng.choice(places),
            rng.choice(places),
        )
        return rng.choice(numbers) & (1 << 8 * field.size) - 1

    def _own(self, field: Field) -> int:
        return int.from_bytes(self.contents[field.offset : field.offset + field.size], "little")


def _fields(owner: str, offset: int, names: tuple[tuple[str, int], ...]) -> Iterator[Field]:
    for name, size in names:
        yield Field(owner, name, offset, size)
        offset += size


# --- kinds of forgery --------------------------------------------------------------------------


def forge_superblock(forge: Forge, rng: random.Random) -> tuple[bytes, list[str]]:
    """Forge an identity, or both, or the state, or where the fresh extents begin."""
    plant = Corruption(forge.contents)
    if rng.random() < 0.5:
        fields = list(IDENTITY.unpack_from(forge.contents))
        place = rng.choice((1, 2, 3, 4, 5))
        fields[place] = {
            1: rng.choice((0, 2, 2**32 - 1)),
            2: rng.choice((0, 1, 4_096, 2**32 - 1)),
            3: rng.randbytes(16),
            4: rng.choice((0, 1, fields[4] ^ 1, 2**64 - 1)),
            5: rng.choice((0, 2**64 - 1)),
        }[place]
        identity = plant.sign_identity(tuple(fields))
        copies = rng.choice((IDENTITY_OFFSETS[:1], IDENTITY_OFFSETS[1:], IDENTITY_OFFSETS))
        for offset in copies:
            plant.put(offset, identity)
        # One of two is no reason to lose a key: either the file is refused, or all are there.
        what = "both copies" if copies == IDENTITY_OFFSETS else f"one copy, at {copies[0]:,},"
        return bytes(plant.image), [f"{what} of the identity, field {place}"]
    said = _forge_fields(forge, plant, forge.state, rng)
    clean, extents, durable, records, *_ = STATE.unpack_from(plant.image, STATE_OFFSET)
    if rng.random() < 0.3:
        clean = 0
        said.append("not clean")
    return plant.sign_state(clean, extents, durable, records), said


def forge_index(forge: Forge, rng: random.Random) -> tuple[bytes, list[str]]:
    """Forge the directory, the extent map or the allocator, one place or up to four."""
    plant = Corruption(forge.contents)
    chance = rng.random()
    if chance < 0.2:
        said = _forge_directory(forge, plant, rng)
    elif chance < 0.4:
        extent = rng.choice(forge.segments)
        live, used = rng.choice(((0, 0), (0, 1), (1, 1), (0, 1_280), (1_280, 1_280)))
        plant.put(map_entry_offset(extent) + 2, U16.pack(live) + U16.pack(used))
        said = [f"segment {extent} has {live} live and {used} used slots"]
    else:
        fields = rng.choice((forge.extent_map, forge.extent_map, forge.allocator, forge.directory))
        said = _forge_fields(forge, plant, fields, rng)
    if rng.random() < 0.2:
        said += _forge_fields(forge, plant, forge.extent_map, rng)
    return plant.sign(), said


def _forge_directory(forge: Forge, plant: Corruption, rng: random.Random) -> list[str]:
    """Have two segments' runs exchanged, or one lead to another: all that looking at it allows."""
    one, other = rng.sample(forge.segments, 2)
    numbers = [U16.pack(one), U16.pack(other)]
    entries = plant.image[DIRECTORY_OFFSET:EXTENT_MAP_OFFSET]
    runs = [[n for n in range(DIRECTORY_ENTRIES) if entries[2 * n : 2 * n + 2] == number]
            for number in numbers]  # fmt: skip
    exchanged = rng.random() < 0.7
    for n in runs[0]:
        plant.put(DIRECTORY_OFFSET + 2 * n, numbers[1])
    for n in runs[1] if exchanged else []:
        plant.put(DIRECTORY_OFFSET + 2 * n, numbers[0])
    return [f"directory: {one} and {other} exchanged" if exchanged else f"{other} for {one}"]


def forge_table(forge: Forge, rng: random.Random) -> tuple[bytes, list[str]]:
    """Forge headers, control bytes or slots of the table."""
    plant = Corruption(forge.contents)
    fields = rng.choice((forge.bucket_headers, forge.controls, forge.slot_fields))
    said = _forge_fields(forge, plant, fields, rng)
    if rng.random() < 0.3:
        said.append(_lead_elsewhere(forge, plant, rng))
    if rng.random() < 0.2:
        extent = rng.choice(rng.choice((forge.segments, forge.halved)))
        depth = plant.image[(extent << EXTENT_SHIFT) + DEPTH_OFFSET] + rng.choice((-1, 1))
        plant.put((extent << EXTENT_SHIFT) + DEPTH_OFFSET, bytes([depth]))
        said.append(f"segment {extent} is of depth {depth}")
    if rng.random() < 0.1:
        # All of a segment: no empty slot ends a search, or nothing but one key's fingerprint.
        extent, code = rng.choice(forge.segments), rng.choice((1, 255, rng.randrange(2, 256)))
        for bucket in range(extent << EXTENT_SHIFT, (extent + 1) << EXTENT_SHIFT, BUCKET_SIZE):
            plant.put(bucket + CONTROL_OFFSET, bytes([code]) * SLOT_COUNT)
        said.append(f"all control bytes of segment {extent} are {code}")
    return bytes(plant.image), said


def _lead_elsewhere(forge: Forge, plant: Corruption, rng: random.Random) -> str:
    """Have a slot lead to the record of another key, of the same sizes, or to where none can be."""
    slot = rng.choice(forge.slots)
    sizes = plant.image[slot + SLOT_RECORD_OFFSET + 4 : slot + SLOT_SIZE]
    alike = [
        other
        for other in forge.slots
        if plant.image[other + SLOT_RECORD_OFFSET + 4 : other + SLOT_SIZE] == sizes
    ]
    (record,) = U32.unpack_from(plant.image, rng.choice(alike) + SLOT_RECORD_OFFSET)
    end = len(forge.contents)
    past_the_end = rng.choice((end - 32, end, end + 64, MAX_BYTES - 64, MAX_BYTES, 2**32 - 32))
    target = rng.choice((record, record, past_the_end, STATE_OFFSET, slot & -BUCKET_SIZE))
    plant.put(slot + SLOT_RECORD_OFFSET, U32.pack(target))
    return f"slot {slot:,} leads to byte {target:,}"


def forge_blocks(forge: Forge, rng: random.Random) -> tuple[bytes, list[str]]:
    """Forge the links of free blocks, to circles and to live records, or records' headers."""
    plant = Corruption(forge.contents)
    fields = rng.choice((forge.links, forge.links, forge.record_headers))
    said = _forge_fields(forge, plant, fields, rng)
    if rng.random() < 0.5:
        for block in rng.sample(forge.free_blocks, 5):
            extent = block & -EXTENT_SIZE
            size = BLOCK_SIZES[plant.slab_entry(extent >> EXTENT_SHIFT)["class"]]
            there = [
                (offset - extent) // size
                for offset in forge.free_blocks + forge.records
                if offset & -EXTENT_SIZE == extent
            ]
            target = rng.choice([*there, (block - extent) // size])
            plant.put_u16(block + 4, target)
            said.append(f"free block {block:,} leads to block {target}")
    if rng.random() < 0.3:
        # Recovery goes by the records' headers alone, and writes the links anew.
        _, extents, durable, *_ = STATE.unpack_from(plant.image, STATE_OFFSET)
        plant.sign_state(0, extents, durable)
        said.append("not clean")
    return bytes(plant.image), said


def _forge_fields(
    forge: Forge, plant: Corruption, fields: list[Field], rng: random.Random
) -> list[str]:
    said = []
    names = sorted({field.name for field in fields})
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(names)
        alike = [field for field in fields if field.name == name]
        field = rng.choice(alike)
        number = forge.number(field, alike, rng)
        plant.put(field.offset, number.to_bytes(field.size, "little"))
        said.append(f"{field.owner}: {name} = {number:,}")
    return said


KINDS: dict[str, Callable[[Forge, random.Random], tuple[bytes, list[str]]]] = {
    "superblock": forge_superblock,
    "index": forge_index,
    "table": forge_table,
    "blocks": forge_blocks,
}
