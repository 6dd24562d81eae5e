"""`kvstore-inspect dump`, `load`, `copy` and `diff`: records carried from place to place."""

import itertools
import json
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from support import MIB
from support import redis as redis_server
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.disks import fill, mounted
from support.files import is_private
from support.inspecting import (
    DONE,
    LOCKED,
    PROBLEMS,
    WRONG_USAGE,
    Result,
    fingerprint,
    flip,
    inspect,
    killed_copy,
    run_in_shell,
)
from support.platforms import needs_shell

from kvstore import KVStore, backup
from kvstore_inspect.commands import diff as diffing
from kvstore_inspect.redis_cli import PIPELINE

KEYS = 300


@pytest.fixture
def filled(path: Path, clock: FakeClock) -> Path:
    """A closed store of keys of all kinds, a third of which expire, stored at many moments.

    Every fifth of them replaces another value, and every seventh was touched.
    """
    rng = random.Random(3)
    with KVStore(path) as store:
        for number in range(KEYS):
            key = ("é" * 16 + str(number), f"{number}", f'"\\\n\x1b{number}', f"鍵🗝{number}")[
                number % 4
            ]
            value = {
                "n": number,
                "text": "ä\u2028" * rng.randrange(200),
                "deep": [[1.5, -(2**63), 2**64 - 1, None, True]],
            }
            ttl = None if number % 3 else 1_000 + number
            if number % 5 == 0:
                store.create(key, {"replaced": number}, ttl=5)
            store.put(key, value, ttl)
            if number % 7 == 0:
                clock.advance(0.5)
                store.touch(key, ttl)
            clock.advance(0.001 * number)
    return path


def contents(path: Path) -> dict[str, Any]:
    with KVStore(path) as store:
        return dict(store)


def lines_file(folder: Path, text: str) -> Path:
    source = folder / "lines.jsonl"
    source.write_text(text, "utf-8")
    return source


# --- dump --------------------------------------------------------------------------------------


def test_dump_writes_each_record_on_a_line_with_its_times(filled: Path) -> None:
    before = fingerprint(filled)
    result = inspect("dump", filled)
    assert result.status == DONE
    assert result.err == ""
    assert fingerprint(filled) == before
    assert result.out.count("\n") == KEYS
    assert {line["key"]: line["value"] for line in result.lines()} == contents(filled)
    for line in result.lines():
        assert list(line) == ["key", "value", "created_at", "expires_at"]
        ttl = None if line["value"]["n"] % 3 else 1_000 + line["value"]["n"]
        assert line["expires_at"] == (None if ttl is None else line["created_at"] + ttl * 1_000)


def test_dump_leaves_out_what_has_expired_unless_it_is_asked_for(
    filled: Path, clock: FakeClock
) -> None:
    clock.advance(1_100)
    live = inspect("dump", filled).lines()
    everything = inspect("dump", filled, "--expired").lines()
    assert 0 < len(live) < len(everything) == KEYS
    assert all(line["expires_at"] is None or line["expires_at"] > clock.now_ms for line in live)


def test_dump_of_a_file_that_was_not_closed_holds_every_record(
    open_store: Callable[..., KVStore], tmp_path: Path, clock: FakeClock
) -> None:
    store = open_store()
    for number in range(500):
        store.create(f"{number}", {"n": number})
    for number in range(0, 500, 5):
        store.delete(f"{number}")
    copy = killed_copy(store, tmp_path / "killed.kvs")
    result = inspect("dump", copy)
    assert result.status == DONE
    assert {line["key"]: line["value"] for line in result.lines()} == dict(store)


def test_dump_goes_on_past_damage_names_it_and_ends_in_1(filled: Path) -> None:
    whole = contents(filled)
    flip(filled, filled.read_bytes().index(b'1{"n":1,') + 5)
    result = inspect("dump", filled)
    assert result.status == PROBLEMS
    del whole["1"]
    assert {line["key"]: line["value"] for line in result.lines()} == whole
    assert "key 1: its record fails its checksum" in result.err


