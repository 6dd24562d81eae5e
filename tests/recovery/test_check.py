"""The checker finds every kind of breach, each planted alone in a file that is otherwise whole."""

from itertools import islice
from pathlib import Path
from struct import Struct
from typing import Final

import pytest
from support.clock import FakeClock
from support.components import NOW_MS, Components, open_components
from support.corruptions import Corruption

from kvstore import KVStore
from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    DIRECTORY_OFFSET,
    EARLIEST_OFFSET,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    IDENTITY_OFFSETS,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MARKED_MAGIC,
    RECORD,
    RECORD_FIELDS,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SLOT,
    STAMP_LIMIT,
    STATE,
    STATE_OFFSET,
    U16,
    U64,
    class_head_offset,
    key_hash,
    map_entry_offset,
    record_checksum,
)
from kvstore.format.superblock import pack_identity, pack_state, unpack_state
from kvstore.recovery.check import check_file, check_image
from kvstore.recovery.problems import Breach, Problem

U32: Final = Struct("<I")
SIZES: Final = b"\2\0\1\0"  # what follows a record's magic
SMALL: Final = b'{"b":1}'
LARGE: Final = b'{"b":"' + b"x" * 5_000 + b'"}'
LARGE_CLASS: Final = next(c for c, size in enumerate(BLOCK_SIZES) if size >= 5_100)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a whole file with a bit of everything in it."""
    path = tmp_path_factory.mktemp("good") / "good.kvs"
    with open_components(path) as parts:
        for number in range(40):
            parts.store(f"small {number}".encode(), SMALL)
            parts.store(f"large {number}".encode(), LARGE)
        parts.store(b"expiring", SMALL, NOW_MS + 1_000)
        parts.store("é".encode() * 20, SMALL)
        for number in (5, 6, 7):
            parts.remove(f"small {number}".encode())
        for number in (0, 13, 14):
            parts.remove(f"large {number}".encode())
        parts.file.grow()
        take_and_give_extents(parts)
    image = path.read_bytes()
    assert list(check_image(image)) == []
    return image


def take_and_give_extents(parts: Components) -> None:
    """Leave free extents on the list."""
    blocks = [parts.slab.allocate(16_544) for _ in range(12)]
    for block in blocks:
        parts.slab.free(block)


@pytest.fixture
def plant(good: bytes) -> Corruption:
    return Corruption(good)


def problems(image: bytes) -> list[Problem]:
    return list(check_image(image))


def assert_only(image: bytes, offset: int, structure: str, message: str = "") -> None:
    """Assert that the checker reports this, and nothing else."""
    found = problems(image)
    assert [(each.offset, each.structure) for each in found] == [(offset, structure)], found
    assert message in found[0].message


def assert_among(image: bytes, offset: int, structure: str, message: str = "") -> None:
    """Assert that the checker reports this, beside what follows from it."""
    assert any(
        each.offset == offset and each.structure == structure and message in each.message
        for each in problems(image)
    ), problems(image)


# --- the file as a whole -----------------------------------------------------------------------


def test_whole_file_has_no_problems(good: bytes, path: Path) -> None:
    assert problems(good) == []
    path.write_bytes(good)
    assert check_file(path) == []


def test_problem_reads_as_one_line() -> None:
    problem = Problem(65_536, "directory", "is odd", Breach.DIRECTORY_RUN)
    assert str(problem) == "byte 65,536: directory: is odd"


def test_check_changes_no_byte_and_takes_no_lock(path: Path) -> None:
    with KVStore(path) as store:
        store.create("a", {})
        before = path.read_bytes()
        assert [str(problem) for problem in check_file(path)] == [
            "byte 512: state: not clean: the next opening rebuilds the index"
        ]
        assert path.read_bytes() == before


def test_empty_file_and_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_file(path)
    path.touch()
    assert check_file(path) == [Problem(0, "file", "is empty", Breach.FILE_EMPTY)]


@pytest.mark.parametrize("size", [1, 511, 4_096, EXTENT_SIZE, 7 * EXTENT_SIZE - 1])
def test_file_too_short_for_a_store(good: bytes, size: int) -> None:
    assert_only(good[:size], 0, "file", f"is {size:,} bytes")


def test_file_shorter_or_longer_than_its_extents(good: bytes) -> None:
    """What was cut off is taken for zeros: here it held nothing else."""
    assert_only(good[:-1], STATE_OFFSET, "state", f"the file has {len(good) - 1:,}")
    assert_only(good + b"x", STATE_OFFSET, "state", f"the file has {len(good) + 1:,}")


def test_growth_that_power_loss_took_back_is_told_from_a_file_cut_off(plant: Corruption) -> None:
    plant.put(STATE_OFFSET, pack_state(False, plant.extent_count + 16, 32, 0, 0, plant.seed))
    breaches = [each.breach for each in problems(bytes(plant.image))]
    assert breaches[:2] == [Breach.NOT_CLOSED, Breach.GROWTH_LOST]
    breaches = [each.breach for each in problems(bytes(plant.image[: 31 * EXTENT_SIZE]))]
    assert breaches[:2] == [Breach.NOT_CLOSED, Breach.FILE_CUT_OFF]


def test_what_was_in_the_part_that_was_cut_off_is_named(plant: Corruption) -> None:
    record = max(plant.record(f"small {number}".encode()) for number in (1, 2, 3))
    found = problems(bytes(plant.image[:record]))
    assert found[0].breach is Breach.FILE_CUT_OFF
    assert [each for each in found if (each.offset, each.breach) == (record, Breach.RECORD_HEADER)]


def test_problem_with_a_record_names_the_slot_that_led_to_it(plant: Corruption) -> None:
    plant.image[plant.record(b"small 1") + 40] ^= 1
    (problem,) = problems(bytes(plant.image))
    assert problem.slot == plant.slot(b"small 1")


def test_progress_is_told_up_to_the_whole(good: bytes) -> None:
    seen = []
    list(check_image(good, lambda done, whole: seen.append((done, whole))))
    assert seen == sorted(seen)
    assert len({whole for _, whole in seen}) == 1
    assert 0 <= seen[0][0] < seen[-1][0] < seen[-1][1]


# --- superblock --------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", IDENTITY_OFFSETS)
@pytest.mark.parametrize("field", [0, 8, 12, 16, 32, 40, 48])
def test_damaged_identity(plant: Corruption, offset: int, field: int) -> None:
    plant.image[offset + field] ^= 1
    assert_only(bytes(plant.image), offset, "identity")


def test_two_damaged_identities(plant: Corruption) -> None:
    for offset in IDENTITY_OFFSETS:
        plant.image[offset] ^= 1
    assert [(each.offset, each.structure) for each in problems(bytes(plant.image))] == [
        (0, "identity"),
        (4_096, "identity"),
        (0, "identity"),
    ]


def test_identities_with_different_seeds(plant: Corruption) -> None:
    plant.put(4_096, pack_identity(bytes(16), 1, NOW_MS))
    assert_only(bytes(plant.image), 0, "identity", "do not agree")


def test_identities_that_are_of_different_files(plant: Corruption) -> None:
    plant.put(4_096, pack_identity(bytes(16), plant.seed, NOW_MS))
    assert_only(bytes(plant.image), 0, "identity", "do not agree")


def test_the_rest_is_checked_although_the_state_is_damaged(plant: Corruption) -> None:
    plant.image[STATE_OFFSET + 24] ^= 1
    record = plant.record(b"small 1")
    plant.image[record + 40] ^= 1
    assert [each.offset for each in problems(bytes(plant.image))] == [STATE_OFFSET, record]


@pytest.mark.parametrize("offset", range(STATE_OFFSET, STATE_OFFSET + STATE.size))
def test_damaged_state(plant: Corruption, offset: int) -> None:
    plant.image[offset] ^= 4
    assert_only(bytes(plant.image), STATE_OFFSET, "state", "checksum")


def test_state_that_is_not_clean(plant: Corruption) -> None:
    _, count, durable, records, checksum, *_ = STATE.unpack_from(plant.image, STATE_OFFSET)
    plant.put(STATE_OFFSET, pack_state(False, count, durable, records, checksum, plant.seed))
    assert_only(bytes(plant.image), STATE_OFFSET, "state", "not clean")


@pytest.mark.parametrize(("count", "durable"), [(6, 6), (15_259, 6), (32, 33)])
def test_impossible_counts_of_extents(plant: Corruption, count: int, durable: int) -> None:
    plant.put(STATE_OFFSET, pack_state(True, count, durable, 0, 0, plant.seed))
    assert_only(bytes(plant.image), STATE_OFFSET, "state", f"extent count {count}, durable")


def test_wrong_index_checksum(plant: Corruption) -> None:
    state = unpack_state(bytes(plant.image[STATE_OFFSET:][: STATE.size]), plant.seed)
    wrong = state._replace(index_checksum=state.index_checksum ^ 1)
    plant.put(STATE_OFFSET, wrong.pack(plant.seed))
    assert_only(bytes(plant.image), STATE_OFFSET, "state", "index checksum is wrong")


# --- allocator and extent map ------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [0, 5, 60_000])
def test_impossible_fresh_extent(plant: Corruption, fresh: int) -> None:
    plant.put_u16(FRESH_EXTENT_OFFSET, fresh)
    assert_among(plant.sign(), FRESH_EXTENT_OFFSET, "allocator", f"fresh extent is {fresh}")


@pytest.mark.parametrize(
    ("extent", "kind"), [(0, KIND_FREE), (5, KIND_SLAB), (6, 4), (6, 1), (6, 255)]
)
def test_impossible_kind_of_extent(plant: Corruption, extent: int, kind: int) -> None:
    plant.put(map_entry_offset(extent), bytes([kind]))
    assert_among(plant.sign(), map_entry_offset(extent), f"extent {extent}", f"kind is {kind}")


def test_extent_in_use_past_the_fresh_one(plant: Corruption) -> None:
    extent = plant.extent_count - 1
    assert plant.u16(FRESH_EXTENT_OFFSET) <= extent
    plant.put(map_entry_offset(extent), bytes([KIND_SEGMENT]))
    assert_among(plant.sign(), map_entry_offset(extent), f"extent {extent}", "past the fresh one")


def test_free_extent_that_is_not_on_the_list(plant: Corruption) -> None:
    first, second, *_ = plant.free_extents()
    plant.put_u16(FREE_EXTENTS_OFFSET, second)
    assert_only(plant.sign(), map_entry_offset(first), f"extent {first}", "not on the list of free")


def test_extent_in_use_on_the_list_of_free_ones(plant: Corruption) -> None:
    *_, last = plant.free_extents()
    slab = plant.slab_of(b"small 1")
    assert plant.slab_entry(slab)["next"] == 0
    plant.change_slab(last, next=slab)
    assert_only(plant.sign(), map_entry_offset(slab), f"extent {slab}", "but not free")


@pytest.mark.parametrize("extent", [3, 60_000])
def test_list_of_free_extents_that_leads_nowhere(plant: Corruption, extent: int) -> None:
    *_, last = plant.free_extents()
    plant.change_slab(last, next=extent)
    assert_only(plant.sign(), FREE_EXTENTS_OFFSET, "list of free extents", f"extent {extent}")


def test_list_of_free_extents_that_goes_in_a_circle(plant: Corruption) -> None:
    first, *_, last = plant.free_extents()
    plant.change_slab(last, next=first)
    assert_only(plant.sign(), FREE_EXTENTS_OFFSET, "list of free extents", f"extent {first}")


def test_slab_extent_with_an_impossible_class(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    plant.change_slab(slab, **{"class": len(BLOCK_SIZES)})
    assert_among(plant.sign(), map_entry_offset(slab), f"extent {slab}", "size class is")


@pytest.mark.parametrize(("field", "value"), [("live", 0), ("live", 5_000), ("fresh", 5_000)])
def test_slab_extent_with_impossible_counts(plant: Corruption, field: str, value: int) -> None:
    slab = plant.slab_of(b"small 1")
    plant.change_slab(slab, **{field: value})
    assert_among(plant.sign(), map_entry_offset(slab), f"extent {slab}", "live blocks, fresh")


def test_extent_with_room_that_is_not_on_the_list_of_its_class(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    plant.put_u16(class_head_offset(0), 0)
    assert_only(plant.sign(), map_entry_offset(slab), f"extent {slab}", "on it without room")


def test_extent_on_the_list_of_another_class(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    plant.put_u16(class_head_offset(30), slab)
    assert_only(plant.sign(), map_entry_offset(slab), f"extent {slab}", "class 30")


def test_wrong_link_back_in_the_list_of_a_class(plant: Corruption) -> None:
    head = plant.u16(class_head_offset(LARGE_CLASS))
    second = plant.slab_entry(head)["next"]
    assert second, "the class has one extent with room only"
    for extent, previous in ((head, second), (second, 0)):
        changed = Corruption(bytes(plant.image))
        changed.change_slab(extent, previous=previous)
        assert_only(changed.sign(), map_entry_offset(extent), f"extent {extent}", "previous is not")


def test_list_of_a_class_that_goes_in_a_circle(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    plant.change_slab(slab, next=slab)
    assert_only(plant.sign(), class_head_offset(0), "list of extents with room of class 0", "again")


def test_list_head_of_a_class_that_there_is_not(plant: Corruption) -> None:
    offset = class_head_offset(len(BLOCK_SIZES))
    plant.put_u16(offset, 6)
    assert_only(plant.sign(), offset, "allocator", "a size class that there is not")


# --- directory and segments --------------------------------------------------------------------


@pytest.mark.parametrize("extent", [0, 5, 60_000])
def test_directory_entry_that_names_no_segment(plant: Corruption, extent: int) -> None:
    plant.put_u16(DIRECTORY_OFFSET, extent)
    assert_among(plant.sign(), DIRECTORY_OFFSET, "directory", f"extent {extent} is no segment")


def test_directory_entry_in_the_middle_of_a_run_that_names_another(plant: Corruption) -> None:
    other = plant.u16(DIRECTORY_OFFSET + 2 * 2_048)
    plant.put_u16(DIRECTORY_OFFSET + 2 * 77, other)
    assert_only(plant.sign(), DIRECTORY_OFFSET, "directory", "not the one run of 2048")


def test_segment_without_an_entry_of_the_directory(plant: Corruption) -> None:
    extent = plant.u16(DIRECTORY_OFFSET)
    other = plant.u16(DIRECTORY_OFFSET + 2 * 2_048)
    plant.put(DIRECTORY_OFFSET, U16.pack(other) * 2_048)
    found = plant.sign()
    assert_among(found, other << EXTENT_SHIFT, "segment", "prefix 2048 at 0")
    assert_among(found, map_entry_offset(extent), f"extent {extent}", "does not name")


@pytest.mark.parametrize(("depth", "prefix"), [(3, 0), (16, 0), (0, 0), (4, 1)])
def test_segment_with_a_wrong_depth_or_prefix(plant: Corruption, depth: int, prefix: int) -> None:
    base = plant.u16(DIRECTORY_OFFSET) << EXTENT_SHIFT
    plant.put(base + 16, bytes([depth]))
    plant.put_u16(base + 18, prefix)
    assert_among(plant.sign(), base, "segment", f"depth {depth}, prefix {prefix} at 0")


@pytest.mark.parametrize("number", [1, 15])
@pytest.mark.parametrize(("offset", "value"), [(16, 5), (18, 2_048), (20, 7), (22, 9)])
def test_bucket_that_is_of_another_segment_or_moment(
    plant: Corruption, number: int, offset: int, value: int
) -> None:
    """Its depth, prefix, rebuilds or rewrites are others than those of the first bucket."""
    bucket = (plant.u16(DIRECTORY_OFFSET) << EXTENT_SHIFT) + number * BUCKET_SIZE
    plant.put(bucket + offset, bytes([value & 0xFF, value >> 8]))
    assert_only(plant.sign(), bucket, "bucket", "are not those of its segment")


def test_segment_of_an_older_index(plant: Corruption) -> None:
    extent = plant.u16(DIRECTORY_OFFSET)
    for number in range(16):
        plant.put_u16((extent << EXTENT_SHIFT) + number * BUCKET_SIZE + 20, 40)
    assert_only(plant.sign(), extent << EXTENT_SHIFT, "segment", "of 40 rebuilds")


@pytest.mark.parametrize("more", [-1, 1, 1_000])
def test_state_with_another_number_of_records_than_the_extent_map(
    plant: Corruption, more: int
) -> None:
    image = plant.sign(plant.records() + more)
    assert_only(image, STATE_OFFSET, "state", f"says {plant.records():,} records at closing")


@pytest.mark.parametrize("number", [0, 1, 15])
def test_bucket_without_its_marker(plant: Corruption, number: int) -> None:
    bucket = (plant.u16(DIRECTORY_OFFSET) << EXTENT_SHIFT) + number * BUCKET_SIZE
    plant.put(bucket, bytes(8))
    assert_among(plant.sign(), bucket, "bucket", "has no marker")


def test_the_other_buckets_are_checked_beside_one_without_its_marker(plant: Corruption) -> None:
    bucket, record = plant.bucket(b"small 1"), plant.record(b"small 1")
    broken = (bucket & -EXTENT_SIZE) + (bucket + BUCKET_SIZE & EXTENT_SIZE - 1)
    plant.put(broken, bytes(BUCKET_SIZE))
    found = problems(bytes(plant.image))
    assert found[0].breach is Breach.BUCKET_MARKER
    assert record not in [each.offset for each in found]
    plant.image[record + 40] ^= 1
    assert_among(bytes(plant.image), record, "record", "fails its checksum")


def test_buckets_in_each_other_s_place(plant: Corruption) -> None:
    bucket = plant.u16(DIRECTORY_OFFSET) << EXTENT_SHIFT
    one = plant.image[bucket + BUCKET_SIZE : bucket + 2 * BUCKET_SIZE]
    plant.put(bucket + 2 * BUCKET_SIZE, bytes(one))
    assert_among(plant.sign(), bucket + 2 * BUCKET_SIZE, "bucket", "has no marker")


def test_tombstone_beside_an_empty_slot(plant: Corruption) -> None:
    bucket = plant.bucket(b"small 1")
    index = plant.image.index(0, bucket + CONTROL_OFFSET)
    plant.image[index] = 1
    plant.change_segment(plant.segment_of(b"small 1"), used=1)
    assert_only(plant.sign(), bucket, "bucket", "both an empty slot and a tombstone")


@pytest.mark.parametrize(("live", "used"), [(1, 0), (0, 1), (-1, -1)])
def test_segment_with_wrong_counts(plant: Corruption, live: int, used: int) -> None:
    extent = plant.segment_of(b"small 1")
    plant.change_segment(extent, live=live, used=used)
    assert_only(plant.sign(), map_entry_offset(extent), f"extent {extent}", "used slots, has")


def test_bucket_that_says_its_slots_expire_later(plant: Corruption) -> None:
    plant.put(plant.bucket(b"expiring") + EARLIEST_OFFSET, U64.pack(NOW_MS + 1_001))
    assert_only(plant.sign(), plant.slot(b"expiring"), "slot", "expires before")


def test_segment_that_says_its_slots_expire_later(plant: Corruption) -> None:
    entry = map_entry_offset(plant.segment_of(b"expiring"))
    plant.put(entry + EARLIEST_OFFSET, U64.pack(NOW_MS + 1_001))
    assert_only(plant.sign(), plant.slot(b"expiring"), "slot", "expires before")


def test_earlier_expiry_of_bucket_and_segment_is_no_breach(plant: Corruption) -> None:
    plant.put(plant.bucket(b"expiring") + EARLIEST_OFFSET, U64.pack(1))
    plant.put(map_entry_offset(plant.segment_of(b"small 1")) + EARLIEST_OFFSET, U64.pack(1))
    assert problems(plant.sign()) == []


# --- slots -------------------------------------------------------------------------------------


def test_slot_whose_control_byte_is_not_its_fingerprint(plant: Corruption) -> None:
    slot = plant.slot(b"small 1")
    control = plant.control(b"small 1")
    plant.image[control] = plant.image[control] ^ 0x40 | 2
    assert_only(plant.sign(), slot, "slot", "not its key's fingerprint")


def test_slot_that_cannot_be_found_from_its_home(plant: Corruption) -> None:
    slot, control, bucket = (
        plant.slot(b"small 1"),
        plant.control(b"small 1"),
        plant.bucket(b"small 1"),
    )
    segment = bucket & -EXTENT_SIZE
    other = segment + (bucket + 3 * BUCKET_SIZE & EXTENT_SIZE - 1)
    index = plant.image.index(0, other + CONTROL_OFFSET) - other - CONTROL_OFFSET
    moved = other + 256 + 48 * index
    plant.put(moved, bytes(plant.image[slot : slot + 48]))
    plant.image[other + CONTROL_OFFSET + index] = plant.image[control]
    plant.image[control] = 0
    assert_only(plant.sign(), moved, "slot", "cannot be found from bucket")


def test_slot_in_another_key_s_segment(plant: Corruption) -> None:
    slot, control = plant.slot(b"small 1"), plant.control(b"small 1")
    home = plant.bucket(b"small 1") & EXTENT_SIZE - 1
    mine = plant.segment_of(b"small 1")
    other = next(
        extent
        for position in range(0, 32_768, 2_048)
        if (extent := plant.u16(DIRECTORY_OFFSET + 2 * position)) != mine
    )
    bucket = (other << EXTENT_SHIFT) + home
    index = plant.image.index(0, bucket + CONTROL_OFFSET) - bucket - CONTROL_OFFSET
    moved = bucket + 256 + 48 * index
    plant.put(moved, bytes(plant.image[slot : slot + 48]))
    plant.image[bucket + CONTROL_OFFSET + index] = plant.image[control]
    plant.image[control] = 0
    plant.change_segment(mine, live=-1, used=-1)
    plant.change_segment(other, live=1, used=1)
    assert_only(plant.sign(), moved, "slot", "belongs to another segment")


@pytest.mark.parametrize("record", [0, 65_536, 2**32 - 32])
def test_slot_whose_record_is_in_no_slab_extent(plant: Corruption, record: int) -> None:
    slot = plant.slot(b"small 1")
    plant.put(slot + 40, record.to_bytes(4, "little"))
    assert_among(plant.sign(), slot, "slot", "is in no slab extent")


@pytest.mark.parametrize("shift", [32, -32])
def test_slot_whose_record_begins_at_no_block(plant: Corruption, shift: int) -> None:
    slot, record = plant.slot(b"small 1"), plant.record(b"small 1")
    plant.put(slot + 40, (record + shift).to_bytes(4, "little"))
    found = plant.sign()
    assert_among(found, slot, "slot", f"begins at byte {record + shift:,}")
    assert_among(found, record, "record", "no slot points to it")


def test_slot_whose_record_would_be_longer_than_its_block(plant: Corruption) -> None:
    slot = plant.slot(b"small 1")
    plant.put_u16(slot + 44, 60)
    assert_among(plant.sign(), slot, "slot", "no block of its size")


def test_two_slots_of_one_record(plant: Corruption) -> None:
    """The second slot is a copy, in the same bucket."""
    slot, bucket = plant.slot(b"small 1"), plant.bucket(b"small 1")
    control = plant.image[plant.control(b"small 1")]
    index = plant.image.index(0, bucket + CONTROL_OFFSET) - bucket - CONTROL_OFFSET
    second = bucket + 256 + 48 * index
    plant.put(second, bytes(plant.image[slot : slot + 48]))
    plant.image[bucket + CONTROL_OFFSET + index] = control
    plant.change_segment(plant.segment_of(b"small 1"), live=1, used=1)
    assert_only(plant.sign(), max(slot, second), "slot", "another one points to its record")


def test_two_slots_of_one_key(plant: Corruption) -> None:
    """Each has a whole record of its own."""
    key = b"small 1"
    slab, record, bucket = plant.slab_of(key), plant.record(key), plant.bucket(key)
    entry = plant.slab_entry(slab)
    other = (slab << EXTENT_SHIFT) + entry["fresh"] * 64
    _, value_size, key_size, _, created_at, _, _ = RECORD.unpack_from(plant.image, record)
    header = RECORD.pack(
        RECORD_MAGIC,
        value_size,
        key_size,
        0,
        created_at,
        0,
        record_checksum(SMALL, key_hash(key, plant.seed), created_at, 0, other),
    )
    plant.put(other, header + key + SMALL)
    plant.change_slab(slab, live=entry["live"] + 1, fresh=entry["fresh"] + 1)
    index = plant.image.index(0, bucket + CONTROL_OFFSET) - bucket - CONTROL_OFFSET
    second = bucket + 256 + 48 * index
    plant.put(second, bytes(plant.image[plant.slot(key) :][:48]))
    plant.put(second + 40, other.to_bytes(4, "little"))
    plant.image[bucket + CONTROL_OFFSET + index] = plant.image[plant.control(key)]
    plant.change_segment(plant.segment_of(key), live=1, used=1)
    assert_only(plant.sign(plant.records() + 1), second, "slot", "has the key of the slot")


@pytest.mark.parametrize(
    "offset", [0, 3, 4, 6], ids=["first byte of magic", "last byte of magic", "value", "key"]
)
def test_record_whose_header_differs_from_its_slot(plant: Corruption, offset: int) -> None:
    record = plant.record(b"small 1")
    plant.image[record + offset] ^= 1
    assert_among(plant.sign(), record, "record", "magic or sizes differ from its slot")


@pytest.mark.parametrize("flags", [4, 8, 16, 28, 31])
def test_slot_with_a_flag_that_there_is_not(plant: Corruption, flags: int) -> None:
    slot, record = plant.slot(b"small 1"), plant.record(b"small 1")
    for known in (0, 1, 2, 3):
        plant.put(slot + 40, (record + known).to_bytes(4, "little"))
        assert problems(plant.sign()) == []
    plant.put(slot + 40, (record + flags).to_bytes(4, "little"))
    assert_only(plant.sign(), slot, "slot", f"has flags that there are not: 0x{flags:02X}")


@pytest.mark.parametrize("stamp", [STAMP_LIMIT, 2**64 - 1])
def test_record_with_a_stamp_past_the_limit(plant: Corruption, stamp: int) -> None:
    record = plant.record(b"small 1")
    forge_record(plant, record, stamp=stamp)
    assert_only(plant.sign(), record, "record", f"its stamp is {stamp}, the limit {STAMP_LIMIT}")


def test_state_with_an_earlier_stamp_than_a_record(plant: Corruption) -> None:
    *_, stamp, _ = STATE.unpack_from(plant.image, STATE_OFFSET)
    record = plant.record(b"small 1")
    forge_record(plant, record, stamp=stamp)
    assert problems(plant.sign()) == []
    forge_record(plant, record, stamp=stamp + 1)
    assert_only(
        plant.sign(),
        STATE_OFFSET,
        "state",
        f"says stamp {stamp}, the record at byte {record:,} has {stamp + 1}",
    )


# --- records that follow each other --------------------------------------------------------------


def forge_record(plant: Corruption, record: int, **fields: int) -> None:
    """Change fields of the header of a whole record, and have its checksum be right again."""
    header = dict(zip(RECORD_FIELDS, RECORD.unpack_from(plant.image, record), strict=True))
    header |= fields
    start = record + RECORD_HEADER_SIZE
    middle = start + header["key_size"]
    key = bytes(plant.image[start:middle])
    value = bytes(plant.image[middle : middle + header["value_size"]])
    header["checksum"] = record_checksum(
        value, key_hash(key, plant.seed), header["stamp"], header["expires_at"], record
    )
    plant.put(record, RECORD.pack(*header.values()))


@pytest.fixture
def in_use(path: Path) -> Corruption:
    """Return a file in use: a key that was superseded, and one that was deleted after that."""
    with KVStore(path) as store:
        for key in ("kept", "dropped", "other"):
            store.create(key, {"mark": "old"})
        store.sync()
        for key in ("kept", "dropped"):
            store[key] = {"mark": "new"}
        store.delete("dropped")
        image = path.read_bytes()
    assert [problem.breach for problem in check_image(image)] == [Breach.NOT_CLOSED]
    return Corruption(image)


def record_at(plant: Corruption, key: bytes, mark: bytes, magic: int) -> int:
    """Return the offset of the one record of these contents."""
    text = key + b'{"mark":"%b"}' % mark
    (offset,) = (
        place
        for place in range(0, len(plant.image), BLOCK_ALIGNMENT)
        if plant.image[place : place + 4] == U32.pack(magic)
        and plant.image[place + RECORD_HEADER_SIZE :].startswith(text)
    )
    return offset


def breaches(plant: Corruption) -> list[tuple[int, Breach]]:
    """Return what is wrong beside that the file is in use."""
    return [
        (problem.offset, problem.breach)
        for problem in check_image(bytes(plant.image))
        if problem.breach is not Breach.NOT_CLOSED
    ]


def test_retired_and_marked_records_are_nothing_wrong_while_the_file_is_open(
    in_use: Corruption,
) -> None:
    retired = record_at(in_use, b"kept", b"old", RECORD_MAGIC)
    marked = record_at(in_use, b"dropped", b"new", MARKED_MAGIC)
    assert in_use.image[retired + 7] != 0
    assert in_use.slab_entry(marked >> EXTENT_SHIFT)["retired"] == 3


def test_retired_and_marked_records_are_wrong_in_a_file_that_was_closed(in_use: Corruption) -> None:
    extent = in_use.slab_of(b"other")
    _, count, durable, *_ = STATE.unpack_from(in_use.image, STATE_OFFSET)
    in_use.sign_state(1, count, durable, in_use.slab_entry(extent)["live"])
    state = unpack_state(bytes(in_use.image[STATE_OFFSET:][: STATE.size]), in_use.seed)
    in_use.put(STATE_OFFSET, state._replace(stamp=STAMP_LIMIT - 1).pack(in_use.seed))
    told = [
        (record_at(in_use, key, mark, magic), Breach.RECORD_RETIRED)
        for key, mark, magic in (
            (b"kept", b"old", RECORD_MAGIC),
            (b"dropped", b"old", RECORD_MAGIC),
            (b"dropped", b"new", MARKED_MAGIC),
        )
    ]
    assert sorted(breaches(in_use)) == sorted(told)


def test_retired_record_without_a_later_one_of_its_key(in_use: Corruption) -> None:
    retired = record_at(in_use, b"kept", b"old", RECORD_MAGIC)
    forge_record(in_use, retired, stamp=STAMP_LIMIT - 1)
    of_dropped = record_at(in_use, b"dropped", b"old", RECORD_MAGIC)
    forge_record(in_use, of_dropped, stamp=STAMP_LIMIT - 2)
    assert sorted(breaches(in_use)) == sorted(
        [(retired, Breach.RECORD_LATEST), (of_dropped, Breach.RECORD_LATEST)]
    )


def test_marked_record_that_is_later_than_the_live_one_of_its_key(in_use: Corruption) -> None:
    retired = record_at(in_use, b"kept", b"old", RECORD_MAGIC)
    forge_record(in_use, retired, magic=MARKED_MAGIC)
    assert breaches(in_use) == []
    forge_record(in_use, retired, stamp=STAMP_LIMIT - 1)
    assert breaches(in_use) == [(retired, Breach.RECORD_LATEST)]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"generation": 1}, "retired"),
        ({"magic": MARKED_MAGIC}, "marked as deleted"),
        ({"magic": MARKED_MAGIC, "generation": 9}, "marked as deleted"),
    ],
)
def test_slot_whose_record_is_retired_or_marked(
    plant: Corruption, fields: dict[str, int], what: str
) -> None:
    slot, record = plant.slot(b"small 1"), plant.record(b"small 1")
    forge_record(plant, record, **fields)
    assert_among(plant.sign(), slot, "slot", f"its record at byte {record:,} is {what}")
    plant.change_slab(record >> EXTENT_SHIFT, retired=1)
    assert_only(plant.sign(), slot, "slot", f"its record at byte {record:,} is {what}")


def test_slab_extent_with_a_wrong_count_of_retired_blocks(
    plant: Corruption, in_use: Corruption
) -> None:
    slab = plant.slab_of(b"small 1")
    plant.change_slab(slab, retired=1)
    message = "says 1 retired blocks, has 0"
    assert_only(plant.sign(), map_entry_offset(slab), f"extent {slab}", message)
    slab = in_use.slab_of(b"other")
    in_use.change_slab(slab, retired=2)
    assert breaches(in_use) == [(map_entry_offset(slab), Breach.SLAB_RETIRED)]


def test_record_whose_expiry_differs_from_its_slot(plant: Corruption) -> None:
    slot, record = plant.slot(b"expiring"), plant.record(b"expiring")
    plant.put(slot + 32, U64.pack(NOW_MS + 1_005))
    assert_only(plant.sign(), record, "record", "key or expiry differs from its slot")


@pytest.mark.parametrize("key", [b"small 1", "é".encode() * 20])
def test_slot_whose_key_is_not_its_record_s(plant: Corruption, key: bytes) -> None:
    hash_of_key = key_hash(key, plant.seed)
    bucket = (plant.segment_of(key) << EXTENT_SHIFT) + (hash_of_key & 15) * BUCKET_SIZE
    slot = plant.image.index(key[:32].ljust(32, b"\0"), bucket)
    (record,) = (SLOT.unpack_from(plant.image, slot)[2],)
    plant.image[slot + 3] ^= 1
    assert_only(plant.sign(), record, "record", "key or expiry differs from its slot")


# --- records and blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [8, 24, 32 + len(b"small 1"), 32 + 13])
def test_record_that_fails_its_checksum(plant: Corruption, offset: int) -> None:
    record = plant.record(b"small 1")
    plant.image[record + offset] ^= 1
    assert_only(plant.sign(), record, "record", "fails its checksum")


def test_record_of_garbage_is_not_called_misplaced_too(plant: Corruption) -> None:
    record = plant.record(b"small 1")
    plant.put(record + 32, b"another")
    assert [each.breach for each in problems(plant.sign())] == [
        Breach.RECORD_KEY,
        Breach.RECORD_CHECKSUM,
    ]


def test_record_in_a_block_larger_than_it_needs(plant: Corruption) -> None:
    """It is whole, but recovery would take its extent for one of another class."""
    key = b"large 1"
    slot, record = plant.slot(key), plant.record(key)
    hash_of_key = key_hash(key, plant.seed)
    plant.put_u16(slot + 44, len(SMALL))
    header = RECORD.unpack_from(plant.image, record)
    checksum = record_checksum(SMALL, hash_of_key, header[4], 0, record)
    plant.put(
        record,
        RECORD.pack(header[0], len(SMALL), len(key), 0, header[4], 0, checksum) + key + SMALL,
    )
    assert_only(plant.sign(), record, "record", "takes 46 bytes in a block of")


def test_record_that_no_slot_points_to(plant: Corruption) -> None:
    record = plant.record(b"small 1")
    plant.image[plant.control(b"small 1")] = 0
    plant.change_segment(plant.segment_of(b"small 1"), live=-1, used=-1)
    assert_only(plant.sign(), record, "record", "no slot points to it")


def test_magic_of_a_record_outside_of_any_slab_extent(plant: Corruption) -> None:
    extent = plant.free_extents()[0]
    offset = (extent << EXTENT_SHIFT) + 96
    plant.put(offset, RECORD_MAGIC_BYTES + SIZES)
    assert_only(plant.sign(), offset, "record", "outside of any slab extent")


@pytest.mark.parametrize("where", ["within a block", "past the fresh block"])
def test_magic_of_a_record_where_no_block_in_use_begins(plant: Corruption, where: str) -> None:
    slab = plant.slab_of(b"small 1")
    offset = plant.record(b"small 1") + 32
    if where == "past the fresh block":
        offset = (slab << EXTENT_SHIFT) + 64 * plant.slab_entry(slab)["fresh"] + 128
    else:
        offset = plant.record(b"large 1") + 320
    plant.put(offset, RECORD_MAGIC_BYTES + SIZES)
    assert_among(plant.sign(), offset, "record", "its magic is not at a block in use")


def test_time_of_a_slot_that_has_the_bytes_of_a_magic_is_no_breach(
    path: Path, clock: FakeClock
) -> None:
    """That is one millisecond in 49.7 days; slots of even number are aligned as records are."""
    expires_at = 0x18C << 32 | RECORD_MAGIC
    clock.set((expires_at - 3_600_000) / 1_000)
    with KVStore(path) as store:
        for number in range(50):
            store.create(f"key {number}", {}, ttl=3_600)
    assert path.read_bytes().count(RECORD_MAGIC_BYTES) >= 3 * 50  # its own, and in slot and record
    assert check_file(path) == []
    with KVStore(path) as store:
        # Nor does recovery take one for a record, or lose one for it.
        crashed = path.with_name("crashed.kvs")
        store.create("another", {})
        crashed.write_bytes(path.read_bytes())
    with KVStore(crashed) as store:
        assert dict(store) == {f"key {number}": {} for number in range(50)} | {"another": {}}
    assert check_file(crashed) == []


def test_magic_that_is_not_aligned_is_no_breach(plant: Corruption) -> None:
    extent = plant.free_extents()[0]
    plant.put((extent << EXTENT_SHIFT) + 33, RECORD_MAGIC_BYTES + SIZES)
    assert problems(plant.sign()) == []


def free_block(plant: Corruption) -> tuple[int, int]:
    """Return the first free block of the extent of the small records, and its offset."""
    slab = plant.slab_of(b"small 1")
    block = plant.slab_entry(slab)["first_free"]
    return block, (slab << EXTENT_SHIFT) + 64 * block


def test_free_list_that_leads_to_a_block_never_used(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    block, offset = free_block(plant)
    fresh = plant.slab_entry(slab)["fresh"]
    plant.put_u16(offset + 4, fresh)
    assert_among(plant.sign(), map_entry_offset(slab), f"extent {slab}", f"leads to block {fresh}")
    plant.put_u16(offset + 4, block)
    assert_among(plant.sign(), map_entry_offset(slab), f"extent {slab}", f"leads to block {block}")


def test_free_block_without_its_magic(plant: Corruption) -> None:
    _, offset = free_block(plant)
    plant.put(offset, b"\0")
    assert_among(plant.sign(), offset, "free block", "has not the magic")


def test_live_block_on_the_free_list(plant: Corruption) -> None:
    slab, record = plant.slab_of(b"small 1"), plant.record(b"small 1")
    _, offset = free_block(plant)
    plant.put_u16(offset + 4, (record - (slab << EXTENT_SHIFT)) // 64)
    assert_among(plant.sign(), record, "free block", "has the magic of a record")


def test_block_that_is_neither_live_nor_on_the_free_list(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    _, offset = free_block(plant)
    plant.change_slab(slab, first_free=plant.u16(offset + 4))
    assert_only(plant.sign(), offset, "block", "neither live nor on the free list")


def test_slab_extent_with_a_wrong_count_of_live_blocks(plant: Corruption) -> None:
    slab = plant.slab_of(b"small 1")
    plant.change_slab(slab, live=plant.slab_entry(slab)["live"] - 1)
    image = plant.sign(plant.records() - 1)
    assert_only(image, map_entry_offset(slab), f"extent {slab}", "live blocks, has")


def test_empty_extent_that_stays_with_its_class_is_nothing_wrong_while_the_file_is_open(
    path: Path,
) -> None:
    """So the only record of its size comes and goes for little. In a closed file there is none."""
    with KVStore(path) as store:
        store.create("small", {})
        empty = store.stats()
        store.create("large", {"text": "x" * 5_000})
        store.delete("large")
        assert store.stats().live_size == empty.live_size
        assert store.stats().free_size == empty.free_size
        assert store.stats().slab_size == empty.slab_size + EXTENT_SIZE
        problems = check_file(path)
        assert [problem.breach for problem in problems] == [Breach.NOT_CLOSED]
        died = path.with_suffix(".died")
        died.write_bytes(path.read_bytes())
    assert check_file(path) == []
    with KVStore(path) as store, KVStore(died) as recovered:
        assert store.stats() == recovered.stats() == empty


# --- anything at all ---------------------------------------------------------------------------


def test_breach_anywhere_is_reported_at_a_place_in_the_file(good: bytes) -> None:
    """Whatever the bytes are, the checker ends, raises nothing, and points into the file."""
    for start in (0, 512, 1_536, DIRECTORY_OFFSET, EXTENT_MAP_OFFSET, 6 * EXTENT_SIZE):
        for filling in (b"\0", b"\xff", b"\1"):
            image = bytearray(good)
            image[start : start + 4_096] = filling * 4_096
            plant = Corruption(good)
            plant.image = image
            for bytes_to_check in (bytes(image), plant.sign()):
                found = list(islice(check_image(bytes_to_check), 100_000))
                assert len(found) < 100_000
                assert all(0 <= each.offset < len(good) for each in found)
