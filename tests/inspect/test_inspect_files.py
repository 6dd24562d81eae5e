"""The inspector on files that are none of its own, are in use, or are cut off: one clear sentence.

Whatever it looks at, it does not change a byte of it.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from support.inspecting import (
    DONE,
    LOCKED,
    PROBLEMS,
    WRONG_USAGE,
    Result,
    fingerprint,
    flip,
    inspect,
    inspector,
    run_in_shell,
    run_inspector,
    start_inspector,
)
from support.platforms import needs_full_device, needs_shell
from support.processes import PATIENCE_SECONDS
from support.stores import OpenStore

from kvstore import KVStore
from kvstore.format.layout import (
    EXTENT_SIZE,
    FILE_MAGIC,
    FIXED_EXTENTS,
    IDENTITY,
    IDENTITY_OFFSETS,
    STATE_OFFSET,
    U64,
)
from kvstore_inspect.file_view import open_view
from kvstore_inspect.records import DamagedRecord, Record, Records

KEYS: Final = {f"user:{number}": {"n": number, "text": "é" * number} for number in range(50)}
COMMANDS: Final = [
    ("info",), ("keys",), ("keys", "--sort", "size"), ("get", "user:3"), ("slots",),
    ("slots", "--key", "user:3"), ("slots", "--segment", "6"),
]  # fmt: skip
each_command = pytest.mark.parametrize("command", COMMANDS, ids=" ".join)


def look(command: tuple[str, ...], file: Path, *options: str) -> Result:
    """Run a command, its words without the file, on a file in this process."""
    return inspect(command[0], file, *command[1:], *options)


@pytest.fixture
def filled(path: Path) -> Path:
    """A closed store of `KEYS`."""
    with KVStore(path) as store:
        for key, value in KEYS.items():
            store.create(key, value)
    return path


def assert_refused(result: Result, status: int, told: str) -> None:
    assert (result.status, result.out) == (status, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("kvstore-inspect: ")
    assert told in result.err


@each_command
def test_looking_changes_neither_bytes_nor_times(filled: Path, command: tuple[str, ...]) -> None:
    before = fingerprint(filled)
    assert look(command, filled).status == DONE
    assert look(command, filled, "--unlocked").status == DONE
    assert fingerprint(filled) == before
    flip(filled, STATE_OFFSET)
    before = fingerprint(filled)
    assert look(command, filled).status == PROBLEMS
    assert fingerprint(filled) == before


@each_command
def test_what_is_not_a_store_is_refused_in_a_sentence(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    for name, contents, told in (
        ("text", b"Dear diary,\n" * 1000, "not a kvstore file"),
        ("zeros", bytes(100_000), "not a kvstore file"),
        ("empty", b"", "not a kvstore file: it is empty"),
        ("magic", FILE_MAGIC, "both copies of the identity are damaged"),
    ):
        file = tmp_path / name
        file.write_bytes(contents)
        for options in ((), ("--unlocked",)):
            result = look(command, file, *options)
            said = result.err.splitlines()[-1]
            assert result.status == (PROBLEMS if name == "magic" else WRONG_USAGE)
            assert (result.out, told in said) == ("", True)
        assert file.read_bytes() == contents


@each_command
def test_a_path_that_is_no_file_is_refused_in_a_sentence(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "fifo").unlink(missing_ok=True)
    told = "not a regular file" if os.name == "posix" else "Permission denied"
    assert_refused(look(command, tmp_path), WRONG_USAGE, told)
    assert_refused(look(command, tmp_path / "nowhere"), WRONG_USAGE, "No such file")
    assert not (tmp_path / "nowhere").exists()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        assert_refused(look(command, tmp_path / "fifo"), WRONG_USAGE, "not a regular file")


@each_command
def test_a_newer_format_is_refused_with_both_versions(
    filled: Path, command: tuple[str, ...]
) -> None:
    from xxhash import xxh3_64_intdigest

    contents = bytearray(filled.read_bytes())
    for offset in IDENTITY_OFFSETS:
        contents[offset + 8 : offset + 12] = (3).to_bytes(4, "little")
        body = bytes(contents[offset : offset + IDENTITY.size - U64.size])
        contents[offset + len(body) : offset + IDENTITY.size] = U64.pack(xxh3_64_intdigest(body))
    filled.write_bytes(contents)
    assert_refused(
        look(command, filled), WRONG_USAGE, "format version 3 with extents of 65,536 bytes; this"
    )


@each_command
@pytest.mark.parametrize("size", [60, 5000, 3 * EXTENT_SIZE, 20 * EXTENT_SIZE + 1])
def test_a_file_that_was_cut_off_is_said_to_be(
    filled: Path, command: tuple[str, ...], size: int
) -> None:
    with filled.open("r+b") as file:
        file.truncate(size)
    result = look(command, filled)
    # No extent 6 is left of a shorter one to ask for.
    asked_too_far = "--segment" in command and size <= 6 * EXTENT_SIZE
    assert result.status == (WRONG_USAGE if asked_too_far else PROBLEMS)
    assert "cut off" in result.err


def test_a_path_is_escaped_for_the_terminal(tmp_path: Path) -> None:
    result = look(("info",), tmp_path / "\x1b[31m\x9bred\n\udcff")
    assert_refused(result, WRONG_USAGE, r"\x1b[31m\x9bred\n\udcff: ")


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="permissions are POSIX's")
def test_an_unreadable_file_is_refused_in_a_sentence(filled: Path) -> None:
    code = (
        "import os, sys\n"
        "from kvstore_inspect import command_line\n"
        "from kvstore_inspect.commands import info, get, keys, slots\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "print(*(command_line.main([name, sys.argv[1], *rest]) for name, *rest in\n"
        "    (['info'], ['keys'], ['get', 'k'], ['slots'], ['slots', '--unlocked'])))"
    )
    filled.chmod(0)
    for folder in filled.parents:
        if folder.stat().st_uid == os.getuid() and not os.access(folder, os.F_OK):
            pytest.skip("the folder is closed to others")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(filled)],
        env=inspector(),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.stdout == "2 2 2 2 2\n", done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 5
    assert all(line.endswith(": Permission denied") for line in said)


# --- in use --------------------------------------------------------------------------------------

_WRITER: Final = """
import json, sys
from kvstore import KVStore
with KVStore(sys.argv[1]) as store:
    for key, value in json.loads(sys.argv[2]).items():
        store.create(key, value)
    number = 0
    while True:
        number += 1
        store.put(f"hot:{number % 4}", {"n": number, "text": "x" * (number % 40)})
        if number % 50 == 0:
            store.sync()
        store.create(f"k{number}", {"n": number, "text": "x" * (number * 37 % 900)})
        if number > 3000:
            store.delete(f"k{number - 3000}")
        if number == 100:
            print("writing", flush=True)
