"""A segment as bytes: built and partitioned again, with each slot where a search finds it."""

import random
from itertools import combinations
from typing import TYPE_CHECKING

import pytest
from support import scaled, seeded_random
from support.implementations import IMPLEMENTATIONS
from support.members import HASH_MASK, MEMBER, pack_members, unpack_members
from xxhash import xxh3_64_intdigest

from kvstore.compiled import Implementation
from kvstore.format.bucket import live_slots
from kvstore.format.layout import (
    BUCKET_HEADER,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    DIRECTORY_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_SHIFT,
    NO_EXPIRY,
    RECORD,
    RECORD_MAGIC,
    SEGMENT_SLOTS,
    SLOT,
    SLOT_COUNT,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_OFFSET,
    SLOT_SIZE,
    bucket_marker,
    bucket_shape,
    segment_run,
    slot_offset,
)

if TYPE_CHECKING:
    from kvstore.compiled.interface import Members

EXTENT = 9

# A slot, to be, with the hash that places it, and when it expires.
Member = tuple[int, int, bytes]


def make_members(
    rng: random.Random, count: int, *, homes: int = 16, expiring: bool = True
) -> list[Member]:
    """Return members whose home buckets are the first `homes`."""
    members = []
    for number in range(count):
        hash_of_key = rng.getrandbits(64) & ~15 | rng.randrange(homes)
        expires_at = rng.randrange(1, 2**44) if expiring and rng.random() < 0.3 else 0
        key = f"key {number}".encode()
        members.append(
            (hash_of_key, expires_at, SLOT.pack(key, expires_at, 64 * number, number, len(key)))
        )
    return members


def packed(implementation: Implementation, members: list[Member]) -> "Members":
    return pack_members(implementation, [(hash_of_key, slot) for hash_of_key, _, slot in members])


def pages(image: bytes) -> list[bytes]:
    return [image[start : start + BUCKET_SIZE] for start in range(0, EXTENT_SIZE, BUCKET_SIZE)]


def slots_of(image: bytes) -> list[tuple[int, int, bytes, int]]:
    """Return bucket, index, slot and expiry of every live slot."""
    return [
        (number, index, slot, expires_at)
        for number, page in enumerate(pages(image))
        for index, expires_at, slot in live_slots(page)
    ]


@pytest.mark.parametrize("homes", [1, 2, 15, 16])
@pytest.mark.parametrize("count", [0, 1, 79, 80, 81, 640, 1_279, 1_280])
def test_what_is_built_has_the_same_slots(
    implementation: Implementation, count: int, homes: int
) -> None:
    """Also where members overflow into the next buckets, as far as all of them are full."""
    members = make_members(seeded_random(), count, homes=homes)
    image, earliest = implementation.build_segment(
        EXTENT, bucket_shape(6, 512, 1, 0), packed(implementation, members)
    )
    assert len(image) == EXTENT_SIZE
    found = slots_of(image)
    assert sorted((slot, expires_at) for _, _, slot, expires_at in found) == sorted(
        (slot, expires_at) for _, expires_at, slot in members
    )
    assert earliest == min(
        (expires_at for _, expires_at, _ in members if expires_at), default=NO_EXPIRY
    )


@pytest.mark.parametrize("homes", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 100, 900, 1_280])
def test_every_member_can_be_found_from_its_home_bucket(
    implementation: Implementation, count: int, homes: int
) -> None:
    members = make_members(seeded_random(), count, homes=homes)
    image, _ = implementation.build_segment(
        EXTENT, bucket_shape(4, 0, 1, 0), packed(implementation, members)
    )
    hashes = {slot: hash_of_key for hash_of_key, _, slot in members}
    has_empty = [0 in page[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT] for page in pages(image)]
    for number, index, slot, _ in slots_of(image):
        hash_of_key = hashes[slot]
        bucket = hash_of_key & 15
        while bucket != number:
            assert not has_empty[bucket], "a search would have ended before it came here"
            bucket = (bucket + 1) % 16
        control = pages(image)[number][CONTROL_OFFSET + index]
        fingerprint = hash_of_key >> 4 & 0xFF
        assert control == (fingerprint if fingerprint > 1 else fingerprint + 2)


