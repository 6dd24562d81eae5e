"""A store called by a thread that is inside an operation already, and misuse of half-made ones.

The fault laboratory does this at every instruction (`faults.reentry`); here are the stories.
"""

import copy
import dataclasses
import mmap
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.platforms import needs_fork, needs_free_names, needs_pwrite, needs_signals
from support.processes import run_script
from support.threads import PATIENCE_SECONDS, run_together

import kvstore.file.lock
import kvstore.file.platform
from kvstore import (
    KVStore,
    StoreBusyError,
    StoreClosedError,
    StoreFullError,
    UnsupportedFormatError,
    compiled,
)
from kvstore.all_keys import AllKeys
from kvstore.compacting import Compactor
from kvstore.file import reentry
from kvstore.file.datafile import DataFile
from kvstore.parts import Parts


@pytest.fixture(autouse=True)
def interruptible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all be done in Python: nothing can come in between what the fast path does."""
    monkeypatch.setattr(compiled, "selected", compiled.PLAIN)


def amid(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], object]
) -> list[BaseException | None]:
    """Have `act` called as the function `name` of `owner` is; return what came of each call."""
    real = getattr(owner, name)
    outcomes: list[BaseException | None] = []

    def and_act(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        try:
            act()
        except BaseException as error:
            outcomes.append(error)
        else:
            outcomes.append(None)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, and_act)
    return outcomes


# --- where an operation holds a lock -------------------------------------------------------------

UNDER_A_STRIPE: dict[str, Callable[[KVStore], object]] = {
    "create": lambda store: store.create("other", {}),
    "read": lambda store: store.read("key"),
    "delete": lambda store: store.delete("key"),
    "put": lambda store: store.put("key", {"n": 3}),
    "assignment": lambda store: store.__setitem__("key", {"n": 3}),
    "touch": lambda store: store.touch("key", 10),
    "pop": lambda store: store.pop("key"),
    "setdefault": lambda store: store.setdefault("key", {}),
    "update": lambda store: store.update(key={"n": 3}),
    "get_many": lambda store: store.get_many(["key", "other"]),
    "put_many": lambda store: store.put_many({"key": {"n": 3}, "other": {}}),
    "delete_many": lambda store: store.delete_many(["other", "key"]),
    "popitem": KVStore.popitem,
    "clear": KVStore.clear,
    "bool": bool,
    "ttl": lambda store: store.ttl("key"),
    "in": lambda store: "key" in store,
    "len": len,
    "iteration": list,
    "items": lambda store: list(store.items()),
    "purge": KVStore.purge_expired,
    "sync": KVStore.sync,
    "stats": KVStore.stats,
    "backup": lambda store: store.backup(f"{store.path}.backup"),
}


@pytest.mark.parametrize("member", UNDER_A_STRIPE)
@pytest.mark.parametrize("durable", [False, True])
def test_a_member_called_amid_an_operation_is_refused_at_once(
    open_store: Callable[..., KVStore], monkeypatch: pytest.MonkeyPatch, member: str, durable: bool
) -> None:
    """It would have waited for its own thread, that is: for ever."""
    store = open_store(durable=durable)
    store.create("key", {"n": 1})
    outcomes = amid(monkeypatch, kvstore.clock, "time_ns", partial(UNDER_A_STRIPE[member], store))
    store.create("new", {"n": 2}, ttl=100)
    assert [type(outcome) for outcome in outcomes] == [StoreBusyError]
    assert "inside an operation" in str(outcomes[0])
    assert dict(store) == {"key": {"n": 1}, "new": {"n": 2}}
    assert not reentry.waiting


REPLACING: dict[str, Callable[[KVStore], object]] = {
    "put": lambda store: store.put("key", {"n": 2}, 100),
    "touch": lambda store: store.touch("key", 100),
    "pop": lambda store: store.pop("key"),
    "setdefault": lambda store: store.setdefault("other", {"n": 2}, 100),
    "put_many": lambda store: store.put_many({"key": {"n": 2}, "other": {"n": 3}}, 100),
    "delete_many": lambda store: store.delete_many(["other", "key"]),
    "clear": KVStore.clear,
}
AFTER: dict[str, dict[str, Any]] = {
    "put": {"key": {"n": 2}},
    "touch": {"key": {"n": 1}},
    "pop": {},
    "setdefault": {"key": {"n": 1}, "other": {"n": 2}},
    "put_many": {"key": {"n": 2}, "other": {"n": 3}},
    "delete_many": {},
    "clear": {},
}


@pytest.mark.parametrize("nested", ["read", "put", "delete", "clear", "len"])
@pytest.mark.parametrize("member", REPLACING)
def test_what_replaces_and_removes_is_not_disturbed_by_what_is_refused_amid_it(
    open_store: Callable[..., KVStore],
    monkeypatch: pytest.MonkeyPatch,
    member: str,
    nested: str,
) -> None:
    store = open_store()
    store.create("key", {"n": 1})
    store.sync()
    outcomes = amid(monkeypatch, kvstore.clock, "time_ns", partial(UNDER_A_STRIPE[nested], store))
    REPLACING[member](store)
    assert all(isinstance(outcome, StoreBusyError) for outcome in outcomes)
    assert dict(store) == AFTER[member]
    assert not reentry.waiting


def test_it_is_refused_by_any_instruction_under_the_space_lock_too(
    open_store: Callable[..., KVStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(max_bytes=4 * 1024 * 1024)
    outcomes = amid(monkeypatch, store._file, "grow", partial(store.create, "x0", {}))
    with pytest.raises(StoreFullError):
        for number in range(10**6):
            store.create(f"large {number}", {"v": "x" * 16_000})
    assert [type(outcome) for outcome in outcomes] == [StoreBusyError]
    assert "x0" not in store


def test_a_thread_that_holds_nothing_is_not_refused(store: KVStore) -> None:
    """It waits, as ever; only who would wait for itself is refused."""
    held, enough = threading.Event(), threading.Event()
    done: list[str] = []

    def hold() -> None:
        for stripe in store._locks.stripes:
            stripe.acquire()
        held.set()
        enough.wait(60)
        for stripe in store._locks.stripes:
            stripe.release()

    def create() -> None:
        held.wait(60)
        threading.Timer(0, enough.set).start()
        store.create("key", {})
        done.append("created")

    run_together(hold, create)
    assert done == ["created"]


@needs_pwrite
def test_what_needs_no_flush_works_amid_a_flush(
    open_store: Callable[..., KVStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable store spends nearly all of its time there: handlers may look at what it holds."""
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _: False)
    store = open_store(durable=True)
    store.create("key", {"n": 1})
    looks = amid(
        monkeypatch, kvstore.file.platform.system, "flush_file", lambda: dict(store.items())
    )
    store.create("second", {})
    deletes = amid(
        monkeypatch, kvstore.file.platform.system, "flush_file", lambda: store.delete("key")
    )
    store.create("third", {})
    assert (looks, [type(outcome) for outcome in deletes]) == ([None], [StoreBusyError])
    assert dict(store) == {"key": {"n": 1}, "second": {}, "third": {}}