"""


@contextmanager
def writing(path: Path) -> Iterator[int]:
    """Have another process write to the store at `path` all the time; give its process id."""
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), json.dumps(KEYS)],
        env=inspector(),
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == b"writing"
            yield process.pid
            assert process.poll() is None
        finally:
            process.kill()


def test_a_file_in_use_is_looked_at_only_without_its_lock(path: Path) -> None:
    with writing(path) as pid:
        for command in COMMANDS:
            assert_refused(look(command, path), LOCKED, f"process {pid} has it open")
        assert_refused(look(("keys",), path, "--wait", "0.01"), LOCKED, "has it open")
        for _ in range(3):
            result = look(("keys",), path, "--unlocked", "--json", "--prefix", "user:")
            assert (result.status, result.err.count("\n")) == (DONE, 1), result.err
            assert "without its lock" in result.err
            sizes = {
                each["key"]: each["value_size"] for each in map(json.loads, result.out.splitlines())
            }
            assert sizes == {
                key: len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
                for key, value in KEYS.items()
            }
            for key in ("user:0", "user:17", "user:49"):
                result = look(("get", key), path, "--unlocked", "--json")
                assert (result.status, json.loads(result.out)["value"]) == (DONE, KEYS[key])
                result = look(("slots", "--key", key), path, "--unlocked")
                assert (result.status, "is whole" in result.out) == (DONE, True)
            result = look(("keys",), path, "--unlocked", "--json", "--prefix", "hot:")
            assert (result.status, len(result.lines())) == (DONE, 4)
            for number in range(4):
                result = look(("get", f"hot:{number}"), path, "--unlocked", "--json")
                assert (result.status, json.loads(result.out)["value"]["n"] % 4) == (DONE, number)
            result = look(("info",), path, "--unlocked", "--json")
            shown: dict[str, Any] = json.loads(result.out)
            assert (result.status, shown["state"]["holder"]) == (DONE, pid)
            assert shown["records"]["count"] >= len(KEYS) + 100
            assert look(("slots",), path, "--unlocked").status == DONE
            assert look(("slots", "--segment", "6"), path, "--unlocked").status == DONE


def test_a_file_that_grows_while_it_is_looked_at_is_followed(
    path: Path, open_store: OpenStore
) -> None:
    store = open_store()
    store.create("first", {})
    with open_view(path, unlocked=True) as view:
        length, records = store.stats().file_size, Records(view)
        for number in range(100):
            store.create(str(number), {"text": "x" * 16_000})
        found = list(records)
        assert len(view) >= store.stats().file_size > length
    assert [each for each in found if isinstance(each, DamagedRecord)] == []
    assert {each.key for each in found if isinstance(each, Record)} == set(store)


def test_a_state_that_is_just_being_written_is_looked_at_again(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(filled, STATE_OFFSET)
    monkeypatch.setattr("kvstore_inspect.file_view.sleep", lambda _: flip(filled, STATE_OFFSET))
    with open_view(filled, unlocked=True) as view:
        assert (view.problems, view.trusted) == ([], True)
    flip(filled, STATE_OFFSET)
    with open_view(filled) as view:
        assert view.problems != []


def test_a_store_open_in_this_very_process_is_in_use_too(
    filled: Path, open_store: OpenStore
) -> None:
    open_store(filled)
    assert_refused(look(("keys",), filled), LOCKED, "this very process")


# --- as a program --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("info",), ("slots",), ("completion",)], ids=" ".join)
def test_a_reader_that_wants_no_more_ends_a_command_cleanly(
    filled: Path, command: tuple[str, ...]
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    name, *rest = command
    arguments = (name, "bash") if name == "completion" else (name, filled, *rest)
    with os.fdopen(write_end, "wb") as nobody, start_inspector(*arguments, stdout=nobody) as child:
        _, err = child.communicate(timeout=PATIENCE_SECONDS)
    assert (child.returncode, err) == (DONE, "")


def test_a_listing_piped_into_head_ends_cleanly(path: Path) -> None:
    with KVStore(path) as store:
        for number in range(3000):  # more than a pipe holds
            store.create(f"{number:032}", {})
    with start_inspector("keys", path) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline().split() == ["size", "left", "created", "key"]
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(PATIENCE_SECONDS) == DONE


UNWRITABLE: Final = "kvstore-inspect: cannot write to standard output"
# One for each way in which they print: tables, lines, bytes, and what click prints itself.
_PRINTING: Final = (
    ("info", "FILE"),
    ("verify", "FILE"),
    ("keys", "FILE"),
    ("dump", "FILE"),
    ("slots", "FILE"),
    ("--help",),
)


@needs_full_device
@pytest.mark.parametrize("command", _PRINTING, ids=" ".join)
def test_output_that_goes_nowhere_is_never_taken_for_written(
    path: Path, command: tuple[str, ...]
) -> None:
    """With a closed standard output, a dump of nothing ended in exit status 0."""
    with KVStore(path) as store:
        store.create("é", {})
    arguments = [path if each == "FILE" else each for each in command]
    full = run_in_shell('"$@" > /dev/full', *arguments)
    assert full == (PROBLEMS, "", f"{UNWRITABLE}: No space left on device\n")
    closed = run_in_shell('"$@" >&-', *arguments)
    assert closed == (PROBLEMS, "", f"{UNWRITABLE}: Bad file descriptor\n")


@needs_full_device
@pytest.mark.parametrize("line", ['"$@" 2> /dev/full', '"$@" 2>&-'])
def test_where_nothing_can_be_said_the_status_still_tells(
    filled: Path, tmp_path: Path, line: str
) -> None:
    """A copy that had succeeded ended in 1, because that could not be said."""
    copy = tmp_path / "copy.kvs"
    assert run_in_shell(line, "copy", filled, copy) == (DONE, "", "")
    assert run_in_shell(line, "copy", filled, copy) == (WRONG_USAGE, "", "")
    flip(copy, FIXED_EXTENTS * EXTENT_SIZE)
    assert run_in_shell(line, "dump", copy).status == PROBLEMS


@needs_shell
@pytest.mark.parametrize(
    ("line", "reason"), [('"$@" <&-', "Bad file"), ('"$@" 0> /dev/null', "Bad file")]
)
def test_input_that_cannot_be_read_is_told_of_and_makes_no_store(
    path: Path, line: str, reason: str
) -> None:
    result = run_in_shell(line, "load", path)
    assert (result.status, result.out) == (WRONG_USAGE, "")
    assert result.err.startswith(f"kvstore-inspect: standard input: cannot be read: {reason}")
    assert not path.exists()


@needs_shell
def test_with_every_stream_closed_the_file_is_in_the_place_of_none(
    filled: Path, tmp_path: Path
) -> None:
    """The store's file would get the number of a closed stream, and messages be written to it."""
    path, lines = tmp_path / "new.kvs", tmp_path / "lines.jsonl"
    lines.write_text('{"key":"a","value":{}}\nno line\n')
    assert run_in_shell('"$@" <&- >&- 2>&-', "load", path, lines).status == PROBLEMS
    with KVStore(path) as store:
        assert dict(store) == {"a": {}}
    assert run_in_shell('"$@" <&- >&- 2>&-', "verify", filled).status == PROBLEMS


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="has no pseudo-terminals")
def test_on_a_terminal_a_bar_is_gone_before_the_lines_come(filled: Path) -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "kvstore_inspect", "keys", str(filled), "--sort", "size"],
        env=inspector(TERM="xterm", NO_COLOR="1"),
        stdout=theirs,
        stderr=theirs,
    ) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal tells that it was closed
            while some := os.read(ours, 65_536):
                shown += some
        os.close(ours)
    assert child.returncode == DONE
    bar, heading, lines = shown.decode().partition("  size  left")
    assert "listing" in bar
    assert bar.endswith("\x1b[2K")
    assert heading
    assert "\x1b" not in lines
    assert len(lines.splitlines()) == 1 + len(KEYS)


def test_a_key_can_be_shown_in_any_encoding(filled: Path) -> None:
    with KVStore(filled) as store:
        store.create("ключ", {"слово": "é"})
    for command in (("keys", "--prefix", "к"), ("get", "ключ")):
        result = run_inspector(command[0], filled, *command[1:], PYTHONIOENCODING="ascii")
        assert (result.status, result.err) == (DONE, "")
        assert r"\u043a\u043b\u044e\u0447" in result.out


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_extra_it_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from kvstore_inspect.__main__ import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=inspector(),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (WRONG_USAGE, "")
    assert done.stderr.count("\n") == 1
    assert (
        f"{missing} is missing; in a clone of kvstore, pip install '.[inspect]' brings it"
        in done.stderr
    )
