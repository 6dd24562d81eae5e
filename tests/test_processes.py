"""Processes: one at a time has the file, and nothing that one does harms another.

Here are the examples; `faults.processes` has many of them race, fork and die at random.
"""

import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.consistency import assert_consistent
from support.files import digest
from support.platforms import (
    needs_fork,
    needs_free_names,
    needs_posix,
    needs_signals,
    needs_symbolic_links,
)
from support.processes import Child, run_script
from xxhash import xxh3_64_intdigest

import kvstore.recovery.opening
from kvstore import (
    CorruptStoreError,
    KVStore,
    KVStoreError,
    StoreLockedError,
    UnsupportedFormatError,
)
from kvstore.file.lock import FileLock
from kvstore.file.platform import system
from kvstore.format.layout import (
    EXTENT_SIZE,
    FILE_MAGIC,
    FIRST_FILE_SIZE,
    IDENTITY,
    IDENTITY_OFFSETS,
    U64,
)

# Opens the file, says so, and keeps it until it is told to let go.
HOLD = """
    store = KVStore(sys.argv[1])
    say("holding")
    hear()
    store.close()
    say("closed")
"""


def assert_locked(path: Path) -> None:
    """Assert that another process than this has the file."""
    with pytest.raises(StoreLockedError):
        KVStore(path)


def opened_elsewhere(path: Path) -> str:
    """Have another process open the file at once: "opened", or "locked: " and the message."""
    return run_script("say(try_open(sys.argv[1]))", path).strip()


# --- the lock ----------------------------------------------------------------------------------


def test_second_opener_in_the_same_process_is_refused_at_once(path: Path) -> None:
    """Also with a timeout: a process that waited for itself would wait in vain."""
    said = run_script(
        """
        with KVStore(sys.argv[1]) as store:
            for timeout in (0, 1e9):
                say(try_open(sys.argv[1], timeout=timeout))
        say(try_open(sys.argv[1]))
        """,
        path,
    ).splitlines()
    for line in said[:2]:
        assert line.startswith("locked: ")
        assert str(path) in line
        assert "process" in line
    assert said[2:] == ["opened"]


def test_second_process_is_refused_at_once_and_told_the_holders_pid(path: Path) -> None:
    with Child(HOLD, path) as holder:
        holder.expect("holding")
        with pytest.raises(StoreLockedError, match=rf"\b{holder.pid}\b") as refused:
            KVStore(path)
        assert str(path) in str(refused.value)
        holder.say("let go")
        holder.expect("closed")
        KVStore(path).close()
        holder.end()
    assert_consistent(path)


def test_process_that_created_the_file_is_the_holder_that_is_named(path: Path) -> None:
    with KVStore(path):
        told = opened_elsewhere(path)
    assert told.startswith("locked: ")
    assert str(os.getpid()) in told


def test_refused_opener_changes_nothing(path: Path) -> None:
    with KVStore(path) as store:
        store.create("key", {"n": 1})
        before = digest(path)
        assert opened_elsewhere(path).startswith("locked")
        with pytest.raises(StoreLockedError):
            KVStore(path)
        assert digest(path) == before
        store.create("other", {})
        store.sync()
    assert_consistent(path)


def test_timeout_waits_for_another_process(path: Path) -> None:
    with Child(HOLD, path) as holder:
        holder.expect("holding")
        script = "say('trying'); say(try_open(sys.argv[1], timeout=100))"
        with Child(script, path) as waiting:
            waiting.expect("trying")
            # By the time that another one was refused, it is most likely waiting.
            assert opened_elsewhere(path).startswith("locked")
            holder.say("let go")
            holder.expect("closed")
            waiting.expect("opened")
            waiting.end()
        holder.end()


def test_timeout_that_passes_ends_in_a_refusal_and_not_before(path: Path) -> None:
    with Child(HOLD, path) as holder:
        holder.expect("holding")
        said = run_script(
            """
            from time import monotonic
            start = monotonic()
            say(try_open(sys.argv[1], timeout=0.3))
            say(monotonic() - start)
            """,
            path,
        ).splitlines()
        assert said[0].startswith("locked: ")
        assert str(holder.pid) in said[0]
        assert float(said[1]) >= 0.3


