"""Threads that start together and whose failures reach the test; histories of what they saw.

A history is *linearizable* where each of its operations can be thought to happen at one moment
between its call and its return, so that all of them in the order of these moments make sense.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

# Only a deadlock takes this long; nothing waits for it otherwise.
PATIENCE_SECONDS: Final = 120


def run_together(*tasks: Callable[[], object]) -> None:
    """Run each task in a thread of its own, all let go at once; raise what the first one raised."""
    barrier = threading.Barrier(len(tasks))
    failures: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE_SECONDS)
            task()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


@dataclass(frozen=True)
class Operation:
    """One call on one key, with the moments at which it began and ended.

    What `kind` it is, and what came of it:

    create: of the value that `mark` tells, for `ttl` seconds; not `done` where the key was there
    put: likewise, whatever was there; not `done` where there was no room
    touch: for `ttl` seconds from now on; not `done` where the key was absent
    full: a create that found the key absent, and no room
    delete: not `done` where the key was absent
    pop: of the value that `mark` tells; not `done` where the key was absent
    read: of the value that `mark` tells; None where the key was absent
    look: `done` where the key was there
    ttl: as look, with the seconds that it told
    clock: no call on a key; the clock shows `mark` from now on, in ms
    """

    kind: str
    start: int
    end: int
    mark: int | None = None
    done: bool = True
    ttl: int | None = None


class State(NamedTuple):
    """A key and the clock: the mark of its value, None where it is absent, and times in ms."""

    mark: int | None
    expires_at: int | None
    now: int


def linearizable(threads: Sequence[Sequence[Operation]], now: int = 0) -> bool:
    """Return whether these operations on one key, in order for each thread, make sense together.

    The key is absent at first, and the clock shows `now`, in ms.
    """
    ends = tuple(len(operations) for operations in threads)
    first = ((0,) * len(threads), State(None, None, now))
    todo, seen = [first], {first}
    while todo:
        places, state = todo.pop()
        if places == ends:
            return True
        waiting = [
            (number, threads[number][place])
            for number, place in enumerate(places)
            if place < ends[number]
        ]
        horizon = min(operation.end for _, operation in waiting)
        for number, operation in waiting:
            if operation.start > horizon:
                continue  # another one had returned before this was called
            for following in _apply(operation, state):
                step = ((*places[:number], places[number] + 1, *places[number + 1 :]), following)
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
    return False


def _apply(operation: Operation, state: State) -> Sequence[State]:
    """Return what the operation can have made of `state`; nothing where it cannot have met it."""
    mark, expires_at, now = state
    expired = expires_at is not None and expires_at <= now
    is_there = mark is not None and not expired
    absent = State(None, None, now)
    match operation.kind:
        case "clock":
            assert operation.mark is not None
            kept = state._replace(now=operation.mark)
            # What has expired may have been taken back before the clock was set.
            return (kept, absent._replace(now=operation.mark)) if expired else (kept,)
        case "create" if operation.done:
            return () if is_there else (State(operation.mark, _ends(operation, now), now),)
        case "put" if operation.done:
            return (State(operation.mark, _ends(operation, now), now),)
        case "put":
            return (state, absent) if expired else (state,)
        case "touch" if operation.done:
            return (State(mark, _ends(operation, now), now),) if is_there else ()
        case "create":
            return (state,) if is_there else ()
        case "full":
            return () if is_there else (absent, state)
        case "pop" if operation.done:
            return (absent,) if is_there and operation.mark == mark else ()
        case "delete" if operation.done:
            return (absent,) if is_there else ()
        case "delete" | "pop" | "touch":
            return () if is_there else (state,)
    return (state,) if _tells(operation, state, is_there) else ()


def _tells(operation: Operation, state: State, is_there: bool) -> bool:
    """Return whether an operation that only looks has told the truth."""
    mark, expires_at, now = state
    match operation.kind:
        case "read":
            return operation.mark == (mark if is_there else None)
        case "look":
            return operation.done == is_there
    left = None if expires_at is None or not is_there else -((now - expires_at) // 1000)
    return (operation.done, operation.ttl) == (is_there, left)


def _ends(operation: Operation, now: int) -> int | None:
    """Return when what is stored at `now` expires, in ms."""
    return None if operation.ttl is None else now + 1000 * operation.ttl
