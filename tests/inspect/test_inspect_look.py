"""`kvstore-inspect info|keys|get|slots|completion`: what is in a file, down to its bytes."""

import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from support import MIB
from support.clock import FakeClock
from support.inspecting import (
    DONE,
    PROBLEMS,
    WRONG_USAGE,
    Result,
    flip,
    inspect,
    killed_copy,
)
from support.stores import OpenStore
from support.values import sized_value

from kvstore import KVStore
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    BUCKET_COUNT,
    BUCKET_HEADER_FIELDS,
    BUCKET_SIZE,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    IDENTITY_FIELDS,
    RECORD_FIELDS,
    RECORD_HEADER_SIZE,
    SEGMENT_ENTRY_FIELDS,
    SLAB_ENTRY_FIELDS,
    SLOT_EXPIRES_OFFSET,
    SLOT_FIELDS,
    SLOT_SIZE,
    STATE_FIELDS,
    STATE_OFFSET,
    key_hash,
)
from kvstore_inspect.command_line import main
from kvstore_inspect.commands import keys as keys_module
from kvstore_inspect.file_view import open_view
from kvstore_inspect.records import Record, Records

LONG_KEY: Final = "ключ" * 8
HOUR: Final = 3600
COMMANDS: Final = ("info", "keys", "get", "slots", "completion")


@pytest.fixture
def filled(path: Path) -> Path:
    """A closed store of 100 keys, every fourth with a TTL, one of more than 32 bytes."""
    with KVStore(path) as store:
        for number in range(99):
            ttl = None if number % 4 else HOUR + number
            store.create(f"user:{number}", sized_value(20 + 10 * number), ttl=ttl)
        store.create(LONG_KEY, {"long": True})
    return path


def expire(path: Path, clock: FakeClock, keys: int = 3, size: int = 50) -> None:
    """Create keys that have expired."""
    with KVStore(path) as store:
        for number in range(keys):
            store.create(f"gone:{number}", sized_value(size), ttl=1)
    clock.advance(10 * HOUR)


def place(path: Path, key: str, what: str) -> int:
    offset = inspect("get", path, key, "--json").json()[what]
    assert isinstance(offset, int)
    return offset


# --- info ----------------------------------------------------------------------------------------


def test_info_counts_what_the_store_counts(path: Path, open_store: OpenStore) -> None:
    with open_store() as store:
        for number in range(3000):
            store.create(f"key {number}", sized_value(20 + number % 700))
        for number in range(0, 3000, 3):
            store.delete(f"key {number}")
        stats = store.stats()
    result = inspect("info", path, "--json")
    shown = result.json()
    assert (result.status, result.err) == (DONE, "")
    assert shown["records"]["count"] == stats.records == 2000
    assert shown["records"]["counted_by"] == "index"
    assert shown["table"]["segments"] == stats.segments
    assert shown["table"]["load"] == pytest.approx(stats.load, abs=1e-6)
    assert shown["space"]["live_size"] == stats.live_size
    assert shown["space"]["free_size"] == stats.free_size
    assert shown["space"]["table_size"] == stats.table_size
    assert shown["file"]["size"] == path.stat().st_size
    exact = shown["records"]["key_size"] + shown["records"]["value_size"]
    exact += RECORD_HEADER_SIZE * stats.records
    assert shown["space"]["padding_size"] == stats.live_size - exact
    assert sum(each["records"] for each in shown["classes"]) == stats.records


def test_info_of_a_killed_process_counts_the_records_alone_and_reassures(
    path: Path, open_store: OpenStore, tmp_path: Path
) -> None:
    store = open_store()
    for number in range(50):
        store.create(f"key {number}", sized_value(30), ttl=HOUR)
    copy = killed_copy(store, tmp_path / "killed.kvs")
    copy.chmod(0o600)
    result = inspect("info", copy, "--json")
    shown = result.json()
    assert result.status == DONE
    assert (shown["state"]["clean"], shown["records"]["counted_by"]) == (False, "records")
    assert (shown["records"]["count"], shown["records"]["expiring"]) == (50, 50)
    assert shown["space"]["live_size"] == store.stats().live_size
    assert any("not closed in order" in sentence for sentence in shown["advice"])
    assert "not clean" in inspect("info", copy).out


def test_info_of_a_plain_file_gives_no_advice(filled: Path) -> None:
    result = inspect("info", filled, "--json")
    assert (result.status, result.json()["advice"]) == (DONE, [])
    text = inspect("info", filled).out
    assert "clean: closed in order" in text
    assert "100, counted by the index" in text


