"""The data file by itself: made, healed, grown, written to in either way, and closed.

Locks between processes are in `test_processes`, full disks for real in the fault laboratory, file
sizes limited by the system there too.
"""

import errno
import os
import re
from pathlib import Path

import pytest
from support import MIB
from support.components import NOW_MS, FaultyWrites, open_components, replace_writes
from support.consistency import assert_consistent
from support.datafiles import (
    FIRST_EXTENTS,
    SCRATCH,
    opened,
    overwrite,
    refusing_disk,
    state_of,
)
from support.platforms import needs_fallocate, needs_free_names

import kvstore.file.platform
from kvstore import CorruptStoreError, KVStore, StoreFullError, UnsupportedFormatError
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
    STATE_OFFSET,
)
from kvstore.format.superblock import pack_identity, pack_state
from kvstore.recovery.opening import open_file

# --- creation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [None, b"", bytes(1), bytes(EXTENT_SIZE), bytes(FIRST_FILE_SIZE + 5)],
    ids=["missing", "empty", "one zero", "an extent of zeros", "more zeros than a new file"],
)
def test_missing_empty_or_zero_file_becomes_a_new_one(path: Path, before: bytes | None) -> None:
    if before is not None:
        path.write_bytes(before)
    with open_components(path):
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
    with open_components(path) as parts:
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
    with pytest.raises(UnsupportedFormatError, match=re.escape(str(path))):
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
    with open_components(path):
        pass
    assert_consistent(path)


# --- identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", IDENTITY_OFFSETS)
@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"x"])
def test_damaged_copy_of_the_identity_heals_at_the_first_change(
    path: Path, damaged: int, filling: bytes
) -> None:
    with open_components(path):
        pass
    whole = path.read_bytes()
    overwrite(path, damaged, filling * IDENTITY.size)
    with opened(path) as file:
        assert file.trusted
    assert path.read_bytes()[damaged : damaged + IDENTITY.size] != whole[: IDENTITY.size]
    with open_components(path):
        pass
    assert path.read_bytes() == whole


def test_file_with_both_identities_damaged_is_refused(path: Path) -> None:
    with open_components(path):
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
    with open_components(path):
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
    with open_components(path) as parts:
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
    with open_components(path):
        pass
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    flushed = []
    real = kvstore.file.platform.system.flush_file

    def flush(fd: int, *more: object) -> None:
        flushed.append(state_of(path)["clean"])
        real(fd)

    monkeypatch.setattr(kvstore.file.platform.system, "flush_file", flush)
    file.mark_dirty()
    assert flushed == [0]
    assert not file.pristine
    file.mark_dirty()
    assert flushed == [0]
    file.close()
    assert flushed == [0, 0, 1]
    assert_consistent(path)


def test_file_left_unclean_is_not_trusted_when_opened_again(path: Path) -> None:
    with open_components(path) as parts:
        parts.file.require_rebuild()
    assert state_of(path)["clean"] == 0
    with opened(path) as file:
        assert not file.trusted


@pytest.mark.parametrize("offset", range(STATE_OFFSET, STATE_OFFSET + STATE.size, 3))
def test_state_with_any_byte_changed_counts_as_not_clean(path: Path, offset: int) -> None:
    with open_components(path) as parts:
        parts.store(b"a", b"{}")
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 0x55]))
    with open_components(path) as parts:
        assert parts.slots.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


def test_clean_state_with_a_wrong_index_checksum_is_not_trusted(path: Path) -> None:
    with open_components(path) as parts:
        seed = parts.file.hash_seed
    state = state_of(path)
    checksum = state["index_checksum"] ^ 1
    packed = pack_state(True, FIRST_EXTENTS, FIRST_EXTENTS, 0, checksum, seed)
    overwrite(path, STATE_OFFSET, packed)
    with opened(path) as file:
        assert not file.trusted


def test_changed_index_is_not_trusted(path: Path) -> None:
    with open_components(path):
        pass
    overwrite(path, DIRECTORY_OFFSET + 4_000, b"\xff")
    with opened(path) as file:
        assert not file.trusted


