"""Which extents are worth emptying, and the end of a class's list that they are put at."""

import random
from pathlib import Path
from typing import Final

import pytest
from support.components import Components, open_components

from kvstore.format.layout import EXTENT_SHIFT, EXTENT_SIZE, RECORD_MAGIC
from kvstore.index.slab import NoOtherBlockError
from kvstore.index.sparse import count_usage, find_sparse

KEYS: Final = 63  # records of a class that has 21 blocks an extent
VALUE: Final = b'{"v":"' + b"x" * 3_000 + b'"}'
BLOCK: Final = 3_072
PER_EXTENT: Final = EXTENT_SIZE // BLOCK


def fill(parts: Components, count: int = KEYS) -> list[int]:
    """Create records of one class; return the extents that they are in."""
    for number in range(count):
        parts.store(key(number), VALUE)
    return sorted({record_of(parts, number) >> EXTENT_SHIFT for number in range(count)})


def key(number: int) -> bytes:
    return b"k%d" % number


def record_of(parts: Components, number: int) -> int:
    slot = parts.slots.find(parts.hash(key(number)), key(number))
    return parts.file.words[slot + 40 >> 3] & 0xFFFF_FFE0


def keep(parts: Components, *counts: int) -> list[int]:
    """Leave so many records in each extent, in the order of their creation."""
    extents = fill(parts)
    for place, count in enumerate(counts):
        for number in range(place * PER_EXTENT + count, (place + 1) * PER_EXTENT):
            parts.remove(key(number))
    return extents


def test_sparsest_come_first_as_long_as_their_records_fit_into_the_others(path: Path) -> None:
    with open_components(path) as parts:
        one, other, third = keep(parts, 4, 2, 10)
        found = find_sparse(parts.file)
        assert found.extents == [(2 * BLOCK, other), (4 * BLOCK, one)]
        assert find_sparse(parts.file, {other}).extents == [(4 * BLOCK, one), (10 * BLOCK, third)]


def test_what_is_missing_is_told_where_nothing_fits(path: Path) -> None:
    with open_components(path) as parts:
        keep(parts, 18, 18, 20)
        assert find_sparse(parts.file) == ([], (18 - 3 - 1) * BLOCK)
        for number in range(14):
            assert not find_sparse(parts.file).extents
            parts.remove(key(number))
        assert find_sparse(parts.file).extents


def test_what_is_retired_need_not_move(path: Path) -> None:
    with open_components(path) as parts:
        extent, *_ = keep(parts, 4, 20, 20)
        assert not find_sparse(parts.file).extents
        for number in range(2):
            parts.slab.retire(record_of(parts, number), RECORD_MAGIC)
        assert find_sparse(parts.file).extents == [(2 * BLOCK, extent)]
        assert count_usage(parts.file).used == 42 * BLOCK + 44 * 48
        parts.file.require_rebuild()


def test_blocks_of_extents_that_were_put_last_are_taken_last(path: Path) -> None:
    with open_components(path) as parts:
        extents = keep(parts, 4, 10, 10)
        for last in random.Random(1).sample(extents, 3):
            parts.slab.put_last([last])
            others = [parts.slab.allocate(len(VALUE) + 34) >> EXTENT_SHIFT for _ in range(3)]
            assert last not in others
        parts.slab.put_last(extents)
        parts.file.require_rebuild()


def test_record_moves_to_another_extent_of_its_class_or_not_at_all(path: Path) -> None:
    with open_components(path) as parts:
        extents = fill(parts, 30)
        size = len(VALUE) + 34
        taken = parts.slab.allocate(size, moved_from=extents[0])
        assert taken >> EXTENT_SHIFT == extents[1]
        with pytest.raises(NoOtherBlockError):
            parts.slab.allocate(size, moved_from=extents[1])
        with pytest.raises(NoOtherBlockError):
            parts.slab.allocate(100, moved_from=extents[1])
        parts.slab.free(taken)


def test_class_is_given_an_extent_before_a_limit_if_there_is_one(path: Path) -> None:
    with open_components(path) as parts:
        first, last = fill(parts, 22)
        size_class = parts.file.map[131_072 + 16 * first + 1]
        assert parts.slab.room_before(size_class, last) == 0
        assert parts.slab.room_before(size_class, last + 1) == PER_EXTENT - 1
        for number in range(PER_EXTENT):
            parts.remove(key(number))
        parts.slab.free_spare()
        assert parts.slab.room_before(size_class, last) == PER_EXTENT
        assert parts.slab.allocate(len(VALUE) + 34) >> EXTENT_SHIFT == first
        parts.file.require_rebuild()
