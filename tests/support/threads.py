"""Threads that start together and whose failures reach the test; histories of what they saw.

A history is *linearizable* where each of its operations can be thought to happen at one moment
between its call and its return, so that all of them in the order of these moments make sense.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

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

    `kind` is create, delete or read. `mark` tells the value that was created or read, None where a
    read found nothing. `done` is False where create found the key there, or delete found it absent.
    """

    kind: str
    start: int
    end: int
    mark: int | None = None
    done: bool = True


def linearizable(threads: Sequence[Sequence[Operation]]) -> bool:
    """Return whether these operations on one key, in order for each thread, make sense together."""
    ends = tuple(len(operations) for operations in threads)
    first: tuple[tuple[int, ...], int | None] = ((0,) * len(threads), None)
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
            follows, next_state = _apply(operation, state)
            if follows:
                step = (
                    (*places[:number], places[number] + 1, *places[number + 1 :]),
                    next_state,
                )
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
    return False


def _apply(operation: Operation, state: int | None) -> tuple[bool, int | None]:
    """Return whether the operation can have met `state`, and what it made of it."""
    if operation.kind == "read":
        return operation.mark == state, state
    if operation.kind == "create":
        if operation.done:
            return state is None, operation.mark
        return state is not None, state
    if operation.done:
        return state is not None, None
    return state is None, state
