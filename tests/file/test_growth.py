"""A data file that grows: by how much, how far, and on a disk that has not the room."""

import errno
import os
from pathlib import Path

import pytest
from support import MIB
from support.components import NOW_MS, FaultyWrites, open_components
from support.consistency import assert_consistent
from support.datafiles import FIRST_EXTENTS, opened, refusing_disk, state_of
from support.platforms import needs_fallocate

import kvstore.file.platform
from kvstore import StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.format.layout import EXTENT_SIZE, FIRST_FILE_SIZE, MAX_FILE_SIZE
from kvstore.recovery.opening import open_file


def grow_to_the_limit(file: DataFile) -> list[int]:
    """Grow until it is refused; return the steps in extents."""
    steps = []
    with pytest.raises(StoreFullError):
        while True:
            steps.append(file.grow())
    return steps


@needs_fallocate
def test_file_grows_by_an_eighth_between_1_and_64_mib_up_to_its_limit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is reserved for real here: a gigabyte would take its time."""
    limit = MAX_FILE_SIZE
    monkeypatch.setattr(
        kvstore.file.platform.system, "reserve", lambda fd, _, end: os.ftruncate(fd, end)
    )
    with opened(path, limit) as file:
        count = file.extent_count
        for step in grow_to_the_limit(file):
            assert step == min(max(16, count // 8), 1024, limit // EXTENT_SIZE - count)
            count += step
        assert count == file.extent_count == file.max_extents == 15_258
        assert file.size == path.stat().st_size == count * EXTENT_SIZE
        assert file.size <= limit


@pytest.mark.parametrize("max_bytes", [4 * MIB, 4 * MIB + EXTENT_SIZE - 1, 5_000_000])
def test_file_grows_to_the_last_whole_extent_of_its_limit(path: Path, max_bytes: int) -> None:
    with opened(path, max_bytes) as file:
        grow_to_the_limit(file)
        assert max_bytes - EXTENT_SIZE < file.size <= max_bytes
        with pytest.raises(StoreFullError) as error:
            file.grow()
        assert error.value.__cause__ is None
        assert f"{file.size:,} bytes" in str(error.value)


def test_file_larger_than_its_limit_opens_and_does_not_grow(path: Path) -> None:
    with opened(path, 8 * MIB) as file:
        grow_to_the_limit(file)
        size = file.size
    with opened(path, 4 * MIB) as file:
        assert file.size == size
        with pytest.raises(StoreFullError):
            file.grow()


@needs_fallocate
def test_growth_is_reserved_on_disk_before_it_counts(path: Path) -> None:
    reserved: list[tuple[int, int]] = []

    def note(start: int, end: int) -> bool:
        reserved.append((start, end))
        return False

    with refusing_disk(note), opened(path) as file:
        before = file.size
        file.grow()
        assert reserved[-1] == (before, file.size)
        assert path.stat().st_blocks * 512 >= file.size


def test_new_extents_are_zeros_that_may_be_written_and_read(path: Path) -> None:
    with opened(path) as file:
        before = file.size
        file.grow()
        assert not any(file.map[before : file.size])
        file.write(file.size - 3, b"end")
        assert path.read_bytes()[: file.size].endswith(b"end")
        assert file.map[file.size - 3 : file.size] == b"end"


@needs_fallocate
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_full_disk_is_store_full_with_the_error_as_its_cause(path: Path, number: int) -> None:
    with opened(path) as file:
        with refusing_disk(lambda _start, _end: True, number):
            for _ in range(2):
                with pytest.raises(StoreFullError) as error:
                    file.grow()
                assert isinstance(error.value.__cause__, OSError)
                assert error.value.__cause__.errno == number
                assert file.size == path.stat().st_size == FIRST_FILE_SIZE
                assert file.extent_count == state_of(path)["extent_count"] == FIRST_EXTENTS
        assert file.grow() == 1


@needs_fallocate
def test_other_errors_of_reserving_are_passed_on(path: Path) -> None:
    with opened(path) as file:
        with refusing_disk(lambda _start, _end: True, errno.EIO):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)) as error:
                file.grow()
            assert error.value.errno == errno.EIO
        assert file.size == path.stat().st_size == FIRST_FILE_SIZE
        assert file.grow() == 16


@needs_fallocate
@pytest.mark.parametrize("left", range(1, 16))
def test_step_is_halved_until_the_disk_has_room_for_it(path: Path, left: int) -> None:
    room = FIRST_FILE_SIZE + left * EXTENT_SIZE
    with opened(path) as file:
        with refusing_disk(lambda _start, end: end > room):
            steps = grow_to_the_limit(file)
        assert steps[0] == 1 << left.bit_length() - 1  # the largest of 16, 8, 4, 2, 1 that fits
        assert steps[1:2] in ([], [1])  # the disk was full a moment ago: ask for little
        assert sum(steps) == left
        assert file.size == path.stat().st_size == room
        assert file.grow() == 1
        assert file.grow() == 16  # once one was granted without ado, all is as before
    assert state_of(path)["extent_count"] == FIRST_EXTENTS + left + 17


@needs_fallocate
def test_blocks_are_filled_with_zeros_where_the_system_cannot_reserve_them(path: Path) -> None:
    with refusing_disk(lambda _start, _end: True, errno.EOPNOTSUPP), open_components(path) as parts:
        parts.file.grow()
        parts.store(b"a", b"{}")
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert_consistent(path)


@needs_fallocate
def test_holes_of_a_file_are_filled_as_it_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_components(path) as parts:
        parts.store(b"a", b'{"b":1}')
    contents = path.read_bytes()
    make_holes(path, contents)
    with monkeypatch.context() as patch, refusing_disk(lambda start, _end: start == 0):
        patch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: True)
        with pytest.raises(StoreFullError) as error:
            open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert isinstance(error.value.__cause__, OSError)
    assert path.read_bytes() == contents
    for missing in (False, True):  # with posix_fallocate, and without
        make_holes(path, contents)
        with refusing_disk(lambda *_, it=missing: it, errno.EOPNOTSUPP), open_components(path):
            assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert path.read_bytes() == contents


def make_holes(path: Path, contents: bytes) -> None:
    """Write a file with a hole for each page of zeros, where the file system has such."""
    path.unlink()
    with path.open("wb") as file:
        file.truncate(len(contents))
        for page in range(0, len(contents), 4096):
            if any(contents[page : page + 4096]):
                file.seek(page)
                file.write(contents[page : page + 4096])


def test_growth_whose_state_cannot_be_written_does_not_count(path: Path) -> None:
    with opened(path) as file:
        FaultyWrites(file, 1, StoreFullError("no room"))
        with pytest.raises(StoreFullError):
            file.grow()
        assert file.extent_count == FIRST_EXTENTS
        assert file.size == FIRST_FILE_SIZE
        assert file.grow() == 16
    assert path.stat().st_size == FIRST_FILE_SIZE + 16 * EXTENT_SIZE
