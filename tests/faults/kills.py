"""Workers that are killed with SIGKILL at random moments, and what must be left of their work.

The workers are forked from the trial's process, so that a round takes milliseconds. A worker
acknowledges each operation through a pipe, one byte each, the number of the thread that did it. Its
operations can be repeated from the seed: so the bytes alone say what must be in the file
afterwards, and which operation of each thread was under way.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, NoReturn
from unittest import mock

from support.consistency import assert_consistent
from support.workload import Operation, Value, Workload, difference, make_value

from kvstore import KVStore

from .laboratory import Experiment, Trial

State = dict[str, Value]
Acknowledge = Callable[[int], object]
Work = Callable[[Acknowledge], None]


ROUNDS: Final = 20  # a trial


def kill_during_operations(
    folder: Path,
    rng: random.Random,
    *,
    rounds: int,
    threads: int,
    fewest_operations: int = 0,
    most_operations: int = 2_000,
    durable: bool = False,
    **workload: Any,
) -> int:
    """Let workers create and delete, kill each at a random moment, and verify what is left.

    Every other round leaves the file as the kill left it for the next worker to recover, and
    verifies a copy.
    """
    file = folder / "test.kvs"
    states = _read_states(file, threads)
    for number in range(rounds):
        workloads = [
            Workload(random.Random(rng.random()), state, prefix=f"{thread}:", **workload)
            for thread, state in enumerate(states)
        ]
        done = _kill_when(
            partial(_operate_until_killed, file, durable, workloads),
            enough=fewest_operations
            + rng.choice((0, 1, rng.randrange(100), rng.randrange(most_operations))),
        )
        try:
            found = _reopen(file, in_copy=rng.random() < 0.5)
            states = _settle(found, states, Counter(done), workloads)
        except BaseException as error:
            error.add_note(f"round {number}, {len(done)} operations acknowledged")
            raise
    assert _reopen(file, in_copy=False) == _joined(states), "at the end"
    return rounds


def kill_amid_rewrites(folder: Path, rng: random.Random) -> int:
    """As above, where the file's 16 first segments are about to be rewritten, one after the other.

    Into two each, or each into itself: then half of what is there has expired.
    """
    expired = rng.random() < 0.5
    with KVStore(folder / "test.kvs") as store, _clock_of_yesterday():
        for number in range(1, 88_500, 5):
            expires = expired and number % 2 == 0
            key = f"{'expired' if expires else '0'}:{number}"
            store.create(key, make_value(key, number, 20), ttl=60 if expires else None)
    return kill_during_operations(
        folder,
        rng,
        rounds=3,
        threads=1,
        fewest_operations=300,
        most_operations=4_000,
        population=88_500,
        grow=0.95,
        largest=40,
    )


def kill_during_creation(folder: Path, rng: random.Random) -> int:
    """Kill workers while they create the file."""
    file = folder / "test.kvs"
    value = make_value("key", 1, 10)
    work = partial(_work_and_wait, file, [Operation("key", value, is_there=False)])
    whole = _time_of(work)
    for number in range(ROUNDS):
        file.unlink(missing_ok=True)
        done = _kill_after(work, rng.uniform(0, 1.2 * whole))
        with KVStore(file) as store:
            contents = dict(store)
            assert contents == {"key": value} or (not contents and not done), (
                f"round {number}: {contents}, acknowledged: {bool(done)}"
            )
            store.create("other", value)
            assert store.read("other") == value
        assert_consistent(file)
    return ROUNDS


def kill_during_recovery(folder: Path, rng: random.Random) -> int:
    """Kill one process after the other while it recovers the file."""
    file = folder / "test.kvs"
    state = _requires_rebuild(file, rng)
    recover = partial(_work_and_wait, file, [])
    whole = _time_of(recover)
    for number in range(ROUNDS):
        _kill_after(recover, rng.uniform(0, 1.2 * whole))
        if number % 5 == 0:
            assert _reopen(file, in_copy=True) == state, f"round {number}"
    assert _reopen(file, in_copy=False) == state, "at the end"
    return ROUNDS


def kill_during_close(folder: Path, rng: random.Random) -> int:
    """Kill workers while they close the store."""
    file = folder / "test.kvs"
    state: State = {}
    for number in range(ROUNDS):
        operations = _operations(rng, state, 50)
        done = _kill_when(
            partial(_work_and_close, file, operations),
            enough=1,
            then_wait=rng.uniform(0, 0.003),
        )
        for operation in operations:
            _replay(state, operation)
        found = _reopen(file, in_copy=rng.random() < 0.5)
        assert found == state, f"round {number}, closed: {len(done) == 2}"
    return ROUNDS


def kill_at_every_flush(folder: Path, rng: random.Random) -> int:
    """Kill workers just before and just after the first flush, the second, and so on.

    The worker creates the file or recovers it, changes it, syncs, changes it and closes it.
    """
    file = folder / "test.kvs"
    kills = 0
    for unclean in (False, True):
        for after in (False, True):
            for at in range(1, 100):
                file.unlink(missing_ok=True)
                state = _requires_rebuild(file, rng, 200) if unclean else {}
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
                    f"killed {'after' if after else 'before'} flush {at}, "
                    f"{acknowledged} operations acknowledged"
                )
                if 1 in done:
                    break
                kills += 1
            else:
                raise AssertionError("a hundred flushes and no end")
    assert kills >= 12, f"only {kills} flushes met"
    return kills


@contextmanager
def _clock_of_yesterday() -> Iterator[None]:
    """Have stores see the time of a day ago."""
    yesterday = time.time_ns() - 86_400 * 10**9
    with mock.patch("kvstore.clock.time_ns", return_value=yesterday):
        yield


# --- what a worker does ------------------------------------------------------------------------


def _operate_until_killed(
    file: Path, durable: bool, workloads: list[Workload], acknowledge: Acknowledge
) -> None:
    """Do each of the workloads in a thread of its own, without end."""
    store = KVStore(file, durable=durable)

    def operate(thread: int) -> None:
        for operation in workloads[thread]:
            operation.do(store)
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
            operation.do(store)
        acknowledge(0)
        _wait_for_the_end()


def _work_and_close(file: Path, operations: list[Operation], acknowledge: Acknowledge) -> None:
    """Open the file, work, acknowledge, close, acknowledge that, and wait for the kill."""
    store = KVStore(file)
    for operation in operations:
        operation.do(store)
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
        operation.do(store)
        acknowledge(0)
    store.close()
    acknowledge(1)


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
    key, value, _ = operation
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
        under_way = next(operations)
        if part != expected:
            _replay(expected, under_way)
        assert part == expected, (
            f"thread {thread}, under way: {'delete' if under_way.value is None else 'store'} "
            f"{under_way.key!r}: " + difference(part, expected)
        )
        after.append(part)
    assert sum(map(len, after)) == len(found), "a key that no thread has written"
    return after


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
    assert_consistent(file)
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


def _requires_rebuild(file: Path, rng: random.Random, count: int = 3_000) -> State:
    """Have a worker killed after that many operations; return what it left in the file."""
    operations = _operations(rng, {}, count)

    _kill_when(partial(_work_and_wait, file, operations), enough=1)
    state: State = {}
    for operation in operations:
        _replay(state, operation)
    return state


# --- the experiments ---------------------------------------------------------------------------


def _unavailable() -> str | None:
    return None if hasattr(signal, "SIGKILL") else "there is no SIGKILL"


def _experiment(name: str, what: str, trial: Trial, short: int = 1) -> Experiment:
    return Experiment(
        f"kills-{name}", f"SIGKILL at a random moment {what}", "kills", trial, short, _unavailable
    )


EXPERIMENTS = (
    _experiment(
        "of-a-thread",
        "of creates, puts and deletes in one thread",
        partial(kill_during_operations, rounds=12, threads=1),
    ),
    _experiment(
        "of-threads",
        "of creates, puts and deletes in four threads",
        partial(kill_during_operations, rounds=12, threads=4),
    ),
    _experiment(
        "of-a-durable-thread",
        "of durable creates, puts and deletes in one thread",
        partial(kill_during_operations, rounds=10, threads=1, durable=True, most_operations=200),
    ),
    _experiment(
        "of-durable-threads",
        "of durable creates, puts and deletes in four threads",
        partial(kill_during_operations, rounds=10, threads=4, durable=True, most_operations=200),
    ),
    _experiment("amid-rewrites", "of rewriting segments", kill_amid_rewrites),
    _experiment(
        "amid-growth",
        "of a file that grows under three threads",
        partial(
            kill_during_operations,
            rounds=5,
            threads=3,
            most_operations=1_000,
            population=5_000,
            grow=0.9,
        ),
    ),
    _experiment("of-creation", "of the creation of the file", kill_during_creation),
    _experiment("of-recovery", "of recovery", kill_during_recovery),
    _experiment("of-closing", "of closing", kill_during_close),
    Experiment(
        "kills-at-flushes",
        "SIGKILL before and after every flush of a store's life",
        "kills",
        kill_at_every_flush,
        1,
        lambda: _unavailable() or (None if sys.platform == "linux" else "written for fdatasync"),
    ),
)