def test_overflow_of_the_last_bucket_wraps_to_the_first(implementation: Implementation) -> None:
    members = [(15, 0, SLOT.pack(bytes([n]), 0, 0, 2, 1)) for n in range(81)]
    image, _ = implementation.build_segment(
        EXTENT, bucket_shape(4, 0, 1, 0), packed(implementation, members)
    )
    found = [number for number, _, _, _ in slots_of(image)]
    assert (found.count(15), found.count(0)) == (80, 1)


def test_full_segment_has_no_empty_slot(implementation: Implementation) -> None:
    image, _ = implementation.build_segment(
        EXTENT,
        bucket_shape(4, 0, 1, 0),
        packed(implementation, make_members(seeded_random(), SEGMENT_SLOTS, homes=2)),
    )
    for page in pages(image):
        assert min(page[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT]) >= 2


def test_headers_tell_page_depth_prefix_and_earliest_expiry(implementation: Implementation) -> None:
    members = make_members(seeded_random(), 500)
    image, _ = implementation.build_segment(
        EXTENT, bucket_shape(7, 1_024, 3, 5), packed(implementation, members)
    )
    for number, page in enumerate(pages(image)):
        marker, earliest, *shape, _ = BUCKET_HEADER.unpack_from(page)
        assert marker == bucket_marker(EXTENT * EXTENT_SIZE + number * BUCKET_SIZE)
        assert shape == [7, 1_024, 3, 5]
        expiries = [expires_at for _, expires_at, _ in live_slots(page) if expires_at]
        assert earliest == min(expiries, default=NO_EXPIRY)


def test_segment_without_members_is_zeros_but_for_its_headers(
    implementation: Implementation,
) -> None:
    image, earliest = implementation.build_segment(
        EXTENT, bucket_shape(4, 2_048, 1, 0), packed(implementation, [])
    )
    assert earliest == NO_EXPIRY
    for page in pages(image):
        assert not any(page[CONTROL_OFFSET:])


def test_tombstones_and_empty_slots_are_not_live_whatever_they_hold(
    implementation: Implementation,
) -> None:
    members = make_members(seeded_random(), 16 * 40)
    page = bytearray(
        pages(
            implementation.build_segment(
                EXTENT, bucket_shape(4, 0, 1, 0), packed(implementation, members)
            )[0]
        )[0]
    )
    live = list(live_slots(bytes(page)))
    page[CONTROL_OFFSET] = 0
    page[CONTROL_OFFSET + 1] = 1
    assert list(live_slots(bytes(page))) == live[2:]


def test_expiry_is_not_looked_up_in_a_bucket_where_nothing_expires(
    implementation: Implementation,
) -> None:
    """It is the speed of a rewrite where nothing expires; the slots come out the same."""
    members = make_members(seeded_random(), 800, expiring=False)
    image, earliest = implementation.build_segment(
        EXTENT, bucket_shape(4, 0, 1, 0), packed(implementation, members)
    )
    assert earliest == NO_EXPIRY
    assert {expires_at for _, _, _, expires_at in slots_of(image)} == {0}


def test_more_members_than_a_segment_has_slots_are_refused(implementation: Implementation) -> None:
    members = make_members(seeded_random(), SEGMENT_SLOTS + 1)
    with pytest.raises(ValueError, match="members, a segment has 1,280 slots"):
        implementation.build_segment(
            EXTENT, bucket_shape(4, 0, 1, 0), packed(implementation, members)
        )


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="members are bytes in the compiled code")
@pytest.mark.parametrize("size", [1, MEMBER.size - 1])
def test_bytes_that_are_no_members_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size:,} bytes of members"):
        IMPLEMENTATIONS[1].build_segment(EXTENT, bucket_shape(4, 0, 1, 0), bytes(size))


# --- partitioned ---------------------------------------------------------------------------------

SEED = 0x0123456789ABCDEF
NOW_MS = 1_700_000_000_000
RECORDS = EXTENT_SIZE  # where they begin in the bytes below: after the segment, in extent 1


