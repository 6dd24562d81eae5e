"""The data file by itself: made, healed, grown, written to in either way, and closed.

Locks between processes are in `test_processes`, full disks for real in the fault laboratory, file
sizes limited by the system there too.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import MIB
from support.parts import NOW_MS, FaultyDoor, Parts, open_parts, replace_door

import kvstore.file.platform
from kvstore import (
    CorruptStoreError,
    StoreClosedError,
    StoreFullError,
    UnsupportedFormatError,
)
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.layout import (
    DIRECTORY_OFFSET,
    EXTENT_SIZE,
    FILE_MAGIC,
    FIRST_FILE_SIZE,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    MAX_FILE_SIZE,
    STATE,
    STATE_FIELDS,
    STATE_OFFSET,
)
from kvstore.format.superblock import pack_identity, pack_state
from kvstore.recovery.check import check_file
from kvstore.recovery.opening import open_file

FIRST_EXTENTS = FIRST_FILE_SIZE // EXTENT_SIZE
SCRATCH = 7 * EXTENT_SIZE  # a place in a new file where nothing else is

needs_fallocate = pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="the system cannot reserve blocks"
)


@contextmanager
def opened(path: Path, max_bytes: int = 64 * MIB) -> Iterator[DataFile]:
    """Open the file at `path`, which gets no index, and close it at the end."""
    file = open_file(str(path), max_bytes, 0.0, NOW_MS)
    try:
        yield file
    finally:
        file.require_rebuild()
        file.close()


@pytest.fixture
def through_pwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files opened as on a file system that copies on write."""
    monkeypatch.setattr(kvstore.file.platform, "overwrites_in_place", lambda _fd: False)


def state_of(path: Path) -> dict[str, int]:
    return dict(zip(STATE_FIELDS, STATE.unpack_from(path.read_bytes(), STATE_OFFSET), strict=True))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def assert_consistent(path: Path) -> None:
    assert [str(problem) for problem in check_file(path)] == []


# --- creation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [None, b"", bytes(1), bytes(EXTENT_SIZE), bytes(FIRST_FILE_SIZE + 5)],
    ids=["missing", "empty", "one zero", "an extent of zeros", "more zeros than a new file"],
)
def test_missing_empty_or_zero_file_becomes_a_new_one(path: Path, before: bytes | None) -> None:
    if before is not None:
        path.write_bytes(before)
    with open_parts(path):
        pass
    assert path.stat().st_size == FIRST_FILE_SIZE
    assert_consistent(path)


def test_new_file_has_two_equal_identities_with_random_parts(path: Path) -> None:
    with opened(path) as file:
        image = path.read_bytes()
        one, other = (image[offset : offset + IDENTITY.size] for offset in IDENTITY_OFFSETS)
        assert one == other
        magic, version, extent_size, file_id, seed, created_at, _ = IDENTITY.unpack(one)
        assert (magic, version, extent_size, created_at) == (FILE_MAGIC, 2, 65_536, NOW_MS)
        assert seed == file.hash_seed
        assert one == pack_identity(file_id, seed, created_at)
    second = path.with_name("second")
    with opened(second) as file:
        assert file.hash_seed != seed
        assert IDENTITY.unpack_from(second.read_bytes())[3] != file_id


def test_new_file_is_not_clean_until_its_index_is_built_and_it_is_closed(path: Path) -> None:
    with opened(path) as file:
        assert not file.trusted
        assert not file.pristine
        assert state_of(path)["clean"] == 0
    assert state_of(path)["clean"] == 0
    with open_parts(path) as parts:
        assert parts.file.trusted
        assert state_of(path)["clean"] == 0
    assert state_of(path)["clean"] == 1


