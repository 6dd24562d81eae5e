"""The slab by itself: blocks come and go, records are what was written or are seen not to be."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from support import MIB, seeded_random
from support.clock import FakeClock
from support.components import (
    VALUE,
    Components,
    FaultyWrites,
    open_components,
    replace_writes,
    tail_of,
    take_written,
)

from kvstore import KVStore, StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_MAGIC,
    KIND_FREE,
    KIND_SLAB,
    MAX_RECORD_SIZE,
    NO_BLOCK,
    NO_EXTENT,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SPLIT_AT,
    STRIPE_SHIFT,
    class_head_offset,
    key_hash,
    map_entry_offset,
)
from kvstore.recovery.check import check_file

HUGE = {"text": "x" * 16_000}
LARGEST = len(BLOCK_SIZES) - 1  # the class with the fewest blocks in an extent: three


def entry(parts: Components, extent: int) -> tuple[int, ...]:
    return SLAB_ENTRY.unpack_from(parts.file.map, map_entry_offset(extent))


def class_list(parts: Components, size_class: int) -> list[int]:
    """Return the extents of a class with room, in order; both ways must agree."""
    extents = []
    previous = NO_EXTENT
    extent = parts.file.shorts[class_head_offset(size_class) >> 1]
    while extent != NO_EXTENT:
        assert entry(parts, extent)[5] == previous
        extents.append(extent)
        previous, extent = extent, entry(parts, extent)[6]
    return extents


# --- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [34, 64, 65, 512, 513, 576, 577, 16_384, MAX_RECORD_SIZE])
def test_block_is_of_the_smallest_class_that_holds_the_record(parts: Components, size: int) -> None:
    offset = parts.slab.allocate(size)
    kind, size_class, live, *_ = entry(parts, offset >> EXTENT_SHIFT)
    assert (kind, live) == (KIND_SLAB, 1)
    assert BLOCK_SIZES[size_class] == min(each for each in BLOCK_SIZES if each >= size)


@pytest.mark.parametrize("size_class", [0, 5, 14, 30, LARGEST])
def test_blocks_of_a_class_fill_extents_one_after_the_other(
    parts: Components, size_class: int
) -> None:
    count = 2 * BLOCKS_PER_EXTENT[size_class]
    offsets = [parts.slab.allocate(BLOCK_SIZES[size_class]) for _ in range(count)]
    assert len(set(offsets)) == count
    assert all(offset % EXTENT_SIZE % BLOCK_SIZES[size_class] == 0 for offset in offsets)
    extents = Counter(offset >> EXTENT_SHIFT for offset in offsets)
    assert list(extents.values()) == [BLOCKS_PER_EXTENT[size_class]] * 2
    for extent in extents:
        assert all(
            offset % EXTENT_SIZE + BLOCK_SIZES[size_class] <= EXTENT_SIZE for offset in offsets
        )
        assert entry(parts, extent)[2:5] == (
            BLOCKS_PER_EXTENT[size_class],
            NO_BLOCK,
            BLOCKS_PER_EXTENT[size_class],
        )


def test_blocks_given_back_come_again_newest_first(parts: Components) -> None:
    offsets = [parts.slab.allocate(100) for _ in range(20)]
    given = [offsets[3], offsets[17], offsets[0], offsets[8]]
    for offset in given:
        parts.slab.free(offset)
    assert [parts.slab.allocate(100) for _ in given] == given[::-1]
    assert parts.slab.allocate(100) not in offsets


def test_block_given_back_holds_no_record_any_more(parts: Components) -> None:
    take_written(parts)
    record = take_written(parts)
    assert parts.records.is_record(record)
    parts.slab.free(record)
    assert not parts.records.is_record(record)
    assert FREE_BLOCK.unpack_from(parts.file.map, record) == (FREE_MAGIC, NO_BLOCK, 0)


def test_block_given_back_without_a_record_leaves_the_count_of_retired_ones(
    parts: Components,
) -> None:
    """Its extent was used for something else before, and the record could not be written."""
    record, other = take_written(parts), take_written(parts)
    parts.slab.retire(record)
    parts.file.write(other, b"\xff" * 8)
    parts.slab.free(other)
    assert parts.slab.count_retired() == [record >> EXTENT_SHIFT]
    parts.slab.sweep(record >> EXTENT_SHIFT, RECORD_MAGIC, 0)
    assert parts.slab.count_retired() == []


def test_full_extent_leaves_the_list_of_its_class_and_comes_back_with_room(
    parts: Components,
) -> None:
    first = [parts.slab.allocate(MAX_RECORD_SIZE) for _ in range(3)]
    full = first[0] >> EXTENT_SHIFT
    assert class_list(parts, LARGEST) == []
    other = parts.slab.allocate(MAX_RECORD_SIZE) >> EXTENT_SHIFT
    assert class_list(parts, LARGEST) == [other]
    parts.slab.free(first[1])
    assert class_list(parts, LARGEST) == [full, other]
    assert parts.slab.allocate(MAX_RECORD_SIZE) == first[1]
    assert class_list(parts, LARGEST) == [other]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_extent_leaves_the_list_from_any_place_in_it(parts: Components, position: int) -> None:
    extents = []
    for _ in range(3):
        offsets = [parts.slab.allocate(MAX_RECORD_SIZE) for _ in range(3)]
        extents.append(offsets)
    for offsets in extents:
        parts.slab.free(offsets[0])
    listed = class_list(parts, LARGEST)
    assert len(listed) == 3
    leaving = listed[position]
    for offsets in extents:
        if offsets[0] >> EXTENT_SHIFT == leaving:
            parts.slab.free(offsets[1])
            parts.slab.free(offsets[2])
    parts.slab.free_spare()
    assert class_list(parts, LARGEST) == [extent for extent in listed if extent != leaving]
    assert entry(parts, leaving)[0] == KIND_FREE


def test_extent_whose_last_block_is_freed_can_serve_another_class(path: Path) -> None:
    """And also a class whose extents are full, and the table: it is back in the common pool."""
    with open_components(path, 4 * MIB) as parts:
        offsets = []
        with pytest.raises(StoreFullError):
            while True:
                offsets.append(parts.slab.allocate(64))
        with pytest.raises(StoreFullError):
            parts.slab.allocate(5_000)
        extent = offsets[0] >> EXTENT_SHIFT
        in_extent = [offset for offset in offsets if offset >> EXTENT_SHIFT == extent]
        assert len(in_extent) == BLOCKS_PER_EXTENT[0]
        for offset in in_extent:
            parts.slab.free(offset)
        assert class_list(parts, 0) == [extent]
        assert parts.slab.allocate(5_000) >> EXTENT_SHIFT == extent
        for offset in set(offsets) - set(in_extent):
            parts.slab.free(offset)
        parts.slab.free(extent << EXTENT_SHIFT)
    assert [str(problem) for problem in check_file(path)] == []


def test_single_block_of_a_full_extent_frees_it_whole(parts: Components) -> None:
    """Full, then all given back at random: on and off the list, and back to the pool at the end."""
    rng = seeded_random()
    for size_class in (LARGEST, 20):
        offsets = [
            parts.slab.allocate(BLOCK_SIZES[size_class])
            for _ in range(BLOCKS_PER_EXTENT[size_class])
        ]
        assert class_list(parts, size_class) == []
        rng.shuffle(offsets)
        for offset in offsets[:-1]:
            parts.slab.free(offset)
            assert class_list(parts, size_class) == [offsets[0] >> EXTENT_SHIFT]
        parts.slab.free(offsets[-1])
        assert class_list(parts, size_class) == [offsets[0] >> EXTENT_SHIFT]
        parts.slab.free_spare()
        assert class_list(parts, size_class) == []
        assert entry(parts, offsets[0] >> EXTENT_SHIFT)[0] == KIND_FREE


def empty_extents(parts: Components) -> list[int]:
    """Return the slab extents that have no live block."""
    return [
        extent
        for extent in range(FIXED_EXTENTS, parts.file.extent_count)
        if entry(parts, extent)[0] == KIND_SLAB and not entry(parts, extent)[2]
    ]


def test_only_record_of_its_size_comes_and_goes_in_one_extent(path: Path) -> None:
    """It opened and freed one each time, at ten times the price, and each time owed a flush."""
    with open_components(path) as parts:
        others = [parts.slab.allocate(64) for _ in range(3)]
        parts.slab.free(offset := parts.slab.allocate(5_000))
        extent = offset >> EXTENT_SHIFT
        assert (class_list(parts, SIZE_CLASSES[5_000 + 31 >> 5]), empty_extents(parts)) == (
            [extent],
            [extent],
        )
        parts.file.flush()
        before = parts.file.map[ALLOCATOR_OFFSET : ALLOCATOR_OFFSET + ALLOCATOR_SIZE]
        for _ in range(10):
            assert parts.slab.allocate(5_000) == offset
            assert empty_extents(parts) == []
            parts.slab.free(offset)
        assert parts.file.map[ALLOCATOR_OFFSET : ALLOCATOR_OFFSET + ALLOCATOR_SIZE] == before
        assert not parts.file._flushing._group_commit._owes_everything
        for offset in others:
            parts.slab.free(offset)
    assert [str(problem) for problem in check_file(path)] == []


def test_only_the_extent_that_was_emptied_last_stays_with_its_class(path: Path) -> None:
    with open_components(path) as parts:
        offsets = [parts.slab.allocate(size) for size in (100, 1_000, 5_000)]
        for offset in offsets:
            parts.file.flush()
            parts.slab.free(offset)
            assert empty_extents(parts) == [offset >> EXTENT_SHIFT]
            # What has become no class's owes a flush of everything; what stays does not.
            assert parts.file._flushing._group_commit._owes_everything == (offset != offsets[0])
        # One that is filled again is nobody's to take away.
        assert parts.slab.allocate(5_000) == offsets[2]
        parts.slab.free(other := parts.slab.allocate(100))
        assert entry(parts, offsets[2] >> EXTENT_SHIFT)[:3] == (
            KIND_SLAB,
            SIZE_CLASSES[5_000 + 31 >> 5],
            1,
        )
        assert empty_extents(parts) == [other >> EXTENT_SHIFT]
        parts.slab.free(offsets[2])
        parts.slab.free_spare()
        assert empty_extents(parts) == []
    assert [str(problem) for problem in check_file(path)] == []


@pytest.mark.parametrize("error", [StoreFullError("no room"), KeyboardInterrupt()])
def test_spare_extent_is_one_whatever_cuts_its_change_short(
    path: Path, error: BaseException
) -> None:
    """Taken from again, replaced by another, and opened for another class, at every write."""
    sizes = MAX_RECORD_SIZE, 5_000
    with open_components(path) as parts:
        write = parts.file.write
        offsets: list[int] = []

        def take(size: int) -> None:
            offsets.append(parts.slab.allocate(size))

        def give() -> None:
            parts.slab.free(offsets[-1])
            offsets.pop()

        takes = [partial(take, size) for size in (*sizes, *sizes, 300)]
        changes: tuple[Callable[[], None], ...]
        changes = (*takes[:2], give, give, *takes[2:4], give, give, takes[4], give)
        for act in changes:
            fail_at, done = 1, False
            while not done:
                faulty = FaultyWrites(parts.file, fail_at, error)
                try:
                    act()
                    done = True
                except type(error):
                    fail_at += 1
                finally:
                    replace_writes(parts.file, write)
                assert done != faulty.reached
                assert set(empty_extents(parts)) <= {parts.slab.spare[0]}
    assert [str(problem) for problem in check_file(path)] == []


def test_random_takes_and_gives_keep_to_what_is_free(path: Path) -> None:
    """Against a plain set of what is taken; at the end all is given back, and the file is whole."""
    rng = seeded_random()
    with open_components(path, 32 * MIB) as parts:
        taken: dict[int, int] = {}
        for _ in range(4_000):
            if taken and rng.random() < 0.45:
                offset = rng.choice(list(taken))
                del taken[offset]
                parts.slab.free(offset)
                continue
            size = rng.choice((40, 64, 100, 700, 3_000, 9_000, MAX_RECORD_SIZE))
            offset = parts.slab.allocate(size)
            assert offset not in taken
            taken[offset] = min(each for each in BLOCK_SIZES if each >= size)
        end = 0
        for offset in sorted(taken):
            assert offset >= end, "two blocks overlap"
            end = offset + taken[offset]
        counts = Counter(offset >> EXTENT_SHIFT for offset in taken)
        for extent, count in counts.items():
            assert entry(parts, extent)[2] == count
        for offset in taken:
            parts.slab.free(offset)
    assert [str(problem) for problem in check_file(path)] == []


def test_full_file_gives_room_to_what_was_given_back_only(path: Path) -> None:
    with open_components(path, 4 * MIB) as parts:
        offsets = []
        with pytest.raises(StoreFullError):
            while True:
                offsets.append(parts.slab.allocate(9_000))
        parts.slab.free(offsets[5])
        assert parts.slab.allocate(9_000) == offsets[5]
        with pytest.raises(StoreFullError):
            parts.slab.allocate(9_000)
        with pytest.raises(StoreFullError):
            parts.slab.allocate(64)
        for offset in offsets:
            parts.slab.free(offset)
    assert [str(problem) for problem in check_file(path)] == []


# --- damaged free lists ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "link",
    [
        bytes(8),
        FREE_BLOCK.pack(FREE_MAGIC ^ 1, NO_BLOCK, 0),
        FREE_BLOCK.pack(FREE_MAGIC, 20, 0),
        FREE_BLOCK.pack(FREE_MAGIC, 0xFFFE, 0),
        FREE_BLOCK.pack(FREE_MAGIC, NO_BLOCK, 1),
        RECORD_MAGIC_BYTES + bytes(4),
    ],
    ids=["zeros", "magic", "next is fresh", "next is far", "reserved", "a record"],
)
def test_damaged_free_list_is_abandoned_and_the_store_goes_on(path: Path, link: bytes) -> None:
    with open_components(path) as parts:
        for number in range(20):
            parts.store(f"key {number}".encode(), VALUE)
        records = sorted(record_of(parts, f"key {number}".encode()) for number in range(20))
        for number in (3, 9):
            parts.remove(f"key {number}".encode())
        free = record_of_block(parts, records[9])
        parts.file.write(free, link)
        more = [parts.slab.allocate(64) for _ in range(2)]
        assert not set(more) & set(records)
        assert entry(parts, records[0] >> EXTENT_SHIFT)[3] == NO_BLOCK
        for number in set(range(20)) - {3, 9}:
            key = f"key {number}".encode()
            assert parts.records.contains_record_of(tail_of(record_of(parts, key), key), key)
        again = take_written(parts, b"another", VALUE)
        assert again not in records
    # What was lost with the list is found again: the file was left marked "not clean".
    with open_components(path) as parts:
        assert entry(parts, records[0] >> EXTENT_SHIFT)[3] != NO_BLOCK
    assert [str(problem) for problem in check_file(path)] == []


def record_of(parts: Components, key: bytes) -> int:
    slot = parts.slots.find(parts.hash(key), key)
    assert slot > 0
    return parts.file.words[slot + 40 >> 3] & 0xFFFF_FFFF


def record_of_block(parts: Components, offset: int) -> int:
    """Return the offset of the first free block in the extent of `offset`."""
    extent = offset >> EXTENT_SHIFT
    _, size_class, _, first_free, *_ = entry(parts, extent)
    assert first_free != NO_BLOCK
    return (extent << EXTENT_SHIFT) + first_free * BLOCK_SIZES[size_class]


def test_damaged_free_list_of_an_extent_without_fresh_blocks_takes_it_off_the_list(
    parts: Components,
) -> None:
    offsets = [parts.slab.allocate(MAX_RECORD_SIZE) for _ in range(3)]
    parts.slab.free(offsets[1])
    parts.file.write(offsets[1], bytes(8))
    extent = offsets[0] >> EXTENT_SHIFT
    assert class_list(parts, LARGEST) == [extent]
    assert parts.slab.allocate(MAX_RECORD_SIZE) >> EXTENT_SHIFT != extent
    assert extent not in class_list(parts, LARGEST)
    # Its blocks can be given back all the same, and then it is like any other.
    parts.slab.free(offsets[0])
    assert parts.slab.allocate(MAX_RECORD_SIZE) == offsets[0]


# --- cut short ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StoreFullError("no room"), KeyboardInterrupt()])
@pytest.mark.parametrize("blocks", range(5))
def test_take_and_give_cut_short_at_any_write_leave_nothing_amiss(
    path: Path, error: BaseException, blocks: int
) -> None:
    """With none to four blocks taken before, so that extents are opened, filled and emptied."""
    with open_components(path) as parts:
        write = parts.file.write
        offsets = [parts.slab.allocate(MAX_RECORD_SIZE) for _ in range(blocks)]

        def take() -> None:
            offsets.append(parts.slab.allocate(MAX_RECORD_SIZE))

        def give() -> None:
            parts.slab.free(offsets[0])
            offsets.pop(0)

        for act in (take, give):
            fail_at, done = 1, False
            while not done:
                faulty = FaultyWrites(parts.file, fail_at, error)
                try:
                    act()
                    done = True
                except type(error):
                    fail_at += 1
                finally:
                    replace_writes(parts.file, write)
                assert done != faulty.reached
                live = sum(
                    entry(parts, extent)[2]
                    for extent in range(FIXED_EXTENTS, parts.file.extent_count)
                    if entry(parts, extent)[0] == KIND_SLAB
                )
                assert live == len(offsets)
        assert len(set(offsets)) == len(offsets) == blocks
        for offset in offsets:
            parts.slab.free(offset)
    assert [str(problem) for problem in check_file(path)] == []


# --- interrupted in a full file ----------------------------------------------------------------


class WritesThatInterrupt:
    """Stands in for the `write` of a data file; one of the calls raises when it has written."""

    def __init__(self, file: DataFile, at: int) -> None:
        self._write = file.write
        self._at = at
        self.calls = 0
        replace_writes(file, self)

    def __call__(self, offset: int, data: bytes) -> None:
        self.calls += 1
        self._write(offset, data)
        if self.calls == self._at:
            raise KeyboardInterrupt


@pytest.fixture
def full_store(path: Path) -> Iterator[KVStore]:
    """A store with room for two more of its records in one extent, and no other."""
    with KVStore(path, max_bytes=4 * MIB) as store:
        with pytest.raises(StoreFullError):
            for number in range(1_000):
                store.create(f"{number}", HUGE)
        store.delete("0")
        store.delete("1")
        yield store
    with KVStore(path, max_bytes=4 * MIB) as store:
        assert len(store) == number
    assert [str(problem) for problem in check_file(path)] == []


def create_both_again(store: KVStore) -> None:
    for key in ("0", "1"):
        if key not in store:
            store.create(key, HUGE)
        assert store.read(key) == HUGE


def test_block_of_an_interrupted_create_is_there_for_the_next_in_a_full_file(
    full_store: KVStore,
) -> None:
    """Where it had just been taken, it was nobody's until the next opening."""
    store, at, done = full_store, 0, False
    write, write_word = store._file.write, store._file.write_word
    while not done:
        at += 1
        faulty = WritesThatInterrupt(store._file, at)
        with suppress(KeyboardInterrupt):
            store.create("0", HUGE)
            done = True
        store._file.write, store._file.write_word = write, write_word
        assert done == (faulty.calls < at)
        create_both_again(store)
        if not done:
            store.delete("0")
            store.delete("1")
    assert at > 3


