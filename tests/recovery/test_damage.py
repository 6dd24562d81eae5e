"""Damaged files: the right value or an error, never a wrong value, a hang or a crash."""

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

import pytest
from support import seeded_random
from support.cases import CASES
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.damage import Original, build
from support.disks import quick_folder
from support.inspecting import inspect
from support.stores import OpenStore
from support.workload import make_value

from kvstore import (
    CorruptStoreError,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    UnsupportedFormatError,
)
from kvstore.clock import now_ms
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    BLOCK_ALIGNMENT,
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_OFFSET,
    DIRECTORY_OFFSET,
    EXTENT_MAP_OFFSET,
    EXTENT_MAP_SIZE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC_BYTES,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_RECORD_OFFSET,
    SLOT_SIZE,
    STATE,
    STATE_OFFSET,
    U64,
    key_hash,
    slot_offset,
)
from kvstore.format.superblock import pack_identity
from kvstore.index.slots import control_offset_of

U32 = Struct("<I")
MARKER = "here is the value that is to be damaged"


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


def change_byte(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Flip the bits of `mask` in one byte of a closed file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def neighbours(count: int = 50) -> dict[str, dict[str, object]]:
    return {f"other {n}": make_value(f"other {n}", n, 20 * n) for n in range(count)}


def make_store(path: Path, key: str = "unlucky") -> int:
    """Make a closed store of `key`, with `MARKER` as its value, and others; return its offset."""
    others = neighbours()
    with KVStore(path) as store:
        for number, (name, value) in enumerate(others.items()):
            store.create(name, value)
            if number == 20:
                store.create(key, {"text": MARKER}, ttl=1_000_000)
    contents = path.read_bytes()
    assert contents.count(MARKER.encode()) == 1
    value_offset = contents.rindex(b'{"text":', 0, contents.index(MARKER.encode()))
    return value_offset - len(key.encode()) - RECORD_HEADER_SIZE


def assert_others_work(store: KVStore) -> None:
    others = neighbours()
    for key, value in others.items():
        assert store.read(key) == value
    for key, value in others.items():
        store.delete(key)
        store.create(key, value)
    assert others.keys() <= set(store)


# --- damage to one record ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["unlucky", "é" * 20, "\N{SNAKE}" * 32], ids=["short", "long", "longest"]
)
def test_damage_to_a_value_stays_with_its_key(path: Path, key: str) -> None:
    make_store(path, key)
    change_byte(path, path.read_bytes().index(MARKER.encode()) + 5, 0x01)
    with KVStore(path) as store:
        for use in (store.read, store.__getitem__, store.get, store.read_bytes):
            with pytest.raises(CorruptStoreError) as error:
                use(key)
            assert repr(key) in str(error.value) or key in str(error.value)
        with pytest.raises(CorruptStoreError):
            dict(store.items())
        with pytest.raises(CorruptStoreError):
            list(store.values())
        assert key in store
        assert key in set(store)
        assert key in set(store.keys())
        assert len(store) == 51
        assert store.ttl(key) is not None
        with pytest.raises(KeyExistsError):
            store.create(key, {})
        assert_others_work(store)
    # Nor did opening, closing and writing to others change that.
    with KVStore(path) as store:
        with pytest.raises(CorruptStoreError):
            store.read(key)
        with pytest.raises(KeyExistsError):
            store.create(key, {})
        store.delete(key)
        assert key not in store
        with pytest.raises(KeyNotFoundError):
            store.read(key)
        store.create(key, {"text": "whole again"})
        assert store.read(key) == {"text": "whole again"}
        assert len(dict(store.items())) == 51
        assert_others_work(store)
    assert_consistent(path)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_damage_to_any_byte_of_a_record_is_found(path: Path, mask: int) -> None:
    """Its header and its value, one byte after the other.

    The key between them is a copy of what the slot has: damage there may leave the value readable.
    """
    key = "unlucky"
    record = make_store(path, key)
    contents = path.read_bytes()
    assert contents[record:].startswith(RECORD_MAGIC_BYTES)
    value = record + RECORD_HEADER_SIZE + len(key)
    size = len('{"text":""}') + len(MARKER)
    for offset in range(record, value + size):
        path.write_bytes(contents)
        change_byte(path, offset, mask)
        with KVStore(path) as store:
            try:
                assert store.read(key) == {"text": MARKER}
                assert value - len(key) <= offset < value, f"byte {offset - record} of the record"
            except CorruptStoreError as error:
                assert key in str(error)  # noqa: PT017 - raising is one of two right answers
            assert key in store
            assert key in set(store)
            with pytest.raises(KeyExistsError):
                store.create(key, {})
            assert store.read("other 20") == neighbours()["other 20"]
            if offset % 7 == 0:
                store.delete(key)
                store.create(key, {"n": 1})
                assert_others_work(store)
                assert store.read(key) == {"n": 1}