class Segment:
    """A file of a segment in extent 0 and an extent of records behind it."""

    def __init__(self, depth: int, prefix: int) -> None:
        self.depth, self.prefix = depth, prefix
        self.members: list[Member] = []
        self.records = bytearray(EXTENT_SIZE)
        self.used = 0

    def add(self, key: bytes, expires_at: int = 0, *, lead: bool = True) -> bytes:
        """Add a key, with its record; unless its hash leads elsewhere and is to `lead` here."""
        run = segment_run(self.depth)
        hash_of_key = xxh3_64_intdigest(key, SEED)
        if lead and hash_of_key >> DIRECTORY_SHIFT & -run != self.prefix:
            return b""
        record = RECORD.pack(RECORD_MAGIC, 2, len(key), 0, NOW_MS, expires_at, 0) + key + b"{}"
        self.records[self.used : self.used + len(record)] = record
        slot = SLOT.pack(key, expires_at, RECORDS + self.used, 2, len(key))
        self.members.append((hash_of_key, expires_at, slot))
        self.used += 192
        return slot

    def file(self, implementation: Implementation) -> bytes:
        shape = bucket_shape(self.depth, self.prefix, 1, 0)
        image, _ = implementation.build_segment(0, shape, packed(implementation, self.members))
        return image + bytes(self.records)

    def partition(
        self, implementation: Implementation, file: bytes = b""
    ) -> "tuple[Members, Members, list[bytes], int]":
        file = file or self.file(implementation)
        return implementation.partition_slots(
            file, len(file), 0, self.depth, self.prefix, NOW_MS, SEED
        )


def slots_in(*parts: "Members") -> list[tuple[int, bytes]]:
    return sorted(member for members in parts for member in unpack_members(members))


KEYS = [f"{'é' * (number % 40)}{number}".encode() for number in range(8_000)]


@pytest.mark.parametrize(
    ("depth", "prefix"), [(4, 0), (4, 30_720), (7, 1_024), (8, 32_640), (9, 64), (15, 12_345)]
)
def test_members_are_parted_by_the_half_of_the_hashes_they_are_in(
    implementation: Implementation, depth: int, prefix: int
) -> None:
    """Those with long keys too, whose end is in the record."""
    segment = Segment(depth, prefix)
    for key in KEYS:
        if len(segment.members) < 340:
            segment.add(key)
    lower, upper, expired, lost = segment.partition(implementation)
    half = 1 << 63 - depth
    members = [(hash_of_key, slot) for hash_of_key, _, slot in segment.members]
    for part, is_upper in ((lower, False), (upper, True)):
        assert slots_in(part) == sorted(
            (hash_of_key & HASH_MASK, slot)
            for hash_of_key, slot in members
            if bool(hash_of_key & half) == is_upper
        )
    assert (expired, lost) == ([], 0)


def test_what_expired_is_told_apart_if_its_record_agrees(implementation: Implementation) -> None:
    segment = Segment(4, 0)
    past = [key for key in KEYS if segment.add(key, NOW_MS)][:50]
    segment = Segment(4, 0)
    gone = [segment.add(key, NOW_MS) for key in past[:20]]
    for key in past[20:30]:
        segment.add(key, NOW_MS + 1)
    for key in past[30:40]:
        segment.add(key, NOW_MS)
        segment.records[segment.used - 192 + 16] ^= 1  # the record's expiry
    lower, upper, expired, lost = segment.partition(implementation)
    assert sorted(expired) == sorted(gone)
    assert (len(slots_in(lower, upper)), lost) == (20, 0)


def test_slots_whose_keys_lead_elsewhere_are_left_out_and_counted(
    implementation: Implementation,
) -> None:
    segment = Segment(4, 0)
    for key in KEYS[:200]:
        segment.add(key, lead=False)
    lower, upper, expired, lost = segment.partition(implementation)
    assert lost > 150
    assert implementation.count_members(lower + upper) == 200 - lost
    assert expired == []


