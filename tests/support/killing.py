"""Workers that are killed with SIGKILL at random moments, and what must be left of their work.

Run these functions in a child (`processes.call_in_child`): the workers are forked from it, so that
a round takes milliseconds. A worker acknowledges each operation through a pipe, one byte each, the
number of the thread that did it. Its operations can be repeated from the seed: so the bytes alone
say what must be in the file afterwards, and which operation of each thread was under way.
"""

import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from kvstore import KVStore

from .whole import assert_whole
from .workload import Value, Workload

State = dict[str, Value]
Operation = tuple[str, Value | None]
Acknowledge = Callable[[int], object]
Work = Callable[[Acknowledge], None]


def kill_during_operations(
    path: str,
    seed: int,
    rounds: int,
    threads: int,
    most_operations: int = 2_000,
    durable: bool = False,
    **workload: Any,
) -> int:
    """Let workers create and delete, kill each at a random moment, and verify what is left.

    Every other round leaves the file as the kill left it for the next worker to recover, and
    verifies a copy. Returns how many operations were acknowledged in all.
    """
    file = Path(path)
    states = _read_states(file, threads)
    acknowledged = 0
    for number in range(rounds):
        rng = random.Random(f"{seed}/{number}")
        workloads = [
            Workload(random.Random(rng.random()), state, prefix=f"{thread}:", **workload)
            for thread, state in enumerate(states)
        ]
        done = _kill_when(
            partial(_operate_until_killed, path, durable, workloads),
            enough=rng.choice((0, 1, rng.randrange(100), rng.randrange(most_operations))),
        )
        acknowledged += len(done)
        try:
            found = _reopen(file, in_copy=rng.random() < 0.5)
            states = _settle(found, states, Counter(done), workloads)
        except BaseException as error:
            error.add_note(f"seed {seed}, round {number}, {len(done)} operations acknowledged")
            raise
    assert _reopen(file, in_copy=False) == _joined(states), f"seed {seed}, at the end"
    return acknowledged


def kill_during_creation(path: str, seed: int, rounds: int) -> int:
    """Kill workers while they create the file; return how many had it created already."""
    file = Path(path)
    rng = random.Random(seed)
    value = {"first": True}
    work = partial(_work_and_wait, file, [("key", value)])
    whole = _time_of(work)
    created = 0
    for number in range(rounds):
        file.unlink(missing_ok=True)
        done = _kill_after(work, rng.uniform(0, 1.2 * whole))
        with KVStore(path) as store:
            contents = dict(store)
            assert contents == {"key": value} or (not contents and not done), (
                f"seed {seed}, round {number}: {contents}, acknowledged: {bool(done)}"
            )
            store.create("other", value)
            assert store.read("other") == value
        assert_whole(file)
        created += bool(done)
    return created


def kill_during_recovery(path: str, seed: int, rounds: int) -> int:
    """Kill one process after the other while it recovers the file.

    Returns how many had recovered it before they were killed.
    """
    file = Path(path)
    rng = random.Random(seed)
    state = _leave_unclean(file, rng)

    recover = partial(_work_and_wait, file, [])
    whole = _time_of(recover)
    recovered = 0
    for number in range(rounds):
        recovered += bool(_kill_after(recover, rng.uniform(0, 1.2 * whole)))
        if number % 5 == 0:
            assert _reopen(file, in_copy=True) == state, f"seed {seed}, round {number}"
    assert _reopen(file, in_copy=False) == state, f"seed {seed}, at the end"
    return recovered


def kill_during_close(path: str, seed: int, rounds: int) -> int:
    """Kill workers while they close the store; return how many had closed it."""
    file = Path(path)
    rng = random.Random(seed)
    state: State = {}
    closed = 0
    for number in range(rounds):
        operations = _operations(rng, state, 50)
        done = _kill_when(
            partial(_work_and_close, file, operations),
            enough=1,
            then_wait=rng.uniform(0, 0.01),
        )
        for operation in operations:
            _replay(state, operation)
        closed += len(done) == 2
        found = _reopen(file, in_copy=rng.random() < 0.5)
        assert found == state, f"seed {seed}, round {number}, closed: {len(done) == 2}"
    return closed


