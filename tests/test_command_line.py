"""`python -m kvstore create|put|read|touch|delete`: JSON in, JSON out, exit codes for scripts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import pytest
from support import MIB, processes
from support.commands import run_command, run_here, start_command
from support.platforms import (
    needs_full_device,
    needs_linux,
    needs_posix,
    needs_shell,
)
from support.stores import OpenStore
from support.values import sized_value

from kvstore import KVStore, StoreFullError
from kvstore.file.lock import FileLock

DONE, REFUSED, USAGE, LOCKED = 0, 1, 2, 3


@pytest.fixture
def filled(path: Path, open_store: OpenStore) -> Path:
    """A closed store with one record, `user:1`."""
    with open_store(path) as store:
        store.create("user:1", {"name": "Ada", "tags": ["é", "🐍"]})
    return path


def _run(command: str, path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here(command, "--file", path, *arguments)


def _done(result: subprocess.CompletedProcess[str]) -> str:
    assert (result.returncode, result.stderr) == (DONE, "")
    return result.stdout


def _in_shell(
    line: str, *arguments: object, folder: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a shell's line in which `kvstore` stands for the command with these arguments."""
    command = shlex.join([sys.executable, "-W", "error", "-m", "kvstore", *map(str, arguments)])
    return subprocess.run(
        ["sh", "-c", line.replace("kvstore", command, 1)],
        env=processes.environment(),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=processes.PATIENCE_SECONDS,
        check=False,
    )


