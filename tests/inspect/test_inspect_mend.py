"""verify and repair: what is wrong is named and explained, what is whole is brought back."""

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support.components import NOW_MS, open_components, replace_writes
from support.disks import SHARING, fill, mounted
from support.inspecting import LOCKED, inspect, run_inspector, start_inspector
from support.truth import Truth
from xxhash import xxh3_64_intdigest

import kvstore_inspect.commands.repair as repair_command
from kvstore import CorruptStoreError, KVStore
from kvstore.file.datafile import DataFile
from kvstore.file.platform import system
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BUCKET_COUNT,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    DIRECTORY_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC_BYTES,
    SLOT_COUNT,
    STAMP_SHIFT,
    STATE,
    STATE_OFFSET,
    U16,
    key_hash,
    map_entry_offset,
)
from kvstore.format.superblock import pack_identity, pack_state
from kvstore.recovery.check import check_file
from kvstore.recovery.problems import Breach
from kvstore_inspect import repair
from kvstore_inspect.explanations import EXPLANATIONS, Remedy, remedies
from kvstore_inspect.file_view import open_view
from kvstore_inspect.opening import Opening
from kvstore_inspect.records import Record, Records
from kvstore_inspect.terminal import escaped

KEYS: Final = 60
COUNTS: Final = {"keys", "expiring", "orphaned", "expired", "outdated", "marked", "damaged"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A closed store with short keys and long ones, a third of them expiring, and with gaps."""
    path = tmp_path_factory.mktemp("whole") / "whole.kvs"
    live: dict[str, dict[str, Any]] = {}
    with KVStore(path) as store:
        for number in range(KEYS + 20):
            key = f"{'é' * 16 if number % 5 == 0 else ''}{number}"
            value = {"mark": number, "text": f"{number};" * (number * 7 % 200)}
            store.create(key, value, ttl=10**8 if number % 3 == 0 else None)
            if number % 4 == 3:
                store.delete(key)
            else:
                live[key] = value
    assert len(live) == KEYS
    return Truth(path, live)


def damaged(whole: Truth, path: Path, *changes: tuple[int, bytes]) -> bytes:
    """Write the store with these bytes changed to `path`, and return what it holds."""
    contents = bytearray(whole.contents)
    for offset, data in changes:
        contents[offset : offset + len(data)] = data
    path.write_bytes(contents)
    return bytes(contents)


def torn_record(whole: Truth, key: str) -> tuple[int, bytes]:
    """Return the change of one byte of a record's value."""
    last = whole.places[key].stop - 1
    return last, bytes([whole.contents[last] ^ 1])


def zeroed_table(whole: Truth) -> tuple[int, bytes]:
    """Return the change that makes the pages of a segment zeros, one that has a key."""
    contents = whole.contents
    entry = key_hash(b"4", IDENTITY.unpack_from(contents)[4]) >> DIRECTORY_SHIFT
    (extent,) = U16.unpack_from(contents, DIRECTORY_OFFSET + 2 * entry)
    return extent << EXTENT_SHIFT, bytes(EXTENT_SIZE)


def unclosed(whole: Truth, holder: int = 0) -> list[tuple[int, bytes]]:
    """Return the changes that make the store one that was not closed."""
    contents = whole.contents
    seed = IDENTITY.unpack_from(contents)[4]
    _, count, durable, *_ = STATE.unpack_from(contents, STATE_OFFSET)
    state = pack_state(False, count, durable, 0, 0, seed)
    return [(STATE_OFFSET, state), (HOLDER_OFFSET, HOLDER.pack(holder))]


def dead_pid() -> int:
    """Return the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def contents_of(path: Path) -> dict[str, Any]:
    assert [str(problem) for problem in check_file(path)] == []
    with KVStore(path) as store:
        return dict(store)


def backups(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.backup-*"))


# --- the explanations --------------------------------------------------------------------------


@pytest.mark.parametrize("breach", Breach)
def test_every_breach_is_explained(breach: Breach) -> None:
    explanation = EXPLANATIONS[breach]
    assert explanation.meaning.endswith(".")
    assert "data.kvs" in explanation.remedy.advice("data.kvs") or explanation.remedy is Remedy.OPEN


def test_where_the_next_opening_rebuilds_the_index_nothing_is_to_be_done() -> None:
    index = {Breach.SLOT_SEGMENT, Breach.SLAB_COUNT}
    assert set(remedies(index, Opening.USES).values()) == {Remedy.REPAIR}
    for reason in (Breach.NOT_CLOSED, Breach.STATE_DAMAGED, Breach.INDEX_CHECKSUM):
        found = {*index, reason}
        assert set(remedies(found, Opening.REBUILDS).values()) == {Remedy.OPEN}
        assert set(remedies(found, Opening.REFUSES).values()) == {Remedy.REPAIR}


def test_where_the_store_does_not_open_opening_is_no_advice() -> None:
    found = {Breach.NOT_CLOSED, Breach.FILE_CUT_OFF, Breach.SLAB_COUNT, Breach.RECORD_CHECKSUM}
    assert set(remedies(found, Opening.REFUSES).values()) == {Remedy.REPAIR, Remedy.RESTORE}


def flipped(contents: bytes, *places: int) -> bytes:
    """Return the contents with a bit flipped at each of these places."""
    changed = bytearray(contents)
    for place in places:
        changed[place] ^= 1
    return bytes(changed)


Damaging = Callable[["Truth"], bytes]


def with_directory_and_record_hit(whole: Truth) -> bytes:
    return flipped(whole.contents, DIRECTORY_OFFSET + 999, whole.places["1"].stop - 1)


def with_state_and_record_hit(whole: Truth) -> bytes:
    return flipped(whole.contents, STATE_OFFSET + 8, whole.places["1"].stop - 1)


def with_state_and_magic_hit(whole: Truth) -> bytes:
    return flipped(whole.contents, STATE_OFFSET + 8, whole.places["1"].start)


def with_a_byte_more(whole: Truth) -> bytes:
    contents = whole.contents
    return contents[:40_000] + b"+" + contents[40_000:]


def unclosed_with_a_byte_more(whole: Truth) -> bytes:
    contents = bytearray(whole.contents)
    for offset, data in unclosed(whole):
        contents[offset : offset + len(data)] = data
    return bytes(contents[:40_000]) + b"+" + bytes(contents[40_000:])


def with_something_appended(whole: Truth) -> bytes:
    return whole.contents + whole.contents[whole.places["1"].start :][:4_096]


REFUSED: Final[tuple[Damaging, ...]] = (
    with_directory_and_record_hit,
    with_state_and_record_hit,
    with_state_and_magic_hit,
    with_a_byte_more,
    unclosed_with_a_byte_more,
    with_something_appended,
)


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_what_the_next_opening_refuses_is_never_said_to_be_mended_by_it(
    whole: Truth, path: Path, damage: Damaging
) -> None:
    """verify, info and report asked what was found, the opening what would be lost by it."""
    path.write_bytes(damage(whole))
    with pytest.raises(CorruptStoreError, match="kvstore-inspect repair"):
        KVStore(path)
    found = inspect("verify", "--json", path).json()
    assert {kind["remedy"] for kind in found["kinds"]} <= {"repair", "restore"}
    text = inspect("verify", path).out
    assert "nothing to do" not in text
    assert "nothing is lost" not in text
    assert "raises an error" not in text, "no key can be read at all"
    assert "the store does not open before that is mended" in text
    advice = " ".join(inspect("info", "--json", path).json()["advice"])
    assert "The store does not open as it is" in advice
    assert "next opening" not in advice
    inspect("repair", "--no-backup", path)
    assert inspect("verify", path).status == 0
    KVStore(path).close()


def test_to_ask_what_the_next_opening_does_changes_nothing(whole: Truth, path: Path) -> None:
    expected = dict.fromkeys(REFUSED, Opening.REFUSES)
    expected[lambda whole: whole.contents] = Opening.USES
    expected[lambda whole: whole.contents + bytes(EXTENT_SIZE)] = Opening.USES
    expected[lambda whole: flipped(whole.contents, DIRECTORY_OFFSET)] = Opening.REBUILDS
    expected[lambda whole: whole.contents[:-1]] = Opening.REFUSES
    for damage, opening in expected.items():
        path.write_bytes(damage(whole))
        os.utime(path, ns=(10**18, 10**18))
        with open_view(path) as view:
            assert view.next_opening() is opening
        assert path.read_bytes() == damage(whole)
        assert os.stat(path).st_mtime_ns == 10**18


# --- verify ------------------------------------------------------------------------------------


def test_verify_finds_nothing_wrong_with_a_whole_store(whole: Truth) -> None:
    ran = inspect("verify", whole.path)
    assert ran.status == 0
    assert "no problems" in ran.out


def test_verify_json_has_the_fields_that_its_help_tells_of(whole: Truth, path: Path) -> None:
    damaged(whole, path, torn_record(whole, "1"))
    ran = inspect("verify", "--json", path)
    found = ran.json()
    assert found.keys() == {
        "file", "fine", "closed", "index_trusted", "in_use", "problems", "kinds", "counts",
    }  # fmt: skip
    assert found["problems"] == [
        {
            "breach": "record-checksum",
            "offset": whole.places["1"].start,
            "structure": "record",
            "message": "fails its checksum",
            "key": "1",
        }
    ]
    (kind,) = found["kinds"]
    assert kind.keys() == {"breach", "count", "meaning", "remedy", "advice"}
    assert (kind["count"], kind["remedy"]) == (1, "delete")
    assert found["counts"].keys() == COUNTS
    help_text = inspect("verify", "--help").out
    assert all(name in help_text for name in (*found, *kind, *COUNTS))


def test_verify_counts_keys_as_they_can_be_read(whole: Truth, path: Path) -> None:
    damaged(whole, path, torn_record(whole, "1"), torn_record(whole, "2"), zeroed_table(whole))
    counts = inspect("verify", "--json", path).json()["counts"]
    expiring = sum(value["mark"] % 3 == 0 for value in whole.live.values())
    assert (counts["keys"], counts["expiring"]) == (KEYS - 2, expiring)
    assert (counts["damaged"], counts["expired"], counts["outdated"]) == (2, 0, 0)
    assert 0 < counts["orphaned"] < KEYS


def test_verify_counts_what_has_expired(path: Path) -> None:
    with open_components(path) as parts:
        parts.store(b"old", b"{}", NOW_MS + 1)
        parts.store(b"new", b"{}")
    counts = inspect("verify", "--json", path).json()["counts"]
    assert (counts["keys"], counts["expiring"], counts["expired"]) == (1, 0, 1)


def test_verify_names_key_place_meaning_and_remedy(whole: Truth, path: Path) -> None:
    damaged(whole, path, torn_record(whole, "1"))
    ran = inspect("verify", path)
    text = ran.out
    assert ran.status == 1
    assert f"byte {whole.places['1'].start:,}: record: fails its checksum (key 1)" in text
    assert EXPLANATIONS[Breach.RECORD_CHECKSUM].meaning in text
    assert f"python -m kvstore put --file {escaped(str(path))} KEY VALUE" in text


def test_verify_says_of_a_crashed_store_that_nothing_is_lost(whole: Truth, path: Path) -> None:
    damaged(whole, path, *unclosed(whole, dead_pid()))
    ran = inspect("verify", path)
    assert ran.status == 1
    assert "the next opening rebuilds the index, and nothing is lost" in ran.out
    assert "repair" not in ran.out


def test_verify_says_that_what_the_next_opening_mends_needs_no_repair(
    whole: Truth, path: Path
) -> None:
    damaged(whole, path, (DIRECTORY_OFFSET, bytes(DIRECTORY_SIZE)))
    found = inspect("verify", "--json", path).json()
    assert not found["index_trusted"]
    assert {kind["remedy"] for kind in found["kinds"]} == {"open"}
    assert contents_after_opening(path) == whole.live


def contents_after_opening(path: Path) -> dict[str, Any]:
    with KVStore(path) as store:
        return dict(store)


def test_verify_tells_of_ten_of_a_kind_and_of_all_when_asked(whole: Truth, path: Path) -> None:
    keys = sorted(whole.live)[:15]
    damaged(whole, path, *(torn_record(whole, key) for key in keys))
    usual, everything = inspect("verify", path), inspect("verify", "--all", path)
    assert usual.out.count("fails its checksum") == 10
    assert "and 5 more of the kind" in usual.out
    assert everything.out.count("fails its checksum") == 15
    for arguments, count in (((), 10), (("--all",), 15)):
        found = inspect("verify", "--json", *arguments, path).json()
        assert len(found["problems"]) == count
        assert found["kinds"][0]["count"] == 15


def test_verify_takes_no_memory_for_the_number_of_problems(path: Path) -> None:
    with KVStore(path) as store:
        for number in range(6_000):
            store.create(str(number), {})
    contents = bytearray(path.read_bytes())
    for page in range(6 * EXTENT_SIZE, len(contents), EXTENT_SIZE // BUCKET_COUNT):
        if contents[page + 4 : page + 8] == b"0VBK":
            contents[page : page + 8] = bytes(8)
    path.write_bytes(contents)
    inspect("verify", "--json", path)  # what is imported is not counted
    tracemalloc.start()
    ran = inspect("verify", "--json", path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kinds = {kind["breach"]: kind["count"] for kind in ran.json()["kinds"]}
    assert kinds["record-unslotted"] == 6_000
    assert peak < 10_000_000


def test_verify_escapes_keys(path: Path) -> None:
    with KVStore(path) as store:
        store.create("\x1b[31mred\n", {"a": 1})
    contents = bytearray(path.read_bytes())
    contents[contents.index(b'{"a":1}')] ^= 1
    path.write_bytes(contents)
    ran = inspect("verify", path)
    assert "\x1b" not in ran.out
    assert "(key \\x1b[31mred\\n)" in ran.out


def test_verify_of_what_is_no_store_or_is_beyond_help(whole: Truth, path: Path) -> None:
    path.write_bytes(b"something else" * 9_999)
    assert inspect("verify", path).status == 2
    damaged(whole, path, *((offset + 20, b"\xff\xfe\xfd") for offset in IDENTITY_OFFSETS))
    ran = inspect("verify", path)
    assert ran.status == 1
    assert "restore the file from a copy" in ran.err


def test_verify_of_a_store_in_use_exits_3(whole: Truth, path: Path) -> None:
    damaged(whole, path)
    with KVStore(path):
        assert inspect("verify", path).status == LOCKED


def test_verify_as_a_process_and_into_a_pipe_that_ends(whole: Truth, path: Path) -> None:
    damaged(whole, path, (DIRECTORY_OFFSET, random.Random(1).randbytes(DIRECTORY_SIZE)))
    ran = run_inspector("verify", path)
    assert (ran.status, ran.err) == (1, "")
    with start_inspector("verify", "--all", path) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline().startswith("byte 512: state")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() in (0, 1)


# --- verify without the lock -------------------------------------------------------------------


def test_verify_unlocked_takes_changes_under_way_for_no_damage(path: Path) -> None:
    """One thread creates, replaces and deletes as fast as it can while the file is checked."""
    with KVStore(path) as store:
        for number in range(300):
            store.create(f"still {number}", {"number": number})
        stop, busy = threading.Event(), threading.Event()

        def change() -> None:
            number = 0
            while not stop.is_set():
                key = f"busy {number % 50}"
                store.create(key, {"text": "x" * (number % 3000)})
                store.put(f"hot {number % 3}", {"number": number})
                if number % 9 == 0:
                    store.sync()
                store.put(key, {"text": "y" * (number % 300)})
                if number % 50 > 20:
                    busy.set()
                store.delete(key)
                number += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            busy.wait()
            ran = inspect("verify", "--unlocked", "--json", path)
        finally:
            stop.set()
            thread.join()
    found = ran.json()
    assert found["problems"] == []
    assert (ran.status, found["fine"], found["in_use"]) == (0, True, True)
    assert found["counts"]["keys"] >= 300


def test_verify_unlocked_still_finds_what_is_damaged(path: Path) -> None:
    with KVStore(path) as store:
        store.create("whole", {"a": 1})
        store.create("torn", {"b": 1})
        contents = path.read_bytes()
        offset = contents.index(b'{"b":1}')
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"[")
        ran = inspect("verify", "--unlocked", "--json", path)
    found = ran.json()
    assert [(each["breach"], each["key"]) for each in found["problems"]] == [
        ("record-checksum", "torn")
    ]
    assert (ran.status, found["counts"]["damaged"]) == (1, 1)


def test_verify_unlocked_of_a_file_that_nobody_has_open_any_more(whole: Truth, path: Path) -> None:
    damaged(whole, path, *unclosed(whole, dead_pid()))
    ran = inspect("verify", "--unlocked", path)
    assert ran.status == 1
    assert "was not closed" in ran.out


# --- what the other commands read --------------------------------------------------------------


def test_records_of_a_segment_with_a_damaged_page_are_all_found(whole: Truth, path: Path) -> None:
    """Its other pages lead to their records still; these were neither listed nor left over."""
    contents = whole.contents
    for position in range(0, DIRECTORY_SIZE, DIRECTORY_SIZE // 16):
        (extent,) = U16.unpack_from(contents, DIRECTORY_OFFSET + position)
        damaged(whole, path, ((extent << EXTENT_SHIFT) + 4 * 4_096, bytes(4_096)))
        with open_view(path) as view:
            found = [each for each in Records(view) if isinstance(each, Record)]
        assert sorted(each.key for each in found) == sorted(whole.live)


@pytest.mark.parametrize("size", [DIRECTORY_OFFSET + 20_001, DIRECTORY_OFFSET + 1, 4_096 + 56])
def test_a_file_cut_off_within_a_directory_entry_is_read_to_its_end(
    whole: Truth, path: Path, size: int
) -> None:
    """The walk over the directory stood still at the half of an entry."""
    path.write_bytes(whole.contents[:size])
    with open_view(path) as view:
        records = Records(view)
        assert all(damage is not None for *_, damage in records.segments())
        assert not any(isinstance(each, Record) for each in records)


def test_a_record_that_is_lost_without_a_trace_is_told_of(whole: Truth, path: Path) -> None:
    """With the index unusable, or with its slot gone, nothing names a record without its magic."""
    place = whole.places["1"]
    seed = IDENTITY.unpack_from(whole.contents)[4]
    (extent,) = U16.unpack_from(
        whole.contents, DIRECTORY_OFFSET + 2 * (key_hash(b"1", seed) >> DIRECTORY_SHIFT)
    )
    bucket = (extent << EXTENT_SHIFT) + BUCKET_SIZE * (key_hash(b"1", seed) & BUCKET_COUNT - 1)
    no_record = (place.start, bytes(4))
    no_slots = (bucket + CONTROL_OFFSET, bytes(SLOT_COUNT))
    for other in ((DIRECTORY_OFFSET, bytes(2)), no_slots):
        damaged(whole, path, no_record, other)
        with open_view(path) as view:
            found = list(Records(view))
        keys = {each.key for each in found if isinstance(each, Record)}
        assert keys == whole.live.keys() - {"1"}
        assert len(found) == len(keys) + 1


# --- repair ------------------------------------------------------------------------------------


def test_repair_of_a_whole_store_changes_nothing(whole: Truth, path: Path) -> None:
    before = damaged(whole, path)
    os.utime(path, ns=(10**18, 10**18))
    ran = inspect("repair", path)
    assert (ran.status, path.read_bytes()) == (0, before)
    assert "nothing to do" in ran.out
    assert os.stat(path).st_mtime_ns == 10**18
    assert list(path.parent.iterdir()) == [path]


def test_repair_brings_back_every_record_and_keeps_the_old_file(whole: Truth, path: Path) -> None:
    before = damaged(whole, path, zeroed_table(whole))
    path.chmod(0o640)
    mode = path.stat().st_mode
    ran = inspect("repair", "--json", path)
    outcome = ran.json()
    assert (ran.status, outcome["complete"]) == (0, True)
    assert contents_of(path) == whole.live
    (backup,) = backups(path)
    assert backup.read_bytes() == before
    assert backup.stat().st_mode == mode
    assert outcome["backup"] == str(backup)
    assert outcome["kept"] == KEYS
    assert outcome["counts"]["orphaned"] > 0
    assert outcome["found"]["bucket-marker"] == BUCKET_COUNT


def test_repair_json_has_the_fields_that_its_help_tells_of(whole: Truth, path: Path) -> None:
    damaged(whole, path, torn_record(whole, "1"))
    outcome = inspect("repair", "--json", path).json()
    help_text = inspect("repair", "--help").out
    assert all(name in help_text for name in (*outcome, *outcome["counts"]))
    assert outcome["counts"].keys() == COUNTS


def all_but_records(whole: Truth) -> dict[str, list[range]]:
    """Return where everything else is in the file, but one copy of the identity."""
    contents = whole.contents
    entries = DIRECTORY_OFFSET, DIRECTORY_OFFSET + DIRECTORY_SIZE
    segments = {*memoryview(contents)[slice(*entries)].cast("H")}
    places = itertools.pairwise(sorted(whole.places.values(), key=lambda place: place.start))
    parts = {
        "identity": [range(IDENTITY_OFFSETS[1], IDENTITY_OFFSETS[1] + IDENTITY.size)],
        "state": [range(STATE_OFFSET, STATE_OFFSET + STATE.size)],
        "holder": [range(HOLDER_OFFSET, HOLDER_OFFSET + HOLDER.size)],
        "allocator": [range(ALLOCATOR_OFFSET, ALLOCATOR_OFFSET + ALLOCATOR_SIZE)],
        "directory": [range(*entries)],
        "extent map": [range(EXTENT_MAP_OFFSET, map_entry_offset(len(contents) // EXTENT_SIZE))],
        "segments": [range(n << EXTENT_SHIFT, n + 1 << EXTENT_SHIFT) for n in segments],
        "between records": [range(one.stop, two.start) for one, two in places],
    }
    return {**parts, "all": [place for part in parts.values() for place in part]}


PARTS: Final = (
    *("identity", "state", "holder", "allocator", "directory", "extent map", "segments"),
    *("between records", "all"),
)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("garbage", ["zeros", "ones", "anything"])
def test_repair_after_damage_to_everything_but_the_records(
    whole: Truth, path: Path, part: str, garbage: str
) -> None:
    make = {
        "zeros": bytes,
        "ones": lambda size: b"\xff" * size,
        "anything": random.Random(part).randbytes,
    }[garbage]
    damaged(whole, path, *((each.start, make(len(each))) for each in all_but_records(whole)[part]))
    assert inspect("repair", "--no-backup", path).status == 0
    assert contents_of(path) == whole.live
    with KVStore(path) as store:
        for key, value in whole.live.items():
            assert (store.ttl(key) is not None) == (value["mark"] % 3 == 0)
    assert backups(path) == []


def test_repair_names_what_it_could_not_keep(whole: Truth, path: Path) -> None:
    """One value is torn, one magic gone, of one record nothing is left but its slot."""
    gone = whole.places["é" * 16 + "10"]
    damaged(
        whole,
        path,
        torn_record(whole, "1"),
        (whole.places["2"].start, bytes(4)),
        (gone.start, bytes(gone.stop - gone.start)),
    )
    ran = inspect("repair", path)
    assert ran.status == 1
    for key in ("1", "2", "é" * 16):
        assert f"key {key}" in ran.out
    lost = {"1", "2", "é" * 16 + "10"}
    assert contents_of(path) == {k: v for k, v in whole.live.items() if k not in lost}
    assert inspect("repair", path).status == 0


def test_repair_tells_lost_records_from_damaged_slots(whole: Truth, path: Path) -> None:
    """The slots are garbage and name many keys; but the extent map knows of no more records."""
    (extent,) = U16.unpack_from(whole.contents, DIRECTORY_OFFSET)
    changes = [
        (bucket + 256 + 8, random.Random(bucket).randbytes(2_000))
        for bucket in range(extent << EXTENT_SHIFT, extent + 1 << EXTENT_SHIFT, 4_096)
    ]
    damaged(whole, path, *changes)
    outcome = inspect("repair", "--json", path).json()
    assert (outcome["counts"]["damaged"], outcome["lost"]) == (0, [])
    assert contents_of(path) == whole.live


@pytest.mark.parametrize("extents", [30, 26, 24])
@pytest.mark.parametrize("shift", [0, -1, 999])
def test_repair_saves_what_is_whole_of_a_file_that_was_cut_off(
    whole: Truth, path: Path, extents: int, shift: int
) -> None:
    contents = whole.contents[: extents * EXTENT_SIZE + shift]
    path.write_bytes(contents)
    ran = inspect("repair", "--json", path)
    saved = whole.whole(contents)
    assert contents_of(path) == {key: whole.live[key] for key in saved}
    outcome = ran.json()
    assert outcome["cut_off"]
    assert outcome["counts"]["damaged"] == KEYS - len(saved)
    assert ran.status == (len(saved) < KEYS)


def test_repair_of_a_file_without_its_state_that_a_crash_left_long(
    whole: Truth, path: Path
) -> None:
    damaged(whole, path, (STATE_OFFSET, bytes(STATE.size)))
    os.truncate(path, 8 * 1024 * 1024)
    assert inspect("repair", "--no-backup", path).status == 0
    assert contents_of(path) == whole.live
    assert path.stat().st_size <= len(whole.contents)


@pytest.mark.parametrize("offset", IDENTITY_OFFSETS)
def test_repair_restores_one_damaged_identity(whole: Truth, path: Path, offset: int) -> None:
    damaged(whole, path, (offset, bytes(IDENTITY.size)))
    assert inspect("repair", path).status == 0
    assert contents_of(path) == whole.live
    image = path.read_bytes()
    first, second = (image[o : o + IDENTITY.size] for o in IDENTITY_OFFSETS)
    assert first == second == whole.contents[: IDENTITY.size]


@pytest.mark.parametrize("offset", IDENTITY_OFFSETS)
def test_repair_chooses_the_identity_that_the_records_fit(
    whole: Truth, path: Path, offset: int
) -> None:
    """The other is valid, and another store's: with it every record would count as damaged."""
    before = damaged(whole, path, (offset, pack_identity(bytes(16), 1, NOW_MS)))
    assert inspect("verify", path).status == 1
    assert inspect("repair", path).status == 0
    assert contents_of(path) == whole.live
    assert backups(path)[0].read_bytes() == before


def test_repair_drops_what_has_expired_and_settles_duplicates(path: Path) -> None:
    with open_components(path) as parts:
        parts.store(b"old", b"{}", NOW_MS + 1)
        parts.store(b"twice", b'{"n":1}', now_ms=NOW_MS)
        newer = parts.slab.allocate(RECORD_HEADER_SIZE + 12)
        later = NOW_MS + 9 << STAMP_SHIFT
        parts.records.write_record(newer, b"twice", b'{"n":2}', parts.hash(b"twice"), later, 0)
        parts.records.finish_record(newer)  # where changes go by pwrite, it is none until then
    outcome = inspect("repair", "--json", path).json()
    assert (outcome["counts"]["expired"], outcome["counts"]["outdated"]) == (1, 1)
    assert contents_of(path) == {"twice": {"n": 2}}


def test_repair_of_a_crashed_store_closes_it(whole: Truth, path: Path) -> None:
    damaged(whole, path, *unclosed(whole, dead_pid()))
    assert inspect("repair", path).status == 0
    assert contents_of(path) == whole.live


def test_repair_keeps_what_an_opening_would_keep_past_the_length_in_the_state(
    whole: Truth, path: Path
) -> None:
    """Power loss had taken back the state of a growth, and repair cut the new extents off."""
    contents = damaged(whole, path, *unclosed(whole))
    seed = IDENTITY.unpack_from(contents)[4]
    last = max(place.start for place in whole.places.values())
    count = last >> EXTENT_SHIFT
    state = pack_state(False, count, 8, 0, 0, seed)
    before = damaged(whole, path, *unclosed(whole), (STATE_OFFSET, state))
    assert contents_after_opening(path) == whole.live
    path.write_bytes(before)
    assert inspect("verify", "--json", path).json()["counts"]["keys"] == KEYS
    assert inspect("repair", "--no-backup", path).status == 0
    assert contents_of(path) == whole.live


def test_repair_can_be_run_again_wherever_it_was_killed(
    whole: Truth, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file as it is before each of its writes is what a kill leaves."""
    damaged(whole, path, zeroed_table(whole), (IDENTITY_OFFSETS[0], bytes(8)))
    images = [path.read_bytes()]

    def take_image() -> None:
        with path.open("rb") as file:  # on Windows it is far longer than its contents meanwhile
            images.append(file.read(2 * len(images[0])))

    watch_writes(monkeypatch, take_image)
    assert inspect("repair", "--no-backup", path).status == 0
    monkeypatch.undo()
    assert len(images) > 20
    for image in images[:: max(1, len(images) // 12)]:
        path.write_bytes(image)
        assert inspect("repair", "--no-backup", path).status == 0
        assert contents_of(path) == whole.live


def watch_writes(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do `action` before each write of the superblock's mending and of the library."""
    real_begin, real_write_at = DataFile.mark_dirty, system.write_at

    def write_at(fd: int, offset: int, data: bytes) -> None:
        action()
        real_write_at(fd, offset, data)

    def mark_dirty(file: DataFile) -> None:
        real_write = file.write

        def write(offset: int, data: bytes) -> None:
            action()
            real_write(offset, data)

        replace_writes(file, write)
        real_begin(file)

    monkeypatch.setattr(system, "write_at", write_at)
    monkeypatch.setattr(DataFile, "mark_dirty", mark_dirty)


def test_repair_that_fails_says_where_the_old_file_is(
    whole: Truth, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged(whole, path, zeroed_table(whole))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(repair_command, "rebuild_index", fail)
    ran = inspect("repair", path)
    assert ran.status != 0
    assert f"run it again; as it was, it is {backups(path)[0]}" in ran.err
    monkeypatch.undo()
    assert inspect("repair", path).status == 0
    assert contents_of(path) == whole.live


def test_repair_without_room_for_a_copy_leaves_the_file_as_it_is(
    whole: Truth, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = damaged(whole, path, zeroed_table(whole))

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(repair, "_share_blocks", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(system, "reserve", no_room)
        ran = inspect("repair", path)
    assert (ran.status, path.read_bytes()) == (1, before)
    assert "--no-backup" in ran.err
    assert list(path.parent.iterdir()) == [path]
    assert inspect("repair", "--no-backup", path).status == 0


@pytest.mark.parametrize("kind", SHARING)
def test_repair_keeps_a_copy_that_shares_blocks_where_the_disk_can(
    whole: Truth, tmp_path: Path, kind: str
) -> None:
    with mounted(kind, tmp_path) as disk:
        path = disk / "data.kvs"
        KVStore(path).close()  # as the store makes its files there
        with path.open("r+b") as file:
            file.write(whole.contents)
            (extent,) = U16.unpack_from(whole.contents, DIRECTORY_OFFSET)
            file.seek(extent << EXTENT_SHIFT)
            file.write(bytes(EXTENT_SIZE))
        before = path.read_bytes()
        with os.fdopen(os.open(path, os.O_RDWR), "rb") as source, (disk / "x").open("wb") as copy:
            assert repair._share_blocks(source.fileno(), copy.fileno())
        assert inspect("repair", path).status == 0
        assert backups(path)[0].read_bytes() == before
        assert contents_of(path) == whole.live


def test_repair_on_a_full_disk_is_refused_unless_no_copy_is_wanted(
    whole: Truth, tmp_path: Path
) -> None:
    with mounted("tmpfs", tmp_path) as disk:
        path = disk / "data.kvs"
        before = damaged(whole, path, zeroed_table(whole))
        fill(disk)
        ran = inspect("repair", path)
        assert (ran.status, path.read_bytes()) == (1, before)
        assert "No space left on device" in ran.err
        assert backups(path) == []
        assert inspect("repair", "--no-backup", path).status == 0
        assert contents_of(path) == whole.live


@pytest.mark.parametrize("count", [1, 2, 32, 64, 4_096, EXTENT_SIZE])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not closed"])
@pytest.mark.parametrize("place", ["before all", "amid"])
def test_repair_counts_each_record_once_where_bytes_were_inserted(
    whole: Truth, path: Path, count: int, closed: bool, place: str
) -> None:
    """A record was counted by its slot and where it had moved to; of a file not closed, by none.

    So more were dropped than there had been, or none with all of them gone: "no problems".
    """
    contents = bytearray(damaged(whole, path, *([] if closed else unclosed(whole))))
    starts = sorted(each.start for each in whole.places.values())
    at = 40_000 if place == "before all" else starts[KEYS // 2]
    contents[at:at] = bytes(count)
    path.write_bytes(contents)
    kept = whole.whole(bytes(contents))
    counts = inspect("verify", "--json", path).json()["counts"]
    assert (counts["keys"], counts["damaged"]) == (len(kept), KEYS - len(kept))
    outcome = inspect("repair", "--json", "--no-backup", path).json()
    assert (outcome["kept"], outcome["counts"]["damaged"]) == (len(kept), KEYS - len(kept))
    assert len(outcome["lost"]) <= KEYS - len(kept)
    assert not outcome["complete"]
    assert contents_of(path) == {key: whole.live[key] for key in kept}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not closed"])
def test_repair_that_keeps_little_says_so_plainly(whole: Truth, path: Path, closed: bool) -> None:
    path.write_bytes((with_a_byte_more if closed else unclosed_with_a_byte_more)(whole))
    ran = inspect("repair", path)
    assert ran.status == 1
    said = f"0 of {KEYS} records could be kept; restore it from a copy if there is one"
    assert said in ran.out
    assert "--json names them" not in ran.out, "nothing is left to name"
    assert "repaired" not in ran.out


def test_repair_of_a_file_that_was_cut_between_extents_counts_what_is_gone(path: Path) -> None:
    """With its state damaged too, it counted the extents that were left, and said "repaired"."""
    with KVStore(path) as store:
        for number in range(200):
            store.create(f"{number}", {"text": "x" * 16_000})
    contents = path.read_bytes()
    os.truncate(path, (contents.rindex(RECORD_MAGIC_BYTES) >> EXTENT_SHIFT) - 20 << EXTENT_SHIFT)
    damage = bytearray(path.read_bytes())
    damage[STATE_OFFSET + 8] ^= 0xFF
    path.write_bytes(damage)
    left = damage.count(RECORD_MAGIC_BYTES)
    ran = inspect("repair", path)
    assert ran.status == 1
    words = ran.out.split()
    assert (words[words.index("kept") + 1], words[words.index("damaged") + 1]) == (
        f"{left}",
        f"{200 - left}",
    )


def test_repair_never_writes_over_an_older_copy(whole: Truth, path: Path) -> None:
    for _ in range(3):
        damaged(whole, path, zeroed_table(whole))
        assert inspect("repair", path).status == 0
    assert len(backups(path)) == 3


def newer(whole: Truth) -> bytes:
    """Return an identity as a newer version would write it."""
    body = bytearray(whole.contents[: IDENTITY.size])
    body[8] = 3
    body[48:] = xxh3_64_intdigest(bytes(body[:48])).to_bytes(8, "little")
    return bytes(body)


def test_repair_refuses_what_it_must_not_touch(whole: Truth, path: Path) -> None:
    for contents, status in (
        (b"something else" * 9_999, 2),
        (b"", 2),
        (bytes(4 * EXTENT_SIZE), 2),
        (damaged(whole, path, *((o, newer(whole)) for o in IDENTITY_OFFSETS)), 2),
        (damaged(whole, path, *((o + 9, b"\1") for o in IDENTITY_OFFSETS)), 1),
    ):
        path.write_bytes(contents)
        assert inspect("repair", path).status == status
        assert path.read_bytes() == contents
    path.unlink()
    assert inspect("repair", path).status == 2
    assert not list(path.parent.iterdir())


def test_repair_of_a_store_in_use_exits_3(whole: Truth, path: Path) -> None:
    damaged(whole, path)
    with KVStore(path) as store:
        before = path.read_bytes()
        ran = run_inspector("repair", path)
        assert (ran.status, path.read_bytes()) == (3, before)
        assert f"process {os.getpid()}" in ran.err
        assert len(store) == KEYS


def test_repair_as_a_process_says_nothing_on_standard_error(whole: Truth, path: Path) -> None:
    """What recovery logs is not shown: the report has it."""
    damaged(whole, path, torn_record(whole, "1"))
    ran = run_inspector("repair", path)
    assert (ran.status, ran.err) == (1, "")
    assert "repaired; checked again, no problems" in ran.out