def of_one_segment(implementation: Implementation) -> tuple[Segment, bytearray]:
    """Return a segment of 300 keys, short and long, and the bytes of its file."""
    segment = Segment(4, 0)
    for key in KEYS:
        if len(segment.members) < 300:
            segment.add(key)
    return segment, bytearray(segment.file(implementation))


def test_slot_whose_key_was_damaged_into_another_is_left_out(
    implementation: Implementation,
) -> None:
    """It would come to the other one's home bucket, and be taken for it."""
    segment, file = of_one_segment(implementation)
    for (hash_of_key, _, slot), (hash_of_other, _, other) in combinations(segment.members, 2):
        size = slot[SLOT_KEY_SIZE_OFFSET]
        fingerprints = (each >> FINGERPRINT_SHIFT & 0xFF for each in (hash_of_key, hash_of_other))
        if size == other[SLOT_KEY_SIZE_OFFSET] <= SLOT_KEY_SIZE and len(set(fingerprints)) == 2:
            break
    place = file.index(slot)
    file[place : place + SLOT_KEY_SIZE] = other[:SLOT_KEY_SIZE]
    lower, upper, expired, lost = segment.partition(implementation, bytes(file))
    assert (expired, lost) == ([], 1)
    assert sorted(each for _, each in slots_in(lower, upper)) == sorted(
        each for _, _, each in segment.members if each != slot
    )


def test_slot_whose_control_byte_was_damaged_is_found_again(
    implementation: Implementation,
) -> None:
    """Its record has its key: so it is that byte that was not what the hash makes it."""
    segment, file = of_one_segment(implementation)
    for _, _, slot in segment.members[:20]:
        place = file.index(slot)
        bucket = place & -BUCKET_SIZE
        index = (place - bucket - BUCKET_HEADER_SIZE) // SLOT_SIZE
        file[bucket + CONTROL_OFFSET + index] ^= 0x40
    lower, upper, expired, lost = segment.partition(implementation, bytes(file))
    assert (expired, lost) == ([], 0)
    assert sorted(slot for _, slot in slots_in(lower, upper)) == sorted(
        each for _, _, each in segment.members
    )


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="there is one implementation")
@pytest.mark.parametrize("number", range(scaled(10)))
def test_damaged_slots_are_partitioned_the_same(number: int) -> None:
    """Whatever sizes, expiries and offsets they have: none of them leads out of the file."""
    rng = random.Random(f"{seeded_random().random()} {number}")
    segment = Segment(4, 0)
    for key in KEYS:
        if len(segment.members) < 340:
            segment.add(key, rng.choice((0, NOW_MS, NOW_MS + 1)))
    plain, compiled = IMPLEMENTATIONS
    file = bytearray(segment.file(plain))
    assert file == segment.file(compiled)
    for _ in range(2_000):
        slot = slot_offset(rng.randrange(16) * BUCKET_SIZE, rng.randrange(SLOT_COUNT))
        place = slot + rng.choice((0, SLOT_KEY_SIZE, 39, 40, 41, 42, 43, 46, 46, 47))
        file[place] = rng.choice((0, 1, 32, 33, 240, 241, 255, rng.randrange(256)))
    for index in range(SLOT_COUNT):
        file[CONTROL_OFFSET + index] = rng.randrange(4)
    *parted, expired, lost = segment.partition(plain, bytes(file))
    *compiled_parted, compiled_expired, compiled_lost = segment.partition(compiled, bytes(file))
    assert list(map(unpack_members, parted)) == list(map(unpack_members, compiled_parted))
    assert (expired, lost) == (compiled_expired, compiled_lost)


@pytest.mark.skipif(len(IMPLEMENTATIONS) < 2, reason="the plain one has no pointers")
@pytest.mark.parametrize(("extent", "depth"), [(2, 4), (2**60, 4), (0, 3), (0, 16), (0, 2**40)])
def test_segment_that_is_not_in_the_file_is_refused(extent: int, depth: int) -> None:
    file = bytes(2 * EXTENT_SIZE)
    with pytest.raises(IndexError, match="no segment"):
        IMPLEMENTATIONS[1].partition_slots(file, len(file), extent, depth, 0, 0, 0)
