"""Recovery: the index of a file that was not closed is built anew from its records."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
from support import MIB, scaled, seeded_random
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.damage import is_bucket
from support.disks import quick_folder
from support.files import digest
from support.images import SECTOR, before_each_flush, write_image
from support.workload import Value, make_value

from kvstore import CorruptStoreError, KVStore, StoreFullError
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    DIRECTORY_OFFSET,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY,
    KIND_SLAB,
    RECORD_HEADER_SIZE,
)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def crash_copy(store: KVStore) -> Path:
    """Return a copy of the open file, as the death of its process would leave it."""
    return write_image(store.path.with_suffix(".crashed"), store.path.read_bytes())


def some_values(count: int, size: int = 100) -> dict[str, Value]:
    return {f"key {n}": make_value(f"key {n}", n, n % size) for n in range(count)}


def create_all(store: KVStore, values: dict[str, Value]) -> None:
    for key, value in values.items():
        store.create(key, value)


def log_of_opening(path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Open and close the file; return what was logged."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="kvstore"):
        KVStore(path).close()
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "kvstore" or record.name.startswith("kvstore.")
    ]


# --- what recovery gives -----------------------------------------------------------------------


def test_file_that_was_not_closed_is_recovered(path: Path) -> None:
    values = some_values(3_000, 1_000)
    with KVStore(path) as store:
        create_all(store, values)
        for number in range(0, 3_000, 3):
            store.delete(f"key {number}")
            del values[f"key {number}"]
        copy = crash_copy(store)
    with KVStore(copy) as recovered:
        assert dict(recovered) == values
        assert len(recovered) == len(values)
        assert "key 0" not in recovered
        for number in range(0, 3_000, 3):
            recovered.create(f"key {number}", {})
        assert len(recovered) == 3_000
    assert_consistent(copy)
    with KVStore(copy) as reopened:
        assert values.items() <= dict(reopened).items()


def test_times_to_live_survive_recovery(path: Path, clock: FakeClock) -> None:
    with KVStore(path) as store:
        store.create("short", {}, ttl=10)
        store.create("long", {}, ttl=100)
        store.create("for ever", {})
        copy = crash_copy(store)
    clock.advance(4)
    with KVStore(copy) as recovered:
        assert recovered.ttl("short") == 6
        assert recovered.ttl("long") == 96
        assert recovered.ttl("for ever") is None
        clock.advance(6)
        assert set(recovered) == {"long", "for ever"}
        assert len(recovered) == 2
    assert_consistent(copy)


def test_expired_records_are_dropped(path: Path, clock: FakeClock) -> None:
    with KVStore(path) as store:
        for number in range(100):
            store.create(f"short {number}", {"text": "x" * 1_000}, ttl=10)
        store.create("long", {"n": 1}, ttl=100)
        copy = crash_copy(store)
    clock.advance(10)
    with KVStore(copy) as recovered:
        assert dict(recovered) == {"long": {"n": 1}}
        assert recovered.purge_expired() == 0
        # Gone permanently: not even a clock that is set back shows them again.
        clock.advance(-5)
        assert set(recovered) == {"long"}
        recovered.create("short 1", {})
    assert_consistent(copy)


def test_keys_that_share_their_first_32_bytes_survive_recovery(path: Path) -> None:
    values = {"é" * 16 + tail: {"tail": tail} for tail in ("", "a", "b", "\0", "é" * 16)}
    with KVStore(path) as store:
        create_all(store, values)
        copy = crash_copy(store)
    with KVStore(copy) as recovered:
        assert dict(recovered) == values
    assert_consistent(copy)


def test_records_alone_are_enough(path: Path) -> None:
    """Directory, extent map, allocator, table and one copy of the identity are all overwritten."""
    rng = seeded_random()
    values = some_values(3_000, 3_000)
    with KVStore(path) as store:
        create_all(store, values)
        contents = bytearray(store.path.read_bytes())
    # Closed since: only the copy is of a file that was not.
    index = [page for page in range(0, len(contents), 4096) if is_bucket(contents, page)]
    assert len(index) >= 16
    for page in index:
        contents[page : page + 4096] = rng.choice((bytes(4096), rng.randbytes(4096)))
    start, stop = DIRECTORY_OFFSET, FIXED_EXTENTS * EXTENT_SIZE
    contents[start:stop] = rng.randbytes(stop - start)
    contents[ALLOCATOR_OFFSET : ALLOCATOR_OFFSET + ALLOCATOR_SIZE] = rng.randbytes(ALLOCATOR_SIZE)
    contents[: IDENTITY.size] = rng.randbytes(IDENTITY.size)
    copy = write_image(path.with_suffix(".damaged"), bytes(contents))
    with KVStore(copy) as recovered:
        assert dict(recovered) == values
        for key in list(values)[::2]:
            recovered.delete(key)
        create_all(recovered, {f"new {key}": value for key, value in values.items()})
    assert_consistent(copy)


@pytest.mark.parametrize("part", ["first byte", "header", "key", "start", "middle", "end"])
def test_torn_record_is_dropped_and_its_neighbours_are_not(path: Path, part: str) -> None:
    """After a crash a key is whole or absent, never corrupt."""
    values = some_values(200)
    torn = {"text": "the torn one " * 300}
    with KVStore(path) as store:
        create_all(store, values)
        store.create("torn", torn)
        copy = crash_copy(store)
    contents = bytearray(copy.read_bytes())
    value = contents.index(b'{"text":"the torn one')
    record = value - len("torn") - RECORD_HEADER_SIZE
    offset, size = {
        "first byte": (record, 1),
        "header": (record + 8, 24),
        "key": (value - 4, 4),
        "start": (value, SECTOR),
        "middle": ((value + 1_000) // SECTOR * SECTOR, SECTOR),
        "end": (value + 3_000, 300),
    }[part]
    contents[offset : offset + size] = bytes(byte ^ 0x55 for byte in contents[offset:][:size])
    copy = write_image(copy, bytes(contents))
    with KVStore(copy) as recovered:
        assert "torn" not in recovered
        assert dict(recovered) == values
        recovered.create("torn", torn)
        assert recovered.read("torn") == torn
    assert_consistent(copy)


def test_of_two_records_of_one_key_the_newer_wins_and_the_older_is_gone_for_good(
    path: Path, clock: FakeClock
) -> None:
    """The disk got the new record, and not that the old one was deleted."""
    old, new = make_value("key", 1, 300), make_value("key", 2, 2_000)
    with KVStore(path) as store:
        store.create("key", old)
        store.create("other", make_value("other", 0, 300))  # keeps the extent in its size class
        store.sync()
        synced = path.read_bytes()
        clock.advance(1)
        store.delete("key")
        store.create("key", new)
        contents = bytearray(path.read_bytes())
    sector = (synced.index(b'{"key":"key","mark":1') - 40) // SECTOR * SECTOR
    contents[sector : sector + 2 * SECTOR] = synced[sector : sector + 2 * SECTOR]
    assert contents.count(b'"mark":1') == contents.count(b'"mark":2') == 1
    copy = write_image(path.with_suffix(".both"), bytes(contents))
    with KVStore(copy) as recovered:
        assert recovered.read("key") == new
        assert len(recovered) == 2
        recovered.delete("key")
        again = crash_copy(recovered)
    assert_consistent(copy)
    with KVStore(again) as recovered:
        assert list(recovered) == ["other"]
    assert_consistent(again)


def test_room_of_deleted_records_is_found_again(path: Path) -> None:
    """Nothing leaks: after recovery a full file takes as much as was deleted from it."""
    values: dict[str, Value] = {}
    with KVStore(path, max_bytes=4 * 1024 * 1024) as store:
        with pytest.raises(StoreFullError):
            for number in range(100_000):
                store.create(f"{number}", {"text": "x" * 5_000})
                values[f"{number}"] = {"text": "x" * 5_000}
        for key in list(values)[::2]:
            store.delete(key)
        copy = crash_copy(store)
    with KVStore(copy, max_bytes=4 * 1024 * 1024) as recovered:
        assert len(recovered) == len(values) // 2
        for key in list(values)[::2]:
            recovered.create(key, values[key])
        assert dict(recovered) == values
    assert_consistent(copy)


@pytest.mark.parametrize("size", [20, 1_000, 16_000])
def test_file_that_is_full_is_recovered_within_its_limit(path: Path, size: int) -> None:
    limit = 4 * 1024 * 1024
    values: dict[str, Value] = {}
    with KVStore(path, max_bytes=limit) as store:
        with pytest.raises(StoreFullError):
            for number in range(100_000):
                value = {"n": number, "text": "x" * size}
                store.create(f"{number}", value)
                values[f"{number}"] = value
        copy = crash_copy(store)
    for generation in range(2):
        with KVStore(copy, max_bytes=limit) as recovered:
            assert dict(recovered) == values
            assert recovered.read("0") == values["0"]
            again = write_image(path.with_suffix(f".{generation}"), copy.read_bytes())
        assert copy.stat().st_size <= limit
        assert_consistent(copy)
        copy = again


@pytest.mark.parametrize("how", ["close", "sync"])
def test_file_cut_off_below_what_was_on_stable_storage_is_refused(path: Path, how: str) -> None:
    """Power loss may take back growth that was never flushed, but no more than that."""
    values = some_values(5_000, 1_500)
    with KVStore(path) as store:
        create_all(store, values)
        if how == "sync":
            store.sync()
            store.create("later", {})
        copy, used = crash_copy(store), store.stats().file_size
    if how == "close":
        with KVStore(path) as store:
            store.create("later", {})
            copy, used = crash_copy(store), store.stats().file_size
    contents = copy.read_bytes()[:used]
    for size in (len(contents) // 2, len(contents) - EXTENT_SIZE):
        cut = write_image(copy, contents[:size])
        with pytest.raises(CorruptStoreError) as error:
            KVStore(cut)
        assert str(cut) in str(error.value)
        assert cut.read_bytes() == contents[:size]
    with KVStore(write_image(copy, contents)) as recovered:
        assert dict(recovered) == {**values, "later": {}}
    assert_consistent(copy)


def test_file_larger_than_the_limit_given_is_recovered(path: Path) -> None:
    values = some_values(10_000, 1_000)
    with KVStore(path) as store:
        create_all(store, values)
        copy, size = crash_copy(store), store.stats().file_size
    assert size > 4 * 1024 * 1024
    with KVStore(copy, max_bytes=4 * 1024 * 1024) as recovered:
        assert dict(recovered) == values
        recovered.delete("key 1")
        recovered.create("key 1", values["key 1"])
    assert copy.stat().st_size == size
    assert_consistent(copy)


def test_recovery_that_is_cut_short_anywhere_begins_again_and_ends_the_same(path: Path) -> None:
    """Copies of the file at each flush of a recovery, and of those of their recoveries."""
    values = some_values(1_000, 2_000)
    with KVStore(path) as store:
        create_all(store, values)
        for number in range(0, 1_000, 2):
            store.delete(f"key {number}")
            del values[f"key {number}"]
        images = [store.path.read_bytes()]
    copy = path.with_suffix(".copy")
    for generation in range(3):
        write_image(copy, images[-1])
        images = [images[-1]]
        with before_each_flush(lambda: images.append(copy.read_bytes())):  # noqa: B023
            recovered = KVStore(copy)
        images.append(copy.read_bytes())
        assert dict(recovered) == values
        recovered.close()
        for image in images:
            each = write_image(path.with_suffix(".each"), image)
            with KVStore(each) as store:
                assert dict(store) == values, f"generation {generation}"
            assert_consistent(each)


def test_file_is_recovered_as_often_as_its_process_dies(path: Path) -> None:
    rng = seeded_random()
    values: dict[str, Value] = {}
    image = b""
    for life in range(scaled(15)):
        file = write_image(path.with_suffix(".life"), image) if image else path
        with KVStore(file) as store:
            assert dict(store) == values, f"life {life}"
            for key in rng.sample(sorted(values), len(values) // 3):
                store.delete(key)
                del values[key]
            for number in range(60):
                key = f"{life}/{number}"
                values[key] = make_value(key, number, rng.choice((10, 100, 1_000, 10_000)))
                store.create(key, values[key])
            image = file.read_bytes()
        assert_consistent(file)


# --- when it happens, and what it says ---------------------------------------------------------


def test_recovery_tells_what_it_found(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KVStore(path) as store:
        create_all(store, some_values(4_321))
        copy = crash_copy(store)
    messages = log_of_opening(copy, caplog)
    assert messages
    assert any(str(copy) in message for message in messages)
    said = " ".join(messages)
    assert "4,321" in said or "4321" in said
    assert {record.name for record in caplog.records} == {"kvstore"}
    # Closed by now: there is nothing to recover and nothing to say.
    assert log_of_opening(copy, caplog) == []
    assert_consistent(copy)


def test_recovery_shows_its_progress(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KVStore(path) as store:
        create_all(store, some_values(2_000, 3_000))
        copy = crash_copy(store)
    monkeypatch.setattr("kvstore.recovery.report._PROGRESS_SECONDS", 0)  # else only what takes long
    messages = log_of_opening(copy, caplog)
    assert len(messages) > 10
    assert all(str(copy) in message for message in messages)
    assert_consistent(copy)


def test_new_file_needs_no_recovery(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert log_of_opening(path, caplog) == []
    assert log_of_opening(path, caplog) == []


def test_closed_file_needs_no_recovery(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with KVStore(path) as store:
        create_all(store, some_values(100))
    assert log_of_opening(path, caplog) == []


def test_file_that_was_only_read_needs_no_recovery(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even where the process died: nothing had changed."""
    with KVStore(path) as store:
        create_all(store, some_values(100))
    with KVStore(path) as store:
        store.read("key 1")
        store.read_bytes("key 1")
        assert store.get("absent") is None
        assert store.ttl("key 2") is None
        assert "absent" not in store
        assert len(dict(store)) == len(store) == 100
        store.stats()
        assert store.purge_expired() == 0
        wrong: list[tuple[str, Value, int | None]] = [
            ("x" * 33, {}, None),
            ("key", {"n": float("nan")}, None),
            ("key", {"n": "x" * 20_000}, None),
            ("key", {}, 0),
        ]
        for arguments in wrong:
            with pytest.raises(ValueError, match="key"):
                store.create(*arguments)
        store.sync()
        copy = crash_copy(store)
    assert log_of_opening(copy, caplog) == []
    assert_consistent(copy)


