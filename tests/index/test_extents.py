"""The pool of extents: what is taken is nobody else's, what is given comes back."""

from pathlib import Path

import pytest
from support import MIB
from support.components import Components, FaultyWrites, open_components, replace_writes

from kvstore import CorruptStoreError, StoreFullError
from kvstore.file.rollback import Rollback
from kvstore.format.layout import (
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    KIND_SLAB,
    NO_BLOCK,
    NO_EXTENT,
    SLAB_ENTRY,
    U16,
    map_entry_offset,
)
from kvstore.recovery.check import check_file

SEGMENTS = 16  # that a new file has


def take(parts: Components, *, for_segment: bool = False) -> int:
    """Take an extent and mark it as a slab, as its new owner would."""
    with parts.extents.lock, Rollback(parts.file) as rollback:
        extent = parts.extents.allocate(rollback, for_segment=for_segment)
        rollback.write(
            map_entry_offset(extent),
            SLAB_ENTRY.pack(KIND_SLAB, 0, 1, NO_BLOCK, 1, NO_EXTENT, NO_EXTENT, 0, 0),
        )
    return extent


def give(parts: Components, *extents: int) -> None:
    for extent in extents:
        with parts.extents.lock, Rollback(parts.file) as rollback:
            parts.extents.free(extent, rollback)


def allocator(parts: Components) -> tuple[int, int]:
    """Return the first free extent and the fresh one."""
    shorts = parts.file.shorts
    return shorts[FREE_EXTENTS_OFFSET >> 1], shorts[FRESH_EXTENT_OFFSET >> 1]


def test_every_extent_is_taken_once_and_the_file_grows_for_more(path: Path) -> None:
    with open_components(path, 4 * MIB) as parts:
        taken = []
        with pytest.raises(StoreFullError):
            while True:
                taken.append(take(parts))
        assert len(set(taken)) == len(taken) == 4 * MIB // EXTENT_SIZE - FIXED_EXTENTS - SEGMENTS
        assert min(taken) >= FIXED_EXTENTS
        assert not set(taken) & set(parts.file.directory)
        assert parts.file.size == 4 * MIB
        assert allocator(parts) == (NO_EXTENT, 64)
        give(parts, *taken)
    assert [str(problem) for problem in check_file(path)] == []


def test_extents_given_back_come_again_newest_first_before_the_file_grows(path: Path) -> None:
    with open_components(path) as parts:
        taken = [take(parts) for _ in range(12)]
        size = parts.file.size
        give(parts, *taken)
        assert [take(parts) for _ in taken] == taken[::-1]
        assert parts.file.size == size
        give(parts, *taken)
    assert [str(problem) for problem in check_file(path)] == []


def test_file_does_not_grow_while_an_extent_is_free_or_fresh(path: Path) -> None:
    with open_components(path) as parts:
        size = parts.file.size
        taken = [take(parts) for _ in range(size // EXTENT_SIZE - FIXED_EXTENTS - SEGMENTS)]
        assert parts.file.size == size
        taken.append(take(parts))
        assert parts.file.size == size + 16 * EXTENT_SIZE
        assert allocator(parts) == (NO_EXTENT, size // EXTENT_SIZE + 1)
        give(parts, *taken)
    assert [str(problem) for problem in check_file(path)] == []


def test_what_the_file_has_grown_by_is_not_looked_at_for_older_records(path: Path) -> None:
    with open_components(path) as parts:
        before = parts.file.extent_count
        while parts.file.extent_count == before:
            take(parts)
        looked_at = parts.extents.looked_at
        assert not any(looked_at[:before])
        assert all(looked_at[before : parts.file.extent_count])
        assert not any(looked_at[parts.file.extent_count :])


def test_table_takes_no_extent_whose_records_power_loss_could_bring_back(path: Path) -> None:
    """It takes others until everything has been flushed; and then those too."""
    with open_components(path, 4 * MIB) as parts:
        taken = [take(parts) for _ in range(4)]
        give(parts, *taken)
        assert not parts.extents.waits_for_flush
        assert take(parts, for_segment=True) == taken.pop()
        parts.file.note_freed()
        assert parts.extents.waits_for_flush
        more = [take(parts, for_segment=True) for _ in range(12)]
        assert not set(taken) & set(more)
        assert take(parts) == taken[-1], "a slab takes what was one, flushed or not"
        with pytest.raises(StoreFullError):
            while True:
                more.append(take(parts, for_segment=True))
        parts.file.flush()
        assert not parts.extents.waits_for_flush
        assert take(parts, for_segment=True) == taken[-2]
        parts.file.require_rebuild()


@pytest.mark.parametrize("error", [StoreFullError("no room"), KeyboardInterrupt()])
def test_take_and_give_cut_short_anywhere_change_nothing(path: Path, error: BaseException) -> None:
    with open_components(path) as parts:
        first, second = take(parts), take(parts)
        give(parts, first)
        for fail_at in (1, 2):
            before = parts.file.map[: FIXED_EXTENTS * EXTENT_SIZE]
            for act in (lambda: take(parts), lambda: give(parts, second)):
                write = parts.file.write
                faulty = FaultyWrites(parts.file, fail_at, error)
                with pytest.raises(type(error)):
                    act()
                assert faulty.reached
                replace_writes(parts.file, write)
                assert parts.file.map[: FIXED_EXTENTS * EXTENT_SIZE] == before
        give(parts, second)
    assert [str(problem) for problem in check_file(path)] == []


@pytest.mark.parametrize("extent", [1, FIXED_EXTENTS - 1, 32, 15_258, 65_535])
def test_list_that_leads_to_no_extent_for_anyone_is_damage(path: Path, extent: int) -> None:
    with open_components(path) as parts:
        before = parts.file.shorts[FREE_EXTENTS_OFFSET >> 1]
        parts.file.write(FREE_EXTENTS_OFFSET, U16.pack(extent))
        with pytest.raises(CorruptStoreError, match=f"leads to extent {extent}, "):
            take(parts)
        parts.file.write(FREE_EXTENTS_OFFSET, U16.pack(before))
    assert [str(problem) for problem in check_file(path)] == []


def test_list_that_leads_to_an_extent_in_use_is_damage(path: Path) -> None:
    with open_components(path) as parts:
        segment = parts.file.directory[0]
        before = parts.file.shorts[FREE_EXTENTS_OFFSET >> 1]
        parts.file.write(FREE_EXTENTS_OFFSET, U16.pack(segment))
        with pytest.raises(CorruptStoreError, match=f"extent {segment} is on the list of free"):
            take(parts)
        parts.file.write(FREE_EXTENTS_OFFSET, U16.pack(before))
    assert [str(problem) for problem in check_file(path)] == []
