"""Of the records of a key that a crash leaves one wins, whatever the disk takes of a recovery."""

from array import array
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from support import MIB
from support.clock import FakeClock
from support.components import NOW_MS
from support.consistency import assert_consistent
from support.disks import quick_folder
from support.files import open_contents
from support.images import SECTOR, before_each_flush, write_image
from support.record_images import STAMP, Image

from kvstore import CorruptStoreError, KVStore
from kvstore.compiled import Implementation
from kvstore.format.found_words import found_offset, found_word
from kvstore.format.layout import (
    BLOCK_SIZES,
    DIRECTORY_OFFSET,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_MAGIC,
    MARKED_MAGIC,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SEGMENT_SLOTS,
    SIZE_CLASSES,
    STAMP_LIMIT,
    STATE,
    STATE_OFFSET,
)
from kvstore.recovery.room import Room

OLD, NEW, NEWEST = ({"mark": number} for number in range(3))
LONG: Final = "é" * 16  # 32 bytes: all of a key that its slot has


class Crashed(Image):
    """A file that was not closed, and has records just where a test puts them."""

    def __init__(self, contents: bytes) -> None:
        super().__init__(contents)
        self._counts = dict.fromkeys(range(len(BLOCK_SIZES)), 0)

    def add(self, key: str, value: dict[str, int], stamp: int, **fields: int) -> int:
        """Put a record in a block of its own, of a small one in a sector; return its offset."""
        text = b'{"mark":%d}' % value["mark"]
        size_class = SIZE_CLASSES[RECORD_HEADER_SIZE + len(key.encode()) + len(text) + 31 >> 5]
        offset = self.extents()[-1 - size_class]
        offset += self._counts[size_class] * 8 * BLOCK_SIZES[size_class]
        self._counts[size_class] += 1
        self.forge(offset, key.encode(), text, stamp, **fields)
        return offset

    def put_whole(self, offset: int, contents: bytes | bytearray) -> None:
        """Have the sector at that offset be as it is in another file."""
        self.put(offset, contents[offset : offset + SECTOR])


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    with quick_folder(tmp_path) as folder:
        yield folder / "test.kvs"


@pytest.fixture
def crashed(path: Path, clock: FakeClock, implementation: Implementation) -> Crashed:
    """Return a new file that is open, and after a restart will be recovered."""
    assert clock.now_ms == NOW_MS
    with KVStore(path) as store:
        return Crashed(open_contents(store))


def recovered(path: Path, image: Image | bytes) -> dict[str, Any]:
    """Recover a file of these contents; return what it holds, also after it was closed."""
    contents = bytes(image.contents if isinstance(image, Image) else image)
    with KVStore(write_image(path, contents)) as store:
        found = dict(store)
        assert len(store) == len(found)
    assert_consistent(path)
    with KVStore(path) as store:
        assert dict(store) == found
    return found