@pytest.mark.parametrize(
    "contents",
    [b"x", b"SQLite format 3\0" + bytes(5_000), bytes(9_999) + b"\1", bytes(MIB) + b"x"],
    ids=["one byte", "another format", "zeros with a one at the end", "a text after zeros"],
)
def test_file_of_another_kind_is_refused_and_left_as_it_is(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    with pytest.raises(UnsupportedFormatError, match=str(path)):
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert path.read_bytes() == contents


def test_more_zeros_than_any_store_has_are_refused(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_SIZE + 1)
    with pytest.raises(UnsupportedFormatError):
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert path.stat().st_size == MAX_FILE_SIZE + 1


@needs_fallocate
@pytest.mark.parametrize("was_there", [False, True])
def test_new_file_that_the_disk_has_no_room_for_is_left_as_it_was(
    path: Path, was_there: bool
) -> None:
    if was_there:
        path.touch()
    with refusing_disk(lambda _start, _end: True), pytest.raises(StoreFullError) as error:
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert path.exists() == was_there
    assert not was_there or path.stat().st_size == 0
    with open_parts(path):
        pass
    assert_consistent(path)


# --- identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", IDENTITY_OFFSETS)
@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"x"])
def test_damaged_copy_of_the_identity_heals_at_the_first_change(
    path: Path, damaged: int, filling: bytes
) -> None:
    with open_parts(path):
        pass
    whole = path.read_bytes()
    overwrite(path, damaged, filling * IDENTITY.size)
    with opened(path) as file:
        assert file.trusted
    assert path.read_bytes()[damaged : damaged + IDENTITY.size] != whole[: IDENTITY.size]
    with open_parts(path):
        pass
    assert path.read_bytes() == whole


def test_file_with_both_identities_damaged_is_refused(path: Path) -> None:
    with open_parts(path):
        pass
    for offset in IDENTITY_OFFSETS:
        overwrite(path, offset + IDENTITY.size - 1, b"?")
    damaged = path.read_bytes()
    with pytest.raises(CorruptStoreError, match="both copies of the identity"):
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("field", "value"), [("version", 1), ("version", 3), ("extent_size", 131_072)]
)
def test_file_of_another_format_is_refused_and_left_as_it_is(
    path: Path, field: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"version": "FORMAT_VERSION", "extent_size": "EXTENT_SIZE"}
    with open_parts(path):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(f"kvstore.format.superblock.{names[field]}", value)
        identity = pack_identity(bytes(16), 1, NOW_MS)
    for offset in IDENTITY_OFFSETS:
        overwrite(path, offset, identity)
    other = path.read_bytes()
    with pytest.raises(UnsupportedFormatError, match=f"{value:,}") as error:
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert path.read_bytes() == other
    # Who has a file of the first one made it with a commit from before this one.
    assert ("never released" in str(error.value)) == ((field, value) == ("version", 1))


# --- state -------------------------------------------------------------------------------------


def test_holder_is_this_process_while_the_file_is_open_and_nobody_after(path: Path) -> None:
    with opened(path):
        assert HOLDER.unpack_from(path.read_bytes(), HOLDER_OFFSET) == (os.getpid(),)
    assert HOLDER.unpack_from(path.read_bytes(), HOLDER_OFFSET) == (0,)


def test_opening_without_a_change_leaves_the_file_as_it_was(path: Path) -> None:
    with open_parts(path) as parts:
        parts.store(b"a", b"{}")
    closed = path.read_bytes()
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert file.trusted
    assert file.pristine
    assert state_of(path)["clean"] == 1
    file.close()
    assert path.read_bytes() == closed


def test_first_change_marks_the_file_unclean_before_it_happens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_parts(path):
        pass
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    flushed = []
    real = kvstore.file.platform.flush_file

    def flush(fd: int, *more: object) -> None:
        flushed.append(state_of(path)["clean"])
        real(fd)

    monkeypatch.setattr(kvstore.file.platform, "flush_file", flush)
    file.mark_dirty()
    assert flushed == [0]
    assert not file.pristine
    file.mark_dirty()
    assert flushed == [0]
    file.close()
    assert flushed == [0, 0, 1]
    assert_consistent(path)