@pytest.mark.parametrize(
    ("owner", "name", "how"), [(AllKeys, "_clear", "clear"), (Compactor, "_cut", "compact")]
)
def test_what_needs_no_flush_is_refused_amid_one_that_who_holds_the_table_waits_for(
    store: KVStore, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, how: str
) -> None:
    """Who cuts the file holds all of the table, and flushes: neither came to an end."""
    for number in range(300):
        store.create(f"k{number}", {"v": "x" * 9_000})
    for number in range(1, 300):
        store.delete(f"k{number}")
    flush_file, cut = kvstore.file.platform.system.flush_file, getattr(owner, name)
    is_held, is_flushing = threading.Event(), threading.Event()
    outcomes: list[BaseException] = []

    def hold_and_cut(self: object) -> None:
        is_held.set()
        assert is_flushing.wait(PATIENCE_SECONDS)
        cut(self)

    def read_amid(fd: int, mapped: mmap.mmap) -> None:
        monkeypatch.setattr(kvstore.file.platform.system, "flush_file", flush_file)
        is_flushing.set()
        try:
            store.read("k0")
        except StoreBusyError as error:
            outcomes.append(error)
        flush_file(fd, mapped)

    def sync() -> None:
        assert is_held.wait(PATIENCE_SECONDS)
        monkeypatch.setattr(kvstore.file.platform.system, "flush_file", read_amid)
        store.sync()

    monkeypatch.setattr(owner, name, hold_and_cut)
    run_together(getattr(store, how), sync)
    assert len(outcomes) == 1
    assert len(store) == (how == "compact")


