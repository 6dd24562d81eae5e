"""Processes that want one file, fork amid its use, are stopped and killed, and end in every way.

One at a time has the file. What one does, or does not live to do, takes nothing from another: what
was acknowledged is there, and whoever is next opens the file and works on.
"""

import atexit
import gc
import os
import random
import selectors
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from support.consistency import assert_consistent
from support.processes import PATIENCE_SECONDS, environment
from support.threads import run_together
from support.workload import Value, make_value

from kvstore import KVStore, StoreClosedError, StoreLockedError

from .histories import Owner, switch_often
from .laboratory import Experiment

RACERS: Final = 50
FORKS: Final = 40  # of a trial
HOLDERS: Final = 12  # of a trial
ENDS: Final = 5  # of a trial
CHANGES: Final = 250  # of a trial, to what is at the paths
# Nobody has to wait as long as that.
LONG: Final = 100.0


def fork(act: Callable[[], object]) -> int:
    """Have a forked child do something, and end with 0 if that went well; return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _end_after(act)
    return pid


def _end_after(act: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Return the exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- races to open -----------------------------------------------------------------------------


def race_to_open(folder: Path, rng: random.Random) -> int:
    """Let many processes open a file at the same moment, under several names; return how many."""
    path = folder / "store.kvs"
    before = rng.choice(("missing", "empty", "closed", "not closed"))
    expected: dict[str, Value] = {}
    names = [path]
    if before == "missing":
        names.append(folder / "dangling")
        names[-1].symlink_to(path.name)
    else:
        _make_file(path, before, expected)
        names += [folder / "symbolic", folder / "hard"]
        names[1].symlink_to(path)
        names[2].hardlink_to(path)
    start_read, start_write = os.pipe()
    said_read, said_write = os.pipe()
    racers = []
    for number in range(RACERS):
        name, timeout = rng.choice(names), rng.choice((0.0, 0.0, LONG))
        dies = rng.random() < 0.2

        def run(
            number: int = number, name: Path = name, timeout: float = timeout, dies: bool = dies
        ) -> None:
            os.close(start_write)
            os.read(start_read, 1)  # until the last writer is gone
            said = _race(name, folder / "in use", str(number), timeout, dies)
            os.write(said_write, f"{number} {said}\n".encode())
            if said == "dying":
                os.kill(os.getpid(), signal.SIGKILL)

        racers.append((fork(run), timeout))
    for descriptor in (start_read, said_write, start_write):
        os.close(descriptor)
    with open(said_read, encoding="utf-8") as said_by_all:
        outcomes = dict(line.split() for line in said_by_all)
    for number, (pid, timeout) in enumerate(racers):
        code, said = wait(pid), outcomes.get(str(number))
        if said in ("held", "dying"):
            assert code == (0 if said == "held" else -signal.SIGKILL)
            expected[str(number)] = {"racer": str(number)}
        else:
            assert (code, said) == (0, "locked"), f"racer {number}: {said}, exit code {code}"
            assert timeout == 0, f"racer {number} was to wait, and was refused"
    assert Counter(outcomes.values())["held"] + Counter(outcomes.values())["dying"] >= 1
    with KVStore(rng.choice(names)) as store:
        assert dict(store) == expected
    assert_consistent(path)
    return RACERS


def _make_file(path: Path, state: str, expected: dict[str, Value]) -> None:
    if state == "empty":
        path.touch()
        return
    original = path.with_name("original") if state == "not closed" else path
    with KVStore(original) as store:
        for number in range(300):
            expected[f"before {number}"] = {"racer": f"before {number}"}
            store.create(f"before {number}", expected[f"before {number}"])
        if state == "not closed":
            path.write_bytes(original.read_bytes())


def _race(name: Path, marker: Path, key: str, timeout: float, dies: bool) -> str:
    """Open the file; what it holds then is whole, and nobody else has it meanwhile."""
    try:
        store = KVStore(name, timeout=timeout)
    except StoreLockedError:
        return "locked"
    # Exclusive creation fails where a second process believes that it has the file as well.
    os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    contents = dict(store)
    assert all(value == {"racer": key} for key, value in contents.items()), contents
    assert len(store) == len(contents)
    store.create(key, {"racer": key})
    marker.unlink()
    if dies:
        # Kept alive, and so open, by its file's being in use until the process dies.
        _dying.append(store)
        return "dying"
    store.close()
    return "held"


_dying: list[KVStore] = []


# --- forks -------------------------------------------------------------------------------------


def fork_amid_work(folder: Path, rng: random.Random) -> int:
    """Fork, from any thread, while others work on the store and as it closes; return how often."""
    switch_often(rng)
    path = folder / "store.kvs"
    store = KVStore(path, durable=rng.random() < 0.4)
    owners = [Owner(f"{number}/", rng, small=rng.random() < 0.5) for number in range(4)]
    lingering, released = os.pipe()
    lingerers: list[int] = []
    closes = threading.Event()

    def fork_some(seed: float) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(FORKS // 2 - 3):
                fork_one(dice.choice(_ACTS), closing=False)
        finally:
            closes.set()
        for _ in range(3):
            fork_one(dice.choice(_ACTS), closing=True)

    def fork_one(act: Callable[[KVStore, Path], None], *, closing: bool) -> None:
        def live() -> None:
            os.close(released)
            if not closing and not closes.is_set():
                # The map has one, of which a copy does not hold the lock.
                assert len(_descriptors_of(path)) <= 1, "the child has the locked file open"
            act(store, folder)
            _use_every_member(store)
            if act is _linger:
                os.read(lingering, 1)

        pid = fork(live)
        if act is _linger:
            lingerers.append(pid)
        else:
            code = wait(pid)
            assert code in (0, -signal.SIGKILL), f"a child ended with {code}: {act.__name__}"

    def close() -> None:
        closes.wait(PATIENCE_SECONDS)
        store.close()

    seeds = [rng.random(), rng.random()]
    run_together(
        *(lambda owner=owner: owner.work(store) for owner in owners),
        *(lambda seed=seed: fork_some(seed) for seed in seeds),
        close,
    )
    expected = {key: value for owner in owners for key, value in owner.live.items()}
    assert_consistent(path)
    # Those that live on keep nothing of it.
    with KVStore(path) as again:
        assert dict(again) == expected
    os.close(released)
    os.close(lingering)
    for pid in lingerers:
        assert wait(pid) == 0
    return FORKS


def _descriptors_of(path: Path) -> list[str]:
    """Return which descriptors of this process are of the file, where the system tells."""
    found = []
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}") == str(path):
                    found.append(name)
    return found


def _use_every_member(store: KVStore) -> None:
    uses: dict[str, Callable[[], object]] = {
        "create": lambda: store.create("child's", {}),
        "create with ttl": lambda: store.create("child's", {}, 1),
        "read": lambda: store.read("0/1"),
        "get": lambda: store.get("absent"),
        "delete": lambda: store.delete("0/1"),
        "ttl": lambda: store.ttl("0/1"),
        "in": lambda: "0/1" in store,
        "len": lambda: len(store),
        "iter": lambda: list(store),
        "items": lambda: list(store.items()),
        "purge_expired": store.purge_expired,
        "sync": store.sync,
        "stats": store.stats,
    }
    for name, use in uses.items():
        with suppress(StoreClosedError):
            raise AssertionError(f"{name} in a forked child gave {use()!r}")
    assert store.closed


def _nothing(store: KVStore, folder: Path) -> None:
    pass


def _linger(store: KVStore, folder: Path) -> None:
    pass


def _close(store: KVStore, folder: Path) -> None:
    store.close()
    with suppress(StoreClosedError), store:
        raise AssertionError("a forked child entered the parent's store")


def _collect(store: KVStore, folder: Path) -> None:
    store.__del__()
    gc.collect()


def _exit(store: KVStore, folder: Path) -> None:
    """Run what is registered for the interpreter's exit, but for the laboratory's own folders."""
    atexit.unregister(getattr(weakref.finalize, "_exitfunc"))  # noqa: B009 - unknown to typing
    atexit._run_exitfuncs()


def _be_killed(store: KVStore, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fork_again(store: KVStore, folder: Path) -> None:
    def act() -> None:
        _close(store, folder)
        _use_every_member(store)

    assert wait(fork(act)) == 0


def _execute(store: KVStore, folder: Path) -> None:
    """Become another program, which has nothing of the file."""
    code = (
        "import os, sys; fds = '/proc/self/fd'; paths = [os.path.join(fds, fd) for fd in "
        "(os.listdir(fds) if os.path.exists(fds) else [])]; "
        "sys.exit(any(os.readlink(p) == sys.argv[1] for p in paths if os.path.lexists(p)))"
    )
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code, str(store.path)])


def _open_own(store: KVStore, folder: Path) -> None:
    """Use a file of the child's own; the parent's is locked, or was closed by now."""
    with KVStore(folder / f"{os.getpid()}.kvs") as own:
        own.create("key", {})
        with suppress(StoreLockedError), KVStore(store.path) as parents:
            dict(parents)
        assert dict(own) == {"key": {}}


_ACTS: Final = (
    _nothing,
    _close,
    _close,
    _collect,
    _exit,
    _be_killed,
    _fork_again,
    _open_own,
    _execute,
    _linger,
)


# --- holders -----------------------------------------------------------------------------------


class Holders:
    """Processes that wait for a file and have it in turn, watched by the one that harms them."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self._path = path
        self._rng = rng
        self._said_read, self._said_write = os.pipe()
        self._heard = b""
        self._alive: set[int] = set()
        self._killed: set[int] = set()
        self._holder = 0
        self._acknowledged: dict[str, int] = {}
        self._marks = 0

    def start(self, timeout: float) -> None:
        """Start one that waits for the file, works on it, and lets go of it."""
        self._marks += 1
        mark, seed = self._marks, self._rng.random()

        def run() -> None:
            try:
                with KVStore(self._path, timeout=timeout) as store:
                    self._say("has")
                    self._work(store, mark, random.Random(seed))
                    self._say("closes")
            except BaseException:
                self._say("failed")
                raise

        self._alive.add(fork(run))

    def _work(self, store: KVStore, mark: int, dice: random.Random) -> None:
        for key, value in store.items():
            assert value == make_value(key, value["mark"], len(value["text"])), value
        for number in range(dice.randrange(1, 400)):
            key = f"{mark}/{number}"
            store.create(key, make_value(key, mark, dice.choice((0, 100, 3_000))))
            if number % 5 == 0:
                self._say(f"created {key}")
            if number % 50 == 0:
                store.sync()

    def _say(self, what: str) -> None:
        os.write(self._said_write, f"{os.getpid()} {what}\n".encode())

    def harm_all(self) -> int:
        """Kill and stop whoever has it, until nobody is left; return how often that was done."""
        harmed = 0
        while self._alive:
            pid, what = self._hear()
            if what == "has":
                assert self._holder in (0, pid) or self._holder in self._killed, "two have it"
                self._holder = pid
                fate = self._rng.choice(("lives", "killed", "stopped", "stopped and killed"))
                for _ in range(self._rng.choice((0, 0, 1, 10))):
                    if self._holder:
                        self._hear()
                if fate != "lives" and self._holder:
                    self._harm(pid, fate)
                    harmed += 1
        return harmed

    def _harm(self, pid: int, fate: str) -> None:
        if fate.startswith("stopped"):
            os.kill(pid, signal.SIGSTOP)
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self._alive.discard(pid)
                assert status == 0, f"a process that had the file ended with status {status}"
                return
            # What it said before it was stopped says whether it has the file still.
            while self._holder == pid and self._has_said_something():
                self._hear()
            if self._holder != pid:
                return
            with suppress(StoreLockedError):
                KVStore(self._path, timeout=self._rng.choice((0, 0.01)))
                raise AssertionError("a stopped process lost its file")
        if fate.endswith("killed"):
            self._killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            self._bury(pid, -signal.SIGKILL, 0)
        else:
            os.kill(pid, signal.SIGCONT)

    def _bury(self, pid: int, *codes: int) -> None:
        code = wait(pid)
        self._alive.discard(pid)
        assert code in codes, f"a process that had the file ended with {code}"

    def _has_said_something(self) -> bool:
        if b"\n" in self._heard:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(self._said_read, selectors.EVENT_READ)
            return bool(selector.select(0))

    def _hear(self) -> tuple[int, str]:
        while b"\n" not in self._heard:
            self._heard += os.read(self._said_read, 65_536)
        line, _, self._heard = self._heard.partition(b"\n")
        number, _, what = line.decode().partition(" ")
        pid = int(number)
        assert what != "failed", f"process {pid} failed"
        if what.startswith("created "):
            key = what.removeprefix("created ")
            self._acknowledged[key] = int(key.partition("/")[0])
        elif what == "closes":
            self._holder = 0
            if pid in self._alive:
                os.kill(pid, signal.SIGCONT)  # it may have been stopped right after it said so
                self._bury(pid, 0)
        return pid, what

    def assert_nothing_is_lost(self) -> None:
        while self._has_said_something():
            self._hear()
        os.close(self._said_read)
        os.close(self._said_write)
        with KVStore(self._path) as store:
            for key, mark in self._acknowledged.items():
                assert store.read(key)["mark"] == mark
            for key, value in store.items():
                assert value == make_value(key, value["mark"], len(value["text"])), value
        assert_consistent(self._path)