@needs_shell
def test_dump_ends_cleanly_where_nobody_reads_on(filled: Path, tmp_path: Path) -> None:
    with KVStore(filled) as store:
        for number in range(2_000):
            store.create(f"more {number}", {"text": "x" * 1_000})
    result = run_in_shell('"$@" | head -n 1', "dump", filled)
    assert (result.status, result.out.count("\n"), result.err) == (DONE, 1, "")


# --- load --------------------------------------------------------------------------------------


def test_dump_load_dump_gives_the_same_lines(
    filled: Path, tmp_path: Path, clock: FakeClock
) -> None:
    first = inspect("dump", filled).out
    lines = tmp_path / "lines.jsonl"
    lines.write_text(first, encoding="utf-8")
    clock.advance(5)
    loaded = tmp_path / "loaded.kvs"
    result = inspect("load", loaded, lines)
    assert result.status == DONE, result.err
    assert f"{KEYS:,} of {KEYS:,} lines loaded" in result.err
    second = inspect("dump", loaded).out
    assert sorted(second.split("\n")) == sorted(first.split("\n"))
    assert_consistent(loaded)


@needs_shell
def test_load_reads_standard_input(filled: Path, tmp_path: Path, clock: FakeClock) -> None:
    loaded = tmp_path / "loaded.kvs"
    lines = tmp_path / "lines.jsonl"
    lines.write_text(inspect("dump", filled).out, "utf-8")
    result = run_in_shell(f'cat {lines} | "$@"', "load", loaded)
    # By the true clock of that process the third with a time-to-live has expired long ago.
    assert result.status == PROBLEMS
    assert f"200 of {KEYS} lines loaded, 100 expired" in result.err
    assert len(contents(loaded)) == 200


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{bad", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"key":"a"}', "its fields are key"),
        ('{"key":"a","value":{},"more":1}', "its fields are key, more, value"),
        ('{"key":5,"value":{}}', "key 5: int"),
        ('{"key":"","value":{}}', "0 characters"),
        (json.dumps({"key": "k" * 33, "value": {}}), "33 characters"),
        ('{"key":"a","value":[]}', "is a list"),
        ('{"key":"a","value":{"n":18446744073709551616}}', "an integer of 65 bits"),
        ('{"key":"a","value":{"n":1e999}}', "a"),
        (json.dumps({"key": "a", "value": {"t": "x" * 17_000}}), "limit 16,384"),
        ('{"key":"a","value":{},"created_at":-1}', "created_at is -1"),
        ('{"key":"a","value":{},"created_at":271474976710656}', "created_at is 271474976710656"),
        ('{"key":"a","value":{},"expires_at":0}', "expires_at is 0"),
        ('{"key":"a","value":{},"expires_at":1.5}', "expires_at is 1.5"),
        ('{"key":"a","value":{},"expires_at":281474976710656}', "expires_at is 281474976710656"),
        ('{"key":"a","value":' + '{"v":' * 200 + "1" + "}" * 200 + "}", "deep"),
        (json.dumps({"key": "a", "value": {"t": "x" * 2 * MIB}}), "longer than 1,048,576 bytes"),
    ],
)
def test_load_names_a_malformed_line_and_keeps_what_came_before(
    path: Path, tmp_path: Path, clock: FakeClock, line: str, problem: str
) -> None:
    source = tmp_path / "lines.jsonl"
    first = '{"key":"before","value":{"n":1}}\n\n'
    source.write_text(f'{first}{line}\n{{"key":"after","value":{{}}}}\n')
    result = inspect("load", path, source)
    assert result.status == PROBLEMS
    assert "stopped at line 3, which is the first not loaded" in result.err
    assert problem in result.err
    assert contents(path) == {"before": {"n": 1}}
    assert_consistent(path)


