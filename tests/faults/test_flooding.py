"""Keys whose hashes all lead to one entry of the directory, and more of them than it can have."""

import logging
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.disks import quick_folder

from faults.flooding import fill, forced
from kvstore import KVStore, StoreFullError
from kvstore.format.layout import EXTENT_SIZE, SEGMENT_SLOTS

KEYS = list(islice(map("key {}".format, count()), SEGMENT_SLOTS + 200))


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def test_full_entry_of_the_directory_refuses_keys_without_looking_at_those_it_has(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of keys that are refused anyway must not have the segment read for each of them."""
    with forced(0x1234), KVStore(path) as store:
        fill(store, KEYS)
        looked: list[object] = []
        monkeypatch.setattr("kvstore.format.segment._keys", lambda *given: looked.append(given))
        for number in range(100):
            with pytest.raises(StoreFullError):
                store.create(f"refused {number}", {})
        assert not looked
        monkeypatch.undo()
        store.delete(KEYS[0])
        store.create("refused 0", {})


def test_expired_key_makes_room_in_a_full_entry(path: Path, clock: FakeClock) -> None:
    with forced(0x1234), KVStore(path) as store:
        store.create("expiring", {}, ttl=1)
        for key in KEYS[: SEGMENT_SLOTS - 1]:
            store.create(key, {})
        with pytest.raises(StoreFullError):
            store.create("another", {})
        clock.advance(1)
        store.create("another", {})
        with pytest.raises(StoreFullError):
            store.create("expiring", {})


def merged(before: bytes, after: bytes) -> bytes:
    """Return `after`, but with the extents of `before` that held records then."""
    merged = bytearray(after)
    for start in range(6 * EXTENT_SIZE, len(before), EXTENT_SIZE):
        extent = before[start : start + EXTENT_SIZE]
        if b'{"n":' in extent:
            merged[start : start + EXTENT_SIZE] = extent
    return bytes(merged)


def test_more_records_of_one_entry_than_slots_are_said_and_come_back_when_others_are_deleted(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only power loss that undoes deletes, after which others were created, can leave so many."""
    added = KEYS[SEGMENT_SLOTS:][:100]
    with forced(7):
        with KVStore(path) as store:
            fill(store, KEYS[: SEGMENT_SLOTS + 1])
            before = path.read_bytes()
            for key in KEYS[:100]:
                store.delete(key)
            for key in added:
                store.create(key, {"n": key, "long": "x" * 5_000})
            # As power loss may leave it: the records' extents from before the deletes.
            image = merged(before, path.read_bytes())
        path.write_bytes(image)
        with KVStore(path) as store, caplog.at_level(logging.ERROR, "kvstore"):
            present = dict(store)
            assert len(present) == SEGMENT_SLOTS
            for key in sorted(present)[:100]:
                store.delete(key)
                del present[key]
        assert "100 records have no slot" in caplog.text
        with KVStore(path) as store:
            after = dict(store)
            assert present.items() <= after.items()
            assert len(after) == SEGMENT_SLOTS
            assert all(value["n"] == key for key, value in after.items())
        assert_consistent(path)