def test_info_tells_what_has_expired_from_what_can_be_read(
    path: Path, open_store: OpenStore, clock: FakeClock
) -> None:
    """What is counted, and how large it is, is all about the same records."""
    expire(path, clock, keys=30, size=5_000)
    with open_store() as store:
        for number in range(20):
            store.create(f"key {number}", sized_value(100), ttl=None if number % 4 else 11 * HOUR)
        stats = store.stats()
    shown = inspect("info", path, "--json").json()
    records, space, classes = shown["records"], shown["space"], shown["classes"]
    assert (records["count"], records["expiring"], records["expired"]) == (20, 5, 30)
    assert (records["value_size"], records["largest_value"]) == (20 * 100, 100)
    assert space["live_size"] + space["expired_size"] == stats.live_size
    assert space["free_size"] == stats.free_size
    exact = records["key_size"] + records["value_size"] + RECORD_HEADER_SIZE * 20
    assert space["padding_size"] == space["live_size"] - exact
    assert sum(each["records"] for each in classes) == 20
    assert sum(each["expired"] for each in classes) == 30
    assert sum(each["expired"] * each["block_size"] for each in classes) == space["expired_size"]
    text = inspect("info", path).out
    assert re.search(r"^records +20, ", text, re.MULTILINE)
    assert re.search(r"^with TTL +5 of them$", text, re.MULTILINE)
    assert re.search(r"^expired +30 beside them", text, re.MULTILINE)
    assert f"({space['expired_size']:,} B)" in text


def test_only_slots_shows_the_hash_seed_and_only_when_it_is_asked_for(filled: Path) -> None:
    """It is the file's secret, and what is printed is pasted into reports of faults."""
    raw = filled.read_bytes()[32:40]
    seed = int.from_bytes(raw, "little")
    given_away = {f"{seed:x}", str(seed), f"{seed:,}", raw.hex(), raw.hex(" ")}
    asked: list[tuple[object, ...]] = [
        ("info", filled), ("info", filled, "--json"), ("keys", filled, "--json"),
        ("get", filled, "user:4", "--json"), ("verify", filled), ("verify", filled, "--json"),
        ("slots", filled), ("slots", filled, "--key", "user:4"), ("slots", filled, "--segment", 0),
        ("slots", filled, "--slot", 0), ("slots", filled, "--slot", 32),
        ("slots", filled, "--record", 0), ("slots", filled, "--record", 8, "--full"),
    ]  # fmt: skip
    for arguments in asked:
        out = inspect(*arguments).out.lower()
        assert not {each for each in given_away if each in out}, arguments
    out = inspect("slots", filled, "--segment", 0).out
    hidden = r"(\.\. ){8} +hash_seed +secret; --secret shows it"
    assert len(re.findall(hidden, out)) == 2
    out = inspect("slots", filled, "--segment", 0, "--secret").out
    assert f"{raw.hex(' ').upper()}  hash_seed" in out


def test_info_says_that_an_index_was_changed_by_something_else(filled: Path) -> None:
    flip(filled, ALLOCATOR_OFFSET)
    result = inspect("info", filled, "--json")
    shown = result.json()
    assert result.status == PROBLEMS
    assert shown["records"]["count"] == 100
    assert "repair" in " ".join(shown["advice"])


def test_info_says_what_is_damaged(filled: Path) -> None:
    flip(filled, FIXED_EXTENTS * EXTENT_SIZE + 3 * BUCKET_SIZE)
    result = inspect("info", filled, "--json")
    assert result.status == PROBLEMS
    (damage,) = result.json()["damage"]["first"]
    assert damage["offset"] == FIXED_EXTENTS * EXTENT_SIZE + 3 * BUCKET_SIZE
    assert "no marker" in result.err


def test_info_advises_on_what_has_expired_and_on_free_space(
    path: Path, open_store: OpenStore, clock: FakeClock
) -> None:
    expire(path, clock, keys=700, size=16_000)
    advice = inspect("info", path, "--json").json()["advice"]
    assert any("purge_expired()" in sentence and "700" in sentence for sentence in advice)
    clock.advance(HOUR)
    with open_store() as store:
        assert store.purge_expired() == 700
    advice = inspect("info", path, "--json").json()["advice"]
    assert any("copy" in sentence and "free" in sentence for sentence in advice)


