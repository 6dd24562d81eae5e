"""`kvstore-inspect compact`: a file is made shorter in place."""

from os.path import getsize
from pathlib import Path

import pytest
from support.consistency import assert_consistent
from support.inspecting import DONE, LOCKED, PROBLEMS, WRONG_USAGE, inspect, start_inspector

from kvstore import KVStore
from kvstore.format.layout import EXTENT_MAP_OFFSET, FIRST_FILE_SIZE


def make_sparse(path: Path) -> dict[str, dict[str, str]]:
    """Fill a file and delete most of it again; return what is left."""
    contents = {f"k{number}": {"v": "x" * (number % 2_000)} for number in range(6_000)}
    with KVStore(path) as store:
        for key, value in contents.items():
            store.create(key, value)
        for number in range(6_000):
            if number % 20:
                store.delete(f"k{number}")
                del contents[f"k{number}"]
    return contents


def test_compact_makes_the_file_shorter_and_says_by_how_much(path: Path) -> None:
    contents = make_sparse(path)
    before = getsize(path)
    result = inspect("compact", path)
    assert result.status == DONE
    assert result.out == ""
    assert "300 records" in result.err
    assert getsize(path) < before / 2
    assert_consistent(path)
    with KVStore(path) as store:
        assert dict(store) == contents
    again = getsize(path)
    assert inspect("compact", path).status == DONE
    assert getsize(path) == again


def test_compact_makes_no_store_of_what_is_none(path: Path) -> None:
    assert inspect("compact", path).status == WRONG_USAGE
    assert not path.exists()
    for contents in (b"", bytes(100), b"text"):
        path.write_bytes(contents)
        assert inspect("compact", path).status == WRONG_USAGE
        assert path.read_bytes() == contents


def test_compact_of_a_file_in_use_is_refused(path: Path) -> None:
    with KVStore(path) as store:
        store.create("k", {})
        assert inspect("compact", path).status == LOCKED


def test_compact_leaves_a_file_alone_that_a_repair_is_for(path: Path) -> None:
    make_sparse(path)
    damaged = bytearray(path.read_bytes())
    damaged[EXTENT_MAP_OFFSET + 6 * 16 : EXTENT_MAP_OFFSET + 40 * 16] = bytes(34 * 16)
    damaged[len(damaged) // 2 : len(damaged) // 2 + 20_000] = b"\xff" * 20_000
    path.write_bytes(damaged)
    result = inspect("compact", path)
    assert result.status == PROBLEMS
    assert "repair" in result.err
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("command", [("keys",), ("verify",), ("dump",), ("info",)])
def test_reader_without_the_lock_survives_the_cut(path: Path, command: tuple[str, ...]) -> None:
    """It reads the file, and does not map it: what is cut off reads as nothing."""
    with KVStore(path) as store:
        for number in range(30_000):
            store.create(f"k{number}", {"v": "x" * 300})
        for number in range(30_000):
            if number % 100:
                store.delete(f"k{number}")
        with start_inspector(*command, "--unlocked", path) as reader:
            assert store.compact() > FIRST_FILE_SIZE
            _, said = reader.communicate(timeout=60)
    assert reader.returncode in (DONE, PROBLEMS), said
    assert "Traceback" not in said