def kill_at_every_flush(path: str, seed: int) -> int:
    """Kill workers just before and just after the first flush, the second, and so on.

    The worker creates the file or recovers it, changes it, syncs, changes it and closes it. Returns
    the number of the last flush that a worker came to.
    """
    file = Path(path)
    rng = random.Random(seed)
    last = 0
    for unclean in (False, True):
        for after in (False, True):
            for at in range(1, 100):
                file.unlink(missing_ok=True)
                state = _leave_unclean(file, rng, 200) if unclean else {}
                operations = _operations(rng, state, 60)

                done = _kill_when(
                    partial(_die_at_a_flush, file, operations, at, after),
                    enough=len(operations) + 1,
                )
                acknowledged = sum(byte == 0 for byte in done)
                for operation in operations[:acknowledged]:
                    _replay(state, operation)
                allowed = [dict(state)]
                if acknowledged < len(operations):
                    _replay(state, operations[acknowledged])
                    allowed.append(state)
                assert _reopen(file, in_copy=False) in allowed, (
                    f"seed {seed}, killed {'after' if after else 'before'} flush {at}, "
                    f"{acknowledged} operations acknowledged"
                )
                if 1 in done:
                    break
                last = max(last, at)
            else:
                raise AssertionError("a hundred flushes and no end")
    return last


# --- what a worker does ------------------------------------------------------------------------


def _operate_until_killed(
    path: str, durable: bool, workloads: list[Workload], acknowledge: Acknowledge
) -> None:
    """Do each of the workloads in a thread of its own, without end."""
    store = KVStore(path, durable=durable)

    def operate(thread: int) -> None:
        for operation in workloads[thread]:
            _do(store, operation)
            acknowledge(thread)

    def run(thread: int) -> None:
        try:
            operate(thread)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    for thread in range(1, len(workloads)):
        threading.Thread(target=run, args=(thread,)).start()
    operate(0)


def _work_and_wait(file: Path, operations: list[Operation], acknowledge: Acknowledge) -> None:
    """Open the file, work, acknowledge, and wait for the kill with the store open."""
    with KVStore(file) as store:
        for operation in operations:
            _do(store, operation)
        acknowledge(0)
        _wait_for_the_end()


def _work_and_close(file: Path, operations: list[Operation], acknowledge: Acknowledge) -> None:
    """Open the file, work, acknowledge, close, acknowledge that, and wait for the kill."""
    store = KVStore(file)
    for operation in operations:
        _do(store, operation)
    acknowledge(0)
    store.close()
    acknowledge(1)
    _wait_for_the_end()


def _die_at_a_flush(
    file: Path, operations: list[Operation], at: int, after: bool, acknowledge: Acknowledge
) -> None:
    """Open, work, sync half-way, close; kill this very process at its flush number `at`."""
    real = os.fdatasync
    count = 0

    def flush(fd: int) -> None:
        nonlocal count
        count += 1
        if count == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, "fdatasync", flush)  # noqa: B010 - a plain assignment is no valid typing
    store = KVStore(file)
    for number, operation in enumerate(operations):
        if number == len(operations) // 2:
            store.sync()
        _do(store, operation)
        acknowledge(0)
    store.close()
    acknowledge(1)


def _do(store: KVStore, operation: Operation) -> None:
    key, value = operation
    if value is None:
        store.delete(key)
    else:
        store.create(key, value)


def _wait_for_the_end() -> NoReturn:
    while True:
        select.select([], [], [])


# --- workers -----------------------------------------------------------------------------------


def _kill_when(work: Work, enough: int, *, then_wait: float = 0) -> bytes:
    """Fork a worker, kill it once it has acknowledged `enough`; return what it acknowledged."""
    said, pid = _fork(work)
    done = bytearray()
    try:
        while len(done) < enough and (block := os.read(said, 4096)):
            done += block
        if then_wait:
            time.sleep(then_wait)  # the moment of the kill is random; nothing waits for it
    finally:
        done += _kill(said, pid)
    return bytes(done)


