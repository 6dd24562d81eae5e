"""What is to be done with a file's index is decided without a change of the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import MIB
from support.components import NOW_MS, open_components
from support.datafiles import FIRST_EXTENTS, overwrite

from kvstore import CorruptStoreError, UnsupportedFormatError
from kvstore.file.opening import FoundFile
from kvstore.file.platform import system
from kvstore.format.layout import (
    DIRECTORY_OFFSET,
    EXTENT_SIZE,
    FIRST_FILE_SIZE,
    HOLDER_OFFSET,
    IDENTITY_OFFSETS,
    RECORD_MAGIC_BYTES,
    STATE_OFFSET,
)
from kvstore.format.superblock import State, pack_holder, pack_identity
from kvstore.recovery.opening import decide, open_file


def make_file(path: Path, keys: int = 3) -> int:
    """Make a closed file with some records; return its hash seed."""
    with open_components(path) as parts:
        for number in range(keys):
            parts.store(b"%d" % number, b"{}")
        return parts.file.hash_seed


@contextmanager
def found(path: Path) -> Iterator[FoundFile]:
    """Look at a file through a descriptor that cannot change it; check that it is as before."""
    before = path.read_bytes()
    fd = os.open(path, os.O_RDONLY | system.flags)
    try:
        yield FoundFile(str(path), fd)
    finally:
        os.close(fd)
    assert path.read_bytes() == before


def test_index_of_a_file_that_was_closed_is_used(path: Path) -> None:
    make_file(path)
    with found(path) as file:
        assert decide(file) == ("", FIRST_EXTENTS)


@pytest.mark.parametrize(
    ("holder", "why"), [(77, "was not closed"), (0, "was closed after a change that was cut short")]
)
def test_index_of_a_file_that_is_not_clean_is_rebuilt(path: Path, holder: int, why: str) -> None:
    seed = make_file(path)
    overwrite(path, STATE_OFFSET, State(False, FIRST_EXTENTS, FIRST_EXTENTS, 0, 0).pack(seed))
    overwrite(path, HOLDER_OFFSET, pack_holder(holder))
    with found(path) as file:
        distrust, count = decide(file)
    assert why in distrust
    assert count == FIRST_EXTENTS


def test_damaged_index_is_rebuilt_if_all_records_are_whole(path: Path) -> None:
    make_file(path)
    overwrite(path, DIRECTORY_OFFSET + 4_000, b"\xff")
    with found(path) as file:
        assert decide(file) == ("was closed, but its index is damaged", FIRST_EXTENTS)


def test_damaged_index_is_not_rebuilt_where_that_would_lose_a_record(path: Path) -> None:
    make_file(path)
    record = path.read_bytes().rfind(RECORD_MAGIC_BYTES)
    overwrite(path, DIRECTORY_OFFSET + 4_000, b"\xff")
    overwrite(path, record + 20, b"\xff")
    with found(path) as file, pytest.raises(CorruptStoreError, match="would lose records"):
        decide(file)


def test_record_beyond_the_end_of_a_file_in_use_makes_it_longer(path: Path) -> None:
    """Power loss took back the new length in the state, and not the record."""
    seed = make_file(path)
    image = path.read_bytes()
    record = image.rfind(RECORD_MAGIC_BYTES)
    extent = record // EXTENT_SIZE * EXTENT_SIZE
    overwrite(path, STATE_OFFSET, State(False, FIRST_EXTENTS, FIRST_EXTENTS, 0, 0).pack(seed))
    overwrite(path, FIRST_FILE_SIZE + EXTENT_SIZE, image[extent : extent + EXTENT_SIZE])
    with found(path) as file:
        _, count = decide(file)
    assert count == FIRST_EXTENTS + 2


@pytest.mark.parametrize("contents", [b"", bytes(3 * EXTENT_SIZE)], ids=["empty", "zeros"])
def test_blank_file_is_told_and_not_filled_where_none_is_to_be_created(
    path: Path, contents: bytes
) -> None:
    path.write_bytes(contents)
    with found(path) as file:
        assert file.is_blank
    with pytest.raises(UnsupportedFormatError, match="no store is in the file"):
        open_file(str(path), 64 * MIB, 0.0, NOW_MS, create=False)
    assert path.read_bytes() == contents


def test_of_two_identities_the_one_that_fits_the_state_is_the_true_one(path: Path) -> None:
    seed = make_file(path)
    overwrite(path, IDENTITY_OFFSETS[0], pack_identity(bytes(16), seed ^ 1, NOW_MS))
    with found(path) as file:
        assert file.hash_seed == seed
        assert file.identity_damaged
        assert decide(file) == ("", FIRST_EXTENTS)


def test_repair_opens_what_would_be_refused(path: Path) -> None:
    make_file(path)
    record = path.read_bytes().rfind(RECORD_MAGIC_BYTES)
    overwrite(path, DIRECTORY_OFFSET + 4_000, b"\xff")
    overwrite(path, record + 20, b"\xff")
    file = open_file(str(path), 64 * MIB, 0.0, NOW_MS, mending=True)
    assert (file.trusted, file.distrust) == (False, "is being repaired")
    file.require_rebuild()
    file.close()
