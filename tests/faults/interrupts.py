"""Exceptions that come from nowhere, at every point of an operation at which one can.

Two kinds, and where each can come up in CPython:

- `MemoryError`: from every instruction that may allocate or call. Those left out only move
  references about; so does the call by which a ``with`` block that ended well lets go of its lock,
  but for the tuple of its three arguments, which comes from a list of spare ones.
- `KeyboardInterrupt`, and whatever else a signal handler or another thread raises: where the
  interpreter looks for pending calls, which is at the start of a function, after a call of one in
  C, and at a jump backward. So never between a lock's being taken by ``with`` and the block.

Each point of a call is tried in a store of its own. The store works on at once, in another thread
(so no lock is left held), every key is as it was, the one under way is as before or as after; and
once the file has been closed and opened again nothing of it is missing or leaked.
"""

import dis
import gc
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

from support.cases import CASES, MAX_BYTES, Case, Prepared, State, make_probes, write_path
from support.clock import FakeClock
from support.consistency import assert_consistent
from support.threads import run_together
from support.workload import Value, difference, make_value

import kvstore.clock
from kvstore import KVStore
from kvstore.recovery.check import check_file

from .laboratory import Experiment

POINTS: Final = 20  # a trial, spread evenly over those of one case
_POINTS_OF_LONG_CASES: Final = 4
_LONG: Final = 20_000  # points

_TESTS: Final = str(Path(__file__).resolve().parent.parent)
# Instructions that move references about, and can fail for no want of memory.
_SAFE: Final = frozenset(
    (
        "CACHE",
        "CHECK_EXC_MATCH",
        "COPY",
        "COPY_FREE_VARS",
        "END_FOR",
        "END_SEND",
        "EXTENDED_ARG",
        "INTERPRETER_EXIT",
        "IS_OP",
        "JUMP_BACKWARD",
        "JUMP_BACKWARD_NO_INTERRUPT",
        "JUMP_FORWARD",
        "JUMP_IF_FALSE_OR_POP",
        "JUMP_IF_TRUE_OR_POP",
        "KW_NAMES",
        "LOAD_ASSERTION_ERROR",
        "LOAD_CLOSURE",
        "LOAD_CONST",
        "LOAD_DEREF",
        "LOAD_FAST",
        "LOAD_FAST_AND_CLEAR",
        "LOAD_FAST_CHECK",
        "LOAD_FAST_LOAD_FAST",
        "LOAD_GLOBAL",
        "MAKE_CELL",
        "NOP",
        "POP_BLOCK",
        "POP_EXCEPT",
        "POP_JUMP_BACKWARD_IF_FALSE",
        "POP_JUMP_BACKWARD_IF_NONE",
        "POP_JUMP_BACKWARD_IF_NOT_NONE",
        "POP_JUMP_BACKWARD_IF_TRUE",
        "POP_JUMP_FORWARD_IF_FALSE",
        "POP_JUMP_FORWARD_IF_NONE",
        "POP_JUMP_FORWARD_IF_NOT_NONE",
        "POP_JUMP_FORWARD_IF_TRUE",
        "POP_JUMP_IF_FALSE",
        "POP_JUMP_IF_NONE",
        "POP_JUMP_IF_NOT_NONE",
        "POP_JUMP_IF_TRUE",
        "POP_TOP",
        "PRECALL",
        "PUSH_EXC_INFO",
        "PUSH_NULL",
        "RERAISE",
        "RESUME",
        "RETURN_CONST",
        "RETURN_VALUE",
        "STORE_ATTR",
        "STORE_DEREF",
        "STORE_FAST",
        "STORE_FAST_LOAD_FAST",
        "STORE_FAST_STORE_FAST",
        "SWAP",
        "WITH_EXCEPT_START",
    )
)


