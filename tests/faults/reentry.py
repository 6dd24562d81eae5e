"""Calls from within: by a thread that is inside an operation already.

What a signal handler, a finalizer or a trace function does comes between two instructions of an
operation. Here a store is called there: at every instruction of the interpreter, before and after
every call of a function in C (so around every system call), and by real signals, and real garbage
collection, which come where they come. Nothing hangs: a trial that does is killed by the laboratory
and failed. What raises `StoreBusyError` has changed nothing, what returns has happened, and the
interrupted call does all that it was to do.
"""

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Final

from support.cases import CASES, MAX_BYTES, Case, Prepared, State, write_path
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.threads import run_together

import kvstore.clock
from kvstore import (
    IMPLEMENTATION,
    KeyExistsError,
    KeyNotFoundError,
    KVStore,
    KVStoreError,
    StoreBusyError,
    StoreClosedError,
    StoreLockedError,
)
from kvstore.file import reentry
from kvstore.recovery.check import check_file

from .interrupts import POINTS, Stepping, points_of
from .laboratory import Experiment

_OWN: Final = str(Path(kvstore.__file__).parent)
_NESTED: Final = "nested"
_VALUE: Final = {"by": "a call from within"}
_SECONDS: Final = 0.5


class Interruption(Stepping):
    """Calls `act` at one of the points that a call comes to.

    Args:
        act: what is done there; it gets the frame that is interrupted.
        at: the number of the point, from 1; 0 does nothing, and counts them.
    """

    def __init__(self, act: Callable[[FrameType], object], at: int = 0) -> None:
        super().__init__(at, profiles=True)
        self._act = act

    def do(self, frame: FrameType) -> None:
        """Call it, and look no further."""
        sys.settrace(None)
        sys.setprofile(None)
        self._act(frame)

    def is_of_interest(self, frame: FrameType) -> bool:
        """Return whether it is the store's."""
        return frame.f_code.co_filename.startswith(_OWN)

    def name_of(self, frame: FrameType) -> str | None:
        """Return where the instruction is: each one is a point."""
        return f"instruction {frame.f_lasti}"

    def name_of_call(self, event: str, arg: object) -> str | None:
        """Return what is said before and after each call of a function in C."""
        is_of_c = event in ("c_call", "c_return")
        return f"{event} of {getattr(arg, '__qualname__', arg)}" if is_of_c else None


# --- what is called ------------------------------------------------------------------------------


def prepare(store: KVStore) -> None:
    """Have some keys, of which a few have a time-to-live."""
    for number in range(30):
        store.create(f"{'é' * (number % 3 * 10)}look {number}", {"n": number}, number + 10**6)


def _list_all(store: KVStore) -> None:
    dict(store.items())


MEMBERS: Final[dict[str, Callable[[KVStore], object]]] = {
    "create": lambda store: store.create(_NESTED, _VALUE),
    "create with TTL": lambda store: store.create(_NESTED, _VALUE, 10**6),
    "put": lambda store: store.put(_NESTED, _VALUE),
    "put over": lambda store: store.put("12", _VALUE),
    "touch": lambda store: store.touch("13", 10**6),
    "set a default": lambda store: store.setdefault(_NESTED, _VALUE),
    "set no default": lambda store: store.setdefault("14", _VALUE),
    "pop": lambda store: store.pop("11"),
    "put many": lambda store: store.put_many({_NESTED: _VALUE}),
    "get many": lambda store: store.get_many(["none", "1", "2"]),
    "delete many": lambda store: store.delete_many(["none", "11"]),
    "read": lambda store: store.read("1"),
    "read_bytes": lambda store: store.read_bytes("2"),
    "get": lambda store: store.get("none"),
    "in": lambda store: "3" in store,
    "ttl": lambda store: store.ttl("4"),
    "delete": lambda store: store.delete("11"),
    "len": len,
    "keys": list,
    "items": _list_all,
    "purge": KVStore.purge_expired,
    "sync": KVStore.sync,
    "stats": KVStore.stats,
    "compact": KVStore.compact,
    "backup": lambda store: store.backup(f"{store.path}.backup", overwrite=True),
    "close": KVStore.close,
}
_TAKES_ROOM: Final = (
    "create",
    "create with TTL",
    "put",
    "put over",
    "touch",
    "set a default",
    "put many",
)
# What only looks is interrupted as well. At one key the compiled one looks without any Python.
_LOOKS: Final = tuple(
    Case(name, prepare, MEMBERS[name])
    for name in (
        *("len", "keys", "items", "stats", "backup", "get many"),
        *(() if IMPLEMENTATION == "compiled" else ("read", "read_bytes", "get", "in", "ttl")),
    )
)