@pytest.mark.parametrize("part", ["magic", "key size", "end of the key", "all of the key", "all"])
def test_damage_to_the_record_of_a_long_key_stays_with_that_key(path: Path, part: str) -> None:
    """Its slot holds the first 32 bytes; the rest is in the damaged record alone.

    So it is taken to be there, as any damaged key is. Only its whole name cannot be listed.
    """
    key = "é" * 16 + "the rest of it"
    record = make_store(path, key)
    size = len(key.encode())
    offset, length = {
        "magic": (0, 4),
        "key size": (6, 1),
        "end of the key": (RECORD_HEADER_SIZE + size - 1, 1),
        "all of the key": (RECORD_HEADER_SIZE, size),
        "all": (0, RECORD_HEADER_SIZE + size + 20),
    }[part]
    for position in range(record + offset, record + offset + length):
        change_byte(path, position, 0x01)
    with KVStore(path) as store:
        if part in {"end of the key", "all of the key"}:
            # The checksum vouches for the value under the key that was asked for.
            assert store.read(key) == {"text": MARKER}
        else:
            for use in (store.read, store.read_bytes, store.get):
                with pytest.raises(CorruptStoreError):
                    use(key)
        assert key in store
        with pytest.raises(KeyExistsError):
            store.create(key, {})
        seen = set()
        try:
            for each in store:
                seen.add(each)
        except CorruptStoreError:
            pass
        assert neighbours().keys() <= seen <= neighbours().keys() | {key}
        store.delete(key)
        assert key not in store
        store.create(key, {"text": "whole again"})
        assert store.read(key) == {"text": "whole again"}
        assert_others_work(store)
    # The damaged block could not be told from another key's: the next opening takes it back.
    with KVStore(path) as store:
        assert store.read(key) == {"text": "whole again"}
        assert_others_work(store)
    assert_consistent(path)


# --- damage to the index -----------------------------------------------------------------------


def test_zeroed_page_of_the_table_is_found_and_not_taken_for_an_empty_one(path: Path) -> None:
    live = build(path, random.Random(1), 300)
    original = Original(path.read_bytes())
    hit = 0
    for bucket in original.buckets[::5]:
        path.write_bytes(original.contents)
        overwrite(path, bucket, bytes(4096))
        with KVStore(path) as store:
            for key, value in live.items():
                try:
                    assert store.read(key) == value
                except CorruptStoreError:  # KeyNotFoundError would be a lie
                    hit += 1
                    with pytest.raises(CorruptStoreError):
                        store.create(key, {})
            with pytest.raises(CorruptStoreError):
                list(store)
    assert hit > 0