def test_block_that_could_not_be_given_back_is_there_for_the_next_in_a_full_file(
    full_store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, refused = full_store, []

    def refuse(offset: int) -> None:
        refused.append(offset)
        raise StoreFullError("no room on the disk")

    write, write_word = store._file.write, store._file.write_word
    for at in range(1, 8):
        with monkeypatch.context() as patch, suppress(StoreFullError):
            FaultyWrites(store._file, at, StoreFullError("no room on the disk"))
            patch.setattr(store._slab, "free", refuse)
            store.create("0", HUGE)
        store._file.write, store._file.write_word = write, write_word
        create_both_again(store)
        store.delete("0")
        store.delete("1")
    create_both_again(store)
    assert len(refused) > 3


def test_records_dropped_by_a_rewriting_that_was_interrupted_give_room_in_a_full_file(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of what had expired in a segment was nobody's until the next opening."""
    with KVStore(path, max_bytes=4 * MIB) as store:
        seed = store._file.hash_seed
        names = (f"{number}" for number in range(10**6))
        keys = [key for key in names if not key_hash(key.encode(), seed) >> STRIPE_SHIFT]
        for number in range(SPLIT_AT):
            store.create(keys[number], {}, ttl=None if number % 2 else 10)
        clock.advance(11)
        give = store._slab.free
        calls = []

        def give_some(offset: int) -> None:
            calls.append(offset)
            if len(calls) == 3:
                raise StoreFullError("no room on the disk")
            give(offset)

        with monkeypatch.context() as patch:
            patch.setattr(store._slab, "free", give_some)
            with pytest.raises(StoreFullError):
                store._parts.segments.split_or_compact(
                    key_hash(keys[0].encode(), seed), clock.now_ms
                )
        assert store.stats().live_size == (SPLIT_AT - 2) * 64
        store._parts.room.make(0)
        assert store.stats().live_size == store.stats().records * 64 == SPLIT_AT // 2 * 64
    with KVStore(path) as store:
        assert len(store) == SPLIT_AT // 2
    assert [str(problem) for problem in check_file(path)] == []