class Stepping:
    """Comes to points of a call, and at one of them does what a subclass says.

    Args:
        at: the number of that point, from 1; 0 only counts them.
        profiles: whether calls are points too.
    """

    def __init__(self, at: int, *, profiles: bool) -> None:
        self._at = at
        self._profiles = profiles
        self.points = 0
        self.where = ""

    def run(self, act: Callable[[], object]) -> None:
        """Call `act`."""
        # What is raised while garbage is collected, the interpreter only prints.
        gc.collect()
        gc.disable()
        if self._profiles:
            sys.setprofile(self._profile)
        # Python 3.12 tells of instructions only where some frame has asked for them before.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._call)
        try:
            act()
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            gc.enable()

    def do(self, frame: FrameType) -> None:
        """Do it, in the frame that has come to the point."""
        raise NotImplementedError

    def is_of_interest(self, frame: FrameType) -> bool:
        """Return whether the instructions of this frame may be points."""
        raise NotImplementedError

    def name_of(self, frame: FrameType) -> str | None:
        """Return what to call the instruction that a frame has come to; None where it is none."""
        raise NotImplementedError

    def name_of_call(self, event: str, arg: object) -> str | None:
        """Likewise, of an event of `sys.setprofile`."""
        raise NotImplementedError

    def _point(self, frame: FrameType, what: str) -> None:
        self.points += 1
        if self.points == self._at:
            code = frame.f_code
            self.where = f"{what} in {code.co_qualname}, line {frame.f_lineno}"
            self.do(frame)

    def _call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if self.where or not self.is_of_interest(frame):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "opcode" and not self.where and (name := self.name_of(frame)):
            self._point(frame, name)
        return self._opcode

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        if (
            not self.where
            and self.is_of_interest(frame)
            and (name := self.name_of_call(event, arg))
        ):
            self._point(frame, name)


class Injection(Stepping):
    """Raises one exception at one of the points that a call comes to.

    Args:
        error: its class, which decides what the points are.
        at: the number of the point, from 1; 0 raises nothing, and counts them.
    """

    def __init__(self, error: type[BaseException], at: int = 0) -> None:
        super().__init__(at, profiles=error is not MemoryError)
        self._error = error
        self._offsets = _memory_points if error is MemoryError else _interrupt_points

    def run(self, act: Callable[[], object]) -> None:
        """Call `act`, and end quietly where it raises what was injected."""
        try:
            super().run(act)
        except self._error:
            if not self.where:
                raise

    def do(self, frame: FrameType) -> None:
        """Raise."""
        raise self._error

    def is_of_interest(self, frame: FrameType) -> bool:
        """Return whether it is none of the tests' own."""
        return not frame.f_code.co_filename.startswith(_TESTS)

    def name_of(self, frame: FrameType) -> str | None:
        """Return the name of an instruction at which the error can come up."""
        return self._offsets(frame.f_code).get(frame.f_lasti)

    def name_of_call(self, event: str, arg: object) -> str | None:
        """Return what is said of a function's start, or of the return of one in C."""
        if event == "call":
            return "start"
        return f"return of {getattr(arg, '__qualname__', arg)}" if event == "c_return" else None


@cache
def _memory_points(code: CodeType) -> dict[int, str]:
    """Return the instructions that may raise MemoryError, by offset."""
    points = {}
    before: list[str] = []
    for each in dis.get_instructions(code):
        if each.opname in ("CACHE", "PRECALL", "EXTENDED_ARG"):
            continue
        ends_with = each.opname == "CALL" and before[-3:] == ["None"] * 3
        if each.opname not in _SAFE and not ends_with:
            points[each.offset] = each.opname
        before.append("None" if each.opname == "LOAD_CONST" and each.argval is None else "")
    return points


@cache
def _interrupt_points(code: CodeType) -> dict[int, str]:
    """Return the jumps backward, and what follows a call and is guarded as the call is."""
    guards: dict[int, int] = {}
    for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
        guards.update(dict.fromkeys(range(entry.start, entry.end, 2), entry.target))
    points = {}
    call = None
    for each in dis.get_instructions(code):
        if call is not None and guards.get(call) == guards.get(each.offset):
            points[each.offset] = f"after a call, {each.opname}"
        call = each.offset if each.opname.startswith("CALL") else None
        if "JUMP_BACKWARD" in each.opname and "NO_INTERRUPT" not in each.opname:
            points[each.offset] = each.opname
    return points


# --- an operation interrupted at every point -----------------------------------------------------


def interrupt(error: type[BaseException], folder: Path, rng: random.Random) -> int:
    """Choose a case and raise `error` at some of its points."""
    case = rng.choice(CASES)
    return interrupt_case(error, case, folder, rng)


def interrupt_case(
    error: type[BaseException], case: Case, folder: Path, rng: random.Random, most: int = POINTS
) -> int:
    """Raise `error` at points of one case, up to about `most`; return at how many."""
    clock = FakeClock()
    setattr(kvstore.clock, "time_ns", clock)  # noqa: B010 - a plain one is no valid typing
    durable = rng.random() < 0.3
    with write_path(in_place := rng.random() < 0.7):
        prepared = Prepared(case, folder, clock)
        file = folder / "test.kvs"
        store = prepared.open(file, durable=durable)
        counting = Injection(error)
        counting.run(partial(case.run, store))
        store.close()
        assert _contents(file) == prepared.after, "without any fault"
        tried = 0
        for at in points_of(counting, most, rng):
            injection = Injection(error, at)
            try:
                _interrupt_once(prepared, file, injection, durable)
            except BaseException as failure:
                failure.add_note(
                    f"{error.__name__} at point {at} of {counting.points} of {case.name!r}: "
                    f"{injection.where}; in place: {in_place}, durable: {durable}"
                )
                raise
            tried += bool(injection.where)
    assert tried, "no point was met"
    return tried