def harm_holders(folder: Path, rng: random.Random) -> int:
    """Kill or stop processes that have the file while others wait for it; return how many."""
    holders = Holders(folder / "store.kvs", rng)
    for _ in range(HOLDERS):
        holders.start(LONG)
    harmed = holders.harm_all()
    holders.assert_nothing_is_lost()
    return harmed


# --- ends of the interpreter -------------------------------------------------------------------

_THREADS_AT_THE_END: Final = """
import gc, os, signal, sys, threading
from kvstore import KVStore, StoreClosedError
sys.setswitchinterval(1e-5)
folder, ending, durable = sys.argv[1:]
kept = store = KVStore(folder + "/store.kvs", durable=durable == "True")
reached = threading.Semaphore(0)

def say(what):
    os.write(1, what.encode() + b"\\n")

def create(name):
    for number in range(1_000_000):
        key = f"{name}/{number}"
        try:
            kept.create(key, {"key": key})
        except StoreClosedError:
            return
        say(key)
        if number % 3 == 0:
            kept.delete(key) if kept.closed else None
        if number == 10:
            reached.release()

def look():
    for number in range(1_000_000):
        try:
            len(kept), kept.stats(), list(kept), kept.purge_expired()
        except StoreClosedError:
            return
        if number == 2:
            reached.release()

def sync():
    for number in range(1_000_000):
        try:
            kept.sync()
        except StoreClosedError:
            return
        if number == 2:
            reached.release()

def open_and_close():
    for number in range(1_000_000):
        with KVStore(folder + "/other.kvs") as own:
            own.create(f"{number}/{os.getpid()}", {})
        if number == 1:
            reached.release()

def die():
    kept.create("dying", {"key": "dying"})
    say("dying")
    reached.release()
    raise ValueError("as expected")

works = [lambda: create("a"), lambda: create("b"), look, sync, die]
if "opens" in ending:
    works.append(open_and_close)
for work in works:
    threading.Thread(target=work, daemon=True).start()
for work in works:
    reached.acquire()
if "cycle" in ending:
    class Node:
        pass
    node = Node()
    node.store, node.node = KVStore(folder + "/cycle.kvs"), node
    node.store.create("key", {})
    del node
if "dropped" in ending:
    del store
if "exit 3" in ending:
    sys.exit(3)
if "raises" in ending:
    raise ValueError("as expected")
if "closes" in ending:
    kept.close()
if "at once" in ending:
    os._exit(0)
if "terminated" in ending:
    os.kill(os.getpid(), signal.SIGTERM)
"""

