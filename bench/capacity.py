"""How much a kvstore of a number of bytes holds, and how long single creates take on the way.

For each size of value a store is filled until StoreFullError, for the smallest and the largest
twice. The first time is for the throughput: the clock is read once in 10,000 creates, keys are made
in between. Then `len()` is timed, a random sample is read back and compared, and one record is
deleted and another put in its place. The second time, on a new file, each create is timed by
itself, to see how pauses are spread.
"""

import random
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, cycle
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, Final

from engines import OpenEngine
from engines.own import check_implementation
from histogram import SHARES, Histogram
from workers import Say

from harness import key_of, make_keys, make_values, markdown_table

DISTINCT_VALUES: Final = 100
CHUNK: Final = 10_000  # creates between two looks at the clock; a multiple of DISTINCT_VALUES
SAMPLE: Final = 20_000
SIZES: Final = {100: True, 1000: False, 16_000: False, 16_384: True}  # of value: whether twice
QUICK_SIZES: Final = {16_384: True}


def measure_capacity(
    _open_engine: OpenEngine,
    say: Say,
    folder: Path,
    engine: str,
    size: int,
    max_bytes: int,
    twice: bool,
) -> dict[str, Any]:
    """Task: fill a store with values of `size` bytes, once or twice; return what was seen."""
    check_implementation(engine)
    path = folder / "full.kvs"
    result = _measure_throughput(path, say, size, max_bytes)
    result["microseconds"] = _measure_pauses(path, say, size, max_bytes) if twice else {}
    return result


def _measure_throughput(path: Path, say: Say, size: int, max_bytes: int) -> dict[str, Any]:
    """Fill a store, look at what it holds, and see that deleting makes room."""
    from kvstore import KVStore, StoreFullError

    values = make_values(size, DISTINCT_VALUES)
    seconds = 0.0
    with KVStore(path, max_bytes=max_bytes) as store:
        create = store.create
        with suppress(StoreFullError):
            for keys in _keys(say):
                begin = perf_counter()
                try:
                    for key, value in zip(keys, cycle(values)):
                        create(key, value)
                finally:
                    seconds += perf_counter() - begin
        begin = perf_counter()
        records = len(store)
        len_seconds = perf_counter() - begin
        for index in random.Random(3).sample(range(records), min(records, SAMPLE)):
            if store.read(key_of(index)) != values[index % len(values)]:
                raise AssertionError(f"record {index:,} does not read back as it was stored")
        store.delete(key_of(0))
        create(key_of(records), values[0])
        begin = perf_counter()
        with suppress(StoreFullError):
            create(key_of(records + 1), values[0])
            raise AssertionError("one record was deleted, and two went in")
        refused = perf_counter() - begin
        file_size = path.stat().st_size
    path.unlink()
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


def _measure_pauses(path: Path, say: Say, size: int, max_bytes: int) -> dict[str, float]:
    """Fill a store and return how the times of single creates are spread, in microseconds."""
    from kvstore import KVStore, StoreFullError

    values = make_values(size, DISTINCT_VALUES)
    took = array("Q")
    with KVStore(path, max_bytes=max_bytes) as store, suppress(StoreFullError):
        create, note = store.create, took.append
        for keys in _keys(say):
            for key, value in zip(keys, cycle(values)):
                begin = perf_counter_ns()
                create(key, value)
                note(perf_counter_ns() - begin)
    path.unlink()
    histogram = Histogram()
    histogram.add(took)
    return histogram.summary()


def _keys(say: Say) -> Iterator[list[str]]:
    """Yield keys without end, `CHUNK` at a time."""
    for first in count(0, CHUNK):
        say(f"filling: {first:,} records")
        yield make_keys(CHUNK, first)


def format_capacity(results: list[dict[str, Any]]) -> str:
    """Return the figures as a table, one line for each size of value."""
    pauses = (*SHARES, "max")
    return markdown_table(
        [
            "value",
            "records held",
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
                f"{each['bytes_per_record']:,.1f}",
                f"{each['create_microseconds']:.2f}",
                *(
                    f"{each['microseconds'][name]:,.1f}" if each["microseconds"] else ""
                    for name in pauses
                ),
                f"{each['refusal_milliseconds']:.1f}",
                f"{each['len_microseconds']:,.0f}",
            ]
            for each in results
        ],
    )