def points_of(counted: Stepping, most: int, rng: random.Random) -> range:
    """Return some of the points that a call came to, spread evenly over them."""
    if counted.points > _LONG:
        most = min(most, _POINTS_OF_LONG_CASES)
    stride = max(1, counted.points // most)
    return range(rng.randrange(stride) + 1, counted.points + 1, stride)


def _interrupt_once(prepared: Prepared, file: Path, injection: Injection, durable: bool) -> None:
    store = prepared.open(file, durable=durable)
    injection.run(partial(prepared.case.run, store))
    contents: State = prepared.before
    if not store.closed:
        run_together(partial(_use_on, store, prepared))
        contents = dict(store.items())
        run_together(store.close)
    store.close()
    del store
    problems = [str(problem) for problem in check_file(file)]
    if problems and not any("not clean" in problem for problem in problems):
        raise AssertionError(f"closed clean, but: {problems[:5]}")
    found = _contents(file)
    assert found == contents, difference(found, contents)


# --- an opening interrupted at every point -------------------------------------------------------


def interrupt_opening(error: type[BaseException], folder: Path, rng: random.Random) -> int:
    """Raise `error` while a file is created, opened, or opened and recovered."""
    setattr(kvstore.clock, "time_ns", FakeClock())  # noqa: B010 - as above
    file = folder / "test.kvs"
    tried = 0
    with write_path(rng.random() < 0.7):
        with KVStore(file, max_bytes=MAX_BYTES) as store:
            state = dict(islice(_records(), rng.randrange(1, 200)))
            for key, value in state.items():
                store.create(key, value)
            unclean = file.read_bytes()
        for start, expected in ((None, {}), (file.read_bytes(), state), (unclean, state)):
            counting = Injection(error)
            _open_interrupted(file, start, counting)
            for at in points_of(counting, POINTS // 3, rng):
                injection = Injection(error, at)
                try:
                    _open_interrupted(file, start, injection)
                    assert _contents(file) == expected
                except BaseException as failure:
                    failure.add_note(
                        f"{error.__name__} at point {at} of {counting.points}: {injection.where}"
                    )
                    raise
                tried += bool(injection.where)
    return tried


def _records() -> Iterator[tuple[str, Value]]:
    for number in count():
        yield f"key {number}", make_value("key", number, 20 * number)


def _open_interrupted(file: Path, start: bytes | None, injection: Injection) -> None:
    """Open a file with these bytes; let go of it, as a program that gives up or goes on."""
    file.unlink(missing_ok=True)
    if start is not None:
        file.write_bytes(start)
    opened: list[KVStore] = []
    injection.run(lambda: opened.append(KVStore(file, max_bytes=MAX_BYTES)))
    for store in opened:
        store.close()
    opened.clear()
    gc.collect()


def _use_on(store: KVStore, prepared: Prepared) -> None:
    """Have the interrupted store tell that the call has happened or not, and do it in full."""
    found = dict(store.items())
    assert found in (prepared.before, prepared.after), difference(found, prepared.after)
    assert len(store) == len(found)
    case = prepared.case
    if (
        (case.key is not None and case.value is not None and found == prepared.before)
        or (case.key is not None and case.value is None and case.key in found)
        or (case.empties and found)
    ):
        case.run(store)
    assert dict(store.items()) == prepared.after, "after the call was repeated"
    assert store.purge_expired() >= 0
    if case.probes:
        make_probes(store)
    assert dict(store.items()) == prepared.after, "after the probes"
    store.stats()
    store.sync()


def _contents(file: Path) -> State:
    """Open the file anew, use it, and close it whole; return what is in it."""
    with KVStore(file, max_bytes=MAX_BYTES) as store:
        found = dict(store.items())
        assert len(store) == len(found)
    assert_consistent(file)
    return found


EXPERIMENTS = tuple(
    Experiment(
        f"{name}-{where}",
        f"{error.__name__} raised at any instruction of {what} where it can come up",
        "errors",
        partial(trial, error),
        1,
    )
    for name, error in (("no-memory", MemoryError), ("interrupts", KeyboardInterrupt))
    for where, what, trial in (
        ("anywhere", "an operation, or of closing,", interrupt),
        ("at-opening", "opening, creation or recovery", interrupt_opening),
    )
)
