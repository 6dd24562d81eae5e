"""Creates, puts and deletes that are on stable storage when they return, by 1 and 8 threads.

In each round each engine that can do it, in a new process: one thread creates for a while, puts
other values to what was created, deletes it; then eight threads do the same on the same store. Each
operation is timed by itself. The figures are those of the disk and of who shares flushes; on tmpfs
they mean nothing.

The bytes that reach the disk for each create of one thread are those that the device counts, the
journal of its file system with them; nothing is owed when it begins. Whatever else is written
meanwhile is counted too: so it is the least of the rounds. Where a file system has no device, it is
what the kernel counts as written by the process.
"""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from threading import Barrier
from time import perf_counter_ns
from typing import Any, Final

from engines import OpenEngine
from operations import TTL, time_writes
from records import make_keys, make_values
from workers import Job, Say, rounds_in_turns

from harness import Column, Plan, engine_table, file_system, show_spread, spread, with_failures

THREADS: Final = (1, 8)
OPERATIONS: Final = ("create", "put", "delete")
PERCENTILES: Final = ("p50", "p99", "max")
VALUE_SIZE: Final = 100
RECORDS: Final = 10_000  # that are there before
SECONDS: Final = 0.5  # for each operation and number of threads
ROUNDS: Final = 5
MOST_OPERATIONS: Final = 10_000  # of a thread in one go

show_rate: Final = partial(show_spread, digits=0)

# An operation and the number of threads that did it; seconds, and each thread's nanoseconds.
Took = dict[tuple[str, int], tuple[float, list[list[int]]]]


def run_round(
    open_engine: OpenEngine, say: Say, folder: Path, number: int, records: int, seconds: float
) -> tuple[Took, float]:
    """Task: return what each case took, and the bytes written for each create of one thread."""
    values = make_values(VALUE_SIZE)
    with closing(open_engine(folder)) as store:
        time_writes(store.create, make_keys(records), values)
    took: Took = {}
    written = 0.0
    with closing(open_engine(folder, durable=True)) as store:

        def create(key: str) -> None:
            store.create(key, values[int(key, 16) % len(values)], TTL)

        def put(key: str) -> None:
            store.put(key, values[int(key, 16) % len(values) - 1], TTL)

        for threads in THREADS:
            say(f"{threads} threads, round {number + 1}")
            keys = make_keys(MOST_OPERATIONS * threads, first=records)
            records += len(keys)
            parts = [keys[place::threads] for place in range(threads)]
            os.sync()
            before, _ = bytes_written(folder)
            created = took["create", threads] = run_together(seconds, create, parts)
            if threads == 1:
                written = (bytes_written(folder)[0] - before) / len(created[1][0])
            parts = [part[: len(each)] for part, each in zip(parts, created[1], strict=True)]
            # More often than once, so that all threads go on until the time is over.
            took["put", threads] = run_together(seconds, put, [part * 4 for part in parts])
            took["delete", threads] = run_together(seconds, store.delete, parts)
    return took, written


def bytes_written(folder: Path) -> tuple[int, str]:
    """Return the bytes that reached the disk of a folder so far, and who counts them."""
    device = folder.stat().st_dev
    counted = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    with suppress(OSError):  # a file system without a device
        return int(counted.read_text().split()[6]) * 512, "the device"  # in sectors of its own
    return getrusage(RUSAGE_SELF).ru_oublock * 512, "the kernel for the process"


def run_together(
    seconds: float, operation: Callable[[str], object], parts: Sequence[Sequence[str]]
) -> tuple[float, list[list[int]]]:
    """Have a thread for each part do the operation for its keys, until the time is over."""
    gc.collect()
    gate = Barrier(len(parts) + 1)

    def work(keys: Sequence[str]) -> list[int]:
        took: list[int] = []
        gate.wait()
        begin = perf_counter_ns()
        end = begin + round(seconds * 1e9)
        for key in keys:
            if begin >= end:
                break
            operation(key)
            now = perf_counter_ns()
            took.append(now - begin)
            begin = now
        return took

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(work, part) for part in parts]
        gate.wait()
        begin = perf_counter_ns()
        results = [future.result() for future in futures]
        return (perf_counter_ns() - begin) / 1e9, results


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return operations a second and percentiles, by engine and case."""
    able = [engine for engine, kind in plan.engines.items() if kind.can_be_durable]
    arguments = (plan.pick(RECORDS, 100), plan.pick(SECONDS, 0.05, 0.02))
    rounds = plan.rounds or plan.pick(ROUNDS, 1)
    jobs = [Job(engine, engine, arguments, rounds, rounds) for engine in able]
    results, failures = rounds_in_turns(plan, run_round, jobs)
    return {
        "file_system": file_system(plan.place),
        "counted_by": bytes_written(plan.place)[1],
        "value_size": VALUE_SIZE,
        "not_durable": [engine for engine in plan.engines if engine not in able],
        "failures": failures,
        "rows": [
            summarise(engine, operation, rounds)
            for operation in OPERATIONS
            for engine, rounds in results.items()
            if rounds
        ],
    }


def summarise(engine: str, operation: str, rounds: Sequence[tuple[Took, float]]) -> dict[str, Any]:
    """Return an engine's figures for one operation."""
    from percentiles import percentiles

    cases = {threads: [took[operation, threads] for took, _ in rounds] for threads in THREADS}
    per_second = {
        threads: [sum(map(len, each)) / seconds for seconds, each in case]
        for threads, case in cases.items()
    }
    one, many = per_second.values()
    return {
        "engine": engine,
        "operation": operation,
        "per_second": {threads: spread(each) for threads, each in per_second.items()},
        "speed_up": median(b / a for a, b in zip(one, many, strict=True)),
        "microseconds": {
            threads: percentiles(each for _, parts in case for each in parts)
            for threads, case in cases.items()
        },
        **({"written_bytes": min(each for _, each in rounds)} if operation == "create" else {}),
    }


def format_result(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    columns: list[Column] = []
    for threads in map(str, THREADS):
        columns.append((f"{threads} × a second", show_rate, ("per_second", threads)))
        columns += [
            (f"{threads} × {name}, µs", "{:,.0f}".format, ("microseconds", threads, name))
            for name in PERCENTILES
        ]
    columns.append(("8 × / 1 ×", "{:.2f}".format, ("speed_up",)))
    columns.append(("bytes to the disk", "{:,.0f}".format, ("written_bytes",)))
    rows = {f"{row['engine']}, {row['operation']}": row for row in result["rows"]}
    text = (
        f"On {result['file_system']}, bytes to the disk as {result['counted_by']} counts them. "
        "Cannot wait for the disk, or not by an operation: "
        f"{', '.join(result['not_durable']) or 'none'}."
    )
    return with_failures([text, engine_table("threads", rows, columns)], result["failures"])