def test_damage_to_a_slot_makes_no_key_that_was_never_created_and_shows_none_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits of the key, of its size and of the fingerprint in the table."""
    # The hash of one in 4,096 wrong keys fits its place: the same seed, the same keys each time.
    monkeypatch.setattr(os, "urandom", random.Random(7).randbytes)
    make_store(path, "other 2x")  # one bit from several of its neighbours
    names = neighbours().keys() | {"other 2x"}
    contents = path.read_bytes()
    (slot, control) = next(
        (slot_offset(bucket, index), bucket + CONTROL_OFFSET + index)
        for bucket in Original(contents).buckets
        for index in range(SLOT_COUNT)
        if contents[slot_offset(bucket, index) :].startswith(b"other 2x")
    )
    places = [*range(slot, slot + 12), slot + SLOT_SIZE - 2, control]
    for place in places:
        for bit in (0, 1, 6):
            path.write_bytes(contents)
            change_byte(path, place, 1 << bit)
            with KVStore(path) as store:
                seen: list[str] = []
                try:
                    for key in store:
                        seen.append(key)  # noqa: PERF402 - what came before the error counts
                except CorruptStoreError:
                    pass
                what = f"byte {place - slot} of the slot, bit {bit}"
                assert len(seen) == len(set(seen)), what
                assert set(seen) <= names, what
                assert names - {"other 2x"} <= set(seen), what
                for key, value in neighbours().items():
                    assert store.read(key) == value


def copy_slot(store: KVStore, key: str, index: int, bucket: int = 0) -> int:
    """Copy the slot of `key` to that place, in the bucket so many before; return its own offset."""
    contents = store._file.map
    slot = store._parts.slots.find(key_hash(key.encode(), store._file.hash_seed), key.encode())
    home = slot & -BUCKET_SIZE
    other = slot_offset(home - bucket * BUCKET_SIZE, index)
    assert other >> EXTENT_SHIFT == slot >> EXTENT_SHIFT
    assert contents[control_offset_of(other)] == CONTROL_EMPTY
    contents[other : other + SLOT_SIZE] = contents[slot : slot + SLOT_SIZE]
    contents[control_offset_of(other)] = contents[control_offset_of(slot)]
    return slot


def test_expired_key_that_has_two_slots_may_be_created_anew(
    path: Path, clock: FakeClock, open_store: OpenStore
) -> None:
    """Once the first was gone, the second was taken for a free slot, which ended the process.

    It stays, and leads to a record that is no more.
    """
    store = open_store(check=False)
    store.create("key", {"n": 1}, ttl=5)
    copy_slot(store, "key", SLOT_COUNT - 1)
    clock.advance(10)
    store.create("key", {"n": 2})
    assert dict(store) == {"key": {"n": 2}}
    store.close()
    with KVStore(path) as again:
        assert dict(again) == {"key": {"n": 2}}


def change_slot(store: KVStore, key: str, offset: int, data: bytes) -> None:
    """Write over a part of the slot of `key`, in the open file."""
    slot = store._parts.slots.find(key_hash(key.encode(), store._file.hash_seed), key.encode())
    store._file.map[slot + offset : slot + offset + len(data)] = data


def test_slot_with_a_flag_that_there_is_not_leads_to_its_record_and_expires_for_all_members(
    clock: FakeClock, open_store: OpenStore
) -> None:
    """Of the bits that an offset does not need, the compiled code once read some as part of it."""
    store = open_store(check=False)
    store.create("key", {}, ttl=5)
    record = EXTENT_SIZE * 22
    for flags in range(BLOCK_ALIGNMENT):
        change_slot(store, "key", SLOT_RECORD_OFFSET, U32.pack(record + flags))
        assert "key" in store
        assert len(store) == 1
        assert store.read("key") == {}
    clock.advance(10)
    assert "key" not in store
    assert len(store) == 0
    assert store.get("key") is None
    assert store.purge_expired() == 1


@pytest.mark.parametrize("key", ["key", "é" * 20], ids=["short", "long"])
@pytest.mark.parametrize("of_record", [False, True], ids=["of the slot", "of the record"])
@pytest.mark.parametrize("ms_left", [-(10**12), -60_000, -1, 0, 1, 60_000, None])
def test_key_with_a_damaged_expiry_is_damaged_for_every_member(
    clock: FakeClock, open_store: OpenStore, key: str, of_record: bool, ms_left: int | None
) -> None:
    """Its time left was none, or less than none; and before that 2**64 milliseconds."""
    store = open_store(check=False)
    store.create(key, {"n": 1}, ttl=5)
    expires_at = U64.pack(0 if ms_left is None else clock.now_ms + ms_left)
    if of_record:
        record = EXTENT_SIZE * 22 + RECORD_EXPIRES_OFFSET
        store._file.map[record : record + U64.size] = expires_at
    else:
        change_slot(store, key, SLOT_EXPIRES_OFFSET, expires_at)
    for seconds in (0, 10):  # its true time is up after five
        clock.advance(seconds)
        for use in (store.ttl, store.read, store.__getitem__, store.get, store.read_bytes):
            with pytest.raises(CorruptStoreError, match=f"key {key!r}: the record at byte"):
                use(key)
        assert key in store
        assert list(store) == [key]
        assert len(store) == 1
        with pytest.raises(CorruptStoreError):
            list(store.items())
        with pytest.raises(KeyExistsError):
            store.create(key, {})
        assert store.purge_expired() == 0
    store.delete(key)
    assert key not in store
    store.create(key, {"n": 2}, ttl=5)
    assert store.ttl(key) == 5
    assert store.read(key) == {"n": 2}


def test_key_that_rewriting_its_segment_brings_to_light_exists(
    path: Path, monkeypatch: pytest.MonkeyPatch, open_store: OpenStore
) -> None:
    """Its slot had strayed to a bucket in which no lookup found it.

    Found where a free slot was looked for, it was taken for one, which ended the process.
    """
    (case,) = (case for case in CASES if case.name == "create and split")
    assert case.key is not None
    monkeypatch.setattr(os, "urandom", bytes)  # the hash seed that the case is made for
    store = open_store(check=False)
    store.create(case.key, {"n": 1})
    slot = copy_slot(store, case.key, SLOT_COUNT - 1, bucket=1)
    store._file.map[control_offset_of(slot)] = CONTROL_EMPTY
    case.prepare(store)
    assert case.key not in store
    with pytest.raises(KeyExistsError):
        case.act(store)
    assert store[case.key] == {"n": 1}
    store.close()
    with KVStore(path) as again:
        assert again[case.key] == {"n": 1}
    assert_consistent(path)


def test_slot_whose_key_was_damaged_into_another_hides_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewriting of their segment brought both to one bucket, the damaged one first.

    One bit is between two keys that end in numbers. The next opening finds both.
    """
    monkeypatch.setattr(os, "urandom", random.Random(7).randbytes)
    values: dict[str, dict[str, object]] = {f"key {number}": {"n": number} for number in range(400)}
    with KVStore(path) as store:
        hashes = {key: key_hash(key.encode(), store._file.hash_seed) for key in values}
        for key, value in values.items():
            store.create(key, value)
        damaged = {}
        for one in list(values)[::2]:
            other = f"key {int(one.split()[1]) + 1}"
            if hashes[one] >> 60 == hashes[other] >> 60 and hashes[one] % 16 < hashes[other] % 16:
                change_slot(store, one, 0, other.encode())
                damaged[other] = one
        assert len(damaged) > 3
        for other in damaged:
            doomed = next(
                key
                for key in values
                if hashes[key] >> 60 == hashes[other] >> 60
                and key not in {*damaged, *damaged.values()}
            )
            store.delete(doomed)
            del values[doomed]
            store._parts.segments.split_or_compact(hashes[other], now_ms())
        for key in values.keys() - set(damaged.values()):
            assert store[key] == values[key]
    with KVStore(path) as again:
        assert dict(again) == values