def test_killed_holder_blocks_nobody_and_loses_nothing(path: Path) -> None:
    script = """
        store = KVStore(sys.argv[1])
        store.create("key", {"n": 1})
        say("holding")
        hear()
    """
    with Child(script, path) as holder:
        holder.expect("holding")
        holder.kill()
        with KVStore(path) as store:
            assert store.read("key") == {"n": 1}
    assert_consistent(path)


@needs_signals
def test_stopped_holder_still_has_the_file(path: Path) -> None:
    with Child(HOLD, path) as holder:
        holder.expect("holding")
        os.kill(holder.pid, signal.SIGSTOP)
        with pytest.raises(StoreLockedError, match=str(holder.pid)):
            KVStore(path)
        os.kill(holder.pid, signal.SIGCONT)
        holder.say("let go")
        holder.expect("closed")
        holder.end()


# --- fork and exec -----------------------------------------------------------------------------

# The child's side of a fork; each line of the report is a member that did not refuse.
USE_EVERY_MEMBER = """
def use_every_member(store, iterator):
    uses = {
        "create": lambda: store.create("new", {}),
        "create with ttl": lambda: store.create("new", {}, ttl=1),
        "read": lambda: store.read("key"),
        "[]": lambda: store["key"],
        "read_bytes": lambda: store.read_bytes("key"),
        "get": lambda: store.get("key"),
        "get of an absent key": lambda: store.get("absent", 1),
        "delete": lambda: store.delete("key"),
        "delete of an absent key": lambda: store.delete("absent"),
        "del": lambda: store.__delitem__("key"),
        "ttl": lambda: store.ttl("key"),
        "in": lambda: "key" in store,
        "len": lambda: len(store),
        "iter": lambda: list(iter(store)),
        "keys": lambda: list(store.keys()),
        "values": lambda: list(store.values()),
        "items": lambda: list(store.items()),
        "dict": lambda: dict(store),
        "an iterator begun before": lambda: list(iterator),
        "purge_expired": lambda: store.purge_expired(),
        "sync": lambda: store.sync(),
        "stats": lambda: store.stats(),
    }
    for name, use in uses.items():
        try:
            result = use()
        except StoreClosedError:
            continue
        except BaseException as error:
            say(f"{name} raised {error!r}")
        else:
            say(f"{name} returned {result!r}")
"""


@needs_fork
def test_child_of_a_fork_amid_a_closed_stores_refusal_is_refused_as_well(path: Path) -> None:
    """It takes a stripe to say that it is closed, and a thread of the parent may just have it."""
    script = """
store = KVStore(sys.argv[1])
iterator = iter(store)
store.close()
for stripe in store._locks.stripes:
    stripe.acquire()
pid = os.fork()
if pid == 0:
    use_every_member(store, iterator)
    os._exit(0)
os.waitpid(pid, 0)
say("end")
"""
    with Child(USE_EVERY_MEMBER + script, path) as child:
        assert child.end().splitlines() == ["end"]


@needs_fork
@pytest.mark.parametrize("parent_closes_first", [False, True])
def test_forked_child_gets_store_closed_error_from_every_member(
    path: Path, parent_closes_first: bool
) -> None:
    script = """
store = KVStore(sys.argv[1])
for number in range(100):
    store.create(f"k{number}", {"n": number})
store.create("key", {})
iterator = iter(store)
next(iterator)
closed_read, closed_write = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(closed_write)
    if sys.argv[2] == "True":
        os.read(closed_read, 1)
    use_every_member(store, iterator)
    os._exit(0)
if sys.argv[2] == "True":
    store.close()
os.close(closed_write)
os.waitpid(pid, 0)
say("end")
store.close()
"""
    with Child(USE_EVERY_MEMBER + script, path, parent_closes_first) as child:
        assert child.end().splitlines() == ["end"]
    assert_consistent(path)