def test_file_left_unclean_is_not_trusted_when_opened_again(path: Path) -> None:
    with open_parts(path) as parts:
        parts.file.require_rebuild()
    assert state_of(path)["clean"] == 0
    with opened(path) as file:
        assert not file.trusted


@pytest.mark.parametrize("offset", range(STATE_OFFSET, STATE_OFFSET + STATE.size, 3))
def test_state_with_any_byte_changed_counts_as_not_clean(path: Path, offset: int) -> None:
    with open_parts(path) as parts:
        parts.store(b"a", b"{}")
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 0x55]))
    with open_parts(path) as parts:
        assert parts.table.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


def test_clean_state_with_a_wrong_index_checksum_is_not_trusted(path: Path) -> None:
    with open_parts(path) as parts:
        seed = parts.file.hash_seed
    state = state_of(path)
    checksum = state["index_checksum"] ^ 1
    packed = pack_state(True, FIRST_EXTENTS, FIRST_EXTENTS, 0, checksum, seed)
    overwrite(path, STATE_OFFSET, packed)
    with opened(path) as file:
        assert not file.trusted


def test_changed_index_is_not_trusted(path: Path) -> None:
    with open_parts(path):
        pass
    overwrite(path, DIRECTORY_OFFSET + 4_000, b"\xff")
    with opened(path) as file:
        assert not file.trusted


@pytest.mark.parametrize("extra", [1, EXTENT_SIZE, 3 * EXTENT_SIZE + 17, 62 * MIB])
def test_file_longer_than_its_extents_is_cut_back(path: Path, extra: int) -> None:
    """A process died while it opened or grew the file; what is beyond holds nothing."""
    with open_parts(path):
        pass
    closed = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(closed) + extra - 1)
        file.write(b"x")
    with opened(path) as data_file:
        assert data_file.size == FIRST_FILE_SIZE
        assert path.stat().st_size == FIRST_FILE_SIZE
    assert path.read_bytes() == closed


@pytest.mark.parametrize("missing", [1, EXTENT_SIZE])
def test_file_shorter_than_its_contents_is_refused_and_left_as_it_is(
    path: Path, missing: int
) -> None:
    with open_parts(path) as parts:
        parts.file.grow()
        size = parts.file.size
    os.truncate(path, size - missing)
    shortened = path.read_bytes()
    with pytest.raises(CorruptStoreError, match="shorter than its contents"):
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert path.read_bytes() == shortened


def test_growth_that_power_loss_took_back_is_forgotten(path: Path) -> None:
    """The state on disk may speak of a growth whose extents never got there, if not clean."""
    with open_parts(path) as parts:
        parts.file.flush()
        parts.file.grow()
        parts.file.require_rebuild()
    os.truncate(path, FIRST_FILE_SIZE + 100)
    assert state_of(path)["extent_count"] > state_of(path)["durable_count"] == FIRST_EXTENTS
    with open_parts(path) as parts:
        assert parts.file.extent_count == FIRST_EXTENTS
    assert_consistent(path)


def test_flush_makes_growth_durable(path: Path) -> None:
    with open_parts(path) as parts:
        parts.file.flush()
        assert state_of(path)["durable_count"] == FIRST_EXTENTS
        step = parts.file.grow()
        assert state_of(path)["durable_count"] == FIRST_EXTENTS
        assert state_of(path)["extent_count"] == FIRST_EXTENTS + step
        parts.file.flush()
        assert state_of(path)["durable_count"] == FIRST_EXTENTS + step


# --- growth ------------------------------------------------------------------------------------


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
    monkeypatch.setattr(kvstore.file.platform, "reserve", lambda fd, _, end: os.ftruncate(fd, end))
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
        assert path.read_bytes().endswith(b"end")
        assert file.map[file.size - 3 : file.size] == b"end"


