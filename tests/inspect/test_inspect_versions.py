"""The inspector on files in which records follow each other: superseded, marked, void."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from support import SEED, scaled
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.images import SECTOR, write_image
from support.inspecting import DONE, PROBLEMS, flip, inspect, killed_copy
from support.stores import OpenStore

from kvstore import KVStore
from kvstore.file.platform import system
from kvstore.format.layout import (
    EXTENT_SIZE,
    IDENTITY,
    MARKED_MAGIC_BYTES,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_KEY_SIZE_OFFSET,
    STATE,
    STATE_OFFSET,
)
from kvstore.format.superblock import State, unpack_state
from kvstore.reclaiming import Reclaimer
from kvstore_inspect.file_view import FileView, open_view
from kvstore_inspect.records import DamagedRecord, Record, Records

KEYS: Final = 30
DELETED: Final = 5
VALUE: Final = {"n": 1, "text": "x" * 50}


@pytest.fixture
def replacing(open_store: OpenStore) -> KVStore:
    """An open store whose keys were all replaced after a sync, some of them deleted then."""
    store = open_store()
    for number in range(KEYS):
        store.create(f"{number}", {"n": 0, "text": "x" * 50})
    store.sync()
    for number in range(KEYS):
        store.put(f"{number}", VALUE)
    for number in range(DELETED):
        store.delete(f"{number}")
    return store


@pytest.fixture
def killed(replacing: KVStore, tmp_path: Path) -> Path:
    """The file of that store as its process would leave it if it were killed."""
    copy = killed_copy(replacing, tmp_path / "killed.kvs")
    copy.chmod(0o600)
    return copy


def record_of(path: Path, key: str, *options: str) -> int:
    offset = inspect("get", path, key, "--json", *options).json()["record_offset"]
    assert isinstance(offset, int)
    return offset


def dumped(path: Path, *options: str, torn: bool = False) -> dict[str, Any]:
    """Return what `dump` writes, by key: each once, and nothing damaged unless some is torn."""
    result = inspect("dump", path, *options)
    assert result.status == DONE or torn, result.err
    lines = result.lines()
    by_key = {line.pop("key"): line for line in lines}
    assert len(by_key) == len(lines)
    return by_key


def state_of(path: Path) -> State:
    contents = path.read_bytes()
    seed = IDENTITY.unpack_from(contents)[4]
    return unpack_state(contents[STATE_OFFSET : STATE_OFFSET + STATE.size], seed)


# --- what is shown -------------------------------------------------------------------------------


def test_what_was_superseded_or_deleted_is_neither_listed_nor_damaged(
    replacing: KVStore, killed: Path
) -> None:
    expected = dict(replacing)
    assert len(expected) == KEYS - DELETED
    for path, options in ((replacing.path, ("--unlocked",)), (killed, ())):
        found = dumped(path, *options)
        assert {key: line["value"] for key, line in found.items()} == expected
        result = inspect("keys", path, "--json", *options)
        assert (result.status, {line["key"] for line in result.lines()}) == (DONE, set(expected))
        assert inspect("get", path, "0", *options).status == PROBLEMS
        assert inspect("get", path, "9", "--json", *options).json()["value"] == VALUE


def test_info_counts_what_is_retired_and_marked(replacing: KVStore, killed: Path) -> None:
    """By the index of a file in use, by the records of one that was not closed."""
    for path, options, how in (
        (replacing.path, ("--unlocked",), "index"),
        (killed, (), "records"),
    ):
        result = inspect("info", path, "--json", *options)
        shown = result.json()
        records, space, (of_class,) = shown["records"], shown["space"], shown["classes"]
        assert (result.status, records["counted_by"]) == (DONE, how)
        assert (records["count"], records["retired"], records["marked"]) == (
            KEYS - DELETED,
            KEYS + DELETED,
            DELETED,
        )
        assert space["retired_size"] == (KEYS + DELETED) * of_class["block_size"]
        assert of_class["retired"] == KEYS + DELETED
        blocks = EXTENT_SIZE // of_class["block_size"]
        assert of_class["free_blocks"] == of_class["extents"] * blocks - 2 * KEYS
        text = inspect("info", path, *options).out
        assert f"{KEYS + DELETED} beside them, not yet reclaimed, {DELETED} of them marked" in text
    replacing.close()
    records = inspect("info", replacing.path, "--json").json()["records"]
    assert (records["retired"], records["marked"]) == (0, 0)
    assert "retired" not in inspect("info", replacing.path).out.partition("class")[0]


def test_an_extent_of_nothing_but_retired_records_is_not_free(open_store: OpenStore) -> None:
    store = open_store()
    store.create("key", {"text": "x" * 10_000})
    store.sync()
    store.put("key", {"text": "short"})
    shown = inspect("info", store.path, "--unlocked", "--json").json()
    assert shown["space"]["slab_size"] == 2 * EXTENT_SIZE
    assert [each["retired"] for each in shown["classes"]] == [0, 1]


def test_report_counts_what_is_retired(killed: Path) -> None:
    pytest.importorskip("matplotlib")
    page = inspect("report", killed, "-o", "-").out
    assert f"<dt>superseded or deleted, not yet reclaimed</dt><dd>{KEYS + DELETED}</dd>" in page


def test_info_advises_on_much_that_is_retired(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reclaimer, "keep_up", lambda _: None)
    store = open_store()
    for _ in range(2):
        for number in range(400):
            store.put(f"{number}", {"text": "x" * 15_000})
        store.sync()
    advice = inspect("info", store.path, "--unlocked", "--json").json()["advice"]
    assert any("400 records that were superseded or deleted" in sentence for sentence in advice)


def test_verify_counts_superseded_and_marked_records_apart(killed: Path) -> None:
    found = inspect("verify", killed, "--json").json()
    counts = found["counts"]
    assert (counts["keys"], counts["outdated"], counts["marked"], counts["damaged"]) == (
        KEYS - DELETED,
        KEYS,
        DELETED,
        0,
    )
    assert {kind["breach"] for kind in found["kinds"]} <= {"not-closed"}


def test_verify_of_a_file_in_use_takes_retired_and_marked_records_for_no_problem(
    replacing: KVStore,
) -> None:
    result = inspect("verify", replacing.path, "--unlocked", "--json")
    found = result.json()
    assert (result.status, found["problems"]) == (DONE, [])
    assert (found["counts"]["outdated"], found["counts"]["marked"]) == (KEYS, DELETED)


def test_slots_shows_stamps_as_times_with_their_counter(
    open_store: OpenStore, clock: FakeClock
) -> None:
    clock.set(1_700_000_000.5)
    store = open_store()
    for number in range(3):
        store.put("key", {"n": number})
    options = ("--unlocked", "--key", "key")
    out = inspect("slots", store.path, *options).out
    assert "stamp            2023-11-14 22:13:20.500 UTC, counter 2\n" in out
    shown = inspect("get", store.path, "key", "--unlocked", "--json").json()
    assert shown["created_at"] == clock.now_ms
    assert "2023-11-14 22:13:20 UTC" in inspect("get", store.path, "key", "--unlocked").out
    store.close()
    out = inspect("slots", store.path, "--segment", 0).out
    assert "no record is later than 2023-11-14 22:13:20.500 UTC, counter 2\n" in out


def test_slots_names_generations_marks_and_flags(replacing: KVStore, killed: Path) -> None:
    path = replacing.path
    out = inspect("slots", path, "--unlocked", "--key", "9").out
    assert "SLOT_OLDER: older records of the key may be on the disk" in out
    assert "neither superseded nor deleted" in out
    assert "retired          35 of the live blocks" in out
    extent = record_of(path, "9", "--unlocked") // EXTENT_SIZE
    result = inspect("slots", path, "--unlocked", "--segment", extent)
    assert result.status == DONE
    places = {
        kind: [
            int(line.split()[0].replace(",", ""))
            for line in result.out.splitlines()
            if f"  {kind}record, " in line
        ]
        for kind in ("retired ", "marked ", "")
    }
    assert [len(each) for each in places.values()] == [KEYS, DELETED, KEYS - DELETED]
    for kind, said in (
        ("retired ", "a later record of its key has superseded it"),
        ("marked ", "its key was deleted, and it outranks older records of the key"),
    ):
        for file, options in ((path, ("--unlocked",)), (killed, ())):
            result = inspect("slots", file, *options, "--record", places[kind][0])
            assert result.status == DONE
            assert said in result.out
            assert "that in which it was superseded or deleted" in result.out
            assert "the record is whole" in result.out
    assert "of a record that is marked as deleted" in result.out


def test_slots_of_a_key_says_that_its_record_was_superseded(path: Path) -> None:
    with KVStore(path) as store:
        store.create("9", VALUE)
    flip(path, record_of(path, "9") + RECORD_KEY_SIZE_OFFSET + 1)
    result = inspect("slots", path, "--key", "9")
    assert result.status == PROBLEMS
    assert "the record was superseded or deleted, and the slot leads to it" in result.out


def test_a_record_that_only_looks_superseded_is_told_of_and_repaired(path: Path) -> None:
    """A flipped bit in its generation, which the checksum does not cover."""
    with KVStore(path) as store:
        for number in range(KEYS):
            store.create(f"{number}", VALUE)
    record = record_of(path, "9")
    flip(path, record + RECORD_KEY_SIZE_OFFSET + 1)
    said = f"its slot leads to a record that was superseded or deleted (byte {record:,})"
    assert inspect("get", path, "9").err == f"key 9: {said}\n"
    result = inspect("dump", path)
    assert (result.status, said in result.err) == (PROBLEMS, True)
    assert len(result.lines()) == KEYS, "its value is whole"
    found = inspect("verify", path, "--json").json()
    assert [(each["breach"], each["key"]) for each in found["problems"]] == [
        ("slot-retired", "9"),
        ("slab-retired", None),
    ]
    outcome = inspect("repair", path, "--json").json()
    assert (outcome["kept"], outcome["complete"]) == (KEYS, True)
    assert dumped(path)["9"]["value"] == VALUE


def test_a_mark_in_a_file_that_was_closed_is_a_problem(
    open_store: OpenStore, tmp_path: Path
) -> None:
    """It brings nothing back, and is gone after a repair."""
    store = open_store()
    store.create("other", {})
    store.create("key", {"n": 1})
    store.sync()
    store.put("key", {"n": 2})
    store.delete("key")
    with open_view(store.path, unlocked=True) as view:
        left = [view.extent(extent) for extent in range(view.extent_count)]
    store.close()
    (extent,) = (n for n, contents in enumerate(left) if MARKED_MAGIC_BYTES in contents)
    position = left[extent].index(MARKED_MAGIC_BYTES)
    copy = tmp_path / "marked.kvs"
    contents = bytearray(store.path.read_bytes())
    place = extent * EXTENT_SIZE + position
    contents[place : place + 64] = left[extent][position : position + 64]
    copy.write_bytes(contents)
    assert dumped(copy).keys() == {"other"}
    found = inspect("verify", copy, "--json").json()
    assert ("record-retired", "key") in [(p["breach"], p["key"]) for p in found["problems"]]
    outcome = inspect("repair", copy, "--json").json()
    assert (outcome["kept"], outcome["counts"]["marked"], outcome["complete"]) == (1, 1, True)
    assert dumped(copy).keys() == {"other"}


# --- looked at while it changes ------------------------------------------------------------------


def change_before_each_record(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[], object], times: int
) -> list[int]:
    """Do `change` before each of the first reads of a record, after that of its slot."""
    real, done = FileView.read, [0]

    def read(view: FileView, offset: int, size: int) -> bytes:
        if offset >= EXTENT_SIZE and RECORD_HEADER_SIZE < size < 4096 and done[0] < times:
            done[0] += 1
            change()
        return real(view, offset, size)

    monkeypatch.setattr(FileView, "read", read)
    return done


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("synced", [True, False], ids=["retired", "freed"])
def test_a_key_replaced_between_slot_and_record_is_looked_at_again(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, synced: bool, times: int
) -> None:
    """Forty times in a row it is another one at each look: then it is not damaged either."""
    store = open_store()
    store.create("key", {"n": 0})
    numbers = iter(range(1, 1_000))

    def change() -> None:
        if synced:
            store.sync()
        store.put("key", {"n": next(numbers)})

    with open_view(store.path, unlocked=True) as view:
        done = change_before_each_record(monkeypatch, change, times)
        for one_key in (False, True):
            done[0] = 0
            found = Records(view).find("key") if one_key else next(iter(Records(view)))
            assert isinstance(found, Record)
            assert found.parsed() == store["key"]


def test_a_key_deleted_between_slot_and_record_is_not_there(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.create("key", {"n": 0})
    store.sync()
    store.put("key", {"n": 1})
    with open_view(store.path, unlocked=True) as view:
        change_before_each_record(monkeypatch, lambda: store.delete("key"), 1)
        assert list(Records(view)) == []
    with open_view(store.path, unlocked=True) as view:
        assert Records(view).find("key") is None


def test_what_stays_damaged_is_damaged_in_a_file_in_use_too(open_store: OpenStore) -> None:
    store = open_store(check=False)
    store.create("key", {"n": 0})
    flip(store.path, record_of(store.path, "key", "--unlocked") + RECORD_HEADER_SIZE + 5)
    with open_view(store.path, unlocked=True) as view:
        (found,) = Records(view)
        assert isinstance(found, DamagedRecord)
        assert found == Records(view).find("key")


# --- what a crash left ---------------------------------------------------------------------------


def busy(store: KVStore, rng: random.Random, clock: FakeClock, steps: int) -> None:
    """Do some of everything that writes to a store, to few keys."""
    for _ in range(steps):
        key = f"{'long key ' * 3 * rng.randrange(2)}{rng.randrange(12)}"
        size, ttl = rng.choice((10, 40, 300)), rng.choice((None, None, 1, 20))
        clock.advance(rng.choice((0, 0, 0.001, 0.4, -0.3)))
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                store.put(key, {"n": rng.randrange(10**6), "text": "x" * size}, ttl)
            case 4 if key in store:
                store.touch(key, ttl)
            case 5 | 6 if key in store:
                store.delete(key)
            case 7:
                store.purge_expired()


def power_lost(synced: bytes, written: bytes, rng: random.Random) -> bytes:
    """Return a file of which the disk has some sectors as they were written, others not."""
    synced = synced.ljust(len(written), b"\0")
    return b"".join(
        (written if rng.random() < 0.6 else synced)[place : place + SECTOR]
        if written[place : place + SECTOR] != synced[place : place + SECTOR]
        else written[place : place + SECTOR]
        for place in range(0, len(written), SECTOR)
    )


@pytest.mark.parametrize("number", range(scaled(25)))
def test_dump_of_what_a_crash_left_holds_what_the_next_opening_finds(
    path: Path, tmp_path: Path, clock: FakeClock, number: int
) -> None:
    """Of several whole records of a key it takes the one that recovery takes, or none."""
    rng = random.Random(f"{SEED}/{number}")
    store = KVStore(path)
    busy(store, rng, clock, rng.randrange(40))
    store.sync()
    synced = path.read_bytes()
    busy(store, rng, clock, rng.randrange(60))
    written = path.read_bytes()
    store.close()
    for name, image in (
        ("killed", written),
        ("power lost", power_lost(synced, written, rng)),
    ):
        crashed = write_image(tmp_path / f"{name}.kvs", image)
        found = dumped(crashed, torn=image != written)
        assert inspect("info", crashed, "--json").json()["records"]["count"] == len(found)
        copied, repaired = tmp_path / "copied.kvs", tmp_path / "repaired.kvs"
        shutil.copy(crashed, repaired)
        inspect("copy", crashed, copied, "--force")
        assert dumped(copied) == found
        assert inspect("repair", "--no-backup", "--json", repaired).json()["kept"] == len(found)
        assert dumped(repaired) == found
        KVStore(crashed).close()
        assert dumped(crashed) == found
        assert_consistent(crashed)


def marked_at(path: Path, record: int) -> None:
    """Mark a record as deleted."""
    with path.open("r+b") as file:
        file.seek(record)
        file.write(MARKED_MAGIC_BYTES)


def test_of_equal_stamps_a_mark_counts(open_store: OpenStore, tmp_path: Path) -> None:
    """As of a record that was moved, and then deleted at one of its two places."""
    store = open_store()
    store.create("key", {"n": 1})
    killed = killed_copy(store, tmp_path / "killed.kvs")
    assert list(dumped(killed)) == ["key"]
    marked_at(killed, record_of(killed, "key"))
    assert dumped(killed) == {}
    counts = inspect("verify", killed, "--json").json()["counts"]
    assert (counts["keys"], counts["outdated"], counts["marked"]) == (0, 0, 1)


def test_an_expired_replacement_does_not_bring_back_what_it_replaced(
    open_store: OpenStore, tmp_path: Path, clock: FakeClock
) -> None:
    store = open_store()
    store.create("key", {"n": 1})
    store.sync()
    store.put("key", {"n": 2}, ttl=5)
    clock.advance(6)
    killed = killed_copy(store, tmp_path / "killed.kvs")
    assert dumped(killed) == {}
    (line,) = dumped(killed, "--expired").values()
    assert line["value"] == {"n": 2}
    assert inspect("get", killed, "key", "--json").json()["expired"]


def voided(path: Path, stamp: int) -> None:
    """Say in the state of a file that was not closed that records up to a stamp are void."""
    contents = bytearray(path.read_bytes())
    seed = IDENTITY.unpack_from(contents)[4]
    state = unpack_state(bytes(contents[STATE_OFFSET : STATE_OFFSET + STATE.size]), seed)
    assert not state.clean
    contents[STATE_OFFSET : STATE_OFFSET + STATE.size] = state._replace(stamp=stamp).pack(seed)
    path.write_bytes(contents)


def test_what_is_void_is_not_there_and_no_repair_brings_it_back(
    open_store: OpenStore, tmp_path: Path, clock: FakeClock
) -> None:
    store = open_store()
    for number in range(10):
        store.create(f"{number}", {"n": number})
        clock.advance(1)
    killed = killed_copy(store, tmp_path / "killed.kvs")
    with killed.open("rb") as file:
        stamp = RECORD.unpack(system.read_at(file.fileno(), RECORD.size, record_of(killed, "6")))[4]
    voided(killed, stamp)
    assert dumped(killed).keys() == {"7", "8", "9"}
    assert inspect("get", killed, "6").status == PROBLEMS
    counts = inspect("verify", killed, "--json").json()["counts"]
    assert (counts["keys"], counts["outdated"], counts["damaged"]) == (3, 7, 0)
    said = inspect("slots", killed, "--segment", 0).out
    assert "all records up to 2023-11-14 22:13:26.000 UTC, counter 0 are void" in said
    outcome = inspect("repair", killed, "--json").json()
    assert (outcome["kept"], outcome["counts"]["outdated"], outcome["complete"]) == (3, 7, True)
    assert dumped(killed).keys() == {"7", "8", "9"}
    assert state_of(killed).clean


def test_repair_of_a_damaged_state_takes_no_record_for_void(
    replacing: KVStore, killed: Path
) -> None:
    """What it said of that may be the very damage."""
    expected = dumped(killed)
    voided(killed, 2**60)
    flip(killed, STATE_OFFSET + 8)
    assert dumped(killed, torn=True) == expected
    inspect("repair", "--no-backup", killed)
    assert dumped(killed) == expected


def test_repair_keeps_one_record_of_a_key_and_drops_what_was_deleted(
    replacing: KVStore, killed: Path
) -> None:
    expected = dict(replacing)
    result = inspect("repair", killed)
    assert result.status == DONE
    assert f"kept                 {KEYS - DELETED}  keys" in result.out
    assert f"duplicates           {KEYS}  dropped" in result.out
    assert f"deleted               {DELETED}  dropped: marked as deleted" in result.out
    with KVStore(killed) as store:
        assert dict(store) == expected
    assert_consistent(killed)


# --- carried elsewhere ---------------------------------------------------------------------------


def line_of(key: str, n: int, created_at: int, expires_at: int | None = None) -> bytes:
    fields = {"key": key, "value": {"n": n}, "created_at": created_at, "expires_at": expires_at}
    return orjson.dumps(fields) + b"\n"


def test_load_that_replaces_keeps_the_times(path: Path, tmp_path: Path, clock: FakeClock) -> None:
    now = clock.now_ms
    with KVStore(path) as store:
        for key in ("older", "younger", "damaged"):
            store.create(key, {"n": 0}, ttl=5)
    flip(path, record_of(path, "damaged") + RECORD_HEADER_SIZE + 10)
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(
        line_of("older", 1, now + 7, now + 9_000)
        + line_of("younger", 2, now - 7)
        + line_of("damaged", 3, now + 7)
        + line_of("absent", 4, now - 7, now + 9_000)
    )
    result = inspect("load", path, lines, "--on-exists", "replace")
    assert result.status == DONE
    assert "4 of 4 lines loaded, 3 replaced" in result.err
    times = {
        key: (line["value"]["n"], line["created_at"], line["expires_at"])
        for key, line in dumped(path).items()
    }
    assert times == {
        "older": (1, now + 7, now + 9_000),
        "younger": (2, now, None),  # it cannot be earlier than what it replaced
        "damaged": (3, now + 7, None),
        "absent": (4, now - 7, now + 9_000),
    }
    assert_consistent(path)


@pytest.mark.parametrize("created_at", [0, 1, 271_474_976_710_655])
def test_load_takes_any_time_that_a_clock_can_have_said(
    path: Path, tmp_path: Path, created_at: int
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(line_of("key", 1, created_at))
    assert inspect("load", path, lines).status == DONE
    assert dumped(path)["key"]["created_at"] == created_at
    with KVStore(path) as store:
        store.put("other", {})
        killed = killed_copy(store, tmp_path / "killed.kvs")
    assert dumped(killed).keys() == {"key", "other"}
    with KVStore(killed) as store:
        assert dict(store) == {"key": {"n": 1}, "other": {}}
    lines.write_bytes(line_of("late", 1, 271_474_976_710_656))
    result = inspect("load", path, lines)
    assert result.status == PROBLEMS
    assert "created_at is 271474976710656, allowed are" in result.err
