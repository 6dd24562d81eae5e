"""How long it takes to open a store whose process was killed, and one that was closed.

A child process loads the records and kills itself with SIGKILL; another one closes its store. In
each round a copy of each file, in the page cache and written to disk, is opened in a new process of
its own, which reports the time of opening alone. Opening after a kill includes the whole recovery
and its flush to the disk.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final

from harness import (
    Progress,
    describe_machine,
    key_of,
    machine_line,
    make_parser,
    make_values,
    markdown_table,
    save,
    scratch_directory,
)
from kvstore import KVStore

VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 100


def load_and_end(path: Path, records: int, how: str) -> None:
    """In a child: load a store, then close it, or die as it is."""
    store = KVStore(path)
    values = make_values(VALUE_SIZE, DISTINCT_VALUES)
    for index, value in zip(range(records), cycle(values)):
        store.create(key_of(index), value)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    store.close()


def open_once(path: Path, records: int) -> None:
    """In a child: open the store, print the seconds it took, see that everything is there."""
    logging.getLogger("kvstore").addHandler(logging.NullHandler())  # it warns of the recovery
    values = make_values(VALUE_SIZE, DISTINCT_VALUES)
    begin, cpu_begin = perf_counter(), process_time()
    store = KVStore(path)
    seconds, cpu_seconds = perf_counter() - begin, process_time() - cpu_begin
    if len(store) != records:
        raise AssertionError(f"{len(store):,} records, expected {records:,}")
    for index in range(0, records, 997):
        if store.read(key_of(index)) != values[index % DISTINCT_VALUES]:
            raise AssertionError(f"record {index:,} does not read back as it was stored")
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


def _run_child(task: str, path: Path, records: int, expected_status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, str(path), str(records)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != expected_status:
        raise RuntimeError(f"child {task!r} ended with status {done.returncode}")
    return done.stdout


def measure(place: Path, records: int, rounds: int) -> dict[str, Any]:
    """Return seconds of opening by how the store was left: "killed" or "closed"."""
    progress = Progress()
    results: dict[str, Any] = {}
    left = {"killed": -signal.SIGKILL, "closed": 0}
    for how, status in left.items():
        progress.show(f"loading {records:,} records, to be {how}")
        _run_child(how, place / f"{how}.kvs", records, status)
        results[how] = {"file_bytes": (place / f"{how}.kvs").stat().st_size, "opened": []}
    copy = place / "copy.kvs"
    for number in range(rounds):
        for how in left:
            progress.show(f"round {number + 1} of {rounds}: opening the store that was {how}")
            shutil.copyfile(place / f"{how}.kvs", copy)
            with copy.open("rb+") as file:
                os.fsync(file.fileno())
            results[how]["opened"].append(json.loads(_run_child("open", copy, records)))
            copy.unlink()
    progress.clear()
    for result in results.values():
        seconds = [each["seconds"] for each in result["opened"]]
        result["seconds"] = median(seconds)
        result["cpu_seconds"] = median(each["cpu_seconds"] for each in result["opened"])
        result["microseconds_per_record"] = result["seconds"] / records * 1e6
        result["range_seconds"] = [min(seconds), max(seconds)]
    return results


def format_results(results: dict[str, Any]) -> str:
    """Return the figures as a table."""
    return markdown_table(
        ["store was", "file bytes", "open, s", "min–max, s", "CPU, s", "µs a record"],
        [
            [
                how,
                f"{result['file_bytes']:,}",
                f"{result['seconds']:.4f}",
                f"{result['range_seconds'][0]:.4f}–{result['range_seconds'][1]:.4f}",
                f"{result['cpu_seconds']:.4f}",
                f"{result['microseconds_per_record']:.3f}",
            ]
            for how, result in results.items()
        ],
    )


def main() -> None:
    """Measure, print and save."""
    parser = make_parser("recovery", __doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, help="(default: 1,000,000)")
    parser.add_argument("--rounds", type=int, help="(default: 5)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, path, records = arguments.child
        if task == "open":
            open_once(Path(path), int(records))
        else:
            load_and_end(Path(path), int(records), task)
        return
    records = arguments.records or (50_000 if arguments.quick else 1_000_000)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    with scratch_directory(arguments.dir) as place:
        machine = describe_machine(place, ["kvstore", "orjson", "xxhash", "portalocker"])
        results = measure(place, records, rounds)
    print(machine_line(machine))
    print(
        f"{records:,} records of {VALUE_SIZE} bytes under 20-byte keys; median of {rounds} rounds, "
        "page cache warm\n"
    )
    print(format_results(results))
    save(
        "recovery",
        arguments,
        {"machine": machine, "records": records, "rounds": rounds, "results": results},
    )


if __name__ == "__main__":
    main()