# --- which one it is ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["key", LONG, LONG + "rest"])
def test_latest_stamp_wins_wherever_the_records_are(
    path: Path, crashed: Crashed, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    crashed.add(key, NEW, STAMP + 1)
    crashed.add(key, NEWEST, STAMP + 2)
    crashed.add(key, OLD, STAMP)
    crashed.add("other", OLD, STAMP)
    assert recovered(path, crashed) == {key: NEWEST, "other": OLD}
    assert "index of 2 records" in caplog.text
    assert "dropped 0 expired, 0 deleted, 2 outdated and 0 damaged" in caplog.text


def test_keys_that_share_their_first_32_bytes_are_told_apart(path: Path, crashed: Crashed) -> None:
    expected = {}
    for number, tail in enumerate(("", "a", "b", "é" * 16)):
        key = LONG + tail
        crashed.add(key, OLD, STAMP + 9)
        expected[key] = NEW
        crashed.add(key, NEW, STAMP + 10 + number)
    crashed.add(LONG + "c", NEW, STAMP + 20, magic=MARKED_MAGIC)
    assert recovered(path, crashed) == expected


def test_marked_record_wins_by_its_stamp_and_then_is_gone(
    path: Path, crashed: Crashed, caplog: pytest.LogCaptureFixture
) -> None:
    crashed.add("deleted", OLD, STAMP)
    crashed.add("deleted", NEW, STAMP + 1, magic=MARKED_MAGIC, generation=3)
    crashed.add("created anew", OLD, STAMP + 1, magic=MARKED_MAGIC)
    crashed.add("created anew", NEW, STAMP + 2)
    assert recovered(path, crashed) == {"created anew": NEW}
    assert "dropped 0 expired, 1 deleted, 2 outdated and 0 damaged" in caplog.text


@pytest.mark.parametrize("magics", [(RECORD_MAGIC, MARKED_MAGIC), (MARKED_MAGIC, RECORD_MAGIC)])
def test_of_equal_stamps_a_marked_one_wins(
    path: Path, crashed: Crashed, magics: tuple[int, int]
) -> None:
    for magic in magics:
        crashed.add("key", OLD, STAMP, magic=magic)
    assert recovered(path, crashed) == {}


def test_of_two_copies_one_is_left(path: Path, crashed: Crashed) -> None:
    """A record that is moved keeps its stamp."""
    for _ in range(2):
        crashed.add("key", OLD, STAMP)
    assert recovered(path, crashed) == {"key": OLD}


def test_newest_that_has_expired_brings_back_nothing_older(
    path: Path, crashed: Crashed, clock: FakeClock
) -> None:
    crashed.add("key", OLD, STAMP)
    crashed.add("key", NEW, STAMP + 1, expires_at=NOW_MS + 1_000)
    clock.advance(1)
    assert recovered(path, crashed) == {}
    clock.advance(-10)
    with KVStore(path) as store:
        assert dict(store) == {}


def test_winner_that_was_retired_is_live_again(path: Path, crashed: Crashed) -> None:
    """Power loss took what had superseded it; no reclaiming may take it for retired."""
    winner = crashed.add("key", OLD, STAMP, generation=200)
    with KVStore(write_image(path, bytes(crashed.contents))) as store:
        assert path.read_bytes()[winner + 7] == 0
        store["key"] = NEW
        store.sync()
        store["key"] = NEWEST
        assert store["key"] == NEWEST
    assert_consistent(path)
    assert recovered(path, crashed) == {"key": OLD}


@pytest.mark.parametrize("stamp", [STAMP_LIMIT, 2**64 - 1])
def test_record_with_a_stamp_past_the_limit_is_none(
    path: Path, crashed: Crashed, caplog: pytest.LogCaptureFixture, stamp: int
) -> None:
    crashed.add("key", OLD, STAMP)
    crashed.add("key", NEW, stamp)
    assert recovered(path, crashed) == {"key": OLD}
    assert "0 outdated and 1 damaged" in caplog.text


def test_last_stamp_that_there_is_wins_and_nothing_can_supersede_it(
    path: Path, crashed: Crashed
) -> None:
    crashed.add("key", OLD, STAMP)
    crashed.add("key", NEW, STAMP_LIMIT - 1)
    assert recovered(path, crashed) == {"key": NEW}
    with KVStore(path) as store, pytest.raises(CorruptStoreError, match="limit"):
        store["key"] = NEWEST


@pytest.mark.parametrize("fields", [{}, {"magic": MARKED_MAGIC}, {"expires_at": NOW_MS}])
def test_stamps_go_on_after_those_of_records_that_were_dropped(
    path: Path, crashed: Crashed, fields: dict[str, int]
) -> None:
    """The clock is far behind them, and power loss may bring each of them back."""
    later = STAMP + (10**9 << 16)
    crashed.add("key", OLD, later, **fields)
    loser = crashed.add("key", OLD, later - 1)
    with KVStore(write_image(path, bytes(crashed.contents))) as store:
        store["key"] = NEW
        after = Crashed(path.read_bytes())
    after.put_whole(loser, crashed.contents)
    assert recovered(path, after) == {"key": NEW}


# --- what is void --------------------------------------------------------------------------------


def void_stamp(contents: bytes) -> int:
    return int(STATE.unpack_from(contents, STATE_OFFSET)[5])


def test_void_records_are_dropped_and_outrank_nothing(
    path: Path, crashed: Crashed, caplog: pytest.LogCaptureFixture
) -> None:
    crashed.add("removed", OLD, STAMP)
    crashed.add("key", OLD, STAMP)
    crashed.add("key", NEW, STAMP + 1)
    crashed.add("removed too", OLD, 1, magic=MARKED_MAGIC)
    crashed.set_void_stamp(STAMP)
    assert recovered(path, crashed) == {"key": NEW}
    assert "0 deleted, 3 outdated and 0 damaged" in caplog.text


def test_void_stamp_is_forgotten_once_what_it_voids_is_gone_from_the_disk(
    path: Path, crashed: Crashed
) -> None:
    void = crashed.add("key", OLD, STAMP)
    crashed.set_void_stamp(STAMP)
    write_image(path, bytes(crashed.contents))
    flushed: list[bytes] = []
    with before_each_flush(lambda: flushed.append(path.read_bytes())):
        store = KVStore(path)
    with store:
        assert void_stamp(path.read_bytes()) == 0
    is_there = [image[void : void + 2] == crashed.contents[void : void + 2] for image in flushed]
    forgotten = [void_stamp(image) == 0 for image in flushed]
    assert True not in is_there[is_there.index(False) :]
    assert forgotten.index(True) > is_there.index(False), "it is flushed before that is said"


def test_what_is_created_after_all_was_removed_is_not_void(
    path: Path, crashed: Crashed, clock: FakeClock
) -> None:
    """Though the clock was set back, and no record is there to tell of a stamp."""
    crashed.set_void_stamp(STAMP + (10**6 << 16))
    with KVStore(write_image(path, bytes(crashed.contents))) as store:
        store.create("key", NEW)
        after = path.read_bytes()
    assert recovered(path, after) == {"key": NEW}
    clock.advance(-1)
    crashed = Crashed(after)
    crashed.set_void_stamp(STAMP + (10**6 << 16))
    assert recovered(path, crashed) == {"key": NEW}


# --- what the disk takes of it -------------------------------------------------------------------


def images_of_recovery(path: Path, contents: bytes) -> list[bytes]:
    """Recover a file; return what it holds before that, at each flush, and at the end."""
    images = [contents]
    write_image(path, contents)
    with before_each_flush(lambda: images.append(path.read_bytes())):
        store = KVStore(path, max_bytes=4 * MIB)
    images.append(path.read_bytes())
    store._file.require_rebuild()
    store.close()
    return images


def subsets(before: bytes, after: bytes) -> Iterator[bytes]:
    """Yield what the disk may have of these: each changed sector alone, or all but that one.

    Of those that count for a recovery: with the state, or a record.
    """
    changed = [
        place
        for place in range(0, len(after), SECTOR)
        if before[place : place + SECTOR] != after[place : place + SECTOR]
        and (
            place == STATE_OFFSET
            or RECORD_MAGIC_BYTES[:3] in before[place : place + 3] + after[place : place + 3]
        )
    ]
    for place in changed:
        for one, other in ((before, after), (after, before)):
            image = bytearray(one.ljust(len(after), b"\0"))
            image[place : place + SECTOR] = other[place : place + SECTOR]
            yield bytes(image)


def of_both_kinds(crashed: Crashed) -> dict[str, Any]:
    """Add keys whose records must be cleared in the right order; return what they come to."""
    crashed.add("marked", OLD, STAMP, generation=1)
    crashed.add("marked", NEW, STAMP + 1, magic=MARKED_MAGIC, generation=1)
    crashed.add("expired", OLD, STAMP)
    crashed.add("expired", NEW, STAMP + 1, expires_at=NOW_MS)
    crashed.add("kept", OLD, STAMP)
    crashed.add("kept", NEW, STAMP + 1)
    return {"kept": NEW}


def test_power_lost_between_any_two_flushes_of_a_recovery_brings_back_nothing(
    path: Path, crashed: Crashed
) -> None:
    """Losers go first: under one flush the disk could lose what outranks them and keep them."""
    expected = of_both_kinds(crashed)
    images = images_of_recovery(path, bytes(crashed.contents))
    for before, after in pairwise(images):
        for image in subsets(before, after):
            assert recovered(path, image) == expected
    assert recovered(path, images[-1]) == expected


def test_record_of_the_wrong_class_for_its_extent_is_gone_before_what_outranks_it(
    path: Path, crashed: Crashed
) -> None:
    """The extent was for larger records before, and the disk has one of these still."""
    for number in range(20):
        crashed.add(f"small {number}", OLD, STAMP)
    extent = crashed.add("key", NEW, STAMP + 1, magic=MARKED_MAGIC) & -EXTENT_SIZE
    value = b'{"mark":0,"rest":"%b"}' % (b"x" * 500)
    crashed.forge(extent + 60 * 576, b"key", value, STAMP)
    images = images_of_recovery(path, bytes(crashed.contents))
    for before, after in pairwise(images):
        for image in subsets(before, after):
            assert recovered(path, image) == {f"small {n}": OLD for n in range(20)}


def test_power_lost_in_the_recovery_after_a_kill_loses_no_key(path: Path, crashed: Crashed) -> None:
    """No disk may have what the process had written; so that is flushed before a loser goes."""
    crashed.add("key", OLD, STAMP, generation=1)
    on_disk = bytes(crashed.contents)
    crashed.add("key", NEW, STAMP + 1)
    _, first, *_ = images_of_recovery(path, bytes(crashed.contents))
    for image in subsets(on_disk, first):
        assert recovered(path, image) in ({"key": OLD}, {"key": NEW})


def test_power_lost_in_the_recovery_after_a_kill_brings_back_nothing_older(
    path: Path, crashed: Crashed
) -> None:
    """That the old record was cleared may not be on any disk, where only the new one is found."""
    old = crashed.add("key", OLD, STAMP)
    crashed.add("key", NEW, STAMP + 1, expires_at=NOW_MS)
    on_disk = bytes(crashed.contents)
    crashed.put(old, FREE_MAGIC.to_bytes(4, "little") + b"\xff\xff\0\0")
    images = images_of_recovery(path, bytes(crashed.contents))
    for before, after in pairwise([on_disk, *images[1:]]):
        for image in subsets(before, after):
            assert recovered(path, image) == {}


@pytest.mark.parametrize(
    ("add", "flushes"),
    [
        (lambda crashed: crashed.add("key", OLD, STAMP), 0),
        (lambda crashed: crashed.add("key", OLD, STAMP, generation=7), 0),
        (lambda crashed: crashed.add("key", OLD, STAMP, magic=MARKED_MAGIC), 2),
        (of_both_kinds, 3),
    ],
    ids=["one record", "one that was retired", "one that is marked", "losers and others"],
)
def test_recovery_flushes_no_more_often_than_there_is_a_reason(
    path: Path, crashed: Crashed, add: Callable[[Crashed], object], flushes: int
) -> None:
    plain = len(images_of_recovery(path, bytes(crashed.contents)))
    add(crashed)
    assert len(images_of_recovery(path, bytes(crashed.contents))) == plain + flushes


# --- whether it may be recovered at all ----------------------------------------------------------


def make_in_use(path: Path) -> bytes:
    """Return a file in use, with a record that is retired and one that is marked."""
    with KVStore(path) as store:
        for key in ("kept", "dropped"):
            store.create(key, OLD)
        store.sync()
        for key in ("kept", "dropped"):
            store[key] = NEW
        store.delete("dropped")
        return path.read_bytes()


def test_retired_and_marked_records_are_expected_where_the_state_is_damaged(
    path: Path, implementation: Implementation
) -> None:
    """The extent map counts them too; so none is missing, and the file opens."""
    contents = bytearray(make_in_use(path))
    contents[STATE_OFFSET] ^= 2
    assert recovered(path, bytes(contents)) == {"kept": NEW}


def test_marked_record_too_many_in_a_closed_file_with_a_damaged_index_is_left_to_a_repair(
    path: Path, clock: FakeClock, implementation: Implementation
) -> None:
    with KVStore(path) as store:
        store.create("key", OLD)
    image = Crashed(path.read_bytes())
    image.add("key", OLD, STAMP + 1, magic=MARKED_MAGIC)
    image.contents[DIRECTORY_OFFSET] ^= 1
    with pytest.raises(CorruptStoreError, match="2 whole records, where there should be 1"):
        KVStore(write_image(path, bytes(image.contents)))


@pytest.mark.parametrize("magic", [RECORD_MAGIC, MARKED_MAGIC])
@pytest.mark.parametrize("field", ["stamp", "expires_at"])
def test_times_that_look_like_magics_are_not_taken_for_records_that_were_moved(
    path: Path, crashed: Crashed, magic: int, field: str
) -> None:
    """Two milliseconds in 49.7 days look so. Most records then were astray, and none was opened."""
    moment = (NOW_MS >> 32) + 1 << 32 | magic
    stamp, expires_at = (moment << 16, 2**44 + 5) if field == "stamp" else (STAMP, moment)
    for number in range(10):
        crashed.add(f"key {number}", OLD, stamp + number, expires_at=expires_at)
    assert recovered(path, crashed) == {f"key {number}": OLD for number in range(10)}


# --- a file at its limit -------------------------------------------------------------------------


def make_room(
    stamps: list[int], older: dict[int, int], max_extents: int, void_stamp: int = 0
) -> tuple[list[int], list[int]]:
    """Give up what has no room of records of these stamps, all of the first sixteenth of hashes.

    Of some an older record was found, with that stamp. Returns the stamps of what is given up, and
    of what stays.
    """
    words = array("Q", bytes(64 * (len(stamps) + len(older))))
    hashes = [n * (1 << 60) // len(stamps) for n in range(len(stamps))]
    kept, losers = array("Q"), array("Q")
    for number, stamp in enumerate(stamps):
        kept.append(found_word(hashes[number], 64 * number))
        words[8 * number + 1] = stamp
    for place, (number, stamp) in enumerate(older.items(), len(stamps)):
        losers.append(found_word(hashes[number], 64 * place))
        words[8 * place + 1] = stamp
    file: Any = SimpleNamespace(words=words, max_extents=max_extents, void_stamp=void_stamp)
    found: Any = SimpleNamespace(words=array("Q", sorted(kept)))
    blocks = -(-len(words) * 8 // EXTENT_SIZE)
    scan: Any = SimpleNamespace(slabs=dict.fromkeys(range(blocks), (0, 1024, 0, 0)))
    given_up = Room(file, found, scan, losers, array("Q")).make()
    return (
        [words[found_offset(word) + 8 >> 3] for word in given_up],
        [words[found_offset(word) + 8 >> 3] for word in found.words],
    )


def extents_for(slabs: int, segments: int) -> int:
    return FIXED_EXTENTS + slabs + segments


def test_newest_records_give_way_where_a_full_file_has_no_room_for_their_slots() -> None:
    stamps = list(range(1, SEGMENT_SLOTS + 11))
    assert make_room(stamps, {}, extents_for(2, 17)) == ([], stamps)
    given_up, kept = make_room(stamps, {}, extents_for(2, 16))
    assert sorted(given_up) == stamps[SEGMENT_SLOTS:]
    assert sorted(kept) == stamps[:SEGMENT_SLOTS]


def test_key_that_has_an_older_record_is_as_old_as_that() -> None:
    """What was promised of it may be that one, which the new one is about to outrank."""
    stamps = list(range(100, SEGMENT_SLOTS + 101))
    last = len(stamps) - 1
    given_up, kept = make_room(stamps, {last: 5}, extents_for(2, 16))
    assert given_up == [stamps[-2]]
    assert stamps[-1] in kept
    given_up, _ = make_room(stamps, {last: 5}, extents_for(2, 16), void_stamp=5)
    assert given_up == [stamps[-1]], "what is void was promised to nobody"