def test_load_takes_lines_without_times(path: Path, tmp_path: Path, clock: FakeClock) -> None:
    source = lines_file(tmp_path, '{"value":{"n":1},"key":"a"}\n')
    assert inspect("load", path, source).status == DONE
    (line,) = inspect("dump", path).lines()
    assert line == {"key": "a", "value": {"n": 1}, "created_at": clock.now_ms, "expires_at": None}


def existing(path: Path, tmp_path: Path) -> Path:
    """Make a store that holds b, and lines for a, b and c."""
    with KVStore(path) as store:
        store.create("b", {"old": True})
    return lines_file(
        tmp_path, "".join(f'{{"key":"{key}","value":{{"new":1}}}}\n' for key in "abc")
    )


def test_load_stops_at_a_key_that_exists(path: Path, tmp_path: Path, clock: FakeClock) -> None:
    result = inspect("load", path, existing(path, tmp_path))
    assert result.status == PROBLEMS
    assert "stopped at line 2" in result.err
    assert "key 'b': exists already" in result.err
    assert contents(path) == {"a": {"new": 1}, "b": {"old": True}}


def test_load_skips_keys_that_exist_and_names_them(
    path: Path, tmp_path: Path, clock: FakeClock
) -> None:
    result = inspect("load", path, existing(path, tmp_path), "--on-exists", "skip")
    assert result.status == PROBLEMS
    assert "key b: exists already, not loaded" in result.err
    assert "2 of 3 lines loaded, 1 exist already" in result.err
    assert contents(path) == {"a": {"new": 1}, "b": {"old": True}, "c": {"new": 1}}


def test_load_replaces_keys_that_exist(path: Path, tmp_path: Path, clock: FakeClock) -> None:
    result = inspect("load", path, existing(path, tmp_path), "--on-exists", "replace")
    assert result.status == DONE
    assert "3 of 3 lines loaded, 1 replaced" in result.err
    assert contents(path) == {key: {"new": 1} for key in "abc"}


def test_load_that_cannot_replace_for_want_of_room_keeps_the_old_value(
    path: Path, tmp_path: Path, clock: FakeClock
) -> None:
    with KVStore(path, max_bytes=4 * MIB) as store:
        store.create("small", {"old": True}, ttl=500)
        created_at = clock.now_ms
        number = 0
        size = 16_000
        while size:
            try:
                store.create(f"{number}", {"t": "x" * size})
                number += 1
            except Exception:
                size //= 2
        before = dict(store)
    clock.advance(1)
    source = lines_file(tmp_path, json.dumps({"key": "small", "value": {"t": "x" * 16_000}}) + "\n")
    result = inspect("load", path, source, "--on-exists", "replace", "--max-bytes", 4 * MIB)
    assert result.status == PROBLEMS
    assert "0 of 1 lines loaded" in result.err
    assert "stopped at line 1" in result.err
    assert contents(path) == before
    (line,) = [line for line in inspect("dump", path).lines() if line["key"] == "small"]
    assert (line["created_at"], line["expires_at"]) == (created_at, created_at + 500_000)


def test_load_into_a_store_that_is_too_small_says_what_was_loaded(
    path: Path, tmp_path: Path, clock: FakeClock
) -> None:
    source = tmp_path / "lines.jsonl"
    with source.open("w") as file:
        for number in range(400):
            file.write(json.dumps({"key": f"{number}", "value": {"t": "x" * 15_000}}) + "\n")
    result = inspect("load", path, source, "--max-bytes", 4 * MIB)
    assert result.status == PROBLEMS
    count = len(contents(path))
    assert 0 < count < 400
    assert f"stopped at line {count + 1:,}, which is the first not loaded" in result.err
    assert f"{count:,} of {count + 1:,} lines loaded" in result.err
    assert contents(path).keys() == {str(number) for number in range(count)}


