"""`KVStore.backup`: a copy of an open store, whole or not there at all."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import scaled
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.disks import fill, mounted
from support.files import change_byte, is_private
from support.keys import TRICKY
from support.platforms import needs_fork, needs_symbolic_links
from support.processes import run_script
from support.stores import OpenStore
from support.threads import run_together
from support.values import Value, sized_value

import kvstore.backup
from kvstore import CorruptStoreError, KVStore, StoreClosedError, StoreFullError, clock
from kvstore.backup import CarriedRecord, new_copy, records_of
from kvstore.compiled import Implementation
from kvstore.format.layout import EXTENT_SIZE, FIXED_EXTENTS, key_hash
from kvstore.index.slots import control_offset_of
from kvstore.recovery import check

pytestmark = pytest.mark.usefixtures("implementation")

State = tuple[Value, int, int]
"""A value, its created_at and its expires_at."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the backup is to be; nothing is there yet."""
    return tmp_path / "backup.kvs"


@pytest.fixture
def store(open_store: OpenStore) -> KVStore:
    """An open store with keys of all kinds, some of which expire."""
    store = open_store()
    for number, key in enumerate(TRICKY):
        store.create(key, sized_value(100 + 40 * number), ttl=100 if number % 3 == 0 else None)
    return store


def states(store: KVStore) -> dict[str, State]:
    """Return all that a store says of each of its keys."""
    return {key: (store.read(key), *store._whole(key)[1:]) for key in store}


def backed_up(path: Path) -> dict[str, State]:
    """Return what a backup holds, once it has been checked."""
    assert_consistent(path)
    with KVStore(path) as copy:
        return states(copy)


