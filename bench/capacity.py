"""How much a file of 1,000,000,000 bytes holds, and how long the longest create takes on the way.

For each size of value a store is filled until StoreFullError, twice. The first time is for the
throughput: the clock is read once in 10,000 creates, keys are made in between. Then `len()` is
timed, a random sample is read back and compared, and one record is deleted and another put in its
place. The second time, on a new file, each create is timed by itself, to see how pauses are spread.
"""

import random
from array import array
from collections.abc import Callable
from contextlib import suppress
from itertools import count, cycle, islice
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, Final

from harness import (
    Progress,
    describe_machine,
    key_of,
    machine_line,
    make_keys,
    make_parser,
    make_values,
    markdown_table,
    percentile,
    save,
    scratch_directory,
)
from kvstore import KVStore, StoreFullError

VALUE_SIZES: Final = (100, 16_384)
DISTINCT_VALUES: Final = 100
CHUNK: Final = 10_000  # creates between two looks at the clock; a multiple of DISTINCT_VALUES
SAMPLE: Final = 20_000
PERCENTILES: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}

Create = Callable[[str, dict[str, Any]], None]


def measure_throughput(path: Path, size: int, max_bytes: int, progress: Progress) -> dict[str, Any]:
    """Fill a store, look at what it holds, and see that deleting makes room."""
    values = make_values(size, DISTINCT_VALUES)
    with KVStore(path, max_bytes=max_bytes) as store:
        seconds, refused = _fill_in_chunks(store.create, values, path, progress)
        begin = perf_counter()
        records = len(store)
        len_seconds = perf_counter() - begin
        _check_sample(store, records, values)
        store.delete(key_of(0))
        store.create(key_of(records), values[0])
        _check_full(store, key_of(records + 1), values[0])
        file_size = path.stat().st_size
    if file_size > max_bytes:
        raise AssertionError(f"the file has {file_size:,} bytes, limit {max_bytes:,}")
    return {
        "value_size": size,
        "max_bytes": max_bytes,
        "records": records,
        "file_bytes": file_size,
        "bytes_per_record": file_size / records,
        "create_microseconds": seconds / records * 1e6,
        "refusal_milliseconds": refused * 1e3,
        "len_microseconds": len_seconds * 1e6,
    }


def _fill_in_chunks(
    create: Create, values: list[dict[str, Any]], path: Path, progress: Progress
) -> tuple[float, float]:
    """Create until the store is full. Return the seconds of all creates and of the refused one."""
    seconds = 0.0
    for first in count(0, CHUNK):
        progress.show(f"filling: {first:,} records, {path.stat().st_size:,} bytes")
        keys = make_keys(CHUNK, first)
        refused = ""
        begin = perf_counter()
        try:
            for key, value in zip(keys, cycle(values)):
                create(key, value)
        except StoreFullError:
            refused = key
        seconds += perf_counter() - begin
        if refused:
            begin = perf_counter()
            with suppress(StoreFullError):
                create(refused, value)
                raise AssertionError("a record that was refused fits now")
            return seconds, perf_counter() - begin
    raise AssertionError("unreachable")


def _check_sample(store: KVStore, records: int, values: list[dict[str, Any]]) -> None:
    rng = random.Random(3)
    for index in rng.sample(range(records), min(records, SAMPLE)):
        if store.read(key_of(index)) != values[index % len(values)]:
            raise AssertionError(f"record {index:,} does not read back as it was stored")


def _check_full(store: KVStore, key: str, value: dict[str, Any]) -> None:
    with suppress(StoreFullError):
        store.create(key, value)
        raise AssertionError("one record was deleted, and two went in")


def measure_pauses(path: Path, size: int, max_bytes: int, progress: Progress) -> dict[str, Any]:
    """Fill a store and return how the times of single creates are spread, in microseconds."""
    values = make_values(size, DISTINCT_VALUES)
    nanoseconds = array("Q")
    with KVStore(path, max_bytes=max_bytes) as store:
        create, note = store.create, nanoseconds.append
        with suppress(StoreFullError):
            for first in count(0, CHUNK):
                progress.show(f"timing each create: {first:,} records")
                keys = make_keys(CHUNK, first)
                for key, value in zip(keys, cycle(values)):
                    begin = perf_counter_ns()
                    create(key, value)
                    note(perf_counter_ns() - begin)
    progress.show("sorting the times")
    longest_at = max(range(len(nanoseconds)), key=nanoseconds.__getitem__)
    ordered = sorted(nanoseconds)
    return {
        **{name: percentile(ordered, share) / 1e3 for name, share in PERCENTILES.items()},
        "longest": ordered[-1] / 1e3,
        "longest_at_record": longest_at,
        "next_longest": [each / 1e3 for each in islice(reversed(ordered), 1, 10)],
    }


def format_results(results: list[dict[str, Any]]) -> str:
    """Return the figures as a table, one line for each size of value."""
    pauses = (*PERCENTILES, "longest")
    return markdown_table(
        [
            "value",
            "records held",
            "file bytes",
            "bytes a record",
            "µs a create",
            *(f"{name}, µs" for name in pauses),
            "refusal, ms",
            "len(), µs",
        ],
        [
            [
                f"{each['value_size']:,} B",
                f"{each['records']:,}",
                f"{each['file_bytes']:,}",
                f"{each['bytes_per_record']:,.1f}",
                f"{each['create_microseconds']:.2f}",
                *(f"{each['pause_microseconds'][name]:,.1f}" for name in pauses),
                f"{each['refusal_milliseconds']:.1f}",
                f"{each['len_microseconds']:,.0f}",
            ]
            for each in results
        ],
    )


def main() -> None:
    """Measure, print and save."""
    parser = make_parser("capacity", __doc__.partition("\n")[0])
    parser.add_argument("--max-bytes", type=int, help="(default: 1,000,000,000)")
    arguments = parser.parse_args()
    max_bytes = arguments.max_bytes or (32 << 20 if arguments.quick else 1_000_000_000)
    progress = Progress()
    results = []
    with scratch_directory(arguments.dir) as place:
        machine = describe_machine(place, ["kvstore", "orjson", "xxhash", "portalocker"])
        for size in VALUE_SIZES:
            path = place / "store.kvs"
            result = measure_throughput(path, size, max_bytes, progress)
            path.unlink()
            result["pause_microseconds"] = measure_pauses(path, size, max_bytes, progress)
            path.unlink()
            results.append(result)
    progress.clear()
    print(machine_line(machine))
    print(f"a store of {max_bytes:,} bytes under 20-byte keys, filled until StoreFullError\n")
    print(format_results(results))
    save("capacity", arguments, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