def _failed(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Check that a command ended as it should: one message, nothing printed, no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr
    return result.stderr


def test_create_read_and_delete_from_a_shell(path: Path, open_store: OpenStore) -> None:
    created = run_command(
        "create", "--file", path, "user:1", '{"name": "Ada", "n": [1, 1.5, null]}'
    )
    assert _done(created) == ""
    printed = _done(run_command("read", "--file", path, "user:1"))
    assert json.loads(printed) == {"name": "Ada", "n": [1, 1.5, None]}
    assert printed.endswith("\n")
    assert dict(open_store()) == {"user:1": {"name": "Ada", "n": [1, 1.5, None]}}


def test_delete_from_a_shell(filled: Path, open_store: OpenStore) -> None:
    assert _done(_run("delete", filled, "user:1")) == ""
    assert len(open_store()) == 0


def test_put_from_a_shell_replaces_value_and_ttl(path: Path, open_store: OpenStore) -> None:
    """It makes key and file where they are missing, as `create` does."""
    for arguments, left in (((), None), (("--ttl", 3600), 3600), ((), None)):
        value = {"n": left, "tags": ["é", "🐍"]}
        assert _done(_run("put", path, "user:1", json.dumps(value), *arguments)) == ""
        with open_store() as store:
            assert dict(store) == {"user:1": value}
            assert store.ttl("user:1") == pytest.approx(left, abs=600)
    _done(run_command("put", "--file", path, "user:1", stdin='{"from": "standard input"}'))
    assert dict(open_store()) == {"user:1": {"from": "standard input"}}


def test_touch_from_a_shell_changes_the_ttl_alone(filled: Path, open_store: OpenStore) -> None:
    value = {"name": "Ada", "tags": ["é", "🐍"]}
    for arguments, left in ((("--ttl", 3600), 3600), (("--ttl", 50_000), 50_000)):
        assert _done(_run("touch", filled, "user:1", *arguments)) == ""
        with open_store() as store:
            assert store.ttl("user:1") == pytest.approx(left, abs=600)
            assert dict(store) == {"user:1": value}
    assert _done(run_command("touch", "--file", filled, "user:1", "--forever")) == ""
    assert open_store().ttl("user:1") is None


def test_create_with_a_ttl(path: Path, open_store: OpenStore) -> None:
    _done(_run("create", path, "k", "{}", "--ttl", 3600))
    left = open_store().ttl("k")
    assert left is not None
    assert 3000 < left <= 3600


def test_create_reads_the_value_from_standard_input(path: Path, open_store: OpenStore) -> None:
    value = sized_value(16_384)
    result = run_command("create", "--file", path, "k", stdin=json.dumps(value))
    _done(result)
    assert dict(open_store()) == {"k": value}


def test_text_beyond_ascii_goes_both_ways(filled: Path, open_store: OpenStore) -> None:
    printed = _done(run_command("read", "--file", filled, "user:1"))
    assert json.loads(printed) == {"name": "Ada", "tags": ["é", "🐍"]}
    _done(run_command("create", "--file", filled, "ключ", '{"é": "🐍"}'))
    assert open_store()["ключ"] == {"é": "🐍"}


def test_without_a_file_it_is_the_default_one(tmp_path: Path) -> None:
    place = {"KVSTORE_PATH": str(tmp_path / "default.kvs")}
    _done(run_here("create", "k", '{"n":1}', **place))
    assert os.listdir(tmp_path) == ["default.kvs"]
    assert json.loads(_done(run_here("read", "k", **place))) == {"n": 1}


REFUSALS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "create of an existing key": ("create", ("user:1", "{}"), "user:1"),
    "read of an absent key": ("read", ("user:2",), "user:2"),
    "delete of an absent key": ("delete", ("user:2",), "user:2"),
    "touch of an absent key": ("touch", ("user:2", "--forever"), "user:2"),
    "touch with no ttl": ("touch", ("user:1", "--ttl", 0), "0"),
    "touch with a long ttl": ("touch", ("user:1", "--ttl", 10**10 + 1), "10,000,000,00"),
    "put of a list": ("put", ("user:1", "[1]"), "list"),
    "put of a large value": ("put", ("user:1", json.dumps(sized_value(16_385))), "16,3"),
    "put with no ttl": ("put", ("user:1", "{}", "--ttl", 0), "0"),
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


@pytest.mark.parametrize("command", ["create", "put"])
@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"v":' * 100_000, "9" * 10_000])
def test_standard_input_that_is_no_value_is_refused(filled: Path, text: str, command: str) -> None:
    result = run_here(command, "--file", filled, "k", stdin=text)
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
        ("put",),
        ("put", "k", "{}", "--forever"),
        ("touch",),
        ("touch", "k"),
        ("touch", "k", "--ttl"),
        ("touch", "k", "--ttl", "soon"),
        ("touch", "k", "--ttl", "5", "--forever"),
        ("touch", "k", "{}", "--forever"),
        ("read", "k", "--unknown"),
        ("read", "k", "--wait", "long"),
        ("read", "k", "--wait", "-1"),
        ("read", "k", "--wait", "inf"),
        ("read", "k", "--max-bytes", "many"),
        ("read", "k", "--file", ""),
        ("--file", "", "read", "k"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_how(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run_here(*arguments, KVSTORE_PATH=str(tmp_path / "default.kvs"))
    assert "usage" in _failed(result, USAGE).lower()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--wait", "abc"), "argument --wait: 'abc' is not a number of seconds, 0 or more"),
        (("--wait", "nan"), "argument --wait: 'nan' is not a number of seconds, 0 or more"),
        (("--max-bytes", "1e9"), "argument --max-bytes: '1e9' is not a whole number"),
        (("create", "k", "{}", "--ttl", "1.5"), "argument --ttl: '1.5' is not a whole number"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_wrong_numbers_are_told_of_without_names_of_the_source(
    arguments: tuple[str, ...], said: str
) -> None:
    """It said "invalid _seconds value"."""
    message = _failed(run_here(*arguments), USAGE)
    assert message.endswith(f"error: {said}\n")


def test_messages_name_the_options_of_the_shell(path: Path) -> None:
    """They named the library's arguments, and None, which a shell does not have."""
    message = _failed(_run("create", path, "k", "{}", "--ttl", 0), REFUSED)
    assert message == (
        "kvstore: key 'k': --ttl is 0, allowed are 1 to 10,000,000,000 seconds; without --ttl the "
        "record does not expire\n"
    )
    message = _failed(_run("touch", path, "k", "--ttl", 0), REFUSED)
    assert message == (
        "kvstore: key 'k': --ttl is 0, allowed are 1 to 10,000,000,000 seconds; --forever lets the "
        "record never expire\n"
    )
    message = _failed(_run("create", path, "k", "{}", "--max-bytes", 5), REFUSED)
    assert message == "kvstore: --max-bytes is 5, allowed are 4,194,304 to 1,000,000,000\n"
    named = path.with_name("max_bytes")
    assert f"{named}: the file does not exist" in _failed(_run("read", named, "k"), REFUSED)


@needs_posix
def test_that_the_default_file_is_elsewhere_is_said_in_one_line(tmp_path: Path) -> None:
    """Each command printed a line of this program's source with it."""
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file")
    changes = {"HOME": nowhere, "XDG_DATA_HOME": nowhere, "TMPDIR": str(tmp_path)}
    environment = processes.environment(**changes)
    environment.pop("KVSTORE_PATH", None)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=processes.PATIENCE_SECONDS,
            check=False,
        )

    for arguments, printed in ((("create", "k", "{}"), ""), (("read", "k"), "{}\n")):
        result = run("-m", "kvstore", *arguments)
        assert (result.returncode, result.stdout) == (DONE, printed)
        assert result.stderr.startswith("kvstore: ")
        assert result.stderr.count("\n") == 1
        assert "may not last" in result.stderr
    assert run("-W", "ignore", "-m", "kvstore", "read", "k").stderr == ""
    assert "may not last" in _failed(run("-W", "error", "-m", "kvstore", "read", "k"), REFUSED)


def test_help_is_printed_and_makes_no_file(tmp_path: Path) -> None:
    result = run_here("--help", KVSTORE_PATH=str(tmp_path / "default.kvs"))
    printed = _done(result)
    assert "create|put|read|touch|delete" in printed
    assert os.listdir(tmp_path) == []


def test_a_store_in_use_exits_with_3_and_names_its_holder(filled: Path) -> None:
    with KVStore(filled):
        for command, arguments in (
            ("read", ()), ("create", ("{}",)), ("put", ("{}",)), ("touch", ("--forever",)),
            ("delete", ()),
        ):  # fmt: skip
            result = run_command(command, "--file", filled, "k", *arguments)
            assert str(os.getpid()) in _failed(result, LOCKED)
        _failed(run_command("read", "--file", filled, "user:1", "--wait", "0.05"), LOCKED)


def test_wait_waits_until_the_store_is_free(filled: Path) -> None:
    with KVStore(filled):
        process = start_command(
            "read", "--file", filled, "user:1", "--wait", processes.PATIENCE_SECONDS
        )
        # A command that does not wait ends well within this; one that waits never does.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    out, error = process.communicate(timeout=processes.PATIENCE_SECONDS)
    assert (process.returncode, error) == (DONE, "")
    assert json.loads(out)["name"] == "Ada"


# --- no file is made of a mistyped name ----------------------------------------------------------


# What takes a key that is there, with its arguments beside the key.
_NEVER_CREATING: Final = pytest.mark.parametrize(
    ("command", "rest"),
    [("read", ()), ("delete", ()), ("touch", ("--forever",)), ("touch", ("--ttl", 5))],
    ids=["read", "delete", "touch --forever", "touch --ttl"],
)


@_NEVER_CREATING
def test_what_takes_a_key_that_is_there_never_makes_a_file(
    tmp_path: Path, command: str, rest: tuple[object, ...]
) -> None:
    """A mistyped name made a store of 2 MiB, and said of the key that it was not there."""
    typo = tmp_path / "typo.kvs"
    message = _failed(_run(command, typo, "user:1", *rest), REFUSED)
    assert f"{typo}: the file does not exist; `create` or `put` makes it" in message
    message = _failed(run_here(command, "k", *rest, KVSTORE_PATH=str(typo)), REFUSED)
    assert f"{typo}: the file does not exist" in message
    message = _failed(_run(command, tmp_path / "folder" / "typo.kvs", "k", *rest), REFUSED)
    assert "the folder of the file does not exist" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("contents", [b"", bytes(100_000)], ids=["empty", "zeros"])
@_NEVER_CREATING
def test_what_takes_a_key_that_is_there_makes_no_store_of_an_empty_file(
    path: Path, command: str, rest: tuple[object, ...], contents: bytes
) -> None:
    path.write_bytes(contents)
    assert "no store is in the file" in _failed(_run(command, path, "k", *rest), REFUSED)
    assert path.read_bytes() == contents


@needs_linux
def test_a_file_removed_while_it_is_waited_for_is_not_made_anew(path: Path) -> None:
    """Whether the file is there is not asked before it is opened, but as it is opened."""
    path.touch()
    lock = FileLock(str(path), 0.0)
    process = start_command("read", "--file", path, "user:1", "--wait", processes.PATIENCE_SECONDS)
    _wait_until_open(process.pid, path)
    path.unlink()
    lock.release()
    _, error = process.communicate(timeout=processes.PATIENCE_SECONDS)
    assert process.returncode == REFUSED
    assert "does not exist" in error
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("", "{}"),
        ("k", "[]"),
        ("k", "{"),
        ("k", "{}", "--ttl", "0"),
        ("k", "{}", "--max-bytes", "5"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["create", "put"])
def test_a_value_that_is_refused_makes_no_file(
    path: Path, command: str, arguments: tuple[str, ...]
) -> None:
    _failed(_run(command, path, *arguments), REFUSED)
    assert not path.exists()


# --- options -------------------------------------------------------------------------------------


def test_options_of_the_file_come_before_the_command_or_after_it(
    filled: Path, tmp_path: Path
) -> None:
    other = str(tmp_path / "other.kvs")
    for arguments in (
        ("--file", filled, "--wait", "1", "--max-bytes", 5 * MIB, "read", "user:1"),
        ("--file", filled, "read", "user:1", "--wait", "1"),
        ("--wait", "1", "read", "--file", filled, "--max-bytes", 5 * MIB, "user:1"),
        ("read", "--wait", "1", "user:1", "--file", filled),
        ("--file", other, "read", "user:1", "--file", filled),
    ):
        printed = _done(run_here(*arguments, KVSTORE_PATH=other))
        assert json.loads(printed)["name"] == "Ada", arguments
    assert not Path(other).exists()


def test_max_bytes_keeps_the_file_from_growing(path: Path) -> None:
    value = json.dumps(sized_value(16_000))
    with KVStore(path, max_bytes=4 * MIB) as store, pytest.raises(StoreFullError):
        for number in range(1_000):
            store.create(f"{number}", json.loads(value))
    full = _failed(_run("create", path, "more", value, "--max-bytes", 4 * MIB), REFUSED)
    assert str(path) in full or "room" in full
    assert path.stat().st_size <= 4 * MIB
    _done(_run("create", path, "more", value))


@needs_linux
def test_max_bytes_makes_do_with_little_address_space(path: Path) -> None:
    """A file is mapped as long as it may become, which a limit on memory may not allow."""
    line = "ulimit -v 600000; kvstore"
    refused = _failed(_in_shell(line, "create", "--file", path, "k", "{}"), REFUSED)
    assert "give a smaller --max-bytes than 1,000,000,000" in refused
    _done(_in_shell(line, "--max-bytes", 64 * MIB, "create", "--file", path, "k", "{}"))
    assert _done(_in_shell(line, "read", "k", "--file", path, "--max-bytes", 64 * MIB)) == "{}\n"


# --- standard streams ----------------------------------------------------------------------------


@needs_full_device
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("kvstore > /dev/full", "No space left on device"),
        ("kvstore >&-", "it is closed"),
        ("kvstore 1< /dev/null", "Bad file descriptor"),
    ],
)
def test_a_value_that_cannot_be_printed_is_told_of(filled: Path, line: str, reason: str) -> None:
    result = _in_shell(line, "read", "--file", filled, "user:1")
    message = _failed(result, REFUSED)
    assert message == f"kvstore: cannot write the value to standard output: {reason}\n"


@needs_full_device
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_printed_is_told_of(option: str) -> None:
    message = _failed(_in_shell("kvstore > /dev/full", option), REFUSED)
    assert message == "kvstore: cannot write to standard output: No space left on device\n"


@needs_full_device
def test_where_no_message_can_be_printed_the_status_tells(filled: Path) -> None:
    for redirect in ("2> /dev/full", "2>&-"):
        for arguments, status in (
            (("read", "absent"), REFUSED),
            (("read",), USAGE),
            (("read", "user:1"), DONE),
        ):
            result = _in_shell(f"kvstore {redirect}", "--file", filled, *arguments)
            assert result.returncode == status, (redirect, arguments, result)
            assert result.stdout.startswith('{"name"') == (status == DONE)


@needs_shell
def test_with_every_stream_closed_the_file_is_in_the_place_of_none(
    path: Path, open_store: OpenStore
) -> None:
    """The file would get the number of a closed stream, and messages be written into it."""
    result = _in_shell("kvstore <&- >&- 2>&-", "create", "--file", path, "k", '{"n":1}')
    assert (result.returncode, result.stdout, result.stderr) == (DONE, "", "")
    assert _in_shell("kvstore <&- >&- 2>&-", "read", "--file", path, "no").returncode == REFUSED
    assert dict(open_store()) == {"k": {"n": 1}}


@needs_shell
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("kvstore <&-", "cannot read the value from standard input: it is closed"),
        ("kvstore 0> /dev/null", "cannot read the value from standard input: Bad file descriptor"),
        (r"printf '{\"a\":\"\377\"}' | kvstore", "the value is not JSON: 'utf-8' codec"),
        ("kvstore < /dev/null", "the value is not JSON"),
    ],
)
def test_standard_input_that_gives_no_value_is_refused(path: Path, line: str, reason: str) -> None:
    message = _failed(_in_shell(line, "create", "--file", path, "k"), REFUSED)
    assert message.startswith(f"kvstore: {reason}")
    assert not path.exists()


