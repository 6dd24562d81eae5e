"""`kvstore-inspect` without a command, or with a file in the place of one."""

import os
import re
from pathlib import Path

import pytest
from support.inspecting import DONE, PROBLEMS, WRONG_USAGE, flip, inspect, killed_copy
from support.stores import OpenStore

from kvstore import KVStore
from kvstore.format.layout import STATE_OFFSET


@pytest.fixture(autouse=True)
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default file would be; the working directory is an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("KVSTORE_PATH", str(tmp_path / "default.kvs"))
    return tmp_path / "default.kvs"


def start() -> str:
    """Return what is said to somebody who gives no command, which ends as wrong usage does."""
    status, out, err = inspect()
    assert (status, out) == (WRONG_USAGE, "")
    return err


def commands(said: str) -> list[list[str]]:
    """Return the commands that it says to try, without the name of the program."""
    lines = (line.split() for line in said.splitlines())
    return [line[1:] for line in lines if line[:1] == ["kvstore-inspect"] and len(line) > 2][1:-1]


def test_it_names_the_default_store_and_what_is_in_it(default: Path) -> None:
    with KVStore() as store:
        store.put_many((f"user:{number}", {"n": number}) for number in range(1_234))
    said = start()
    assert f"The default store, which KVStore() opens: {default}" in said
    assert "MiB, 1,234 records, closed in order" in said
    assert f"kvstore-inspect info {default}" in said


def test_the_commands_that_it_says_to_try_all_work(default: Path) -> None:
    with KVStore() as store:
        store.put("user:1", {"name": "Ada"})
    tried = commands(start())
    assert [command[0] for command in tried] == ["info", "keys", "report"]
    for command in tried:
        assert inspect(*command).status == DONE
    assert Path("report.html").exists()


def test_without_any_store_it_says_how_to_make_one_and_makes_none(default: Path) -> None:
    said = start()
    assert "It is not there yet." in said
    assert "python -m kvstore put --file data.kvs" in said
    assert not default.exists()
    assert list(Path().iterdir()) == []


def test_no_folder_is_made_for_the_default_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVSTORE_PATH")
    monkeypatch.setattr("platformdirs.user_data_path", lambda *_, **__: tmp_path / "data")
    assert f"{tmp_path / 'data' / 'default.kvs'}\n  It is not there yet." in start()
    assert not (tmp_path / "data").exists()


def test_a_user_without_a_data_folder_is_told_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_PATH")
    monkeypatch.setattr("kvstore.location._data_folder", lambda: None)
    said = start()
    assert "default" not in said
    assert "kvstore-inspect info data.kvs" in said


def test_without_a_default_store_it_takes_the_newest_in_this_folder() -> None:
    for name in ("old.kvs", "the new one.kvs"):
        KVStore(name).close()
    Path("notes.txt").touch()
    os.utime("old.kvs", (2**31, 2**31))
    assert re.search(r"A store in this folder: old.kvs\n  .* 0 records, closed in order", start())
    Path("old.kvs").unlink()
    assert "kvstore-inspect info 'the new one.kvs'" in start()


def test_a_store_in_use_is_not_waited_for_and_the_commands_look_at_it_all_the_same(
    default: Path,
) -> None:
    with KVStore() as store:
        store.put("user:1", {"name": "Ada"})
        said = start()
        assert "in use by process" in said
        for command in commands(said):
            assert "--unlocked" in command
            assert inspect(*command).status == DONE


def test_what_cannot_be_looked_at_is_named_with_the_reason(default: Path) -> None:
    default.write_text("no store")
    assert "not a kvstore file" in start()
    default.unlink()
    KVStore().close()
    flip(default, STATE_OFFSET + 8)
    assert "damaged: kvstore-inspect verify says how" in start()
    default.unlink()
    default.mkdir()
    assert "It is not there yet." not in start()


def test_a_path_that_no_system_can_look_at_does_not_end_what_is_said(
    default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = default.with_name("n" * 300)
    monkeypatch.setenv("KVSTORE_PATH", str(long))
    said = start()
    assert f"opens: {long}" in said
    assert commands(said)


def test_a_store_whose_process_was_killed_is_said_to_be_mended_by_the_next_opening(
    default: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.put("user:1", {"name": "Ada"})
    killed_copy(store, default)
    monkeypatch.setattr("kvstore.file.platform.system.is_alive", lambda _pid: False)
    assert "not closed in order, or in use; the next opening mends it" in start()


def test_a_file_in_the_place_of_a_command_is_short_for_info_of_it(path: Path) -> None:
    KVStore(path).close()
    assert inspect(path) == inspect("info", path)
    assert inspect(path, "--json").json() == inspect("info", path, "--json").json()
    flip(path, STATE_OFFSET + 8)
    assert inspect(path).status == PROBLEMS


def test_a_command_is_a_command_even_where_a_file_has_its_name() -> None:
    KVStore("info").close()
    missing = inspect("info")
    assert missing.status == WRONG_USAGE
    assert "Missing argument 'FILE'" in missing.err


def test_a_command_behind_its_file_is_put_right(path: Path) -> None:
    KVStore(path).close()
    result = inspect(path, "verify")
    assert result.status == WRONG_USAGE
    assert f"The command comes before the file: verify {path}" in result.err


def test_what_is_neither_command_nor_file_is_wrong_usage() -> None:
    assert "Did you mean verify?" in inspect("verfy", "data.kvs").err
    missing = inspect("missing.kvs")
    assert missing.status == WRONG_USAGE
    assert "No command and no file is called 'missing.kvs'." in missing.err