def test_info_advises_on_a_longer_file_and_on_one_that_others_may_use(filled: Path) -> None:
    with filled.open("ab") as file:
        file.write(bytes(3 * EXTENT_SIZE))
    filled.chmod(0o644)
    result = inspect("info", filled, "--json")
    advice = result.json()["advice"]
    assert result.status == DONE
    assert any("192.0 KiB longer" in sentence for sentence in advice)
    assert any("0644" in sentence for sentence in advice) or os.name != "posix"


# --- keys ----------------------------------------------------------------------------------------


def test_keys_lists_every_key_with_its_metadata(filled: Path, open_store: OpenStore) -> None:
    result = inspect("keys", filled, "--json")
    assert (result.status, result.err) == (DONE, "")
    with open_store() as store:
        expected = {key: len(store.read_bytes(key)) for key in store}
        expiring = {key for key in store if store.ttl(key) is not None}
    assert {each["key"]: each["value_size"] for each in result.lines()} == expected
    assert {each["key"] for each in result.lines() if each["expires_at"]} == expiring
    for each in result.lines():
        assert set(each) == {"key", "value_size", "created_at", "expires_at"}
        number = each["key"].removeprefix("user:")
        if each["expires_at"]:
            assert each["expires_at"] - each["created_at"] == 1000 * (HOUR + int(number))


def test_keys_shows_a_line_for_each_key_below_a_heading(filled: Path) -> None:
    heading, *lines = inspect("keys", filled).out.splitlines()
    assert heading.split() == ["size", "left", "created", "key"]
    assert len(lines) == 100
    (line,) = (each for each in lines if each.endswith("  user:5"))
    assert re.match(r" +70  no TTL  +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  user:5", line)
    (line,) = (each for each in lines if each.endswith("  user:8"))
    assert re.match(r" +100  (1 h|59 min) ", line)


def test_keys_are_escaped_for_the_terminal(path: Path) -> None:
    wicked = ["\x1b[31mred", "a\nb", "\x9b2J", "[bold]x[/]", "back\\slash", ":smile:", "\u202eabc"]
    with KVStore(path) as store:
        for key in wicked:
            store.create(key, {"text": key})
    out = inspect("keys", path).out
    assert set(out.replace("\n", "")) <= set(map(chr, range(32, 127)))
    shown = {line.rpartition("UTC  ")[2] for line in out.splitlines()[1:]}
    assert shown == {
        r"\x1b[31mred", r"a\nb", r"\x9b2J", "[bold]x[/]", r"back\\slash", ":smile:", r"\u202eabc",
    }  # fmt: skip
    for key in wicked:
        result = inspect("get", path, key)
        assert result.status == DONE
        assert set(result.out.replace("\n", "")) <= set(map(chr, range(32, 127)))
        value = json.loads(result.out[result.out.index("\n{") :])
        assert value == {"text": key}
        assert inspect("slots", path, "--key", key).status == DONE
        assert set(inspect("get", path, key + "?").err[:-1]) <= set(map(chr, range(32, 127)))


def test_keys_by_prefix_and_by_pattern(filled: Path) -> None:
    def found(*options: str) -> set[str]:
        return {each["key"] for each in inspect("keys", filled, "--json", *options).lines()}

    assert found("--prefix", "ключ") == {LONG_KEY}
    assert found("--prefix", "user:9") == {"user:9", *(f"user:{n}" for n in range(90, 99))}
    assert found("--match", "*:?") == {f"user:{n}" for n in range(10)}
    assert found("--prefix", "user:1", "--match", "*5") == {"user:15"}
    assert found("--match", "USER:*") == set()


@pytest.mark.parametrize("run_length", [7, 1000], ids=["in files", "in memory"])
def test_keys_in_order(filled: Path, monkeypatch: pytest.MonkeyPatch, run_length: int) -> None:
    monkeypatch.setattr(keys_module, "_RUN_LENGTH", run_length)
    all_of_them = inspect("keys", filled, "--json").lines()

    def in_order(*options: object) -> list[dict[str, Any]]:
        return inspect("keys", filled, "--json", "--sort", *options).lines()

    by_size = sorted(all_of_them, key=lambda each: (-each["value_size"], each["key"]))
    assert in_order("size") == by_size
    assert in_order("size", "--top", 5) == by_size[:5]
    assert in_order("size", "--top", 50) == by_size[:50]
    by_ttl = sorted(all_of_them, key=lambda each: (each["expires_at"] or 2**60, each["key"]))
    assert in_order("ttl") == by_ttl
    assert by_ttl[0]["key"] == "user:0"
    assert in_order("ttl", "--top", 1) == by_ttl[:1]
    newest = sorted(all_of_them, key=lambda each: (-each["created_at"], each["key"]))
    assert in_order("created") == newest


