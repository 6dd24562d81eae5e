"""Statements timed as loops, in turns: what one takes longer than another is what it does more."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from textwrap import indent
from time import perf_counter_ns
from typing import Any

# A key, as text or bytes, and what belongs to it.
Pairs = Sequence[tuple[str | bytes, Any]]
Loop = Callable[[Pairs], int]


def make_loop(statements: Iterable[str], names: dict[str, Any]) -> Loop:
    """Return a function that does these for each key and value, and returns nanoseconds."""
    return _compile(
        "def loop(pairs):\n"
        "    begin = perf_counter_ns()\n"
        "    for key, value in pairs:\n"
        f"{_body(statements)}\n"
        "    return perf_counter_ns() - begin\n",
        names,
    )


def make_undoing_loop(statement: str, undo: str, names: dict[str, Any]) -> Loop:
    """Return one that undoes what it did for each key, and does not count that in."""
    return _compile(
        "def loop(pairs):\n"
        "    total = 0\n"
        "    for key, value in pairs:\n"
        "        begin = perf_counter_ns()\n"
        f"{_body([statement])}\n"
        "        total += perf_counter_ns() - begin\n"
        f"{_body([undo])}\n"
        "    return total\n",
        names,
    )


def _body(statements: Iterable[str]) -> str:
    body = "\n".join(statements)
    if not body or body.endswith(":"):
        body += " pass"
    return indent(body.strip(), " " * 8)


def _compile(source: str, names: dict[str, Any]) -> Loop:
    scope = {"perf_counter_ns": perf_counter_ns, **names}
    exec(source, scope)
    loop: Loop = scope["loop"]
    return loop


def time_loops(
    loops: Sequence[tuple[Loop, Iterator[Pairs]]], turns: int, rng: random.Random
) -> list[float]:
    """Run the loops in turns, in shuffled order; return each one's nanoseconds for a key."""
    nanoseconds: list[list[float]] = [[] for _ in loops]
    for _ in range(turns):
        for index in rng.sample(range(len(loops)), len(loops)):
            loop, samples = loops[index]
            pairs = next(samples)
            nanoseconds[index].append(loop(pairs) / len(pairs))
    return [median(each) for each in nanoseconds]