_ENDINGS: Final = (
    ("falls off its end", 0),
    ("falls off its end, dropped", 0),
    ("falls off its end, leaves a cycle", 0),
    ("exit 3, leaves a cycle", 3),
    ("exit 3, opens", 3),
    ("falls off its end, opens", 0),
    ("raises", 1),
    ("closes", 0),
    ("at once", 0),
    ("at once, opens", 0),
    ("terminated", -signal.SIGTERM),
)


def end_with_threads_at_work(folder: Path, rng: random.Random) -> int:
    """Let interpreters end in every way while daemon threads use stores; return how many."""
    for number in range(ENDS):
        ending, code = rng.choice(_ENDINGS)
        place = folder / str(number)
        place.mkdir()
        ended = subprocess.run(
            [sys.executable, "-c", _THREADS_AT_THE_END, place, ending, str(rng.random() < 0.3)],
            env=environment(),
            capture_output=True,
            encoding="utf-8",
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        what = f"{ending}: exit code {ended.returncode}\n{ended.stderr[-4000:]}"
        assert ended.returncode == code, what
        assert "Fatal" not in ended.stderr, what
        path = place / "store.kvs"
        if "at once" not in ending and "terminated" not in ending:
            assert_consistent(path)
            if "cycle" in ending:
                assert_consistent(place / "cycle.kvs")
        with KVStore(path) as store:
            for key in ended.stdout.split():
                assert store.get(key) == {"key": key}, f"{key!r} was lost; {what}"
            assert all(value == {"key": key} for key, value in store.items())
        assert_consistent(path)
        with KVStore(place / "other.kvs") as store:
            assert all(value == {} for value in store.values())
    return ENDS


# --- what is at the path -----------------------------------------------------------------------


class StoreFile:
    """A store's file, by whatever names, if any: its contents, and who has it open."""

    def __init__(self) -> None:
        self.contents: dict[str, Value] = {}
        self.store: KVStore | None = None


class Names:
    """A folder of stores, some open, whose files are removed, moved, linked and replaced."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder = folder
        self._rng = rng
        self._files: dict[Path, StoreFile] = {}
        self._open: list[StoreFile] = []
        self._links: dict[Path, Path] = {}
        self._marks = 0

    def _any_path(self) -> Path:
        return self._folder / f"{self._rng.randrange(5)}.kvs"

    def _file_at(self, path: Path) -> StoreFile | None:
        return self._files.get(self._links.get(path, path))

    def change(self) -> None:
        """Change what is at a path, or the contents of an open store."""
        self._rng.choice(
            (self._open_one,) * 3
            + (self._use,) * 6
            + (self._close, self._remove, self._move, self._link, self._link, self._sync)
        )()

    def _open_one(self) -> None:
        path = self._any_path()
        if self._rng.random() < 0.3 and self._links:
            path = self._rng.choice(list(self._links))
        there = self._file_at(path)
        try:
            store = KVStore(path)
        except StoreLockedError:
            assert there is not None, f"{path}: nothing is there to be locked"
            assert there.store is not None, f"{path}: nobody has it open"
            return
        if there is None:
            there = self._files[self._links.get(path, path)] = StoreFile()
        assert there.store is None, f"{path} was opened a second time"
        there.store = store
        self._open.append(there)
        assert dict(store) == there.contents

    def _use(self) -> None:
        if self._open:
            file = self._rng.choice(self._open)
            store, contents = file.store, file.contents
            assert store is not None
            for _ in range(self._rng.randrange(1, 40)):
                key = f"{self._rng.randrange(100)}"
                if key in contents and self._rng.random() < 0.7:
                    assert store.read(key) == contents.pop(key)
                    store.delete(key)
                elif key not in contents:
                    self._marks += 1
                    contents[key] = make_value(key, self._marks, self._rng.choice((0, 900, 9_000)))
                    store.create(key, contents[key])
            assert dict(store) == contents

    def _is_at_its_path(self, file: StoreFile) -> bool:
        assert file.store is not None
        return self._file_at(file.store.path) is file

    def _sync(self) -> None:
        if self._open:
            file = self._rng.choice(self._open)
            assert file.store is not None
            self._says_so(file, file.store.sync)

    def _says_so(self, file: StoreFile, act: Callable[[], None]) -> None:
        """Assert that it raises OSError exactly where the path does not name the file any more."""
        said = False
        lost = not self._is_at_its_path(file)
        try:
            act()
        except OSError:
            said = True
        assert said == lost, f"the file is {'not ' * lost}at its path; said so: {said}"

    def _close(self) -> None:
        if self._open:
            file = self._open.pop(self._rng.randrange(len(self._open)))
            store = file.store
            assert store is not None
            self._says_so(file, store.close)
            assert store.closed
            file.store = None

    def _remove(self) -> None:
        path = self._any_path()
        if path in self._files:
            path.unlink()
            del self._files[path]

    def _move(self) -> None:
        path, other = self._any_path(), self._any_path()
        if path in self._files and path != other:
            if self._files.get(other) is self._files[path]:
                return  # two names of one file: nothing would happen
            path.replace(other)
            self._files[other] = self._files.pop(path)

    def _link(self) -> None:
        path, other = self._any_path(), self._any_path()
        if self._rng.random() < 0.5 and len(self._links) < 4:
            link = self._folder / f"link {len(self._links)}"
            link.symlink_to(path.name)
            self._links[link] = path
        elif path in self._files and other not in self._files:
            os.link(path, other)
            self._files[other] = self._files[path]

    def end(self) -> None:
        """Close what is open, and look at what is left."""
        while self._open:
            self._close()
        for path, file in self._files.items():
            assert_consistent(path)
            with KVStore(path) as store:
                assert dict(store) == file.contents


def change_what_is_at_the_paths(folder: Path, rng: random.Random) -> int:
    """Remove, move, link and replace files while stores have them open; return how often."""
    names = Names(folder, rng)
    for _ in range(CHANGES):
        names.change()
    names.end()
    return CHANGES


def _no_posix() -> str | None:
    return None if os.name == "posix" else "needs POSIX processes and files"


EXPERIMENTS = tuple(
    Experiment(f"process-{name}", fault, unit, trial, unavailable=_no_posix)
    for name, fault, unit, trial in (
        ("races", "processes that open a file at one moment", "processes", race_to_open),
        ("forks", "forks amid the work of threads, and at closing", "forks", fork_amid_work),
        ("holders", "a holder killed or stopped while others wait", "holders", harm_holders),
        ("ends", "the interpreter's end amid threads' work", "ends", end_with_threads_at_work),
        ("paths", "the open file removed, moved, linked", "changes", change_what_is_at_the_paths),
    )
)