@needs_fork
@pytest.mark.parametrize(
    "act",
    [
        "pass",
        "store.close(); store.close()",
        "del store; gc.collect()",
        "sys.exit(0)",
        "store.__exit__(ValueError, ValueError(), None)",
        "holder.clear(); gc.collect()",
        "repr(store); store.path; store.closed; hash(store); store == store",
    ],
)
def test_nothing_that_a_forked_child_does_disturbs_the_parent(path: Path, act: str) -> None:
    """It ends as programs do, with its atexit functions run, or acts as the parameter says."""
    script = f"""
        store = KVStore(sys.argv[1])
        holder = [store]  # a cycle, so that only the collector takes it away
        holder.append(holder)
        store.create("before", {{"n": 1}})
        pid = os.fork()
        if pid == 0:
            try:
                {act}
            except StoreClosedError:
                pass
            sys.exit(0)
        _, status = os.waitpid(pid, 0)
        say("child:", status)
        hear()
        assert store.read("before") == {{"n": 1}}
        store.create("after", {{"n": 2}})
        store.sync()
        say("worked on")
        hear()
        store.close()
    """
    with Child(script, path) as parent:
        parent.expect("child: 0")
        assert_locked(path)
        parent.say("go on")
        parent.expect("worked on")
        assert_locked(path)
        parent.say("close")
        parent.end()
    assert_consistent(path)
    with KVStore(path) as store:
        assert dict(store) == {"before": {"n": 1}, "after": {"n": 2}}


# The parent opens and forks; the child waits for the end of its input. Whoever lives says so.
FORK_AND_WAIT = """
    store = KVStore(sys.argv[1])
    store.create("key", {"n": 1})
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        say("forked")
        os.close(go_write)
        os.read(go_read, 1)  # until the parent has closed the store, or is gone
        while hear() is not None:
            pass
        os._exit(0)
    if hear() == "close":
        store.close()
        say("closed")
    hear()
    os.close(go_write)
    os.waitpid(pid, 0)
"""


@needs_fork
def test_child_that_lives_on_does_not_keep_the_lock_of_a_parent_that_closed(path: Path) -> None:
    with Child(FORK_AND_WAIT, path) as parent:
        parent.expect("forked")
        assert_locked(path)
        parent.say("close")
        parent.expect("closed")
        with KVStore(path) as store:
            assert store.read("key") == {"n": 1}
        parent.end()
    assert_consistent(path)


@needs_fork
def test_child_that_lives_on_does_not_keep_the_lock_of_a_parent_that_was_killed(
    path: Path,
) -> None:
    with Child(FORK_AND_WAIT, path) as parent:
        parent.expect("forked")
        parent.kill()
        with KVStore(path) as store:
            assert store.read("key") == {"n": 1}
            assert opened_elsewhere(path).startswith("locked")
        parent.stop_listening()
    assert_consistent(path)


@needs_fork
def test_fork_while_the_file_is_being_locked_does_not_give_the_lock_to_the_child(
    path: Path,
) -> None:
    """A child that was forked after the file was opened shared the lock taken right after that."""
    script = """
        import threading
        from kvstore.file.platform import system
        go_read, go_write = os.pipe()

        def fork():
            if os.fork() == 0:
                say("forked")
                os.close(go_write)
                while hear() is not None:
                    pass
                os._exit(0)

        thread = threading.Thread(target=fork)
        lock = system.lock

        def fork_and_lock(fd):
            thread.start()
            thread.join(0.5)  # until it has forked, or for long enough to see that it waits
            return lock(fd)

        system.lock = fork_and_lock
        store = KVStore(sys.argv[1])
        thread.join()
        say("opened")
        hear()
    """
    with Child(script, path) as parent:
        assert {parent.hear(), parent.hear()} == {"forked", "opened"}
        parent.kill()
        KVStore(path).close()
        parent.stop_listening()
    assert_consistent(path)


@needs_fork
def test_fork_while_a_store_is_being_closed_leaves_the_childs_other_files_alone(
    path: Path,
) -> None:
    """The child closed the store's descriptor by its number, which was another file's by then."""
    script = """
        from kvstore.file.lock import FileLock
        release = FileLock.release

        def fork_and_release(lock):
            other = os.open(sys.argv[1], os.O_RDONLY)  # takes the number that was given up last
            pid = os.fork()
            if pid == 0:
                os.fstat(other)
                os._exit(0)
            say(os.waitpid(pid, 0)[1])
            os.close(other)
            release(lock)

        FileLock.release = fork_and_release
        KVStore(sys.argv[1]).close()
    """
    with Child(script, path) as parent:
        assert parent.end().splitlines() == ["0"]
        assert parent.errors() == ""
    assert_consistent(path)