def test_load_takes_back_what_has_expired_when_it_needs_room(
    path: Path, tmp_path: Path, clock: FakeClock
) -> None:
    lines = [{"key": f"{number}", "value": {"t": "x" * 15_000}} for number in range(200)]
    source = lines_file(tmp_path, "".join(json.dumps(line) + "\n" for line in lines))
    with KVStore(path, max_bytes=4 * MIB) as store:
        for number in range(150):
            store.create(f"old {number}", {"t": "x" * 15_000}, ttl=10)
        room = store.stats().records
    assert room == 150
    clock.advance(20)
    source.write_text("".join(json.dumps(line) + "\n" for line in lines[:150]))
    assert inspect("load", path, source, "--max-bytes", 4 * MIB).status == DONE
    assert len(contents(path)) == 150


def test_load_into_a_store_in_use_is_locked(
    store: KVStore, tmp_path: Path, clock: FakeClock
) -> None:
    source = lines_file(tmp_path, "")
    assert inspect("load", store.path, source).status == LOCKED


def test_load_of_a_missing_input_or_into_what_is_no_store_is_wrong_usage(
    path: Path, tmp_path: Path
) -> None:
    assert inspect("load", path, tmp_path / "missing").status == WRONG_USAGE
    assert not path.exists()
    path.write_text("not a store")
    source = lines_file(tmp_path, "")
    assert inspect("load", path, source).status == WRONG_USAGE
    assert path.read_text() == "not a store"


# --- copy --------------------------------------------------------------------------------------


def test_copy_is_compact_and_holds_the_same_with_its_times(
    filled: Path, tmp_path: Path, clock: FakeClock
) -> None:
    with KVStore(filled) as store:
        for number in range(1_000):
            store.create(f"gone {number}", {"t": "x" * 10_000})
        for number in range(1_000):
            store.delete(f"gone {number}")
    before = fingerprint(filled)
    out = tmp_path / "copy.kvs"
    result = inspect("copy", filled, out)
    assert result.status == DONE, result.err
    assert f"{KEYS} records" in result.err
    assert fingerprint(filled) == before
    assert out.stat().st_size < filled.stat().st_size // 2
    assert is_private(out)
    assert_consistent(out)
    carried = (inspect("dump", each).out.split("\n") for each in (out, filled))
    assert len({tuple(sorted(lines)) for lines in carried}) == 1
    assert inspect("diff", filled, out, "--created").status == DONE
    assert sorted(tmp_path.iterdir()) == sorted([filled, out])


def test_copy_overwrites_only_what_it_is_told_to(
    filled: Path, tmp_path: Path, clock: FakeClock
) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    assert inspect("copy", filled, out).status == WRONG_USAGE
    assert out.read_text() == "precious"
    assert inspect("copy", filled, filled, "--force").status == WRONG_USAGE
    assert inspect("copy", filled, out, "--force").status == DONE
    assert contents(out) == contents(filled)


def test_copy_of_a_damaged_file_leaves_out_the_damage(
    filled: Path, tmp_path: Path, clock: FakeClock
) -> None:
    whole = contents(filled)
    flip(filled, filled.read_bytes().index(b'1{"n":1,') + 5)
    out = tmp_path / "copy.kvs"
    result = inspect("copy", filled, out)
    assert result.status == PROBLEMS
    assert "1 damaged place left out" in result.err
    del whole["1"]
    assert contents(out) == whole
    assert_consistent(out)


def test_copy_never_tells_of_its_temporary_file(filled: Path, tmp_path: Path) -> None:
    """Of a missing folder it said that ".out.kvs.x1y2z3.tmp" does not exist."""
    missing = tmp_path / "missing"
    result = inspect("copy", filled, missing / "out.kvs")
    assert (result.status, result.err) == (
        WRONG_USAGE,
        f"kvstore-inspect: {missing}: No such file or directory\n",
    )
    with mounted("tmpfs", tmp_path) as disk:
        fill(disk)
        result = inspect("copy", filled, disk / "out.kvs")
        assert result.status == PROBLEMS
        assert f"{disk / 'out.kvs'}: no room on the disk" in result.err
        assert ".out.kvs" not in result.err
        assert not list(disk.glob("*out.kvs*"))


