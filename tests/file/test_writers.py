"""The write path: through the map, by pwrite, or refused; and where compiled code may store."""

import errno
import os
from pathlib import Path

import pytest
from support import MIB
from support.components import NOW_MS, Components, open_components
from support.consistency import assert_consistent
from support.datafiles import SCRATCH, opened, state_of
from support.platforms import IN_PLACE, needs_pwrite

import kvstore.file.platform
from kvstore import CorruptStoreError, StoreClosedError, StoreFullError
from kvstore.format.layout import FIRST_FILE_SIZE
from kvstore.recovery.opening import open_file


@pytest.fixture
def through_pwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files opened as on a file system that copies on write."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: False)


@pytest.fixture
def through_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files opened as on a file system that overwrites in place."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: True)


def use_the_parts(parts: Components) -> None:
    """Do a little of everything that writes."""
    for number in range(300):
        key = f"{'é' * 16 if number % 3 else ''}{number}".encode()
        value = b'{"n":"%s"}' % (b"x" * (number * 37 % 4_000))
        parts.store(key, value, NOW_MS + number if number % 2 else 0)
        if number % 4 == 0:
            parts.remove(key)
    for position in range(0, 2**15, 2**11):
        parts.segments.split_or_compact(position << 49, NOW_MS + 100)
    parts.file.grow()
    parts.file.flush()


@needs_pwrite
def test_both_ways_to_write_leave_the_same_bytes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = []
    for in_place in (True, False):
        randoms = iter([b"seed" * 2, b"file id " * 2])
        path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(
                kvstore.file.platform.system, "overwrites_in_place", lambda _fd, it=in_place: it
            )
            patch.setattr(os, "urandom", lambda _size, them=randoms: next(them))
            with open_components(path) as parts:
                use_the_parts(parts)
        assert_consistent(path)
        images.append(path.read_bytes())
    assert images[0] == images[1]


@pytest.mark.parametrize("in_place", IN_PLACE)
def test_what_is_written_is_seen_through_the_map_and_in_the_file(
    path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _fd: in_place)
    with opened(path) as file:
        file.write(SCRATCH, b"abcdefgh")
        assert file.map[SCRATCH : SCRATCH + 8] == b"abcdefgh"
        assert file.words[SCRATCH >> 3] == int.from_bytes(b"abcdefgh", "little")
        assert file.shorts[SCRATCH >> 1] == int.from_bytes(b"ab", "little")
        with path.open("rb") as plain:
            plain.seek(SCRATCH)
            assert plain.read(8) == b"abcdefgh"


@needs_pwrite
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


@needs_pwrite
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


@needs_pwrite
@pytest.mark.usefixtures("through_pwrite")
def test_disk_that_is_too_full_for_the_clean_flag_leaves_the_file_unclean(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(_fd: int, _data: bytes, _offset: int, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, open_components(path) as parts:
        parts.store(b"a", b"{}")
        patch.setattr(os, "pwrite", pwrite)
    assert state_of(path)["clean"] == 0
    with open_components(path) as parts:
        assert parts.slots.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


# --- what compiled code may touch --------------------------------------------------------------


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


@needs_pwrite
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


@needs_pwrite
@pytest.mark.usefixtures("through_pwrite")
def test_live_words_forbid_stores_into_a_private_map(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvstore.file.platform.system, "may_be_mapped_privately", lambda _fd: True)
    with opened(path) as file:
        assert file.private
        file.use_private_map()
        file.write(SCRATCH, b"abc")
        assert file.map[SCRATCH : SCRATCH + 3] == b"abc"
        assert path.read_bytes()[SCRATCH : SCRATCH + 3] == bytes(3)
        assert file.live.tolist() == [file.size, 0]


@needs_pwrite
@pytest.mark.usefixtures("through_pwrite")
def test_pwrite_that_began_before_the_file_became_read_only_is_refused(path: Path) -> None:
    """An operation of another thread may have got the way to write before that."""
    with opened(path) as file:
        write = file.write
        file.make_read_only(StoreFullError("no room"))
        with pytest.raises(CorruptStoreError, match=r"could not be undone \(no room\)"):
            write(SCRATCH, b"abc")
        assert path.read_bytes()[SCRATCH : SCRATCH + 3] == bytes(3)