class Outcome:
    """What came of a member that was called from within."""

    def __init__(self, store: KVStore, name: str, other: Path) -> None:
        self._store = store
        self.name = name
        self._other = other
        self.raised: BaseException | None = None

    def __call__(self, _frame: FrameType) -> None:
        try:
            MEMBERS[self.name](self._store)
        except (StoreBusyError, StoreClosedError) as error:
            if self.name == "close":
                raise
            self.raised = error
        self._use_another()

    def _use_another(self) -> None:
        """Another store is nobody's business: it opens, works, and closes at once."""
        with suppress(StoreBusyError), KVStore(self._other, max_bytes=MAX_BYTES) as other:
            with suppress(KeyExistsError):
                other.create("k", {"n": 1}, ttl=100)
            assert other.read("k") == {"n": 1}
            assert len(other) == 1
            other.delete("k")
            other.close()
            assert other.closed
            KVStore(self._other, max_bytes=MAX_BYTES).close()

    def apply_to(self, state: State) -> State:
        """Return the contents of a store with what was done."""
        state = dict(state)
        if self.raised is None:
            if self.name in ("create", "create with TTL", "put", "put many", "set a default"):
                state[_NESTED] = _VALUE
            elif self.name == "put over":
                state["12"] = _VALUE
            elif self.name in ("delete", "delete many", "pop"):
                del state["11"]
        return state


# --- an operation interrupted at every point -----------------------------------------------------


def call_from_within(folder: Path, rng: random.Random) -> int:
    """Choose a case, and call a member at each of some of its points; return at how many."""
    case = rng.choice([case for case in CASES + _LOOKS if not case.empties])
    clock = FakeClock()
    setattr(kvstore.clock, "time_ns", clock)  # noqa: B010 - a plain one is no valid typing
    names = [name for name in MEMBERS if case.probes or name not in _TAKES_ROOM]
    if case.name.startswith("close") and rng.random() < 0.5:
        names = ["close"]
    durable = rng.random() < 0.5
    with write_path(rng.random() < 0.7):
        prepared = Prepared(case, folder, clock)
        file = folder / "test.kvs"
        store = prepared.open(file, durable=durable)
        counting = Interruption(lambda _: None)
        counting.run(partial(case.run, store))
        store.close()
        tried = 0
        for at in points_of(counting, POINTS, rng):
            name = names[rng.randrange(len(names))]
            store = prepared.open(file, durable=durable)
            outcome = Outcome(store, name, folder / "other.kvs")
            interruption = Interruption(outcome, at)
            try:
                _interrupt_once(prepared, store, interruption, outcome)
            except BaseException as failure:
                failure.add_note(
                    f"{name} ({outcome.raised!r}) at point {at} of {counting.points} of "
                    f"{case.name!r}: {interruption.where}; durable: {durable}"
                )
                raise
            tried += bool(interruption.where)
    assert tried, "no point was met"
    return tried


def _interrupt_once(
    prepared: Prepared, store: KVStore, interruption: Interruption, outcome: Outcome
) -> None:
    file, closes = store.path, outcome.name == "close"
    expected = prepared.after
    try:
        interruption.run(partial(prepared.case.run, store))
    except StoreClosedError:
        # Closed before it had begun; what had, is not broken off.
        assert closes, "an operation that nobody closed"
        expected = prepared.before
    assert not reentry.is_inside()
    assert not reentry.waiting
    if interruption.where:
        expected = outcome.apply_to(expected)
        assert not closes or store.closed, "close() was forgotten"
    if not store.closed:
        run_together(partial(_use_on, store, expected))
        run_together(store.close)
    problems = [str(problem) for problem in check_file(file)]
    assert not problems, problems[:5]
    with KVStore(file, max_bytes=MAX_BYTES) as opened:
        found = dict(opened.items())
    assert found == expected, sorted(found.keys() ^ expected.keys())
    assert_consistent(file)


def _use_on(store: KVStore, expected: State) -> None:
    """Use all of a store in a thread that holds no lock of it."""
    assert dict(store.items()) == expected
    assert len(store) == len(expected)
    store.purge_expired()
    store.stats()
    store.sync()


# --- an opening interrupted at every point -------------------------------------------------------


