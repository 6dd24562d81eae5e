"""The inspector on a table whose segments merge, also while it looks at them."""

from collections.abc import Callable
from itertools import count, islice

import pytest
from support.inspecting import DONE, inspect
from support.stores import OpenStore

from kvstore import KVStore
from kvstore.format.layout import (
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_SIZE,
    RECORD_HEADER_SIZE,
    STRIPE_SHIFT,
    key_hash,
)
from kvstore_inspect.file_view import FileView, open_view
from kvstore_inspect.records import Record, Records


@pytest.fixture
def split(open_store: OpenStore) -> KVStore:
    """An open store with several segments for the keys of one stripe, of which few are left."""
    store = open_store()
    seed = store._file.hash_seed
    names = (f"{'é' * 16 if number % 9 == 0 else ''}{number}" for number in count())
    own = (name for name in names if key_hash(name.encode(), seed) >> STRIPE_SHIFT == 3)
    keys = list(islice(own, 3_000))
    for number, key in enumerate(keys):
        store.create(key, {"n": number})
    for key in keys[150:]:
        store.delete(key)
    assert store.stats().segments >= 19
    return store


def merge(store: KVStore) -> None:
    assert store._all_keys.merge_segments() >= 3


def at_first_read(
    monkeypatch: pytest.MonkeyPatch, wanted: Callable[[int, int], bool], change: Callable[[], None]
) -> list[int]:
    """Do `change` once, after the first read of an offset and a size that is wanted."""
    real, done = FileView.read, [0]

    def read(view: FileView, offset: int, size: int) -> bytes:
        found = real(view, offset, size)
        if not done[0] and wanted(offset, size):
            done[0] = 1
            change()
        return found

    monkeypatch.setattr(FileView, "read", read)
    return done


def is_record(offset: int, size: int) -> bool:
    return offset >= EXTENT_SIZE and RECORD_HEADER_SIZE < size < 4_096


def is_directory(offset: int, size: int) -> bool:
    return (offset, size) == (DIRECTORY_OFFSET, DIRECTORY_SIZE)


def test_every_command_takes_a_merged_table_as_it_is(split: KVStore) -> None:
    merge(split)
    live = dict(split)
    for unlocked in (["--unlocked"], []):
        if not unlocked:
            split.close()
        assert inspect("verify", split.path, *unlocked).status == DONE
        info = inspect("info", split.path, "--json", *unlocked).json()
        assert (info["table"]["segments"], info["records"]["count"]) == (16, len(live))
        assert inspect("slots", split.path, *unlocked).status == DONE
        listed = inspect("keys", split.path, "--json", *unlocked).lines()
        assert sorted(each["key"] for each in listed) == sorted(live)


@pytest.mark.parametrize("after", [1, 30, 100])
def test_records_are_read_once_while_segments_merge(split: KVStore, after: int) -> None:
    """Between two records, of a segment that was read already or is just being read."""
    live = dict(split)
    with open_view(split.path, unlocked=True) as view:
        found = []
        for number, record in enumerate(Records(view), 1):
            assert isinstance(record, Record)
            found.append(record.key)
            if number == after:
                merge(split)
    assert sorted(found) == sorted(live)


def test_records_replaced_and_merged_while_they_are_read_are_found_where_they_are(
    split: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither record nor slot is where it was."""
    keys = set(split)

    def change() -> None:
        for key in keys:
            split.put(key, {"again": key})
        merge(split)

    with open_view(split.path, unlocked=True) as view:
        done = at_first_read(monkeypatch, is_record, change)
        found = list(Records(view))
    assert done[0]
    assert sorted(each.key for each in found if isinstance(each, Record)) == sorted(keys)
    assert len(found) == len(keys)


def test_one_key_is_found_while_its_segment_merges(
    split: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = max(split, key=lambda key: key_hash(key.encode(), split._file.hash_seed))
    with open_view(split.path, unlocked=True) as view:
        done = at_first_read(monkeypatch, lambda offset, size: size == 2, lambda: merge(split))
        found = Records(view).find(key)
    assert done[0]
    assert isinstance(found, Record)
    assert found.key == key


@pytest.mark.parametrize("command", ["verify", "info"])
def test_merge_between_two_reads_is_no_damage(
    split: KVStore, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    live = len(split)
    wanted = is_directory if command == "verify" else lambda _, size: size == EXTENT_SIZE
    done = at_first_read(monkeypatch, wanted, lambda: merge(split))
    outcome = inspect(command, split.path, "--unlocked", "--json")
    assert done[0]
    assert outcome.status == DONE
    if command == "info":
        assert outcome.json()["records"]["count"] == live
