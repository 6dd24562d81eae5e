"""What comes of the calls of a store that something bad has happened to, in words to be counted."""

import os
import resource
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from signal import Signals
from typing import Any, Final

from engines import Engine
from filling import Records
from workers import WorkerError

from harness import key_of

RIGHT: Final = "right"
WRONG: Final = "wrong"
ABSENT: Final = "absent"

# For the process of an engine that takes damage for sizes: far more than any needs.
_MOST_MEMORY: Final = 4 << 30
_LARGEST_FILE: Final = 9 << 30

Outcomes = dict[str, int]


def prepare_for_harm() -> None:
    """Have this process, which may die, print nothing, and not take the machine with it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    for limit, most in (
        (resource.RLIMIT_DATA, _MOST_MEMORY),
        (resource.RLIMIT_FSIZE, _LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # where less is allowed already
            resource.setrlimit(limit, (most, most))


def count_reads(store: Engine, known: Records, indexes: Iterable[int]) -> Outcomes:
    """Read these records; return how many were right, wrong or absent, and what others raised."""
    outcomes: Counter[str] = Counter()
    for index in indexes:
        try:
            value = store.read(key_of(index))
        except KeyError:
            outcomes[ABSENT] += 1
        except Exception as error:
            outcomes[name_of(error)] += 1
        else:
            outcomes[RIGHT if value == known.value(index) else WRONG] += 1
    return dict(outcomes)


def count_calls(function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> Outcomes:
    """Return how many calls were right, and how many raised what."""
    outcomes: Counter[str] = Counter()
    for arguments in calls:
        try:
            function(*arguments)
        except Exception as error:
            outcomes[name_of(error)] += 1
        else:
            outcomes[RIGHT] += 1
    return dict(outcomes)


def name_of(error: BaseException) -> str:
    """Return the name of an exception's class, with that of the package that it is from."""
    kind = type(error)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"


def how_it_ended(error: WorkerError) -> str:
    """Return how a process ended that did not get to the end of its task."""
    if error.exit_code is None:
        return error.brief
    return f"dies: {Signals(-error.exit_code).name}" if error.exit_code < 0 else "dies"


def show(outcomes: Outcomes, everything: str) -> str:
    """Return outcomes as text: `everything` where all are right."""
    if set(outcomes) <= {RIGHT}:
        return everything
    return ", ".join(f"{count:,} {what}" for what, count in outcomes.items())