def test_change_leaves_a_file_that_needs_recovery_until_it_is_closed(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with KVStore(path) as store:
        create_all(store, some_values(2))
    with KVStore(path) as store:
        store.delete("key 1")
        store.sync()
        copy = crash_copy(store)
    assert log_of_opening(copy, caplog) != []
    assert log_of_opening(path, caplog) == []
    assert_consistent(copy)


def test_recovered_file_that_was_not_closed_is_recovered_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = some_values(500)
    with KVStore(path) as store:
        create_all(store, values)
        copy = crash_copy(store)
    with KVStore(copy) as store:
        again = write_image(path.with_suffix(".again"), copy.read_bytes())
    with KVStore(again) as store:
        assert dict(store) == values
    assert log_of_opening(again, caplog) == []
    before = digest(again)
    with KVStore(again) as store:
        assert dict(store) == values
    assert digest(again) == before, "a file that was only read has changed"
    assert_consistent(again)


def test_disk_is_asked_to_read_ahead_while_recovery_scans_and_at_no_other_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In little memory, what is read ahead of lookups pushes out what they need."""
    asked: list[bool] = []
    monkeypatch.setattr(
        "kvstore.file.platform.system.read_ahead", lambda _map, wanted: asked.append(wanted)
    )
    with KVStore(path) as store:
        create_all(store, some_values(10))
        crashed = crash_copy(store)
    asked.clear()
    KVStore(path).close()
    assert asked == [False]
    asked.clear()
    KVStore(crashed).close()
    assert asked == [False, True, False]


# --- more records than the file has slots for ----------------------------------------------------


class Flushes:
    """What a file held each time that everything in it was flushed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.images: list[bytes] = []

    def __call__(self) -> None:
        self.images.append(self._path.read_bytes())


def create_until_full(
    store: KVStore, clock: FakeClock, name: str, value: Value, most: int = 10**6
) -> list[str]:
    """Create so many records, one each millisecond, or as many as there is room for."""
    keys: list[str] = []
    with suppress(StoreFullError):
        while len(keys) < most:
            clock.advance(0.001)
            store.create(f"{name} {len(keys)}", value)
            keys.append(f"{name} {len(keys)}")
    return keys


def segments_of(image: bytes) -> set[int]:
    return set(memoryview(image)[DIRECTORY_OFFSET : DIRECTORY_OFFSET + DIRECTORY_SIZE].cast("H"))


def slabs_of(image: bytes) -> set[int]:
    kinds = image[EXTENT_MAP_OFFSET : EXTENT_MAP_OFFSET + 16 * (len(image) // EXTENT_SIZE) : 16]
    return {extent for extent, kind in enumerate(kinds) if kind == KIND_SLAB}


def with_old(extents: set[int], old: bytes, new: bytes) -> bytes:
    """Return the new bytes of a file, with the old ones of some extents."""
    image = bytearray(new)
    for extent in extents:
        place = slice(extent * EXTENT_SIZE, (extent + 1) * EXTENT_SIZE)
        image[place] = old[place]
    return bytes(image)


LARGE: Final[Value] = {"text": "x" * 16_000}


def test_records_that_power_loss_brings_back_leave_the_table_its_extents(
    path: Path, clock: FakeClock
) -> None:
    """What large records had been in became segments; the old ones were whole there once more.

    And no extent was left for the table of all the small ones: the file could not be opened. So
    the table takes none that may hold old records, and the small ones find room all the same.
    """
    flushes = Flushes(path)
    with KVStore(path, max_bytes=4 * MIB) as store, before_each_flush(flushes):
        large = create_until_full(store, clock, "large", LARGE)
        store.sync()
        del flushes.images[:-1]
        for key in large[1:]:
            store.delete(key)
        small = set(create_until_full(store, clock, "small", {}))
        assert len(small) > 25_000
        images = [*flushes.images, path.read_bytes()]
    assert 2 < len(images) < 10
    for old, new in pairwise(images):
        assert not slabs_of(old) & segments_of(new)
        changed = slabs_of(old) ^ slabs_of(new)
        for image in (with_old(changed, old, new), with_old(slabs_of(old), old, new), new):
            with KVStore(write_image(path, image), max_bytes=4 * MIB) as store:
                assert store.read(large[0]) == LARGE
                assert set(store) <= small.union(large)
                assert store.stats().file_size == 4 * MIB
            assert_consistent(path)


def test_segments_over_old_records_as_earlier_versions_left_them_do_no_harm(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The extents of the table are lost to what came back: the newest of the small ones go."""
    with KVStore(path, max_bytes=4 * MIB) as store:
        large = create_until_full(store, clock, "large", LARGE)
        store.sync()
        old = path.read_bytes()
        for key in large[1:]:
            store.delete(key)
        small = create_until_full(store, clock, "small", {})
        new = path.read_bytes()
    image = with_old(slabs_of(old) & segments_of(new), old, new)
    with KVStore(write_image(path, image), max_bytes=4 * MIB) as store:
        assert store.read(large[0]) == LARGE
        found = set(store) & set(small)
        assert found == set(small[: len(found)])
        assert 1_000 < len(found) < len(small)
    assert f"gave up the {len(small) - len(found)} newest" in caplog.text
    assert_consistent(path)


def test_deleted_records_and_new_ones_at_once_may_be_more_than_a_full_file_holds(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """All creations had reached the disk, and none of the deletes before. The newest give way."""
    flushes = Flushes(path)
    with KVStore(path, max_bytes=4 * MIB) as store, before_each_flush(flushes):
        large = create_until_full(store, clock, "large", LARGE)
        for key in large[: len(large) * 3 // 4]:  # so that none has to move
            store.delete(key)
        store.sync()
        old_ones = create_until_full(store, clock, "old", {})
        store.sync()
        flushed = len(flushes.images)
        old = flushes.images[-1]
        kept = {key: store.read(key) for key in (*old_ones[:100], *large[-1:])}
        for key in (*old_ones, *sorted(set(large) & set(store))):
            if key not in kept:
                store.delete(key)
        new_ones = create_until_full(store, clock, "new", {}, 18_000)
        assert len(flushes.images) == flushed, "else the deletes are on the disk"
        new = path.read_bytes()
    tiny_ones_were_in = {
        extent
        for extent in slabs_of(old)
        if b"old " in old[extent * EXTENT_SIZE : (extent + 1) * EXTENT_SIZE]
    }
    image = with_old(tiny_ones_were_in, old, new)
    with KVStore(write_image(path, image), max_bytes=5 * MIB) as store:
        everything = set(store)
    assert "newest" not in caplog.text, "there is room where the file may grow"
    with KVStore(write_image(path, image), max_bytes=4 * MIB) as store:
        assert {key: store.read(key) for key in kept} == kept
        found = set(store)
        assert everything - found <= set(new_ones), "what the last flush promised is older"
        on_disk = [key for key in new_ones if key in everything]
        count = len(found & set(new_ones))
        assert 0 < count < len(on_disk)
        assert found & set(new_ones) == set(on_disk[:count])
        assert store.stats().file_size == 4 * MIB
        for key in on_disk[:count]:
            store.delete(key)
    assert f"gave up the {len(on_disk) - count} newest" in caplog.text
    assert_consistent(path)


def test_reason_for_recovery_is_told_truly(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store may be closed in order, and its index still have to be built anew."""
    with KVStore(path) as store:
        create_all(store, some_values(10))
        crashed = crash_copy(store)
        store._file.require_rebuild()
    (killed,) = log_of_opening(crashed, caplog)
    assert "was not closed; rebuilt the index of 10 records" in killed
    (closed,) = log_of_opening(path, caplog)
    assert "was closed after a change that was cut short" in closed