@pytest.mark.parametrize("copy", [0, 1])
def test_one_damaged_copy_of_the_identity_does_no_harm(path: Path, copy: int) -> None:
    live = build(path, random.Random(2), 100)
    contents = path.read_bytes()
    for offset in range(IDENTITY.size):
        path.write_bytes(contents)
        change_byte(path, IDENTITY_OFFSETS[copy] + offset)
        with KVStore(path) as store:
            assert dict(store) == live
            store.create("new", {})
    with KVStore(path) as store:
        assert dict(store) == {**live, "new": {}}
    assert_consistent(path)


@pytest.mark.parametrize("copy", [0, 1])
def test_identity_of_another_file_in_the_place_of_one_copy_does_no_harm(
    path: Path, copy: int
) -> None:
    """Its seed would make damage of every record, and recovery would drop them all."""
    live = build(path, random.Random(6), 100)
    overwrite(path, IDENTITY_OFFSETS[copy], pack_identity(bytes(16), 12_345, 1))
    with KVStore(path) as store:
        assert dict(store) == live
        store.create("new", {})
    with KVStore(path) as store:
        assert dict(store) == {**live, "new": {}}
    assert_consistent(path)


def test_two_valid_identities_that_the_state_fits_neither_of_are_refused(path: Path) -> None:
    build(path, random.Random(7), 100)
    overwrite(path, IDENTITY_OFFSETS[1], pack_identity(bytes(16), 12_345, 1))
    overwrite(path, STATE_OFFSET, bytes(STATE.size))
    contents = path.read_bytes()
    with pytest.raises(CorruptStoreError, match="different hash seeds"):
        KVStore(path)
    assert path.read_bytes() == contents