@needs_shell
def test_values_go_through_a_pipe(filled: Path, tmp_path: Path, open_store: OpenStore) -> None:
    other = tmp_path / "other.kvs"
    copy = shlex.join([sys.executable, "-m", "kvstore", "create", "--file", str(other), "copy"])
    _done(_in_shell(f"kvstore | {copy}", "read", "--file", filled, "user:1"))
    assert open_store(other)["copy"] == {"name": "Ada", "tags": ["é", "🐍"]}


@pytest.mark.parametrize("option", [(), ("--help",)], ids=["a value", "help"])
def test_a_closed_pipe_ends_it_quietly(
    path: Path, open_store: OpenStore, option: tuple[str, ...]
) -> None:
    """As under `| head -0`."""
    with open_store() as store:
        store.create("user:1", sized_value(16_000))
    with start_command("read", "--file", path, "user:1", *option) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == DONE


@needs_linux
def test_an_interrupt_ends_it_without_a_traceback(filled: Path) -> None:
    with KVStore(filled):
        # What a shell starts in the background ignores the signal, and so would our child.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = start_command(
            "read", "--file", filled, "user:1", "--wait", processes.PATIENCE_SECONDS
        )
        signal.signal(signal.SIGINT, handler)
        _wait_until_open(process.pid, filled)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=processes.PATIENCE_SECONDS)
    assert (process.returncode, out, error) == (128 + signal.SIGINT, "", "")


def _wait_until_open(pid: int, path: Path) -> None:
    """Wait until the process has this file open, as Linux tells: it is past its imports then."""
    folder = Path(f"/proc/{pid}/fd")
    deadline = time.monotonic() + processes.PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for link in folder.iterdir():
            try:
                if os.path.samefile(link, path):
                    return
            except OSError:  # closed meanwhile
                continue
    pytest.fail("the file was never opened")


@needs_posix
def test_bytes_of_a_key_that_are_no_utf_8_are_refused(filled: Path) -> None:
    key = os.fsdecode(b"caf\xe9")
    assert "lone surrogate" in _failed(run_command("read", "--file", filled, key), REFUSED)


@needs_shell
def test_a_relative_name_is_of_the_folder_that_the_shell_is_in(filled: Path) -> None:
    result = _in_shell("kvstore", "read", "user:1", "--file", filled.name, folder=filled.parent)
    assert json.loads(_done(result))["name"] == "Ada"