def _kill_after(work: Work, seconds: float) -> bytes:
    """Fork a worker, kill it after so long, and return what it acknowledged."""
    said, pid = _fork(work)
    try:
        time.sleep(seconds)  # as above
    finally:
        done = _kill(said, pid)
    return done


def _time_of(work: Work) -> float:
    """Return how long a worker takes until it acknowledges something. It is killed then."""
    start = time.perf_counter()
    _kill_when(work, enough=1)
    return time.perf_counter() - start


def _fork(work: Work) -> tuple[int, int]:
    said, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(said)
        _run_worker(work, say)
    os.close(say)
    return said, pid


def _run_worker(work: Work, say: int) -> NoReturn:
    code = 1
    try:
        work(lambda number: os.write(say, bytes([number])))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def _kill(said: int, pid: int) -> bytes:
    """Kill the worker, wait for its end, and return what it said and nobody has read yet."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    rest = bytearray()
    while block := os.read(said, 65_536):
        rest += block
    os.close(said)
    code = os.waitstatus_to_exitcode(status)
    assert code in (-signal.SIGKILL, 0), f"the worker failed by itself: {code}"
    return bytes(rest)


# --- what must be left -------------------------------------------------------------------------


def _operations(rng: random.Random, state: State, count: int) -> list[Operation]:
    return list(islice(Workload(rng, state), count))


def _replay(state: State, operation: Operation) -> None:
    key, value = operation
    if value is None:
        del state[key]
    else:
        state[key] = value


def _settle(
    found: State,
    before: list[State],
    done: Counter[int],
    workloads: list[Workload],
) -> list[State]:
    """Return each thread's part of what was found, which must be what it acknowledged.

    The operation under way when it was killed may stand or not.
    """
    after = []
    for thread, state in enumerate(before):
        part = {key: value for key, value in found.items() if key.startswith(f"{thread}:")}
        expected = dict(state)
        operations = iter(workloads[thread])
        for operation in islice(operations, done[thread]):
            _replay(expected, operation)
        key, value = next(operations)
        if part != expected:
            _replay(expected, (key, value))
        assert part == expected, (
            f"thread {thread}, under way: {'delete' if value is None else 'create'} {key!r}: "
            + _difference(part, expected)
        )
        after.append(part)
    assert sum(map(len, after)) == len(found), "a key that no thread has written"
    return after


def _difference(found: State, expected: State) -> str:
    lost = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = sorted(key for key in found.keys() & expected.keys() if found[key] != expected[key])
    return f"lost {lost[:5]}, extra {extra[:5]}, wrong {wrong[:5]}"


def _reopen(file: Path, *, in_copy: bool) -> State:
    """Open what the kill left, or a copy of it; return the contents; check the closed file."""
    if in_copy:
        copy = file.with_suffix(".copy")
        if file.exists():
            shutil.copyfile(file, copy)
        else:
            copy.unlink(missing_ok=True)
        file = copy
    with KVStore(file) as store:
        contents = dict(store.items())
        assert len(store) == len(contents)
        # It is not only readable: it works.
        store.create("probe", {})
        store.delete("probe")
    assert_whole(file)
    return contents


def _read_states(file: Path, threads: int) -> list[State]:
    with KVStore(file) as store:
        contents = dict(store.items())
    return [
        {key: value for key, value in contents.items() if key.startswith(f"{thread}:")}
        for thread in range(threads)
    ]


def _joined(states: list[State]) -> State:
    return {key: value for state in states for key, value in state.items()}


def _leave_unclean(file: Path, rng: random.Random, count: int = 3_000) -> State:
    """Have a worker killed after that many operations; return what it left in the file."""
    operations = _operations(rng, {}, count)

    _kill_when(partial(_work_and_wait, file, operations), enough=1)
    state: State = {}
    for operation in operations:
        _replay(state, operation)
    return state