@needs_fork
def test_child_that_closes_as_it_is_born_disturbs_nothing(path: Path) -> None:
    """In what a program had registered for forked children before kvstore registered its own."""
    script = """
        import os, sys
        stores = []
        os.register_at_fork(after_in_child=lambda: [store.close() for store in stores])
        from kvstore import KVStore
        stores.append(KVStore(sys.argv[1]))
        stores[0].create("before", {})
        pid = os.fork()
        if pid == 0:
            os._exit(0 if stores[0].closed else 2)
        print(os.waitpid(pid, 0)[1], flush=True)
        sys.stdin.readline()
        stores[0].create("after", {})
        stores[0].close()
    """
    with Child(script, path, prelude="") as parent:
        parent.expect("0")
        assert_locked(path)
        parent.say()
        parent.end()
        assert parent.errors() == ""
    assert_consistent(path)
    with KVStore(path) as store:
        assert set(store) == {"before", "after"}


def test_program_started_by_the_holder_inherits_neither_file_nor_lock(path: Path) -> None:
    script = """
        import subprocess
        store = KVStore(sys.argv[1])
        program = subprocess.Popen(
            [sys.executable, "-c", "import os; os.write(1, b'started\\\\n'); os.read(0, 1)"],
            close_fds=False,
        )
        hear()
        store.close()
    """
    with Child(script, path) as holder:
        holder.expect("started")
        holder.kill()
        KVStore(path).close()
        holder.stop_listening()
    assert_consistent(path)


@needs_fork
def test_child_may_open_the_file_once_the_parent_has_closed_it(path: Path) -> None:
    script = """
        store = KVStore(sys.argv[1])
        store.create("parent", {})
        closed_read, closed_write = os.pipe()
        done_read, done_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(closed_write)
            early = try_open(sys.argv[1])
            if not (early.startswith("locked") and str(os.getppid()) in early):
                say("too early:", early)
            os.write(done_write, b".")
            os.read(closed_read, 1)
            with KVStore(sys.argv[1]) as own:
                own.create("child", dict(own))
                say(try_open(sys.argv[1]).partition(":")[0])
            sys.exit(0)
        os.read(done_read, 1)
        store.close()
        os.close(closed_write)
        _, status = os.waitpid(pid, 0)
        say(status)
        with KVStore(sys.argv[1]) as store:
            say(dict(store) == {"parent": {}, "child": {"parent": {}}})
    """
    with Child(script, path) as parent:
        assert parent.end().splitlines() == ["locked", "0", "True"]
    assert_consistent(path)


@needs_fork
def test_pool_of_forked_workers_may_use_files_of_their_own(path: Path, tmp_path: Path) -> None:
    script = """
        store = KVStore(sys.argv[1])
        store.create("key", {})
        pids = []
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                with KVStore(f"{sys.argv[2]}/{number}.kvs") as own:
                    own.create("key", {"n": number})
                sys.exit(0)
            pids.append(pid)
        for pid in pids:
            say(os.waitpid(pid, 0)[1])
        store.create("other", {})
        store.close()
    """
    with Child(script, path, tmp_path) as parent:
        assert parent.end().splitlines() == ["0"] * 4
    assert_consistent(path)
    for number in range(4):
        with KVStore(tmp_path / f"{number}.kvs") as store:
            assert store.read("key") == {"n": number}


@needs_fork
def test_pool_of_multiprocessing_is_refused_its_parents_store_and_disturbs_nothing(
    path: Path,
) -> None:
    script = """
        import multiprocessing
        store = KVStore(sys.argv[1])
        store.create("key", {})

        def use(number):
            try:
                return store.read("key")
            except StoreClosedError:
                return "refused"

        with multiprocessing.get_context("fork").Pool(3) as pool:
            say(set(pool.map(use, range(9))))
            store.create("while they live", {})
            say(try_open(sys.argv[1]).partition(":")[0])
        store.create("after", {})
        store.close()
    """
    with Child(script, path) as parent:
        assert parent.end().splitlines() == ["{'refused'}", "locked"]
    assert_consistent(path)
    with KVStore(path) as store:
        assert set(store) == {"key", "while they live", "after"}


# --- other names for the file ------------------------------------------------------------------