def files(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


# --- what is in it -------------------------------------------------------------------------------


def test_backup_holds_every_key_with_its_value_and_times(store: KVStore, out: Path) -> None:
    assert store.backup(out) == len(TRICKY)
    assert backed_up(out) == states(store)


def test_backup_of_an_empty_store_is_an_empty_store(open_store: OpenStore, out: Path) -> None:
    assert open_store().backup(out) == 0
    assert backed_up(out) == {}


def test_backup_leaves_out_what_has_expired(
    store: KVStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {key: state for key, state in states(store).items() if not state[2]}
    moved = FakeClock()
    moved.set(clock.now_ms() // 1000 + 101)
    monkeypatch.setattr(clock, "time_ns", moved)
    assert store.backup(out) == len(left)
    assert backed_up(out) == left


def test_backup_keeps_what_expires_while_it_is_made(
    store: KVStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = states(store)
    moved = FakeClock()
    now = clock.now_ms() // 1000
    moved.set(now)
    monkeypatch.setattr(clock, "time_ns", moved)
    with new_copy(str(out), source=str(store.path), overwrite=False) as copy:
        copy.write(records_of(store._parts, clock.now_ms, lambda _done, _whole: None))
        moved.advance(1_000)
        copy.verify(lambda _done, _whole: None)
    assert copy.count == len(before)
    moved.set(now)
    assert backed_up(out) == before


def test_backup_grows_though_something_in_it_expires_meanwhile(
    open_store: OpenStore, out: Path, clock: FakeClock
) -> None:
    """It was refused as full: its file was not to grow before that was taken back."""
    store = open_store(out.with_name("large.kvs"))
    for number in range(1_500):
        store.create(f"k{number}", {"v": "x" * 9_000}, ttl=100 if number % 2 else None)

    def records() -> Iterator[CarriedRecord]:
        for number, record in enumerate(records_of(store._parts, lambda: 0, lambda *_: None)):
            if number == 100:
                clock.advance(1_000)
            yield record

    with new_copy(str(out), source=str(store.path), overwrite=False) as copy:
        copy.write(records())
        copy.verify(lambda *_: None)
    assert copy.count == 1_500
    assert backed_up(out).keys() == set(store)


def test_backup_has_what_was_put_and_not_what_was_deleted(store: KVStore, out: Path) -> None:
    for number, key in enumerate(TRICKY):
        if number % 2:
            store.put(key, {"put": number}, 50)
        elif number % 4:
            store.delete(key)
    store.sync()
    assert store.backup(out) == len(store)
    assert backed_up(out) == states(store)


def test_backup_is_compact(open_store: OpenStore, out: Path) -> None:
    store = open_store()
    for number in range(1_000):
        store.create(f"k{number}", sized_value(10_000))
    for number in range(950):
        store.delete(f"k{number}")
    assert store.backup(out) == 50
    assert out.stat().st_size < store.path.stat().st_size / 4
    with KVStore(out) as copy:
        assert copy.compact() == 0


def test_backup_of_many_keys_of_a_table_that_was_split(open_store: OpenStore, out: Path) -> None:
    store = open_store()
    for number in range(30_000):
        store.create(f"{number}", {"n": number})
    assert store.backup(out) == 30_000
    with KVStore(out) as copy:
        assert dict(copy.items()) == dict(store.items())


def test_backup_of_a_durable_store(open_store: OpenStore, out: Path) -> None:
    store = open_store(durable=True)
    store.create("key", {"n": 1})
    assert store.backup(out) == 1
    assert backed_up(out) == states(store)


def test_backup_changes_not_a_byte_of_the_store(store: KVStore, out: Path) -> None:
    before = store.path.read_bytes()
    store.backup(out)
    assert store.path.read_bytes() == before


# --- where it is ---------------------------------------------------------------------------------


def test_backup_is_for_its_owner_alone(store: KVStore, out: Path) -> None:
    store.backup(out)
    assert is_private(out)


def test_backup_takes_text_paths_and_relative_ones(
    store: KVStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    store.backup("text.kvs")
    store.backup(Path("path.kvs"))
    store.backup(str(tmp_path / "absolute.kvs"))
    assert files(tmp_path / "folder") == {"text.kvs", "path.kvs"}
    assert (tmp_path / "absolute.kvs").exists()


@pytest.mark.parametrize("wrong", [None, 7, b"bytes"])
def test_backup_to_what_is_no_path_is_a_type_error(store: KVStore, wrong: object) -> None:
    with pytest.raises(TypeError):
        store.backup(wrong)  # type: ignore[arg-type]


def test_backup_takes_the_longest_name_that_a_file_can_have(store: KVStore, tmp_path: Path) -> None:
    out = tmp_path / f"x{'é' * 127}"
    store.backup(out)
    assert files(tmp_path) == {out.name, store.path.name}


def test_backup_overwrites_only_when_told_to(store: KVStore, out: Path) -> None:
    out.write_text("precious")
    with pytest.raises(FileExistsError) as caught:
        store.backup(out)
    assert caught.value.filename == str(out)
    assert out.read_text() == "precious"
    assert store.backup(out, overwrite=True) == len(store)
    assert backed_up(out) == states(store)
    assert files(out.parent) == {out.name, store.path.name}


def test_backup_does_not_overwrite_what_has_come_meanwhile(store: KVStore, out: Path) -> None:
    def records() -> Iterator[tuple[str, bytes, int, int]]:
        out.write_text("faster")
        yield from ()

    with (
        pytest.raises(FileExistsError),
        new_copy(str(out), source=str(store.path), overwrite=False) as copy,
    ):
        copy.write(records())
        copy.verify(lambda _done, _whole: None)
    assert out.read_text() == "faster"
    assert files(out.parent) == {out.name, store.path.name}


@needs_symbolic_links
@pytest.mark.parametrize("overwrite", [False, True])
def test_backup_onto_the_own_file_is_refused(
    store: KVStore, tmp_path: Path, overwrite: bool
) -> None:
    before = states(store)
    (tmp_path / "symbolic").symlink_to(store.path)
    (tmp_path / "hard").hardlink_to(store.path)
    for path in (store.path, tmp_path / "symbolic", tmp_path / "hard"):
        with pytest.raises(FileExistsError):
            store.backup(path, overwrite=overwrite)
    assert states(store) == before
    store.sync()


@needs_symbolic_links
def test_backup_replaces_a_link_and_leaves_alone_what_it_leads_to(
    store: KVStore, out: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    for target in (elsewhere, tmp_path / "nowhere"):
        out.unlink(missing_ok=True)
        out.symlink_to(target)
        with pytest.raises(FileExistsError):
            store.backup(out)
        store.backup(out, overwrite=True)
        assert not out.is_symlink()
    assert elsewhere.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_backup_onto_a_folder_is_refused(store: KVStore, out: Path, overwrite: bool) -> None:
    out.mkdir()
    with pytest.raises(IsADirectoryError):
        store.backup(out, overwrite=overwrite)


def test_backup_into_a_folder_that_is_missing_names_that(store: KVStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        store.backup(tmp_path / "missing" / "backup.kvs")
    assert caught.value.filename == str(tmp_path / "missing")


# --- what goes wrong -----------------------------------------------------------------------------


def test_backup_of_a_damaged_record_names_the_key_and_leaves_nothing(
    open_store: OpenStore, path: Path, out: Path
) -> None:
    store = open_store(check=False)
    for number in range(100):
        store.create(f"key {number}", {"n": number, "text": f"<{number}>"})
    out.write_text("older")
    change_byte(path, path.read_bytes().index(b"<70>"))
    with pytest.raises(CorruptStoreError, match="'key 70'"):
        store.backup(out, overwrite=True)
    assert out.read_text() == "older"
    assert files(out.parent) == {out.name, path.name}
    store.delete("key 70")
    assert store.backup(out, overwrite=True) == 99


def test_backup_of_a_key_that_is_no_utf8_leaves_nothing(open_store: OpenStore, out: Path) -> None:
    store = open_store(check=False)
    store._one_key.store("forged", b"\xff", b"{}", 0, replace=False)
    with pytest.raises(CorruptStoreError, match="no UTF-8"):
        store.backup(out)
    assert not out.exists()


@pytest.mark.parametrize("key", ["key 70", "é" * 30])
@pytest.mark.parametrize("damage", ["key in slot", "control byte", "page"])
def test_backup_of_a_damaged_table_does_not_leave_out_a_key(
    open_store: OpenStore, out: Path, key: str, damage: str
) -> None:
    store = open_store(check=False)
    store.create(key, {"n": 1})
    slots = store._parts.slots
    slot = slots.find(key_hash(key.encode(), store._file.hash_seed), key.encode())
    page = slot & -4096
    offset = {"key in slot": slot, "control byte": control_offset_of(slot), "page": page}[damage]
    if damage == "control byte":
        store._file.write(offset, b"\0")
    else:
        store._file.write(offset, bytes([store._file.map[offset] ^ 1]))
    with pytest.raises(CorruptStoreError):
        store.backup(out)
    assert not out.exists()


def test_backup_that_differs_from_what_was_read_is_not_kept(
    store: KVStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(kvstore.backup, "_digest", lambda *_record: next(numbers))
    with pytest.raises(CorruptStoreError, match="does not hold what was read"):
        store.backup(out)
    assert files(out.parent) == {store.path.name}


def test_backup_that_was_damaged_on_its_way_is_not_kept(
    store: KVStore, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_file = check.check_file

    def damage_first(path: Path) -> object:
        change_byte(Path(path), FIXED_EXTENTS * EXTENT_SIZE)
        return check_file(path)

    monkeypatch.setattr(check, "check_file", damage_first)
    with pytest.raises(CorruptStoreError, match="the copy is damaged"):
        store.backup(out)
    assert files(out.parent) == {store.path.name}


def test_backup_of_a_closed_store_is_refused(store: KVStore, out: Path) -> None:
    store.close()
    with pytest.raises(StoreClosedError):
        store.backup(out)
    with pytest.raises(StoreClosedError):
        KVStore.__new__(KVStore).backup(out)
    assert not out.exists()


def test_backup_of_a_store_that_is_closed_meanwhile_leaves_nothing(
    store: KVStore, out: Path
) -> None:
    with (
        pytest.raises(StoreClosedError),
        new_copy(str(out), source=str(store.path), overwrite=False) as copy,
    ):
        records = records_of(store._parts, clock.now_ms, lambda _done, _whole: None)
        copy.write(itertools.islice(records, 3))
        store.close()
        copy.write(records)
    assert files(out.parent) == {store.path.name}


@needs_fork
def test_backup_in_a_forked_child_is_refused(path: Path, out: Path) -> None:
    said = run_script(
        """
        store = KVStore(sys.argv[1])
        store.create("key", {})
        pid = os.fork()
        if not pid:
            try:
                store.backup(sys.argv[2])
            except StoreClosedError:
                os._exit(7)
            os._exit(1)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.path.exists(sys.argv[2]))
        """,
        path,
        out,
    )
    assert said == "7 False\n"


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "btrfs"])
def test_backup_on_a_full_disk_says_so_and_leaves_nothing(
    open_store: OpenStore, tmp_path: Path, kind: str
) -> None:
    store = open_store()
    for number in range(400):
        store.create(f"key {number}", sized_value(15_000))
    with mounted(kind, tmp_path) as disk:
        for leave in (0, 3_000_000):
            fill(disk, leave)
            with pytest.raises(StoreFullError, match=str(disk / "backup.kvs")) as caught:
                store.backup(disk / "backup.kvs")
            assert ".backup.kvs" not in str(caught.value)
            assert not list(disk.glob("*backup*"))
    assert len(store) == 400


# --- others meanwhile ----------------------------------------------------------------------------


def test_backup_while_other_threads_change_all_the_rest(open_store: OpenStore, out: Path) -> None:
    store = open_store()
    for number in range(3_000):
        store.create(f"still {number}", {"n": number}, ttl=10**6 if number % 2 else None)
        store.create(f"put {number}", {"n": 0})
    before = states(store)
    done: list[int] = []

    def change(prefix: str) -> None:
        for number in itertools.count():
            store.put(f"put {number % 3_000}", {"n": number, "by": prefix})
            store.create(f"{prefix} {number}", sized_value(50 + number % 500))
            if number % 3:
                store.delete(f"{prefix} {number}")
            if done:
                break

    def back_up() -> None:
        try:
            store.backup(out)
        finally:
            done.append(1)

    run_together(back_up, lambda: change("a"), lambda: change("b"))
    after = backed_up(out)
    for key, state in before.items():
        if key.startswith("still"):
            assert after[key] == state
        else:
            assert key in after
    store.close()


def test_backup_while_the_file_is_compacted_and_its_table_merges(
    open_store: OpenStore, out: Path
) -> None:
    store = open_store()
    for number in range(20_000):
        store.create(f"{number}", {"n": number})
    for number in range(20_000):
        if number % 20:
            store.delete(f"{number}")
    before = states(store)
    run_together(lambda: store.backup(out), store.compact, store.compact)
    assert backed_up(out) == before


def test_backups_to_one_path_at_a_time_do_not_disturb_each_other(store: KVStore, out: Path) -> None:
    expected = states(store)

    def back_up() -> None:
        for _ in range(5):
            assert store.backup(out, overwrite=True) == len(TRICKY)

    run_together(back_up, back_up, back_up)
    assert backed_up(out) == expected
    assert files(out.parent) == {out.name, store.path.name}


STEPS: Final = st.lists(
    st.tuples(
        st.integers(0, 400),  # so many records are read before it
        st.sampled_from(
            ("create", "put", "delete", "touch", "pop", "grow", "thin", "clear", "compact")
        ),
        st.integers(0, 400),
    ),
    max_size=12,
)


@settings(max_examples=scaled(8))
@given(STEPS, st.booleans())
def test_each_key_is_backed_up_as_it_was_at_some_moment_during_the_call(
    path: Path, implementation: Implementation, steps: list[tuple[int, str, int]], split: bool
) -> None:
    """Between two records that are read anything may happen, as in other threads."""
    path.unlink(missing_ok=True)
    with KVStore(path) as store:
        for number in range(400 if not split else 16_000):
            store.create(f"{number}", {"n": number})
        history: dict[str, list[State | None]] = {
            key: [each] for key, each in states(store).items()
        }
        found: dict[str, State] = {}
        records = records_of(store._parts, clock.now_ms, lambda _done, _whole: None)

        def read(count: int) -> None:
            for key, encoded, created_at, expires_at in itertools.islice(records, count):
                assert key not in found, f"{key} came twice"
                found[key] = (json.loads(encoded), created_at, expires_at)

        def note(*keys: str) -> None:
            for key in keys:
                state = (store.read(key), *store._whole(key)[1:]) if key in store else None
                history.setdefault(key, [None]).append(state)

        for count, what, number in steps:
            read(count)
            act(store, what, f"{number}", note)
        read(10**6)
    for key, moments in history.items():
        assert found.get(key) in moments, key
    assert found.keys() <= history.keys()


def act(store: KVStore, what: str, key: str, note: Callable[..., object]) -> None:
    """Do one step, and note what has become of each key that it changed."""
    if what == "grow":
        keys = [f"{what} {key} {number}" for number in range(3_000)]
        for each in keys:
            store.put(each, {"grown": 1})
        note(*keys)
    elif what == "thin":
        keys = [each for each in store if hash(each) % 4]
        for each in keys:
            store.delete(each)
        note(*keys)
    elif what == "clear":
        keys = list(store)
        store.clear()
        note(*keys)
    elif what == "compact":
        store.compact()
    else:
        if what == "create" and key not in store:
            store.create(key, {"created": 1})
        elif what == "put":
            store.put(key, {"put": 1}, 100)
        elif what == "touch" and key in store:
            store.touch(key, 500)
        else:
            store.pop(key, None)
        note(key)


# --- kills ---------------------------------------------------------------------------------------

KILLS: Final = """
    from pathlib import Path
    from kvstore.recovery.check import check_file

    path, out = map(Path, sys.argv[1:])

    def back_up(kill_at):
        calls = 0
        def count(frame, event, argument):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        store = KVStore(path)
        sys.setprofile(count)
        try:
            store.backup(out, overwrite=True)
        finally:
            sys.setprofile(None)
        store.close()
        return calls

    with KVStore(path) as store:
        for number in range(30):
            store.create(f"key {number}", {"n": number})
        contents = dict(store.items())
    back_up(0)  # which loads modules
    whole = back_up(0)
    out.unlink()
    at = sorted({1, *range(2, whole, whole // 20), *range(whole - 40, whole, 4)})
    killed = 0
    for number in at:
        pid = os.fork()
        if not pid:
            back_up(number)
            os._exit(0)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if out.exists():
            assert not check_file(out)
            with KVStore(out) as copy:
                assert dict(copy.items()) == contents
    with KVStore(path) as store:
        assert dict(store.items()) == contents
        store.backup(out, overwrite=True)
    assert {each.name for each in path.parent.iterdir()} == {path.name, out.name}
    say(killed, len(at))
"""


@needs_fork
def test_killed_backup_leaves_no_half_file_under_the_name(path: Path, out: Path) -> None:
    """And the next one removes what it has left under another."""
    killed, tried = map(int, run_script(KILLS, path, out).split())
    assert killed > tried - 10  # the last may have got to its end


def test_next_backup_removes_a_leftover_unless_somebody_has_it_locked(
    store: KVStore, out: Path
) -> None:
    leftover = out.with_name(f".{out.name}.backup-1")
    leftover.write_bytes(b"half a file")
    store.backup(out)
    assert not leftover.exists()
    with KVStore(leftover) as other:
        other.create("of another backup", {})
        store.backup(out, overwrite=True)
        assert files(out.parent) == {out.name, leftover.name, store.path.name}
        assert "of another backup" in other


def test_backup_that_takes_long_tells_the_log(
    store: KVStore, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kvstore.backup, "_PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "kvstore"):
        store.backup(out)
    assert any(str(out) in message for message in caplog.messages)