def test_copy_counts_one_record_as_one(path: Path, tmp_path: Path) -> None:
    with KVStore(path) as store:
        store.create("whole", {})
        store.create("torn", {"b": 1})
    contents = path.read_bytes()
    flip(path, contents.index(b'{"b":1}'))
    result = inspect("copy", path, tmp_path / "out.kvs")
    assert "out.kvs: 1 record, " in result.err
    assert "1 damaged place left out\n" in result.err


def test_copy_that_fails_leaves_nothing_behind(
    filled: Path,
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = itertools.count()
    monkeypatch.setattr(backup, "_digest", lambda *_record: next(count))
    result = inspect("copy", filled, tmp_path / "copy.kvs")
    assert result.status == PROBLEMS
    assert "does not hold what was read" in result.err
    assert list(tmp_path.iterdir()) == [filled]


# --- diff --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys_at_a_time", [250_000, 7])
def test_diff_names_every_key_that_differs(
    path: Path,
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    keys_at_a_time: int,
) -> None:
    monkeypatch.setattr(diffing, "_MOST_KEYS", keys_at_a_time)
    other = tmp_path / "other.kvs"
    with KVStore(path) as a, KVStore(other) as b:
        for number in range(50):
            for store in (a, b):
                store.create(f"same {number}", {"n": number}, ttl=100)
        a.create("only\na", {})
        b.create("only b", {})
        for store, value, ttl in ((a, 1, 50), (b, 2, None)):
            store.create("both", {"n": value}, ttl=ttl)
            store.create("value", {"n": value})
            store.create("ttl", {"n": 0}, ttl=ttl)
        a.create("expired", {}, ttl=1)
    clock.advance(2)
    result = inspect("diff", path, other)
    assert result.status == PROBLEMS
    assert sorted(result.out.splitlines()) == [
        "+ only b",
        "- only\\na",
        "~ both  value, expires_at",
        "~ ttl  expires_at",
        "~ value  value",
    ]
    as_json = inspect("diff", path, other, "--json").lines()
    assert {(each["key"], each["in"], *each["differs"]) for each in as_json} == {
        ("only b", "b"),
        ("only\na", "a"),
        ("both", "both", "value", "expires_at"),
        ("ttl", "both", "expires_at"),
        ("value", "both", "value"),
    }


def test_diff_of_equal_stores_is_silent_and_times_of_creation_count_if_asked(
    path: Path, tmp_path: Path, clock: FakeClock
) -> None:
    other = tmp_path / "other.kvs"
    for each in (path, other):
        with KVStore(each) as store:
            store.create("key", {"n": 1})
        clock.advance(1)
    assert inspect("diff", path, other) == Result(DONE, "", "")
    result = inspect("diff", path, other, "--created")
    assert (result.status, result.out) == (PROBLEMS, "~ key  created_at\n")
    assert inspect("diff", path, path).status == WRONG_USAGE


def test_diff_names_damage_once_and_ends_in_1(
    filled: Path,
    tmp_path: Path,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diffing, "_MOST_KEYS", 50)
    other = tmp_path / "other.kvs"
    shutil.copyfile(filled, other)
    flip(other, other.read_bytes().index(b'1{"n":1,') + 5)
    result = inspect("diff", filled, other)
    assert result.status == PROBLEMS
    assert result.out == "- 1\n"
    assert result.err.count("fails its checksum") == 1


# --- a Redis server ----------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Path]:
    """The socket of a Redis or Valkey server of this test's own."""
    with redis_server.server(tmp_path / "redis") as address:
        yield address


def _ask(address: Path, *command: str) -> bytes:
    """Send a command to the server and return the bytes of its answer."""
    parts = [part.encode() for part in command]
    request = b"*%d\r\n" % len(parts)
    request += b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        connection.sendall(request)
        answer = connection.makefile("rb")
        head = answer.readline()
        if head.startswith(b"$") and head != b"$-1\r\n":
            return answer.read(int(head[1:]))
        return head[1:-2]


@needs_shell
def test_dump_goes_into_a_redis_server_by_one_line_of_shell(
    path: Path, redis: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {}
    with KVStore(path) as store:
        for number in range(10_000):
            key = (f"user:{number}", f"Ключ {number}", f"鍵🗝\r\n{number}")[number % 3]
            values[key] = {"n": number, "text": "ä\r\n$3\r\n" * (number % 7)}
            store.create(key, values[key], ttl=None if number % 2 else 100_000 + number)
    client = redis_server.client()
    line = f'"$@" | "{client}" -s "{redis}" --pipe'
    result = run_in_shell(line, "dump", path, "--format", "resp")
    assert result.status == 0, result.err
    assert "errors: 0, replies: 10000" in result.out
    assert _ask(redis, "DBSIZE") == b"10000"
    with KVStore(path) as store:
        for key in random.Random(1).sample(sorted(values), 500):
            assert orjson.loads(_ask(redis, "GET", key)) == values[key]
            left = int(_ask(redis, "PTTL", key))
            expected = store.ttl(key)
            if expected is None:
                assert left == -1
            else:
                assert expected * 1_000 - 60_000 < left <= expected * 1_000 + 60_000
    expires_at = inspect("get", path, "user:0", "--json").json()["expires_at"]
    assert int(_ask(redis, "PTTL", "user:0")) == pytest.approx(
        expires_at - time.time() * 1_000, abs=60_000
    )


def _load_from(address: Path, target: Path, *options: object) -> Result:
    """Run the pipeline that `load --help` shows, with the client of this server."""
    pipeline = PIPELINE.replace(
        "redis-cli --no-raw", f'"{redis_server.client()}" -s "{address}" --no-raw'
    )
    return run_in_shell(
        pipeline.replace("kvstore-inspect load data.kvs --format redis-cli", '"$@"'),
        *("load", target, "--format", "redis-cli", *options),
    )


def test_what_went_into_a_redis_server_comes_back_the_same(
    path: Path, redis: Path, tmp_path: Path
) -> None:
    with KVStore(path) as store:
        for number in range(2_000):
            key = (f"user:{number}", f"Ключ {number}", f'鍵🗝\r\n\\"{number}')[number % 3]
            value = {
                "n": number,
                "text": "ä\r\n\x07\t\\x00'\"" * (number % 9),
                "deep": [[2**64 - 1]],
            }
            store.create(key, value, ttl=None if number % 2 else 100_000 + number)
        store.create("full", {"t": "x" * 16_000})
    line = f'"$@" | "{redis_server.client()}" -s "{redis}" --pipe'
    assert run_in_shell(line, "dump", path, "--format", "resp").status == 0
    back = tmp_path / "back.kvs"
    result = _load_from(redis, back)
    assert (result.status, result.err) == (DONE, f"{back}: 2,001 of 2,001 keys loaded\n")
    records = [
        sorted((line["key"], line["value"], line["expires_at"]) for line in lines)
        for lines in (inspect("dump", path).lines(), inspect("dump", back).lines())
    ]
    assert records[0] == records[1]
    assert_consistent(back)


def test_load_from_a_redis_server_names_what_a_store_cannot_hold_and_takes_the_rest(
    path: Path, redis: Path
) -> None:
    _ask(redis, "SET", "good", '{ "spaces": [1,  2],\n "lines": {} }')
    _ask(redis, "SET", "text", "hello")
    _ask(redis, "SET", "number", "5")
    _ask(redis, "SET", "large", json.dumps({"t": "x" * 17_000}))
    _ask(redis, "SET", "huge", json.dumps({"t": "x" * 2 * MIB}))
    _ask(redis, "SET", "k" * 33, "{}")
    _ask(redis, "EVAL", "return redis.call('SET', string.rep('long', 300000), '{}')", "0")
    _ask(redis, "SET", "", "{}")
    _ask(redis, "HSET", "hash", "field", "value")
    _ask(redis, "EVAL", "return redis.call('SET', '\\255', '{}')", "0")
    result = _load_from(redis, path)
    assert result.status == PROBLEMS
    assert contents(path) == {"good": {"spaces": [1, 2], "lines": {}}}
    for message in (
        "key text: its value is not JSON",
        "key 'number': value: 5 is a int, allowed is a dict",
        "key 'large': ",
        "key huge: its value is longer than 1,048,576 bytes",
        f"key {'k' * 33!r}: 33 characters, allowed are 1 to 32",
        f"key {'long' * 10}…: is longer than 32 characters",
        "key '': 0 characters",
        "key hash: is no string on the server",
        "key \\xff: is not UTF-8",
        "1 of 10 keys loaded, 9 left out",
    ):
        assert message in result.err, result.err


def test_load_from_a_redis_server_obeys_what_is_said_of_keys_that_exist(
    path: Path, redis: Path
) -> None:
    existing(path, path.parent)
    for key in "abc":
        _ask(redis, "SET", key, '{"new": 1}')
    assert "exists already" in _load_from(redis, path).err
    assert _load_from(redis, path, "--on-exists", "replace").status == DONE
    assert contents(path) == {key: {"new": 1} for key in "abc"}


@pytest.mark.parametrize(
    ("replies", "problem"),
    [
        ('"a"\n"{}"\n', "stopped at line 1, which is the first not loaded: the input ends within"),
        ('"a"\n"{}"\n(integer) -1\n"b"\n', "stopped at line 4"),
        ("(error) NOAUTH Authentication required.\n" * 3, "the reply to ECHO, not (error) NOAUTH"),
        ('"a"\n(error) LOADING\n(integer) -1\n', "the reply to GET, not (error) LOADING"),
        ('"a"\n"{}"\n(error) ERR unknown\n', "the reply to PEXPIRETIME, not (error) ERR unknown"),
        ('{"key":"a","value":{}}\n' * 3, "expected a string in quotes as the reply to ECHO"),
        ('"a"\n"{}\n(integer) -1\n', "expected a string in quotes as the reply to GET"),
        ('"a"\n"{\\q}"\n(integer) -1\n', "expected a string in quotes as the reply to GET"),
    ],
)
def test_load_stops_at_what_is_no_reply_of_redis_cli(
    path: Path, tmp_path: Path, replies: str, problem: str
) -> None:
    result = inspect("load", path, lines_file(tmp_path, replies), "--format", "redis-cli")
    assert result.status == PROBLEMS
    assert problem in result.err


def test_load_leaves_out_what_expired_on_the_server_and_here(
    path: Path, tmp_path: Path, clock: FakeClock
) -> None:
    replies = "".join(
        f'"{key}"\n{value}\n(integer) {time}\n'
        for key, value, time in (
            ("deleted", "(nil)", -2),
            ("expired meanwhile", '"{}"', -2),
            ("expired here", '"{}"', clock.now_ms),
            ("stays a millisecond", '"{}"', clock.now_ms + 1),
            ("stays for ages", '"{}"', 2**62),
        )
    )
    replies += "(0.80s)\n"  # which redis-cli says after a reply that took long
    result = inspect("load", path, lines_file(tmp_path, replies), "--format", "redis-cli")
    assert result.status == PROBLEMS
    assert "2 of 5 keys loaded, 1 expired, 2 left out" in result.err
    assert "key deleted: was gone before it was read, not loaded" in result.err
    lines = {line["key"]: line for line in inspect("dump", path).lines()}
    assert lines.keys() == {"stays a millisecond", "stays for ages"}
    assert lines["stays a millisecond"]["expires_at"] == clock.now_ms + 1