def test_who_was_interrupted_amid_a_flush_goes_on_before_the_store_is_cleared(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For he may be waiting for a part of the table by then."""
    store.create("key", {})
    flush_file = kvstore.file.platform.system.flush_file
    is_waiting = threading.Event()
    clearing = threading.Thread(target=store.clear)

    def read_and_clear_amid(fd: int, mapped: mmap.mmap) -> None:
        monkeypatch.setattr(kvstore.file.platform.system, "flush_file", flush_file)
        assert store.read("key") == {}
        clearing.start()
        assert is_waiting.wait(PATIENCE_SECONDS)
        flush_file(fd, mapped)

    def wait(seconds: float) -> None:
        is_waiting.set()
        time.sleep(seconds)

    monkeypatch.setattr("kvstore.locks.sleep", wait)
    monkeypatch.setattr(kvstore.file.platform.system, "flush_file", read_and_clear_amid)
    store.sync()
    clearing.join(PATIENCE_SECONDS)
    assert not clearing.is_alive()
    assert len(store) == 0


def test_another_store_is_nobodys_business(
    tmp_path: Path, store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler keeps its own books; opens, writes and closes them wherever it interrupts."""

    def keep_books() -> None:
        with KVStore(tmp_path / "books.kvs") as books:
            books.create("stopped", {"why": "SIGTERM"})
            assert len(books) == 1
        with KVStore(tmp_path / "books.kvs") as books:
            assert books.read("stopped") == {"why": "SIGTERM"}

    outcomes = amid(monkeypatch, kvstore.clock, "time_ns", keep_books)
    store.create("key", {}, ttl=10)
    assert outcomes == [None]


def test_two_threads_amid_two_stores_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each is inside one store and calls the other one: one of them is refused, none waits."""
    stores = [KVStore(tmp_path / f"{number}.kvs") for number in range(2)]
    met = threading.Barrier(2)
    outcomes: list[BaseException | None] = []

    def call_the_other_amid(number: int) -> None:
        own, other = stores[number], stores[1 - number]
        real = own._parts.segments.segment_keys

        def and_call(position: int, now_ms: int) -> Any:
            own._parts.segments.segment_keys = real  # type: ignore[method-assign]
            met.wait(60)
            try:
                other.stats()
            except StoreBusyError as error:
                outcomes.append(error)
            else:
                outcomes.append(None)
            return real(position, now_ms)

        own._parts.segments.segment_keys = and_call  # type: ignore[method-assign]
        list(own)

    run_together(partial(call_the_other_amid, 0), partial(call_the_other_amid, 1))
    assert len(outcomes) == 2
    assert any(isinstance(outcome, StoreBusyError) for outcome in outcomes)
    for store in stores:
        store.stats()
        store.close()


# --- close ---------------------------------------------------------------------------------------


def _create_new(store: KVStore) -> None:
    store.create("new", {"n": 2})


@needs_pwrite
@pytest.mark.parametrize("member", ["create", "read", "purge", "sync", "iteration"])
def test_close_amid_an_operation_takes_effect_as_it_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    monkeypatch.setattr(kvstore.file.platform.system, "overwrites_in_place", lambda _: False)
    store = KVStore(path)
    store.create("key", {"n": 1}, ttl=10**6)
    closed_meanwhile: list[bool] = []

    def close() -> None:
        store.close()
        closed_meanwhile.append(store.closed)

    where: tuple[object, str] = (kvstore.clock, "time_ns")
    if member == "sync":
        where = (kvstore.file.platform.system, "flush_file")
    outcomes = amid(monkeypatch, *where, close)
    if member == "iteration":
        iterator = iter(store)
        with pytest.raises(StoreClosedError):
            list(iterator)
    else:
        act = UNDER_A_STRIPE[member] if member != "create" else _create_new
        act(store)
    assert (outcomes, closed_meanwhile, store.closed) == ([None], [False], True)
    with KVStore(path) as opened:
        expected = {"key": {"n": 1}, **({"new": {"n": 2}} if member == "create" else {})}
        assert dict(opened) == expected


@pytest.mark.parametrize("durable", [False, True])
def test_close_amid_a_batch_takes_effect_before_its_next_item(
    path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """As where another thread closes: those before it are stored, and the error says which."""
    store = KVStore(path, durable=durable)
    store.create("key", {"n": 1})
    outcomes = amid(monkeypatch, kvstore.clock, "time_ns", store.close)
    with pytest.raises(StoreClosedError) as caught:
        store.put_many({"first": {}, "second": {}, "third": {}})
    assert (outcomes, store.closed) == ([None], True)
    assert caught.value.__notes__ == ["key 'second' was not put; those before it were"]
    with KVStore(path) as opened:
        assert dict(opened) == {"key": {"n": 1}, "first": {}}


@pytest.mark.parametrize("changed", [False, True])
def test_close_amid_close_leaves_it_to_that(
    path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """It went ahead and unmapped the file, under the hands of the one that it had interrupted."""
    KVStore(path).close()
    store = KVStore(path)
    if changed:
        store.create("key", {})
    outcomes = amid(monkeypatch, store._file, "_close_contents", store.close)
    store.close()
    assert (outcomes, store.closed) == ([None], True)
    with KVStore(path) as opened:
        assert len(opened) == changed


def test_close_takes_effect_where_the_operation_is_cut_short(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a handler that closes and then raises SystemExit."""
    store = KVStore(path)
    store.create("key", {})
    real = kvstore.clock.time_ns

    def close_and_exit() -> int:
        monkeypatch.setattr(kvstore.clock, "time_ns", real)
        store.close()
        raise SystemExit

    monkeypatch.setattr(kvstore.clock, "time_ns", close_and_exit)
    with pytest.raises(SystemExit):
        store.create("new", {})
    assert store.closed
    with KVStore(path) as opened:
        assert list(opened) == ["key"]


@needs_free_names
def test_what_goes_wrong_in_a_late_close_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler that called it has long returned: nobody is there to raise it to."""
    store = KVStore(path)
    reported: list[type[BaseException]] = []
    monkeypatch.setattr("sys.excepthook", lambda kind, *_: reported.append(kind))

    def close() -> None:
        store.close()
        path.unlink()

    amid(monkeypatch, kvstore.clock, "time_ns", close)
    store.create("key", {})
    assert store.closed
    assert reported == [OSError]


@needs_signals
@pytest.mark.parametrize("durable", [False, True])
def test_a_handler_of_sigterm_closes_the_store(path: Path, durable: bool) -> None:
    """What a service does. It hung in up to 12 of 12 tries."""
    said = run_script(
        """
        store = KVStore(sys.argv[1], durable=sys.argv[2] == "True")
        def stop(*_):
            store.close()
            raise SystemExit
        signal.signal(signal.SIGALRM, stop)
        numbers = []
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            while True:
                store.create(f"k{len(numbers)}", {})
                numbers.append(len(numbers))
        except (SystemExit, StoreClosedError):
            pass
        store = KVStore(sys.argv[1])
        assert len(store) - len(numbers) in (0, 1), (len(store), len(numbers))
        say("whole")
        """,
        path,
        durable,
    )
    assert said == "whole\n"


def test_a_finalizer_that_deletes_does_not_hang(path: Path) -> None:
    """The collector runs it wherever it will: amid operations of the same thread, too."""
    said = run_script(
        """
        store = KVStore(sys.argv[1])
        refused = []
        class Session:
            def __init__(self, number):
                self.key, self.itself = f"s{number}", self
                store.create(self.key, {})
            def __del__(self):
                try:
                    store.delete(self.key)
                except StoreBusyError:
                    refused.append(self.key)
        gc.set_threshold(5)
        for number in range(2000):
            Session(number)
            store.create("lease", {"by": "x" * 500})
            store.delete("lease")
        gc.collect()
        assert sorted(store) == sorted(refused)
        say("end")
        """,
        path,
    )
    assert said == "end\n"


# --- close, where another thread is at it --------------------------------------------------------


@contextmanager
def closing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, store: KVStore, owner: object, name: str
) -> Iterator[list[BaseException | None]]:
    """Have another thread be at closing `store` as `owner.name` is called, which closes it too."""
    thread = threading.Thread(target=store.close, daemon=True)
    is_closed = threading.Event()
    set_closed = store._parts._set_closed

    def tell() -> None:
        set_closed()
        is_closed.set()

    def close() -> None:
        thread.start()
        assert is_closed.wait(60)
        store.close()

    monkeypatch.setattr(store._parts, "_set_closed", tell)

    outcomes = amid(monkeypatch, owner, name, close)
    yield outcomes
    thread.join(60)
    assert not thread.is_alive(), "the thread that closes hangs"
    assert outcomes == [None]


def test_close_amid_a_flush_that_another_threads_close_waits_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker shuts down, and SIGTERM comes: each waited for the other, in 7 of 12 tries."""
    monkeypatch.setattr(kvstore.file.platform.system, "can_flush_pages", lambda: False)
    store = KVStore(path, durable=True)
    store.create("key", {})
    with closing_elsewhere(monkeypatch, store, kvstore.file.platform.system, "flush_file"):
        store.create("second", {})
    with KVStore(path) as opened:
        assert sorted(opened) == ["key", "second"]


def test_close_amid_opening_another_one(
    tmp_path: Path, store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard of all openings is held then, and the other thread's close needs it."""
    with (
        closing_elsewhere(monkeypatch, store, kvstore.file.lock.FileLock, "_open"),
        KVStore(tmp_path / "another.kvs") as another,
    ):
        another.create("key", {})


def test_close_amid_a_failed_opening_is_not_forgotten(
    tmp_path: Path, store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was put off until something that never came."""
    (tmp_path / "no store").write_bytes(b"something else" * 100)
    outcomes = amid(monkeypatch, kvstore.file.platform.system, "unlock", store.close)
    with pytest.raises(UnsupportedFormatError):
        KVStore(tmp_path / "no store")
    assert (outcomes, store.closed, reentry.waiting) == ([None], True, {})


def test_close_that_is_interrupted_once_more_is_not_forgotten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C, amid the close that the first one's handler had asked for."""
    store = KVStore(path)
    amid(monkeypatch, kvstore.clock, "time_ns", store.close)

    def interrupt(_self: Parts) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.create("key", {})
    assert store.closed
    assert not reentry.waiting
    with KVStore(path) as opened:
        assert list(opened) == ["key"]


def test_who_follows_a_flush_is_inside_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the leader's gate for a moment, and others wait for that one with locks held."""
    KVStore(path).close()
    with KVStore(path) as store:
        outcomes = amid(
            monkeypatch, store._file._flushing, "_group_commit", partial(store.create, "nested", {})
        )
        store.sync()
        assert [type(outcome) for outcome in outcomes] == [StoreBusyError]


# --- forks from within ---------------------------------------------------------------------------


@needs_fork
def test_a_child_forked_amid_a_create_over_an_expired_key_writes_nothing(path: Path) -> None:
    """By a signal handler that returns in the child. The compiled one stored into the parent's."""
    said = run_script(
        """
        import kvstore.clock
        store = KVStore(sys.argv[1])
        store.create("key", {"old": 1}, ttl=1)
        now, children = kvstore.clock.time_ns() + 10**10, []
        def fork():
            if not children:
                children.append(os.fork())
                if children[0]:
                    os.waitpid(children[0], 0)
            return now
        kvstore.clock.time_ns = fork
        try:
            store.create("key", {"new": 1})
        except StoreClosedError:
            os._exit(0)
        if not children[0]:
            say("the child has created it")
            os._exit(0)
        say(dict(store))
        store.close()
        """,
        path,
    )
    assert said == "{'key': {'new': 1}}\n"


@needs_fork
@needs_signals
def test_a_signal_as_a_fork_waits_does_not_give_the_store_to_the_child(path: Path) -> None:
    """No fork heeds what its hooks raise: the child went on with the parent's store as its own."""
    said = run_script(
        """
        import threading
        from kvstore.file import lock as filelock
        store = KVStore(sys.argv[1])
        held, enough = threading.Event(), threading.Event()
        def hold():
            with filelock._guard:
                held.set()
                enough.wait(60)
        threading.Thread(target=hold).start()
        held.wait(60)
        def interrupt(*_):
            enough.set()
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        sys.unraisablehook = lambda _: None
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        child = os.fork()
        if not child:
            try:
                store.create("child's", {})
            except StoreClosedError:
                os._exit(7)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        store.create("parent's", {})
        KVStore(sys.argv[1] + "2").close()
        say(os.waitstatus_to_exitcode(status), list(store))
        store.close()
        """,
        path,
    )
    assert said == '7 ["parent\'s"]\n'


# --- copies --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Holder:
    store: KVStore


COPIES: dict[str, Callable[[KVStore], object]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a holder": lambda store: copy.deepcopy([store]),
    "asdict": lambda store: dataclasses.asdict(Holder(store)),
    "pickle": pickle.dumps,
    "pickle, oldest protocol": lambda store: pickle.dumps(store, 0),
    "deepcopy of a view": lambda store: copy.deepcopy(store.items()),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_store_is_not_copied(store: KVStore, capfd: pytest.CaptureFixture[str], how: str) -> None:
    """A shallow copy, once collected, had unmapped the file of both: reading killed the process."""
    store.create("key", {"n": 1})
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        COPIES[how](store)
    assert store.read("key") == {"n": 1}
    assert capfd.readouterr() == ("", "")


# --- stores that are not there -------------------------------------------------------------------


class Forgetful(KVStore):
    def __init__(self) -> None:
        pass


MEMBERS: dict[str, Callable[[KVStore], object]] = {
    **UNDER_A_STRIPE,
    "read_bytes": lambda store: store.read_bytes("key"),
    "get": lambda store: store.get("key"),
    "[]": lambda store: store["key"],
    "del": lambda store: store.__delitem__("key"),
    "keys": lambda store: list(store.keys()),
    "values": lambda store: list(store.values()),
    "path": lambda store: store.path,
    "with": lambda store: store.__enter__(),
}


@pytest.mark.parametrize("make", [Forgetful, lambda: KVStore.__new__(KVStore)])
def test_a_store_that_was_never_opened_says_so(make: Callable[[], KVStore]) -> None:
    store = make()
    for name, call in MEMBERS.items():
        with pytest.raises(StoreClosedError, match="was not opened"):
            call(store)
        assert name
    assert store.closed
    assert "not opened" in repr(store)
    store.close()


@pytest.mark.usefixtures("implementation")
def test_a_store_whose_opening_has_not_ended_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled one read from it already, as the last things were made ready."""
    with KVStore(path) as store:
        store.create("key", {"n": 1})
    used: list[KVStore] = []
    call_after_fork = DataFile.call_after_fork

    def use(file: DataFile, method: Any) -> None:
        for call in MEMBERS.values():
            with pytest.raises(StoreClosedError, match="was not opened"):
                call(method.__self__)
        used.append(method.__self__)
        call_after_fork(file, method)

    monkeypatch.setattr(DataFile, "call_after_fork", use)
    with KVStore(path) as store:
        assert used == [store]
        assert store.read("key") == {"n": 1}


@pytest.mark.parametrize(
    "arguments", [{"max_bytes": 1}, {"timeout": -1}, {"nothing": 1}, {"path": 1}, {"path": ""}]
)
def test_a_wrong_argument_is_the_only_error(
    arguments: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """An ignored AttributeError was printed besides, by `__del__`."""
    with pytest.raises((ValueError, TypeError, OSError)):
        KVStore(**{"path": "unused.kvs", **arguments})
    assert capfd.readouterr() == ("", "")
    assert not Path("unused.kvs").exists()


@pytest.mark.parametrize("closed", [False, True])
def test_init_called_again_is_an_error_and_does_nothing_else(
    store: KVStore, tmp_path: Path, closed: bool
) -> None:
    store.create("key", {"n": 1})
    if closed:
        store.close()
    for arguments in ((), (tmp_path / "another.kvs",)):
        with pytest.raises(TypeError, match="called again"):
            store.__init__(*arguments)  # type: ignore[misc]
    assert store.closed is closed
    if not closed:
        assert store.read("key") == {"n": 1}
    assert not (tmp_path / "another.kvs").exists()


def test_a_store_in_a_circle_of_garbage_is_no_trap(path: Path) -> None:
    """Finalizers of the same circle may use what is collected with them."""
    said = run_script(
        """
        store = KVStore(sys.argv[1])
        class Last:
            def __del__(self):
                for call in (lambda: self.store.create("last", {}), lambda: len(self.store)):
                    try:
                        call()
                    except StoreClosedError:
                        pass
        store.last = Last()
        store.last.store = store
        store.itself = store
        del store
        gc.collect()
        with KVStore(sys.argv[1]) as store:
            say(*store)
        """,
        path,
    )
    assert said in ("last\n", "\n")