@contextmanager
def refusing_disk(
    is_full: Callable[[int, int], bool], number: int = errno.ENOSPC
) -> Iterator[None]:
    """Have the disk refuse to reserve some parts of a file, given by start and end."""
    real = os.posix_fallocate

    def posix_fallocate(fd: int, start: int, size: int, /) -> None:
        if is_full(start, start + size):
            # As the real one may, it leaves a part reserved and the file longer.
            os.ftruncate(fd, max(os.fstat(fd).st_size, start + size // 2))
            raise OSError(number, os.strerror(number))
        real(fd, start, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", posix_fallocate)
        yield


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
    with refusing_disk(lambda _start, _end: True, errno.EOPNOTSUPP), open_parts(path) as parts:
        parts.file.grow()
        parts.store(b"a", b"{}")
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert_consistent(path)


@needs_fallocate
def test_holes_of_a_file_are_filled_as_it_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_parts(path) as parts:
        parts.store(b"a", b'{"b":1}')
    contents = path.read_bytes()
    make_holes(path, contents)
    with monkeypatch.context() as patch, refusing_disk(lambda start, _end: start == 0):
        patch.setattr(kvstore.file.platform, "overwrites_in_place", lambda _fd: True)
        with pytest.raises(StoreFullError) as error:
            open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert isinstance(error.value.__cause__, OSError)
    assert path.read_bytes() == contents
    for missing in (False, True):  # with posix_fallocate, and without
        make_holes(path, contents)
        with refusing_disk(lambda *_, it=missing: it, errno.EOPNOTSUPP), open_parts(path):
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


# --- the write path -----------------------------------------------------------------------------


def use_the_parts(parts: Parts) -> None:
    """Do a little of everything that writes."""
    for number in range(300):
        key = f"{'é' * 16 if number % 3 else ''}{number}".encode()
        value = b'{"n":"%s"}' % (b"x" * (number * 37 % 4_000))
        parts.store(key, value, NOW_MS + number if number % 2 else 0)
        if number % 4 == 0:
            parts.remove(key)
    for position in range(0, 2**15, 2**11):
        parts.table.split_or_compact(position << 49, NOW_MS + 100)
    parts.file.grow()
    parts.file.flush()


def test_both_ways_to_write_leave_the_same_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    for in_place in (True, False):
        randoms = iter([b"seed" * 2, b"file id " * 2])
        path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(kvstore.file.platform, "overwrites_in_place", lambda _fd, it=in_place: it)
            patch.setattr(os, "urandom", lambda _size, them=randoms: next(them))
            with open_parts(path) as parts:
                use_the_parts(parts)
        assert_consistent(path)
        images.append(path.read_bytes())
    assert images[0] == images[1]


@pytest.mark.parametrize("in_place", [True, False], ids=["map", "pwrite"])
def test_what_is_written_is_seen_through_the_map_and_in_the_file(
    path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.file.platform, "overwrites_in_place", lambda _fd: in_place)
    with opened(path) as file:
        file.write(SCRATCH, b"abcdefgh")
        assert file.map[SCRATCH : SCRATCH + 8] == b"abcdefgh"
        assert file.words[SCRATCH >> 3] == int.from_bytes(b"abcdefgh", "little")
        assert file.shorts[SCRATCH >> 1] == int.from_bytes(b"ab", "little")
        with path.open("rb") as plain:
            plain.seek(SCRATCH)
            assert plain.read(8) == b"abcdefgh"


@pytest.mark.usefixtures("through_pwrite")
def test_full_disk_at_a_pwrite_is_store_full_and_other_errors_are_passed_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = errno.ENOSPC

    def pwrite(_fd: int, _data: bytes, _offset: int, /) -> int:
        raise OSError(number, os.strerror(number))

    with opened(path) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            with pytest.raises(StoreFullError, match="write 3 bytes") as error:
                file.write(SCRATCH, b"abc")
            assert isinstance(error.value.__cause__, OSError)
            number = errno.EIO
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                file.write(SCRATCH, b"abc")
        file.write(SCRATCH, b"abc")


@pytest.mark.usefixtures("through_pwrite")
def test_pwrite_that_writes_a_part_goes_on_with_the_rest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def short(fd: int, data: bytes, offset: int, /) -> int:
        return real(fd, data[:3], offset)

    with opened(path) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", short)
            file.write(SCRATCH, b"abcdefgh")
        assert file.map[SCRATCH - 1 : SCRATCH + 9] == b"\0abcdefgh\0"


@pytest.mark.usefixtures("through_pwrite")
def test_disk_that_is_too_full_for_the_clean_flag_leaves_the_file_unclean(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(_fd: int, _data: bytes, _offset: int, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, open_parts(path) as parts:
        parts.store(b"a", b"{}")
        patch.setattr(os, "pwrite", pwrite)
    assert state_of(path)["clean"] == 0
    with open_parts(path) as parts:
        assert parts.table.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


def test_growth_whose_state_cannot_be_written_does_not_count(path: Path) -> None:
    with opened(path) as file:
        FaultyDoor(file, 1, StoreFullError("no room"))
        with pytest.raises(StoreFullError):
            file.grow()
        assert file.extent_count == FIRST_EXTENTS
        assert file.size == FIRST_FILE_SIZE
        assert file.grow() == 16
    assert path.stat().st_size == FIRST_FILE_SIZE + 16 * EXTENT_SIZE


# --- what compiled code may touch --------------------------------------------------------------


@pytest.fixture
def through_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files opened as on a file system that overwrites in place."""
    monkeypatch.setattr(kvstore.file.platform, "overwrites_in_place", lambda _fd: True)


@pytest.mark.usefixtures("through_the_map")
def test_live_words_say_how_much_may_be_touched_and_never_move(path: Path) -> None:
    with opened(path) as file:
        place = file.live.buffer_info()
        assert file.live.tolist() == [FIRST_FILE_SIZE, 1]
        file.grow()
        assert file.live.tolist() == [file.size, 1]
        assert file.size > FIRST_FILE_SIZE
        file.close()
        assert file.live.tolist() == [0, 0]
        assert file.live.buffer_info() == place


@pytest.mark.usefixtures("through_pwrite")
def test_live_words_forbid_stores_where_changes_go_by_pwrite(path: Path) -> None:
    with opened(path) as file:
        assert file.live.tolist() == [FIRST_FILE_SIZE, 0]


@pytest.mark.usefixtures("through_the_map")
def test_live_words_forbid_stores_into_a_file_that_is_read_only_by_now(path: Path) -> None:
    with opened(path) as file:
        file.make_read_only(StoreFullError("no room"))
        assert file.live.tolist() == [file.size, 0]


@pytest.mark.usefixtures("through_the_map")
def test_live_words_forbid_stores_into_the_file_of_a_parent(path: Path) -> None:
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    file.detach_after_fork()
    assert file.live.tolist() == [file.size, 0]
    with pytest.raises(StoreClosedError, match="parent"):
        file.write(SCRATCH, b"abc")
    file._held.lock.release()


@pytest.mark.usefixtures("through_pwrite")
def test_live_words_forbid_stores_into_a_private_map(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.file.platform, "may_be_mapped_privately", lambda _fd: True)
    with opened(path) as file:
        assert file.private
        file.use_private_map()
        file.write(SCRATCH, b"abc")
        assert file.map[SCRATCH : SCRATCH + 3] == b"abc"
        assert path.read_bytes()[SCRATCH : SCRATCH + 3] == bytes(3)
        assert file.live.tolist() == [file.size, 0]


@pytest.mark.usefixtures("through_pwrite")
def test_pwrite_that_began_before_the_file_became_read_only_is_refused(path: Path) -> None:
    """An operation of another thread may have got the way to write before that."""
    with opened(path) as file:
        write = file.write
        file.make_read_only(StoreFullError("no room"))
        with pytest.raises(CorruptStoreError, match=r"could not be undone \(no room\)"):
            write(SCRATCH, b"abc")
        assert path.read_bytes()[SCRATCH : SCRATCH + 3] == bytes(3)


# --- rollback ------------------------------------------------------------------------------------


def test_undo_keeps_what_a_block_wrote_that_did_not_raise(path: Path) -> None:
    with opened(path) as file:
        with Rollback(file) as rollback:
            rollback.write(SCRATCH, b"abc")
            rollback.write(SCRATCH + 1, b"x")
        assert file.map[SCRATCH : SCRATCH + 3] == b"axc"


@pytest.mark.parametrize("error", [StoreFullError("full"), KeyboardInterrupt(), MemoryError()])
def test_undo_takes_back_in_reverse_what_a_block_wrote_that_raised(
    path: Path, error: BaseException
) -> None:
    """In reverse: writes may overlap, and a reader never sees a later one without the earlier."""
    with opened(path) as file:
        file.write(SCRATCH, b"abcdef")
        written: list[tuple[int, bytes]] = []
        real = file.write

        def note(offset: int, data: bytes) -> None:
            written.append((offset - SCRATCH, data))
            real(offset, data)

        replace_door(file, note)
        with pytest.raises(type(error)), Rollback(file) as rollback:
            rollback.write(SCRATCH, b"123")
            rollback.write(SCRATCH + 1, b"45")
            rollback.write(SCRATCH + 2, b"6")
            raise error
        assert written[3:] == [(2, b"5"), (1, b"23"), (0, b"abc")]
        assert file.map[SCRATCH : SCRATCH + 6] == b"abcdef"


def test_undo_takes_back_the_write_that_failed_half_way(path: Path) -> None:
    with opened(path) as file:
        real = file.write

        def half(offset: int, data: bytes) -> None:
            replace_door(file, real)
            real(offset, data[:2])
            raise StoreFullError("full")

        with pytest.raises(StoreFullError), Rollback(file) as rollback:
            rollback.write(SCRATCH, b"abc")
            replace_door(file, half)
            rollback.write(SCRATCH + 8, b"defg")
        assert not any(file.map[SCRATCH : SCRATCH + 16])


def test_undo_that_fails_lets_nothing_more_be_written(path: Path) -> None:
    """The index may contradict itself. Reading goes on; the next opening builds it anew."""
    with open_parts(path) as parts:
        file = parts.file
        parts.store(b"a", b"{}")
        FaultyDoor(file, 3, StoreFullError("no room"), lasting=True)
        with pytest.raises(StoreFullError, match="no room"), Rollback(file) as rollback:
            rollback.write(SCRATCH, b"abc")
            rollback.write(SCRATCH + 8, b"abc")
            rollback.write(SCRATCH + 16, b"abc")
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match=r"could not be undone \(no room\)"):
                file.write(SCRATCH, b"\0")
        assert parts.table.find(parts.hash(b"a"), b"a") > 0
        file.flush()
    assert state_of(path)["clean"] == 0
    with open_parts(path) as parts:
        assert parts.table.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


# --- closing -----------------------------------------------------------------------------------


def test_close_lets_go_of_everything_though_its_flush_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_fd: int, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_parts(path) as parts:
        parts.store(b"a", b"{}")
        with monkeypatch.context() as patch:
            patch.setattr(kvstore.file.platform, "flush_file", fail)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                parts.file.flush()
        with pytest.raises(OSError, match="an earlier flush failed"):
            parts.file.flush()
        file = parts.file
        with pytest.raises(OSError, match="an earlier flush failed"):
            file.close()
        assert file.map.closed
        parts.file.close = lambda: None  # type: ignore[method-assign]
    assert state_of(path)["clean"] == 0
    with open_parts(path) as parts:
        assert parts.table.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


def test_close_says_that_the_path_names_another_file_and_leaves_that_alone(path: Path) -> None:
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    path.rename(path.with_name("moved"))
    path.write_bytes(b"another")
    with pytest.raises(OSError, match="removed or replaced"):
        file.close()
    assert file.closed
    assert path.read_bytes() == b"another"