@pytest.mark.parametrize("link", [pytest.param(os.symlink, marks=needs_symbolic_links), os.link])
def test_link_to_the_file_is_the_same_store(
    path: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    other = tmp_path / "other.kvs"
    with KVStore(path) as store:
        link(path, other)
        store.create("key", {"n": 1})
        with pytest.raises(StoreLockedError):
            KVStore(other)
        assert opened_elsewhere(other).startswith("locked")
    with KVStore(other) as store:
        assert store.read("key") == {"n": 1}
        store.create("through the link", {})
        with pytest.raises(StoreLockedError):
            KVStore(path)
        assert opened_elsewhere(path).startswith("locked")
    with KVStore(path) as store:
        assert "through the link" in store
    assert_consistent(path)


@needs_symbolic_links
def test_file_is_the_same_store_by_a_relative_path_and_through_a_linked_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linked").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with KVStore(path.name) as store:
        for other in (path, tmp_path / "linked" / path.name):
            with pytest.raises(StoreLockedError):
                KVStore(other)
        # The path was settled at opening: changing the folder does not lose the file.
        monkeypatch.chdir("/")
        store.create("key", {})
        store.sync()
    assert_consistent(path)


# --- removed or replaced -----------------------------------------------------------------------


LOST = r"removed|replaced"


def remove(path: Path) -> None:
    path.unlink()


def move_away(path: Path) -> None:
    path.rename(path.with_suffix(".away"))


def replace_by_a_store(path: Path) -> None:
    other = path.with_suffix(".new")
    KVStore(other).close()
    other.replace(path)


def replace_by_text(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_text("no store")
    other.replace(path)


@needs_free_names
@pytest.mark.parametrize("lose", [remove, move_away, replace_by_a_store, replace_by_text])
@pytest.mark.parametrize("written_before", [False, True])
def test_file_that_is_lost_while_open_makes_sync_and_close_say_so(
    path: Path, lose: Callable[[Path], None], written_before: bool
) -> None:
    with KVStore(path) as store:
        store.create("key", {})
    store = KVStore(path)
    if written_before:
        store.create("other", {})
    lose(path)
    assert store.read("key") == {}
    for _ in range(2):
        with pytest.raises(OSError, match=LOST) as error:
            store.sync()
        assert not isinstance(error.value, KVStoreError)
        assert str(path) in str(error.value)
    with pytest.raises(OSError, match=LOST) as error:
        store.close()
    assert str(path) in str(error.value)
    assert store.closed
    store.close()


@needs_free_names
def test_file_that_was_lost_is_let_go_and_a_new_one_takes_its_place(path: Path) -> None:
    store = KVStore(path)
    store.create("key", {"n": 1})
    move_away(path)
    # Another file is at this path now, as far as anyone can tell.
    with KVStore(path) as second:
        assert len(second) == 0
    with pytest.raises(OSError, match=LOST), store:
        pass
    assert store.closed
    with KVStore(path.with_suffix(".away")) as store:
        assert store.read("key") == {"n": 1}
    assert_consistent(path)
    assert_consistent(path.with_suffix(".away"))


@needs_free_names
def test_file_that_is_replaced_between_opening_and_locking_is_not_the_one_that_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes could each have the lock of a file that they take for this one."""
    KVStore(path).close()
    other = path.with_suffix(".new")
    with KVStore(other) as store:
        store.create("of the new file", {})
    lock = system.lock

    def replace_and_lock(fd: int) -> bool:
        if other.exists():
            other.replace(path)
        return lock(fd)

    monkeypatch.setattr(system, "lock", replace_and_lock)
    with KVStore(path) as store:
        assert "of the new file" in store
        store.create("key", {})
    monkeypatch.undo()
    with KVStore(path) as store:
        assert set(store) == {"of the new file", "key"}
    assert_consistent(path)


# --- the end of the interpreter ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("cycle = [store]; cycle.append(cycle); del cycle, store", 0),
        ("threading.Thread(target=store.create, args=('k2', {})).start()", 0),
        ("import atexit; atexit.register(store.create, 'at exit', {})", 0),
        # The interpreter leaves such a thread behind, and the store in it is never collected.
        ("threading.Thread(target=hold, args=(store,), daemon=True).start(); del store", 0),
    ],
)
def test_store_left_open_is_closed_as_the_interpreter_exits(
    path: Path, ending: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"""
        import threading

        def hold(store):
            os.read(0, 1)

        store = KVStore(sys.argv[1])
        store.create("key", {{"n": 1}})
        say("created")
        {ending}
    """
    with Child(script, path) as child:
        child.expect("created")
        assert child.wait() == code
    assert_consistent(path)
    with caplog.at_level(logging.DEBUG, logger="kvstore"), KVStore(path) as store:
        assert store.read("key") == {"n": 1}
        assert ("k2" in store) == ("k2" in ending)
        assert ("at exit" in store) == ("at exit" in ending)
    assert not [record for record in caplog.records if record.name.startswith("kvstore")]


@needs_free_names
def test_several_stores_left_open_are_all_closed_as_the_interpreter_exits(tmp_path: Path) -> None:
    """Also where closing one of them fails: the next are closed all the same."""
    run = """
        stores = [KVStore(f"{sys.argv[1]}/{number}.kvs") for number in range(4)]
        for store in stores:
            store.create("key", {})
        os.unlink(f"{sys.argv[1]}/1.kvs")
        say("created")
    """
    with Child(run, tmp_path) as child:
        child.expect("created")
        child.wait()
    assert not (tmp_path / "1.kvs").exists()
    for number in (0, 2, 3):
        assert_consistent(tmp_path / f"{number}.kvs")


def test_process_that_ends_without_any_cleaning_up_loses_nothing(path: Path) -> None:
    run_script(
        """
        store = KVStore(sys.argv[1])
        store.create("key", {"n": 1})
        os._exit(0)
        """,
        path,
    )
    with KVStore(path) as store:
        assert store.read("key") == {"n": 1}
    assert_consistent(path)


# --- what is at the path -----------------------------------------------------------------------


def test_missing_folder_is_file_not_found(tmp_path: Path) -> None:
    path = tmp_path / "no such folder" / "data.kvs"
    with pytest.raises(FileNotFoundError) as error:
        KVStore(path)
    assert not isinstance(error.value, KVStoreError)
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_directory_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(PermissionError if os.name == "nt" else IsADirectoryError) as error:
        KVStore(tmp_path)
    assert not isinstance(error.value, KVStoreError)
    assert error.value.filename == str(tmp_path)


def test_file_as_a_folder_is_not_a_directory(path: Path) -> None:
    path.write_text("text")
    with pytest.raises(FileNotFoundError if os.name == "nt" else NotADirectoryError):
        KVStore(path / "data.kvs")


@needs_symbolic_links
def test_loop_of_links_is_an_os_error(path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        KVStore(path)


@needs_posix
def test_no_permission_is_a_permission_error() -> None:
    """Tried as a user without rights; to root everything is permitted."""
    with tempfile.TemporaryDirectory() as name:  # every folder above it lets everybody through
        folder = Path(name)
        foreign, own = folder / "foreign", folder / "own"
        for each in (foreign, own):
            each.mkdir()
        for file, mode in (("unreadable", 0o200), ("unwritable", 0o444)):
            KVStore(foreign / file).close()
            (foreign / file).chmod(mode)
        before = {each.name: digest(each) for each in foreign.iterdir()} if os.geteuid() == 0 else 0
        if os.geteuid() == 0:
            os.chown(own, 65_534, 65_534)
        folder.chmod(0o755)
        foreign.chmod(0o555)
        script = """
            foreign, own = sys.argv[1:]
            KVStore(f"{own}/imports all that is needed").close()
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65_534)
                os.setuid(65_534)
            for path in (
                f"{own}/new", f"{foreign}/new", f"{foreign}/unreadable", f"{foreign}/unwritable",
            ):
                try:
                    KVStore(path).close()
                    say("opened")
                except OSError as error:
                    say(type(error).__name__, isinstance(error, KVStoreError), path in str(error))
        """
        try:
            said = run_script(script, foreign, own).splitlines()
        finally:
            foreign.chmod(0o755)
        assert said == ["opened"] + ["PermissionError False True"] * 3
        assert {each.name for each in foreign.iterdir()} == {"unreadable", "unwritable"}
        if before:
            assert {each.name: digest(each) for each in foreign.iterdir()} == before


@needs_posix
@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/null", "/dev/zero", "/dev/full"])
def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        descriptor = os.open(tmp_path, os.O_RDONLY)
        try:  # a socket's path may not be long
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(f"/proc/self/fd/{descriptor}/it")
        except OSError as error:
            pytest.skip(f"no socket can be made here: {error}")
        finally:
            os.close(descriptor)
    else:
        path = Path(kind)
    said = run_script(
        """
        try:
            KVStore(sys.argv[1])
        except OSError as error:
            say("OSError", isinstance(error, KVStoreError))
        except UnsupportedFormatError:
            say("UnsupportedFormatError")
        """,
        path,
    )
    assert said.strip() in ("OSError False", "UnsupportedFormatError")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4096, EXTENT_SIZE, 1_000_001, FIRST_FILE_SIZE])
def test_file_of_nothing_but_zeros_becomes_a_store(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with KVStore(path) as store:
        assert len(store) == 0
        store.create("key", {"n": 1})
    assert_consistent(path)
    with KVStore(path) as store:
        assert store.read("key") == {"n": 1}


def test_file_of_nothing_but_holes_becomes_a_store(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(FIRST_FILE_SIZE)
    with KVStore(path) as store:
        store.create("key", {"n": 1})
    assert_consistent(path)


FOREIGN = {
    "a letter": b"a",
    "text": b"Dear diary,\n" * 20_000,
    "JSON": b'{"name": "Ada"}',
    "SQLite": b"SQLite format 3\0".ljust(8192, b"\0"),
    "PNG, whose magic is alike": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 100,
    "all ones": b"\xff" * FIRST_FILE_SIZE,
    "the magic alone": FILE_MAGIC,
    "the magic and zeros": FILE_MAGIC.ljust(FIRST_FILE_SIZE, b"\0"),
    "the magic at the second copy alone": FILE_MAGIC.rjust(4096 + 8, b"\0").ljust(10_000, b"\0"),
    "zeros and one byte at the end": b"\1".rjust(FIRST_FILE_SIZE, b"\0"),
    "zeros and one byte far out": b"\1".rjust(3_000_000, b"\0"),
    "one byte amid zeros": bytes(1_000_000) + b"\1" + bytes(1_000_000),
    "zeros and one byte in the second sector": b"\1".rjust(513, b"\0").ljust(4096, b"\0"),
    "random bytes": bytes((number * number) % 251 for number in range(300_000)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_refused_and_left_byte_for_byte(path: Path, name: str) -> None:
    path.write_bytes(FOREIGN[name])
    before = path.stat()
    expected = (
        (UnsupportedFormatError, CorruptStoreError) if "magic" in name else UnsupportedFormatError
    )
    with pytest.raises(expected) as error:
        KVStore(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == FOREIGN[name]
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    # It is let go of as well.
    with pytest.raises(expected):
        KVStore(path)


def test_newer_format_is_refused_and_left_byte_for_byte(path: Path) -> None:
    with KVStore(path) as store:
        store.create("key", {})
    contents = bytearray(path.read_bytes())
    for offset in IDENTITY_OFFSETS:
        fields = list(IDENTITY.unpack_from(contents, offset))
        fields[1] += 1
        body = IDENTITY.pack(*fields)[: -U64.size]
        contents[offset : offset + IDENTITY.size] = body + U64.pack(xxh3_64_intdigest(body))
    path.write_bytes(contents)
    with pytest.raises(UnsupportedFormatError, match="version 2"):
        KVStore(path)
    assert path.read_bytes() == contents


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9])
def test_truncated_store_is_refused_and_left_byte_for_byte(path: Path, fraction: float) -> None:
    with KVStore(path) as store:
        for number in range(2_000):
            store.create(f"{number}", {"text": "x" * 1_000})
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * fraction)])
    with pytest.raises(CorruptStoreError) as error:
        KVStore(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == contents[: int(len(contents) * fraction)]
    path.write_bytes(contents)
    with KVStore(path) as store:
        assert len(store) == 2_000
    assert_consistent(path)


# --- opening and closing that are interrupted ----------------------------------------------------


def test_close_that_is_interrupted_is_ended_by_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KVStore(path)
    store.create("key", {})
    with monkeypatch.context() as patch:
        patch.setattr(store._file, "close", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.close()
    assert store.closed
    store.close()
    with KVStore(path) as store:
        assert dict(store) == {"key": {}}


def test_close_lets_go_of_the_lock_whatever_interrupts_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KVStore(path)
    store.create("key", {})
    with monkeypatch.context() as patch:
        patch.setattr(store._file, "_close_contents", _interrupted)
        patch.setattr(store._file._held, "close_descriptor", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.close()
    with KVStore(path) as other:
        assert dict(other) == {"key": {}}
    store.close()


def test_opening_that_is_interrupted_keeps_no_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is after the lock was taken, and before anyone has it in hand."""
    KVStore(path).close()
    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "_path_names_it", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            KVStore(path)
    with monkeypatch.context() as patch:
        patch.setattr(kvstore.recovery.opening, "index_checksum", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            KVStore(path)
    lock = FileLock(str(path), 0)
    del lock
    KVStore(path).close()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
