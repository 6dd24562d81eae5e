"""`python -m kvstore create|read|delete`: JSON in, JSON out, and exit codes for scripts."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import children
from support.stores import OpenStore
from support.values import sized_value

from kvstore import KVStore

DONE, REFUSED, USAGE, LOCKED = 0, 1, 2, 3


@pytest.fixture
def filled(path: Path, open_store: OpenStore) -> Path:
    """A closed store with one record, `user:1`."""
    with open_store(path) as store:
        store.create("user:1", {"name": "Ada", "tags": ["é", "🐍"]})
    return path


def _run(command: str, path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return children.run_command(command, "--file", path, *arguments)


def _done(result: subprocess.CompletedProcess[str]) -> str:
    assert (result.returncode, result.stderr) == (DONE, "")
    return result.stdout


def _failed(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Check that a command ended as it should: one message, nothing printed, no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr
    return result.stderr


def test_create_read_and_delete_from_a_shell(path: Path, open_store: OpenStore) -> None:
    assert _done(_run("create", path, "user:1", '{"name": "Ada", "n": [1, 1.5, null]}')) == ""
    printed = _done(_run("read", path, "user:1"))
    assert json.loads(printed) == {"name": "Ada", "n": [1, 1.5, None]}
    assert printed.endswith("\n")
    assert dict(open_store()) == {"user:1": {"name": "Ada", "n": [1, 1.5, None]}}


def test_delete_from_a_shell(filled: Path, open_store: OpenStore) -> None:
    assert _done(_run("delete", filled, "user:1")) == ""
    assert len(open_store()) == 0


def test_create_with_a_ttl(path: Path, open_store: OpenStore) -> None:
    _done(_run("create", path, "k", "{}", "--ttl", 3600))
    left = open_store().ttl("k")
    assert left is not None
    assert 3000 < left <= 3600


def test_create_reads_the_value_from_standard_input(path: Path, open_store: OpenStore) -> None:
    value = sized_value(16_384)
    result = children.run_command("create", "--file", path, "k", stdin=json.dumps(value))
    _done(result)
    assert dict(open_store()) == {"k": value}


def test_text_beyond_ascii_goes_both_ways(filled: Path, open_store: OpenStore) -> None:
    assert json.loads(_done(_run("read", filled, "user:1"))) == {
        "name": "Ada",
        "tags": ["é", "🐍"],
    }
    _done(_run("create", filled, "ключ", '{"é": "🐍"}'))
    assert open_store()["ключ"] == {"é": "🐍"}


def test_without_a_file_it_is_the_default_one(tmp_path: Path) -> None:
    place = {"KVSTORE_PATH": str(tmp_path / "default.kvs")}
    _done(children.run_command("create", "k", '{"n":1}', **place))
    assert os.listdir(tmp_path) == ["default.kvs"]
    assert json.loads(_done(children.run_command("read", "k", **place))) == {"n": 1}


REFUSALS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "create of an existing key": ("create", ("user:1", "{}"), "user:1"),
    "read of an absent key": ("read", ("user:2",), "user:2"),
    "delete of an absent key": ("delete", ("user:2",), "user:2"),
    "an empty key": ("create", ("", "{}"), "32"),
    "a long key": ("read", ("x" * 33,), "32"),
    "a list as value": ("create", ("k", "[1]"), "list"),
    "NaN": ("create", ("k", '{"v": NaN}'), ""),
    "an integer out of range": ("create", ("k", '{"v": 18446744073709551616}'), ""),
    "no JSON": ("create", ("k", "{v: 1}"), ""),
    "half of JSON": ("create", ("k", '{"v": '), ""),
    "a large value": ("create", ("k", json.dumps(sized_value(16_385))), "16,3"),
    "no ttl": ("create", ("k", "{}", "--ttl", 0), "0"),
    "a long ttl": ("create", ("k", "{}", "--ttl", 10**10 + 1), "10,000,000,00"),
}


@pytest.mark.parametrize(("command", "arguments", "fact"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_is_refused_exits_with_1_and_changes_nothing(
    filled: Path, open_store: OpenStore, command: str, arguments: tuple[Any, ...], fact: str
) -> None:
    assert fact in _failed(_run(command, filled, *arguments), REFUSED)
    assert dict(open_store()) == {"user:1": {"name": "Ada", "tags": ["é", "🐍"]}}


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"v":' * 100_000, "9" * 10_000])
def test_standard_input_that_is_no_value_is_refused(filled: Path, text: str) -> None:
    result = children.run_command("create", "--file", filled, "k", stdin=text)
    _failed(result, REFUSED)


def test_a_key_that_looks_like_an_option_comes_after_two_dashes(filled: Path) -> None:
    _done(_run("create", filled, "--", "--ttl", '{"n":1}'))
    assert json.loads(_done(_run("read", filled, "--", "--ttl"))) == {"n": 1}


def test_a_foreign_file_is_refused_and_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"precious")
    assert path.name in _failed(_run("read", path, "k"), REFUSED)
    assert path.read_bytes() == b"precious"


def test_trouble_with_the_path_is_refused(tmp_path: Path) -> None:
    _failed(_run("create", tmp_path / "missing" / "test.kvs", "k", "{}"), REFUSED)
    _failed(_run("create", tmp_path, "k", "{}"), REFUSED)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("update", "k"),
        ("read",),
        ("delete",),
        ("create",),
        ("read", "k", "extra"),
        ("create", "k", "{}", "--ttl", "soon"),
        ("read", "k", "--unknown"),
        ("read", "k", "--wait", "long"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_how(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = children.run_command(*arguments, KVSTORE_PATH=str(tmp_path / "default.kvs"))
    assert "usage" in _failed(result, USAGE).lower()
    assert os.listdir(tmp_path) == []


def test_help_is_printed_and_makes_no_file(tmp_path: Path) -> None:
    result = children.run_command("--help", KVSTORE_PATH=str(tmp_path / "default.kvs"))
    printed = _done(result)
    assert all(word in printed for word in ("create", "read", "delete"))
    assert os.listdir(tmp_path) == []


def test_a_store_in_use_exits_with_3_and_names_its_holder(filled: Path) -> None:
    with KVStore(filled):
        for command, arguments in (("read", ()), ("create", ("{}",)), ("delete", ())):
            assert str(os.getpid()) in _failed(_run(command, filled, "k", *arguments), LOCKED)
        _failed(_run("read", filled, "user:1", "--wait", "0.05"), LOCKED)


def test_wait_waits_until_the_store_is_free(filled: Path) -> None:
    with KVStore(filled):
        process = children.start_command(
            "read", "--file", filled, "user:1", "--wait", children.PATIENCE_SECONDS
        )
        # A command that does not wait ends well within this; one that waits never does.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    out, error = process.communicate(timeout=children.PATIENCE_SECONDS)
    assert (process.returncode, error) == (DONE, "")
    assert json.loads(out)["name"] == "Ada"


def test_a_closed_pipe_ends_read_quietly(filled: Path) -> None:
    """As under `| head -0`."""
    with children.start_command("read", "--file", filled, "user:1") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
