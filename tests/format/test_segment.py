"""A segment as bytes: built and taken apart again, with each slot where a search finds it."""

import random

import pytest
from support import seeded_random

from kvstore.format.layout import (
    BUCKET_HEADER,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    EXTENT_SIZE,
    NO_EXPIRY,
    SEGMENT_SLOTS,
    SLOT,
    SLOT_COUNT,
    bucket_marker,
    bucket_shape,
)
from kvstore.format.segment import Member, build, live_slots

EXTENT = 9


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


def pages(image: bytes) -> list[bytes]:
    return [image[start : start + BUCKET_SIZE] for start in range(0, EXTENT_SIZE, BUCKET_SIZE)]


def take_apart(image: bytes) -> list[tuple[int, int, bytes, int]]:
    """Return bucket, index, slot and expiry of every live slot."""
    return [
        (number, index, slot, expires_at)
        for number, page in enumerate(pages(image))
        for index, expires_at, slot in live_slots(page)
    ]


@pytest.mark.parametrize("homes", [1, 2, 15, 16])
@pytest.mark.parametrize("count", [0, 1, 79, 80, 81, 640, 1_279, 1_280])
def test_what_is_built_comes_apart_the_same(count: int, homes: int) -> None:
    """Also where members overflow into the next buckets, as far as all of them are full."""
    members = make_members(seeded_random(), count, homes=homes)
    image, earliest = build(EXTENT, bucket_shape(6, 512, 1, 0), members)
    assert len(image) == EXTENT_SIZE
    found = take_apart(image)
    assert sorted((slot, expires_at) for _, _, slot, expires_at in found) == sorted(
        (slot, expires_at) for _, expires_at, slot in members
    )
    assert earliest == min(
        (expires_at for _, expires_at, _ in members if expires_at), default=NO_EXPIRY
    )


@pytest.mark.parametrize("homes", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 100, 900, 1_280])
def test_every_member_can_be_found_from_its_home_bucket(count: int, homes: int) -> None:
    members = make_members(seeded_random(), count, homes=homes)
    image, _ = build(EXTENT, bucket_shape(4, 0, 1, 0), members)
    hashes = {slot: hash_of_key for hash_of_key, _, slot in members}
    has_empty = [0 in page[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT] for page in pages(image)]
    for number, index, slot, _ in take_apart(image):
        hash_of_key = hashes[slot]
        bucket = hash_of_key & 15
        while bucket != number:
            assert not has_empty[bucket], "a search would have ended before it came here"
            bucket = (bucket + 1) % 16
        control = pages(image)[number][CONTROL_OFFSET + index]
        fingerprint = hash_of_key >> 4 & 0xFF
        assert control == (fingerprint if fingerprint > 1 else fingerprint + 2)


def test_overflow_of_the_last_bucket_wraps_to_the_first() -> None:
    members = [(15, 0, SLOT.pack(bytes([n]), 0, 0, 2, 1)) for n in range(81)]
    image, _ = build(EXTENT, bucket_shape(4, 0, 1, 0), members)
    found = [number for number, _, _, _ in take_apart(image)]
    assert (found.count(15), found.count(0)) == (80, 1)


def test_full_segment_has_no_empty_slot() -> None:
    image, _ = build(
        EXTENT, bucket_shape(4, 0, 1, 0), make_members(seeded_random(), SEGMENT_SLOTS, homes=2)
    )
    for page in pages(image):
        assert min(page[CONTROL_OFFSET : CONTROL_OFFSET + SLOT_COUNT]) >= 2


def test_headers_tell_page_depth_prefix_and_earliest_expiry() -> None:
    members = make_members(seeded_random(), 500)
    image, _ = build(EXTENT, bucket_shape(7, 1_024, 3, 5), members)
    for number, page in enumerate(pages(image)):
        marker, earliest, *shape, _ = BUCKET_HEADER.unpack_from(page)
        assert marker == bucket_marker(EXTENT * EXTENT_SIZE + number * BUCKET_SIZE)
        assert shape == [7, 1_024, 3, 5]
        expiries = [expires_at for _, expires_at, _ in live_slots(page) if expires_at]
        assert earliest == min(expiries, default=NO_EXPIRY)


def test_segment_without_members_is_zeros_but_for_its_headers() -> None:
    image, earliest = build(EXTENT, bucket_shape(4, 2_048, 1, 0), [])
    assert earliest == NO_EXPIRY
    for page in pages(image):
        assert not any(page[CONTROL_OFFSET:])


def test_tombstones_and_empty_slots_are_not_live_whatever_they_hold() -> None:
    members = make_members(seeded_random(), 16 * 40)
    page = bytearray(pages(build(EXTENT, bucket_shape(4, 0, 1, 0), members)[0])[0])
    live = list(live_slots(bytes(page)))
    page[CONTROL_OFFSET] = 0
    page[CONTROL_OFFSET + 1] = 1
    assert list(live_slots(bytes(page))) == live[2:]


def test_expiry_is_not_looked_up_in_a_bucket_where_nothing_expires() -> None:
    """It is the speed of a rewrite where nothing expires; the slots come out the same."""
    members = make_members(seeded_random(), 800, expiring=False)
    image, earliest = build(EXTENT, bucket_shape(4, 0, 1, 0), members)
    assert earliest == NO_EXPIRY
    assert {expires_at for _, _, _, expires_at in take_apart(image)} == {0}