def test_keys_stops_at_the_top(filled: Path) -> None:
    everything = inspect("keys", filled, "--json").lines()
    assert inspect("keys", filled, "--json", "--top", "4").lines() == everything[:4]
    assert len(inspect("keys", filled, "--top", "4").out.splitlines()) == 5


def test_keys_counts_what_has_expired_and_does_not_list_it(filled: Path, clock: FakeClock) -> None:
    expire(filled, clock)
    result = inspect("keys", filled)
    assert result.status == DONE
    assert "gone:" not in result.out
    assert result.err.startswith("3 expired, not listed")


def test_keys_names_a_damaged_record_and_lists_the_rest(filled: Path) -> None:
    record = place(filled, "user:7", "record_offset")
    flip(filled, record + RECORD_HEADER_SIZE + 20)
    result = inspect("keys", filled, "--json")
    assert result.status == PROBLEMS
    assert len(result.lines()) == 99
    assert "user:7: its record fails its checksum" in result.err
    assert inspect("get", filled, "user:7") == Result(
        PROBLEMS, "", f"key user:7: its record fails its checksum (byte {record:,})\n"
    )
    assert inspect("get", filled, "user:8").status == DONE


# --- get -----------------------------------------------------------------------------------------


def test_get_shows_value_and_metadata(filled: Path, open_store: OpenStore) -> None:
    result = inspect("get", filled, "user:4", "--json")
    shown = result.json()
    assert (result.status, result.err) == (DONE, "")
    with open_store() as store:
        assert shown["value"] == store.read("user:4")
    assert shown["expires_at"] - shown["created_at"] == 1000 * (HOUR + 4)
    assert (shown["key"], shown["expired"], shown["value_size"]) == ("user:4", False, 60)
    contents = filled.read_bytes()
    assert contents[shown["record_offset"] + RECORD_HEADER_SIZE :].startswith(b"user:4{")
    assert contents[shown["slot_offset"] :].startswith(b"user:4\0")
    assert inspect("get", filled, LONG_KEY, "--json").json()["value"] == {"long": True}


def test_get_of_an_absent_key_ends_in_1(filled: Path) -> None:
    for options in ((), ("--json",)):
        assert inspect("get", filled, "nobody", *options) == Result(
            PROBLEMS, "", "key nobody: not in the store\n"
        )


def test_get_of_an_expired_key_shows_it_and_ends_in_1(path: Path, clock: FakeClock) -> None:
    expire(path, clock)
    result = inspect("get", path, "gone:1", "--json")
    assert (result.status, result.json()["expired"]) == (PROBLEMS, True)
    assert " ago\n" in inspect("get", path, "gone:1").out


@pytest.mark.parametrize("key", ["", "k" * 33, "\udcff"], ids=["empty", "long", "no UTF-8"])
def test_what_cannot_be_a_key_is_wrong_usage(filled: Path, key: str) -> None:
    for arguments in (("get", filled, key), ("slots", filled, "--key", key)):
        result = inspect(*arguments)
        assert (result.status, result.out) == (WRONG_USAGE, "")
        assert result.err.count("\n") == 1


# --- slots ---------------------------------------------------------------------------------------


def assert_bytes_are_of(path: Path, out: str) -> int:
    """Check each line of the kind "offset, bytes in hex" against the file; return their number."""
    contents = path.read_bytes()
    found = re.findall(r"^ *([\d,]+)  ((?:[0-9A-F]{2} )*[0-9A-F]{2})(?:  |$)", out, re.MULTILINE)
    for offset, digits in found:
        start, raw = int(offset.replace(",", "")), bytes.fromhex(digits)
        assert contents[start : start + len(raw)] == raw, (offset, digits)
    return len(found)


def names_in(out: str) -> set[str]:
    return set(re.findall(r"\b[a-z_]+\b", out))


def test_slots_lists_the_segments_with_their_load(filled: Path) -> None:
    result = inspect("slots", filled)
    heading, *lines = result.out.splitlines()
    assert (result.status, result.err) == (DONE, "")
    assert heading.split() == ["extent", "byte", "directory", "depth", "live", "dead", "load"]
    rows = [line.split() for line in lines]
    assert sum(int(row[4]) for row in rows) == 100
    covered = [tuple(map(int, row[2].split(".."))) for row in rows]
    assert covered[0][0] == 0
    assert covered[-1][1] == 32_767
    assert all(one[1] + 1 == next_one[0] for one, next_one in pairwise(covered))