class AtOpening:
    """Opens stores, and calls what there is of a half-made one."""

    def __init__(self, file: Path, other: Path) -> None:
        self._file = file
        self._other = other

    def __call__(self, frame: FrameType) -> None:
        with suppress(StoreBusyError, StoreLockedError):
            KVStore(self._file, max_bytes=MAX_BYTES).close()
        with suppress(StoreBusyError), KVStore(self._other, max_bytes=MAX_BYTES) as other:
            with suppress(KeyExistsError):
                other.create("k", {"n": 1})
            assert other.read("k") == {"n": 1}
        half_made = self._find_store(frame)
        if half_made is None or not half_made.closed:
            return
        repr(half_made)
        for name, call in MEMBERS.items():
            try:
                call(half_made)
            except StoreClosedError:
                continue
            assert name == "close", name
        with suppress(TypeError):
            half_made.__init__(self._other)  # type: ignore[misc]
            assert not half_made.closed, "the inner one has opened it"
            half_made.close()

    @staticmethod
    def _find_store(frame: FrameType | None) -> KVStore | None:
        while frame is not None:
            own = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
            if isinstance(own, KVStore):
                return own
            frame = frame.f_back
        return None


def call_from_within_opening(folder: Path, rng: random.Random) -> int:
    """Interrupt creation, opening and recovery."""
    setattr(kvstore.clock, "time_ns", FakeClock())  # noqa: B010 - as above
    file = folder / "test.kvs"
    tried = 0
    with write_path(rng.random() < 0.7):
        with KVStore(file, max_bytes=MAX_BYTES) as store:
            state = {f"{'é' * (n % 3 * 12)}{n}": {"n": n} for n in range(rng.randrange(1, 100))}
            for key, value in state.items():
                store.create(key, value)
            unclean = file.read_bytes()
        for start, expected in ((None, {}), (file.read_bytes(), state), (unclean, state)):
            counting = Interruption(lambda _: None)
            _open_interrupted(file, start, counting)
            for at in points_of(counting, POINTS // 3, rng):
                interruption = Interruption(AtOpening(file, folder / "other.kvs"), at)
                try:
                    found = _open_interrupted(file, start, interruption)
                    assert found == expected
                    assert not reentry.waiting
                except BaseException as failure:
                    failure.add_note(f"at point {at} of {counting.points}: {interruption.where}")
                    raise
                tried += bool(interruption.where)
    return tried


def _open_interrupted(file: Path, start: bytes | None, interruption: Interruption) -> State:
    file.unlink(missing_ok=True)
    if start is not None:
        file.write_bytes(start)
    opened: list[KVStore] = []

    def open_store() -> None:
        # Where the call from within was first, of the file or of the object: it has closed by now.
        with suppress(StoreLockedError, TypeError):
            opened.append(KVStore(file, max_bytes=MAX_BYTES))

    interruption.run(open_store)
    if not opened:
        opened.append(KVStore(file, max_bytes=MAX_BYTES))
    with opened.pop() as store:
        return dict(store.items())


# --- real signals and real garbage ---------------------------------------------------------------


class Crowd:
    """A store that the main thread, signal handlers and finalizers use at once, and its contents.

    Each key is one user's only; so what it does to it follows from what its calls said.
    """

    def __init__(self, store: KVStore, rng: random.Random) -> None:
        self.store = store
        self.live: State = {}
        self.calls = 0
        self._rng = rng
        self._numbers = count()

    def use(self, whose: str) -> None:
        """Call something; where it raises that the thread is busy, nothing has happened."""
        self.calls += 1
        key = f"{whose}{next(self._numbers)}"
        value = {"by": whose, "x": "x" * self._rng.choice((1, 50, 900, 5_000))}
        own = self._own(whose)
        with suppress(StoreBusyError):
            match self._rng.randrange(10):
                case 0 | 1 | 2 | 3 if len(own) < 200:
                    self.store.create(key, value, self._rng.choice((None, 10**6)))
                    self.live[key] = value
                case 4 if own:
                    self.store.put(own[0], value, self._rng.choice((None, 10**6)))
                    self.live[own[0]] = value
                case 5 | 6 if own:
                    self.store.delete(own[0])
                    del self.live[own[0]]
                case 7 if own:
                    assert self.store.read(own[-1]) == self.live[own[-1]]
                case 8:
                    len(self.store)
                case 9:
                    self.store.purge_expired()
                    self.store.sync()
                case _:
                    assert next(iter(self.store), "") is not None

    def _own(self, whose: str) -> list[str]:
        while True:
            with suppress(RuntimeError):  # changed meanwhile, by a finalizer
                return [key for key in self.live if key.startswith(whose)]

    def check(self) -> None:
        """Compare what is in the store with what it acknowledged."""
        found = dict(self.store.items())
        assert found == self.live, sorted(found.keys() ^ self.live.keys())


class Garbage:
    """In a circle with itself, so that the collector finds it, amid whatever operation that is."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self.itself = self

    def __del__(self) -> None:
        self._crowd.use("g")


def signals_and_garbage(folder: Path, rng: random.Random) -> int:
    """Use a store with handlers, finalizers and another thread; then close it from a handler."""
    file = folder / "test.kvs"
    store = KVStore(file, durable=rng.random() < 0.5)
    crowd = Crowd(store, rng)
    deadline = threading.Event()
    failures: list[BaseException] = []

    def guarded(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    def elsewhere() -> None:
        """Have locks contended, and the interpreter switch threads amid operations."""
        for number in count():
            if deadline.is_set():
                return
            store.create(f"t{number % 50}", {})
            len(store)
            store.delete(f"t{number % 50}")

    def rearm() -> None:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))

    def handle(*_: object) -> None:
        guarded(partial(crowd.use, "s"))
        if not deadline.is_set():  # one that came as the timer was stopped would start it again
            rearm()

    thresholds = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    thread = threading.Thread(target=guarded, args=(elsewhere,), daemon=True)
    signal.signal(signal.SIGALRM, handle)
    end = kvstore.clock.time_ns() + int(_SECONDS * 10**9)
    thread.start()
    rearm()
    while kvstore.clock.time_ns() < end and not failures:
        Garbage(crowd)
        crowd.use("m")
    deadline.set()
    signal.setitimer(signal.ITIMER_REAL, 0)
    thread.join(60)
    gc.collect()
    gc.set_threshold(*thresholds)
    assert not thread.is_alive(), "a thread hangs"
    assert not failures, failures
    crowd.check()
    _close_by_signal(crowd)
    assert_consistent(file)
    with KVStore(file) as opened:
        crowd.store = opened
        crowd.check()
    return crowd.calls


def _close_by_signal(crowd: Crowd) -> None:
    """Close the store by a handler, wherever the main thread is; which ends first."""
    signal.signal(signal.SIGALRM, lambda *_: crowd.store.close())
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    with suppress(StoreClosedError):
        while True:
            crowd.store.create("last", {})
            crowd.store.delete("last")
    assert crowd.store.closed
    with suppress(KVStoreError):
        crowd.store.create("never", {})
        raise AssertionError("a closed store was used")
    with KVStore(crowd.store.path) as opened, suppress(KeyNotFoundError):
        opened.delete("last")


# --- two stores, crosswise -----------------------------------------------------------------------


def crosswise(folder: Path, rng: random.Random) -> int:
    """Two threads, each inside one store and calling the other one: they never wait in a circle."""
    stores = [KVStore(folder / f"{number}.kvs", durable=rng.random() < 0.3) for number in range(2)]
    calls = [0, 0]

    def work(number: int) -> None:
        own, other = stores[number], stores[1 - number]
        chance = random.Random(rng.getrandbits(32) + number)

        def call_other(frame: FrameType, event: str, _arg: object) -> None:
            if not frame.f_code.co_filename.startswith(_OWN) or chance.random() > 0.05:
                return
            calls[number] += 1
            with suppress(StoreBusyError, KeyNotFoundError, KeyExistsError):
                chance.choice((len, KVStore.stats, list, KVStore.sync))(other)
                other.create(f"x{number}", {})
                other.delete(f"x{number}")

        sys.setprofile(call_other)
        try:
            for turn in range(50):
                own.create(f"{number} {turn}", {"turn": turn})
                len(own)
                own.delete(f"{number} {turn}")
                own.sync()
        finally:
            sys.setprofile(None)

    run_together(partial(work, 0), partial(work, 1))
    for store in stores:
        left = set(store)
        assert left <= {"x0", "x1"}, left
        store.close()
        assert_consistent(store.path)
    return sum(calls)


def _no_signals() -> str | None:
    return None if os.name == "posix" else "takes the timers and signals of POSIX"


EXPERIMENTS = (
    Experiment(
        "reentry-anywhere",
        "Members called amid an operation, or closing, at every instruction and call of C",
        "calls",
        call_from_within,
        2,
    ),
    Experiment(
        "reentry-at-opening",
        "Stores opened, and half-made ones used, amid opening, creation or recovery",
        "calls",
        call_from_within_opening,
        1,
    ),
    Experiment(
        "reentry-signals",
        "Signal handlers and finalizers that use and close the store, as they come",
        "calls",
        signals_and_garbage,
        1,
        _no_signals,
    ),
    Experiment(
        "reentry-crosswise",
        "Threads inside one store that call another one, where others are inside that",
        "calls",
        crosswise,
        1,
    ),
)