def test_lost_first_page_does_no_harm(path: Path) -> None:
    """With it go one copy of the identity, the state and the heads of the allocator."""
    live = build(path, random.Random(3), 300)
    overwrite(path, 0, bytes(4096))
    with KVStore(path) as store:
        assert dict(store) == live
        store.create("new", {})
    with KVStore(path) as store:
        assert dict(store) == {**live, "new": {}}
    assert_consistent(path)


def test_file_with_both_copies_of_the_identity_damaged_is_refused_and_left_as_it_is(
    path: Path,
) -> None:
    build(path, random.Random(4), 100)
    whole = path.read_bytes()
    damages = [
        *([(offset + field, b"\xff") for offset in IDENTITY_OFFSETS] for field in (0, 9, 24, 33)),
        [(offset, bytes(IDENTITY.size)) for offset in IDENTITY_OFFSETS],
        [(0, bytes(8192))],
        [(0, bytes(65_536))],
    ]
    for damage in damages:
        path.write_bytes(whole)
        for offset, data in damage:
            overwrite(path, offset, data)
        contents = path.read_bytes()
        with pytest.raises((CorruptStoreError, UnsupportedFormatError)) as error:
            KVStore(path)
        assert str(path) in str(error.value)
        assert path.read_bytes() == contents


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (STATE_OFFSET, STATE.size),
        (HOLDER_OFFSET, 4),
        (ALLOCATOR_OFFSET, 136),
        (DIRECTORY_OFFSET, 65_536),
        (EXTENT_MAP_OFFSET, 512),
    ],
    ids=["state", "holder", "allocator", "directory", "extent map"],
)
@pytest.mark.parametrize("filling", ["zeros", "ones", "random", "one bit"])
def test_damaged_index_page_is_rebuilt_from_the_records(
    path: Path, start: int, size: int, filling: str
) -> None:
    rng = seeded_random()
    live = build(path, rng, 300)
    if filling == "one bit":
        change_byte(path, start + rng.randrange(size), 1 << rng.randrange(8))
    else:
        overwrite(
            path,
            start,
            {"zeros": bytes(size), "ones": b"\xff" * size, "random": rng.randbytes(size)}[filling],
        )
    with KVStore(path) as store:
        assert dict(store) == live
        for number in range(200):
            store.create(f"new {number}", make_value("new", number, 10 * number))
        assert live.items() <= dict(store).items()
    assert_consistent(path)


# --- what a rebuild would lose ------------------------------------------------------------------


PLACES = {
    "magic": 0,
    "magic, last byte": 3,
    "value size": 4,
    "key size": 6,
    "stamp": 8,
    "expires_at": 16,
    "checksum": 24,
    "key": RECORD_HEADER_SIZE,
    "value": RECORD_HEADER_SIZE + len("unlucky"),
}
INDEX = {
    "directory": DIRECTORY_OFFSET + 1_000,
    "extent map": EXTENT_MAP_OFFSET + 16 * 22 + 2,
    "allocator": ALLOCATOR_OFFSET + 2,
    "state": STATE_OFFSET + 4,
}


def assert_refused_and_left_alone(path: Path, *told: str) -> str:
    """Open a file that is refused; not a byte of it, nor its length or times, have changed."""
    contents, status = path.read_bytes(), path.stat()
    with pytest.raises(CorruptStoreError) as error:
        KVStore(path)
    assert path.read_bytes() == contents
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    if os.name == "posix":
        assert after.st_blocks == status.st_blocks
    for text in (str(path), f"kvstore-inspect repair {path}", *told):
        assert text in str(error.value)
    return str(error.value)