@pytest.mark.parametrize("extra", [1, EXTENT_SIZE, 3 * EXTENT_SIZE + 17, 62 * MIB])
def test_file_longer_than_its_extents_is_cut_back(path: Path, extra: int) -> None:
    """A process died while it opened or grew the file; what is beyond holds nothing."""
    with open_components(path):
        pass
    closed = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(closed) + extra - 1)
        file.write(b"x")
    with opened(path) as data_file:
        assert data_file.size == FIRST_FILE_SIZE
    assert path.read_bytes() == closed


@pytest.mark.parametrize("missing", [1, EXTENT_SIZE])
def test_file_shorter_than_its_contents_is_refused_and_left_as_it_is(
    path: Path, missing: int
) -> None:
    with open_components(path) as parts:
        parts.file.grow()
        size = parts.file.size
    os.truncate(path, size - missing)
    shortened = path.read_bytes()
    with pytest.raises(CorruptStoreError, match="shorter than its contents"):
        open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    assert path.read_bytes() == shortened


def test_growth_that_power_loss_took_back_is_forgotten(path: Path) -> None:
    """The state on disk may speak of a growth whose extents never got there, if not clean."""
    with open_components(path) as parts:
        parts.file.flush()
        parts.file.grow()
        parts.file.require_rebuild()
    os.truncate(path, FIRST_FILE_SIZE + 100)
    assert state_of(path)["extent_count"] > state_of(path)["durable_count"] == FIRST_EXTENTS
    with open_components(path) as parts:
        assert parts.file.extent_count == FIRST_EXTENTS
    assert_consistent(path)


def test_flush_makes_growth_durable(path: Path) -> None:
    with open_components(path) as parts:
        parts.file.flush()
        assert state_of(path)["durable_count"] == FIRST_EXTENTS
        step = parts.file.grow()
        assert state_of(path)["durable_count"] == FIRST_EXTENTS
        assert state_of(path)["extent_count"] == FIRST_EXTENTS + step
        parts.file.flush()
        assert state_of(path)["durable_count"] == FIRST_EXTENTS + step


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

        replace_writes(file, note)
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
            replace_writes(file, real)
            real(offset, data[:2])
            raise StoreFullError("full")

        with pytest.raises(StoreFullError), Rollback(file) as rollback:
            rollback.write(SCRATCH, b"abc")
            replace_writes(file, half)
            rollback.write(SCRATCH + 8, b"defg")
        assert not any(file.map[SCRATCH : SCRATCH + 16])


def test_undo_that_fails_lets_nothing_more_be_written(path: Path) -> None:
    """The index may contradict itself. Reading goes on; the next opening builds it anew."""
    with open_components(path) as parts:
        file = parts.file
        parts.store(b"a", b"{}")
        FaultyWrites(file, 3, StoreFullError("no room"), lasting=True)
        with pytest.raises(StoreFullError, match="no room"), Rollback(file) as rollback:
            rollback.write(SCRATCH, b"abc")
            rollback.write(SCRATCH + 8, b"abc")
            rollback.write(SCRATCH + 16, b"abc")
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match=r"could not be undone \(no room\)"):
                file.write(SCRATCH, b"\0")
        assert parts.slots.find(parts.hash(b"a"), b"a") > 0
        file.flush()
    assert state_of(path)["clean"] == 0
    with open_components(path) as parts:
        assert parts.slots.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


# --- closing -----------------------------------------------------------------------------------


def test_close_lets_go_of_everything_though_its_flush_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_fd: int, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_components(path) as parts:
        parts.store(b"a", b"{}")
        with monkeypatch.context() as patch:
            patch.setattr(kvstore.file.platform.system, "flush_file", fail)
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
    with open_components(path) as parts:
        assert parts.slots.find(parts.hash(b"a"), b"a") > 0
    assert_consistent(path)


def test_close_is_whole_though_somebody_looks_at_a_part_of_the_map_yet(path: Path) -> None:
    """As the traceback of an operation does that was interrupted as it went through the map."""
    store = KVStore(path)
    store.create("key", {"n": 1})
    part = store._file.words[:8]
    store.close()
    assert_consistent(path)
    with KVStore(path) as again:
        assert again.read("key") == {"n": 1}
    part.release()


@needs_free_names
def test_close_says_that_the_path_names_another_file_and_leaves_that_alone(path: Path) -> None:
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS)
    path.rename(path.with_name("moved"))
    path.write_bytes(b"another")
    with pytest.raises(OSError, match="removed or replaced"):
        file.close()
    assert file.closed
    assert path.read_bytes() == b"another"