@pytest.mark.parametrize("key", ["user:4", LONG_KEY])
def test_slots_of_a_key_names_every_field_on_the_way(filled: Path, key: str) -> None:
    result = inspect("slots", filled, "--key", key)
    assert (result.status, result.err) == (DONE, "")
    assert assert_bytes_are_of(filled, result.out) > 30
    expected = {
        "hash_seed", *SEGMENT_ENTRY_FIELDS, *SLAB_ENTRY_FIELDS, *SLOT_FIELDS, *RECORD_FIELDS,
        *BUCKET_HEADER_FIELDS,
    } - {"depth", "prefix"}  # fmt: skip
    assert names_in(result.out) >= expected
    seed = int.from_bytes(filled.read_bytes()[32:40], "little")
    assert f"0x{key_hash(key.encode(), seed):016X}" in result.out
    for what in ("slot_offset", "record_offset"):
        assert f"{place(filled, key, what):,}" in result.out
    assert "the record is whole" in result.out


def test_slots_of_a_key_that_its_home_had_no_room_for(path: Path, tmp_path: Path) -> None:
    with KVStore(path) as store:
        for number in range(17_500):
            store.create(str(number), {})
    with open_view(path) as view:
        displaced = next(
            found.key
            for found in Records(view)
            if isinstance(found, Record)
            and found.slot % EXTENT_SIZE // BUCKET_SIZE
            != key_hash(found.key.encode(), view.seed) % BUCKET_COUNT
        )
    result = inspect("slots", path, "--key", displaced)
    assert (result.status, "the record is whole" in result.out) == (DONE, True)
    assert ", the home bucket\n" in result.out
    assert ", the next one\n" in result.out
    nowhere = inspect("slots", path, "--key", "nobody")
    assert "the key is absent" in nowhere.out


def test_slots_of_an_absent_key_shows_where_the_way_ends(filled: Path) -> None:
    result = inspect("slots", filled, "--key", "nobody")
    assert result.status == PROBLEMS
    assert "the key is absent" in result.out
    assert assert_bytes_are_of(filled, result.out) > 5


def test_slots_of_a_segment_shows_its_buckets_and_live_slots(filled: Path) -> None:
    slot = place(filled, "user:4", "slot_offset")
    segment = slot // EXTENT_SIZE
    result = inspect("slots", filled, "--segment", segment)
    assert (result.status, result.err) == (DONE, "")
    live = sum(
        int(row.split()[2]) for row in re.findall(r"^ *\d+ .*%.*$", result.out, re.MULTILINE)
    )
    assert live == result.out.count("\nslot ") > 0
    assert f"{slot:,}  75 73 65 72 3A 34 00" in result.out
    assert assert_bytes_are_of(filled, result.out) >= 3 * live
    assert names_in(result.out) >= {*SLOT_FIELDS, *SEGMENT_ENTRY_FIELDS}
    bucket = slot % EXTENT_SIZE // BUCKET_SIZE
    page = inspect("slots", filled, "--segment", segment, "--bucket", bucket)
    assert page.status == DONE
    assert f"{slot:,}  75 73 65 72 3A 34 00 00  key" in page.out


def test_slots_of_every_extent_are_shown_as_what_they_are(filled: Path) -> None:
    count = filled.stat().st_size // EXTENT_SIZE
    shown = [inspect("slots", filled, "--segment", extent) for extent in range(count)]
    assert [each.status for each in shown] == [DONE] * count
    assert all(each.err == "" for each in shown)
    assert names_in(shown[0].out) >= {*IDENTITY_FIELDS, *STATE_FIELDS}
    slab = place(filled, "user:4", "record_offset") // EXTENT_SIZE
    assert "record, 60 B: user:4\n" in shown[slab].out
    assert sum(assert_bytes_are_of(filled, each.out) for each in shown) > 500


def test_slots_of_a_slot_and_of_a_record(filled: Path) -> None:
    slot = place(filled, "user:98", "slot_offset")
    record = place(filled, "user:98", "record_offset")
    result = inspect("slots", filled, "--slot", slot)
    assert (result.status, result.err) == (DONE, "")
    assert f"at byte {record:,}, in extent {record // EXTENT_SIZE}" in result.out
    result = inspect("slots", filled, "--record", record)
    assert result.status == DONE
    assert "744 more bytes; --full shows them" in result.out
    full = inspect("slots", filled, "--record", record, "--full")
    assert "more bytes" not in full.out
    assert assert_bytes_are_of(filled, full.out) > 60