def repair(path: Path) -> tuple[int, dict[str, object]]:
    """Repair a file with the tool; return its exit status and what it says."""
    ran = inspect("repair", path, "--json")
    return ran.status, ran.json()


@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("place", PLACES)
def test_closed_file_with_damage_to_the_index_and_to_a_record_is_left_to_a_repair(
    path: Path, index: str, place: str
) -> None:
    """One bit each. It was rebuilt, the record wiped, and "was not closed" was the reason given.

    The record may be the only one that there is, and worth mending by hand.
    """
    record = make_store(path)
    change_byte(path, INDEX[index], 0x04)
    change_byte(path, record + PLACES[place], 0x01)
    said = assert_refused_and_left_alone(path, "50 whole records")
    assert "was not closed" not in said
    damaged = path.read_bytes()
    status, outcome = repair(path)
    assert status == 1
    assert outcome["kept"] == 50
    assert Path(str(outcome["backup"])).read_bytes() == damaged
    with KVStore(path) as store:
        assert dict(store) == neighbours()
    assert_consistent(path)


@pytest.mark.parametrize("index", INDEX)
def test_closed_file_with_damage_to_the_index_alone_is_rebuilt_and_says_so(
    path: Path, index: str, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Records that have expired since are counted: they are there, until the rebuild drops them."""
    make_store(path)
    change_byte(path, INDEX[index], 0x04)
    clock.advance(2_000_000)
    with KVStore(path) as store:
        assert dict(store) == neighbours()
    assert "was not closed" not in caplog.text
    assert ("its state is damaged" if index == "state" else "its index is damaged") in caplog.text
    assert "dropped 1 expired" in caplog.text
    assert_consistent(path)


def test_file_that_was_not_closed_loses_a_torn_record_as_before_and_says_where(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = make_store(path)
    with KVStore(path) as store:
        store.create("new", {})
        crashed = path.read_bytes()
    path.write_bytes(crashed)
    change_byte(path, record + PLACES["value"], 0x01)
    with KVStore(path) as store:
        assert dict(store) == {**neighbours(), "new": {}}
    assert "was not closed" in caplog.text
    assert f"1 damaged ones, the first of these at byte {record:,}" in caplog.text


def test_new_file_whose_state_never_reached_the_disk_is_opened(path: Path) -> None:
    KVStore(path).close()
    contents = path.read_bytes()
    for size in (2 * EXTENT_SIZE, len(contents)):
        path.write_bytes(contents[: IDENTITY.size].ljust(size, b"\0"))
        if size < len(contents):
            with pytest.raises(CorruptStoreError, match="cut off"):
                KVStore(path)
            continue
        with KVStore(path) as store:
            store.create("key", {})
            assert dict(store) == {"key": {}}
        assert_consistent(path)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not closed"])
@pytest.mark.parametrize("size", [1, 7, 32, 4_096])
@pytest.mark.parametrize("what", ["inserted", "removed"])
def test_file_with_bytes_inserted_or_removed_is_refused_and_left_as_it_is(
    path: Path, what: str, size: int, closed: bool
) -> None:
    """As by a transfer that takes it for text. It opened as an empty store, without a word."""
    live = build(path, random.Random(8), 300)
    contents = path.read_bytes()
    with KVStore(path) as store:
        store.create("new", {})
        contents = contents if closed else path.read_bytes()
    records = [match.start() for match in re.finditer(re.escape(RECORD_MAGIC_BYTES), contents)]
    places = (40_000, STATE_OFFSET + 100, DIRECTORY_OFFSET + 9, EXTENT_MAP_OFFSET + 50, 300_000)
    for place in (*places, records[0] - 5, records[len(records) // 2] + 9):
        inserted = contents[:place] + bytes(size) + contents[place:]
        removed = contents[:place] + contents[place + size :]
        path.write_bytes(inserted if what == "inserted" else removed)
        said = str(assert_never_loses_a_word(path, live))
        assert str(path) in said, f"at byte {place:,}"


def assert_never_loses_a_word(path: Path, live: dict[str, dict[str, object]]) -> object:
    """Assert that a file is refused and left as it is; return what was said."""
    contents = path.read_bytes()
    try:
        store = KVStore(path)
    except CorruptStoreError as error:
        assert path.read_bytes() == contents
        return error
    with store:
        raise AssertionError(f"opened with {len(store)} of {len(live)} records")


def test_text_at_the_end_of_a_closed_file_is_cut_off_and_a_record_there_is_not(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = make_store(path)
    with KVStore(path) as store:
        live = dict(store)
    contents = path.read_bytes()
    path.write_bytes(contents + b"\n")
    with KVStore(path) as store:
        assert dict(store) == live
    assert "is longer than its contents" in caplog.text
    assert path.stat().st_size == len(contents)
    assert_consistent(path)
    path.write_bytes(contents + bytes(100) + contents[record : record + 200])
    assert_refused_and_left_alone(path, f"at byte {len(contents) + 100:,}")


def test_records_past_the_end_that_a_crash_left_are_there(path: Path) -> None:
    """Power was lost before the new length was in the state, which is one sector, but not after."""
    with KVStore(path) as store:
        for number in range(100):
            store.create(f"{number}", make_value("", number, 16_000))
        store.sync()
        state = path.read_bytes()[STATE_OFFSET : STATE_OFFSET + STATE.size]
        while store._file.extent_count == STATE.unpack(state)[1]:
            number += 1
            store.create(f"{number}", make_value("", number, 16_000))
        live = dict(store)
        crashed = bytearray(path.read_bytes())
    crashed[STATE_OFFSET : STATE_OFFSET + STATE.size] = state
    path.write_bytes(crashed)
    with KVStore(path) as store:
        assert dict(store) == live
    assert_consistent(path)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_file_with_a_damaged_state_that_was_cut_between_extents_is_refused(
    path: Path, cut: int
) -> None:
    """Only the entries of the extents that were left counted: the keys of the others were gone."""
    with KVStore(path) as store:
        for number in range(200):
            store.create(f"{number}", {"text": "x" * 16_000})
    contents = path.read_bytes()
    end = contents.rindex(RECORD_MAGIC_BYTES) + EXTENT_SIZE >> EXTENT_SHIFT
    os.truncate(path, (end - cut) << EXTENT_SHIFT)
    change_byte(path, STATE_OFFSET + 8, 0x01)
    shortened = path.read_bytes()
    with pytest.raises(CorruptStoreError, match="where there should be 200"):
        KVStore(path)
    assert path.read_bytes() == shortened


def test_file_with_a_damaged_state_and_a_spare_extent_opens(path: Path) -> None:
    """Its entry has no live block, as no closed file's has; that was taken for damage too."""
    with KVStore(path) as store:
        store.create("key", {"n": 1})
        store.create("large", {"text": "x" * 3000})
        store.delete("large")
        unclosed = bytearray(path.read_bytes())
    unclosed[STATE_OFFSET + 8] ^= 0xFF
    path.write_bytes(unclosed)
    with KVStore(path) as store:
        assert dict(store) == {"key": {"n": 1}}


@pytest.mark.parametrize("change", [b"\xff", bytes(EXTENT_MAP_SIZE)], ids=["a byte", "all"])
def test_file_with_a_damaged_state_whose_extent_map_cannot_tell_either_is_refused(
    path: Path, change: bytes
) -> None:
    """How many records there should be nobody knows then, and so not whether it was cut off."""
    build(path, random.Random(5), 300)
    change_byte(path, STATE_OFFSET + 8, 0x01)
    overwrite(path, EXTENT_MAP_OFFSET, change)
    contents = path.read_bytes()
    with pytest.raises(CorruptStoreError, match=r"extent map|where there should be 0"):
        KVStore(path)
    assert path.read_bytes() == contents


def test_refusal_of_a_file_that_is_too_short_names_the_way_to_save_what_is_left(path: Path) -> None:
    build(path, random.Random(6), 100)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptStoreError, match="bytes were removed") as error:
        KVStore(path)
    assert f"Where there is none, kvstore-inspect repair {path} saves" in str(error.value)
