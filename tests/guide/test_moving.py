"""Each script that carries data over, as it stands in the page, on real data of that kind."""

import json
import shelve
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from support import redis as redis_server
from support.inspecting import inspect
from support.pages import run_python, run_shell, section

from kvstore import KVStore


def carried(heading: str) -> tuple[dict[str, Any], list[str]]:
    """Run a section's script, twice; return what is in the store and what was printed."""
    _, printed = run_python(section("MOVING", heading))
    assert run_python(section("MOVING", heading))[1] == printed
    with KVStore("data.kvs") as store:
        return dict(store), printed.splitlines()


OLD: dict[str, Any] = {
    "user:1": {"name": "Ada", "tags": ["a", None, 1.5, True], "é": {"n": 2**63}},
    "鍵": {},
    "text": "hello",
    "number": 5,
    "list": [1, [2]],
    "k" * 33: {},
    "large": {"t": "x" * 17_000},
}
TAKEN: dict[str, Any] = {
    "user:1": OLD["user:1"],
    "鍵": {},
    "text": {"value": "hello"},
    "number": {"value": 5},
    "list": {"value": [1, [2]]},
}


def test_a_dict_in_a_json_file_is_carried_over_and_what_does_not_fit_is_named() -> None:
    Path("data.json").write_text(json.dumps(OLD), "utf-8")
    store, printed = carried("A dict in a JSON file")
    assert store == TAKEN
    assert printed == [
        f"left out: key {'k' * 33!r}: 33 characters, allowed are 1 to 32",
        "left out: key 'large': value is 17,008 bytes of JSON, limit 16,384",
        "5 of 7 carried over",
    ]


def test_a_shelf_is_carried_over_and_what_is_no_json_is_named() -> None:
    with shelve.open("data") as shelf:
        shelf.update(OLD | {"date": date(2020, 1, 1), "set": {1}})
        shelf.dict[b"gone"] = b"cno_such_module\nThing\n."  # type: ignore[attr-defined]
    store, printed = carried("shelve")
    assert store == TAKEN
    assert printed[-1] == "5 of 10 carried over"
    assert sum("key 'date': value['value']" in line for line in printed) == 1
    assert "left out: gone No module named 'no_such_module'" in printed
    assert len(printed) == 6


def test_a_diskcache_is_carried_over_with_its_times() -> None:
    diskcache = pytest.importorskip("diskcache")
    with closing(diskcache.Cache("cache-folder")) as cache:
        for key, value in OLD.items():
            cache[key] = value
        cache.set("expires", {"n": 1}, expire=100_000)
        cache.set("expired", {"n": 1}, expire=-1)
        cache.set(7, b"bytes")
    store, printed = carried("diskcache")
    assert store == TAKEN | {"expires": {"n": 1}}
    assert printed[-1] == "6 carried over"
    assert len(printed) == 4
    with KVStore("data.kvs") as opened:
        assert opened.ttl("text") is None
        assert 99_000 < (opened.ttl("expires") or 0) <= 100_000


def test_the_rows_of_a_table_are_carried_over() -> None:
    with closing(sqlite3.connect("data.db")) as database:
        database.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT, photo)")
        database.executemany(
            "INSERT INTO users VALUES (?, ?, ?)", [(1, "Ada", None), (2, "Alan", b"\x00")]
        )
        database.commit()
    store, printed = carried("SQLite")
    assert store == {"user:1": {"id": 1, "name": "Ada", "photo": None}}
    assert printed[0].startswith("left out: key 'user:2': value['photo']")
    assert printed[1:] == ["1 carried over"]


# --- Redis -------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path, folder: Path) -> Iterator[Path]:
    """The socket of a server of the test's own."""
    with redis_server.server(tmp_path / "redis") as address:
        yield address


def in_shell(heading: str, address: Path) -> "subprocess.CompletedProcess[str]":
    """Run a section's lines of a shell, with this server for `redis-cli`."""
    client = f'"{redis_server.client()}" -s "{address}"'
    return run_shell(section("MOVING", heading), address.parent / "bin", redis_cli=client)


def test_what_a_redis_server_has_is_carried_over(
    redis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("redis")
    with client.Redis.from_url(f"unix://{redis}", decode_responses=True) as server:
        server.set("user:1", '{"name": "Ada"}', ex=100_000)
        server.set("text", "hello")
        server.set("number", 5)
        server.hset("hash", mapping={"field": "value"})
        server.rpush("list", "b", "a")
        server.sadd("set", "b", "a")
        server.zadd("sorted", {"a": 1})
        server.set("k" * 33, "{}")
    monkeypatch.setenv("REDIS_URL", f"unix://{redis}")
    store, printed = carried("Redis")
    assert store == {
        "user:1": {"name": "Ada"},
        "text": {"value": "hello"},
        "number": {"value": 5},
        "hash": {"field": "value"},
        "list": {"items": ["b", "a"]},
        "set": {"items": ["a", "b"]},
    }
    assert printed[-1] == "6 of 8 carried over"
    assert "left out: key 'sorted': is a zset" in printed
    with KVStore("data.kvs") as opened:
        assert opened.ttl("text") is None
        assert 99_000 < (opened.ttl("user:1") or 0) <= 100_000


def test_the_lines_for_going_on_to_redis_and_back_do_so(redis: Path) -> None:
    with KVStore("data.kvs") as store:
        for number in range(500):
            store.put(f"user:{number}", {"n": number}, ttl=number + 1_000 if number % 2 else None)
    result = in_shell("Going on to Redis or Valkey", redis)
    assert result.returncode == 0, result.stderr
    assert "errors: 0, replies: 500" in result.stdout
    assert result.stdout.endswith("\n500\n")
    result = in_shell("And back", redis)
    assert (result.returncode, result.stderr) == (0, "back.kvs: 500 of 500 keys loaded\n")
    assert inspect("diff", "data.kvs", "back.kvs").status == 0


def test_the_lines_for_coming_back_are_those_that_the_help_shows() -> None:
    (back,) = section("MOVING", "And back").code("sh")
    lines = back.text.replace("back.kvs", "data.kvs").splitlines()
    help_text = inspect("load", "--help").out
    assert all(line in help_text for line in lines)