def test_slots_names_what_does_not_fit(filled: Path, path: Path) -> None:
    slot = place(filled, "user:4", "slot_offset")
    record = place(filled, "user:4", "record_offset")
    for options, told in (
        (("--slot", slot + 1), "no slot begins here"),
        (("--record", record + 1), "no record begins here"),
        (("--record", slot), "its kind is 2, where a slab (3) should be"),
        (("--record", 0), "extent 0 can have no record"),
        (("--slot", record // 4096 * 4096 + 256 + SLOT_SIZE), "it is in no bucket"),
    ):
        result = inspect("slots", filled, *options)
        assert (result.status, told in result.out) == (PROBLEMS, True), (options, result.out)
    with KVStore(path) as store:
        store.delete("user:4")
    assert "its block is free" in inspect("slots", filled, "--record", record).out


def test_slots_of_a_damaged_file_shows_what_is_there(filled: Path) -> None:
    slot = place(filled, "user:4", "slot_offset")
    record = place(filled, "user:4", "record_offset")
    flip(filled, record + RECORD_HEADER_SIZE + 20)
    result = inspect("slots", filled, "--key", "user:4")
    assert result.status == PROBLEMS
    assert "it is damaged" in result.out
    flip(filled, slot // BUCKET_SIZE * BUCKET_SIZE)
    result = inspect("slots", filled, "--key", "user:4")
    assert result.status == PROBLEMS
    assert "has not the marker of this page" in result.out
    result = inspect("slots", filled, "--segment", slot // EXTENT_SIZE)
    assert result.status == PROBLEMS
    assert "user:4" in result.out
    assert "marker" in result.err


def test_slots_of_a_key_says_that_slot_and_record_differ(filled: Path) -> None:
    slot = place(filled, "user:4", "slot_offset")
    flip(filled, slot + SLOT_EXPIRES_OFFSET)
    result = inspect("slots", filled, "--key", "user:4")
    assert (result.status, "they differ in expiry" in result.out) == (PROBLEMS, True)


def test_options_of_slots_that_make_no_sense_are_wrong_usage(filled: Path) -> None:
    for options in (
        ("--key", "k", "--segment", "6"),
        ("--bucket", "1"),
        ("--segment", "6", "--bucket", "16"),
        ("--segment", filled.stat().st_size // EXTENT_SIZE),
        ("--record", str(filled.stat().st_size)),
        ("--slot", "-1"),
    ):
        result = inspect("slots", filled, *options)
        assert (result.status, result.out) == (WRONG_USAGE, ""), options


# --- help and completion -------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(name: str) -> None:
    result = inspect(name, "--help")
    assert result.status == DONE
    assert f"Example: kvstore-inspect {name} " in " ".join(result.out.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str) -> None:
    result = inspect("completion", shell)
    assert (result.status, result.err) == (DONE, "")
    assert f"_KVSTORE_INSPECT_COMPLETE={shell}_complete" in result.out
    assert result.out.splitlines()[-1].startswith("# Put this into ")


def test_the_completion_script_completes_a_command_and_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def completed(words: str, count: int) -> set[str]:
        monkeypatch.setenv("_KVSTORE_INSPECT_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(count))
        with pytest.raises(SystemExit, match="0"):
            main([])
        return {line.partition(",")[2] for line in capsys.readouterr().out.splitlines()}

    assert completed("kvstore-inspect sl", 1) == {"slots"}
    assert "--segment" in completed("kvstore-inspect slots --", 2)


def test_a_store_too_large_for_memory_is_sorted_in_files_that_are_gone_afterwards(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with KVStore(path, max_bytes=8 * MIB) as store:
        for number in range(1000):
            store.create(str(number), {"n": number % 13})
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(keys_module, "_RUN_LENGTH", 64)
    result = inspect("keys", path, "--sort", "created", "--json")
    assert len({each["key"] for each in result.lines()}) == 1000
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)


def test_info_tells_no_number_of_a_damaged_state(path: Path) -> None:
    """It printed how many extents are durable from the very bytes that it called damaged."""
    KVStore(path).close()
    assert "extents at least" in inspect("info", path).out
    flip(path, STATE_OFFSET + 8)
    result = inspect("info", path)
    assert "extents at least" not in result.out
    state = inspect("info", "--json", path).json()["state"]
    assert state["durable_count"] is None
