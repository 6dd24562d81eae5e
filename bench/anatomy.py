"""`anatomy`: where the time of one read and one create of kvstore goes, in nanoseconds.

Not by a profiler: one that traces distorts what it times. Both implementations are looked at from
outside: see [`outside`](outside.py).

The plain one is taken apart too: the steps of an operation are written down here as statements that
call the layers as the store does, and are timed as loops: one of no step, one of the first, one of
the first two, and so on. What each loop takes longer than the one before is its last step; what the
whole operation takes longer than all steps is the calls and checks around them. The loops take
turns every few hundred keys, in shuffled order, so that all meet the same ups and downs of the
machine; a figure is the median of a loop's turns, and the extremes are those of some rounds. There,
*cold* keys are random ones of all, far more than the processor's caches hold; *hot* ones are a
thousand, again and again. Created keys are new ones, so cold. Now and then the file grows, and a
segment of the table that fills up is split in two: that is in no median, so it is timed while the
store is loaded, and spread over these creates.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, pairwise, product
from pathlib import Path
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import orjson
import outside
from engines import OpenEngine
from engines.own import IMPLEMENTATIONS, PLAIN
from loops import Loop, Pairs, make_loop, time_loops
from outside import format_outside, look_from_outside, show_nanoseconds, summarise
from workers import Plan, Say, Skipped, Worker, spread
from xxhash import xxh3_64_intdigest

from harness import key_of, make_keys, make_values, markdown_table

# Every process of a benchmark imports this module; only its own task is to bring kvstore along.
if TYPE_CHECKING:
    from kvstore import KVStore

VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
# Between two waves of splits, as keys spread evenly: there is room for what the loops create.
RECORDS: Final = 1_300_000
QUICK_RECORDS: Final = 20_000
ROUNDS: Final = 5
TURNS: Final = 40  # of a loop in each round
QUICK_TURNS: Final = 3
KEYS: Final = 500  # in a turn
HOT_KEYS: Final = 1000
AROUND: Final = "calls and checks around these"
WHOLE: Final = "**the whole**"


class Step(NamedTuple):
    """A part of an operation."""

    what: str
    statement: str


READ: Final = (
    Step("key to bytes (`encode_key`)", "encoded_key = encode_key(key)"),
    Step("hash of the key (`xxh3_64`)", "key_hash = xxh3_64_intdigest(encoded_key, seed)"),
    Step("lock of the stripe", "with stripes[key_hash >> STRIPE_SHIFT]:"),
    Step("look up (`Slots.find`)", "    slot = find(key_hash, encoded_key)"),
    Step(
        "expiry and clock (`time_ns`)",
        "    expires_at = words[slot + SLOT_EXPIRES_OFFSET >> 3]\n"
        "    expires_at <= time_ns() // 1_000_000",
    ),
    Step(
        "copy the record (`Slab.read_record`)",
        "    tail = words[slot + SLOT_RECORD_OFFSET >> 3]\n    header, encoded = read_record(tail)",
    ),
    Step("checksum (`verify`)", "verify(header, encoded, tail, expires_at, key_hash)"),
    Step("parse (`decode_value`)", "decode_value(key, encoded)"),
)
CREATE: Final = (
    READ[0],
    Step("time-to-live (`check_ttl`)", "lifetime = check_ttl(key, TTL)"),
    Step("value to JSON (`encode_value`)", "encoded = encode_value(key, value)"),
    READ[1],
    READ[2],
    Step("clock (`time_ns`)", "    now_ms = time_ns() // 1_000_000"),
    Step("look up (`Slots.find`)", "    slot = find(key_hash, encoded_key)"),
    Step("is the segment full (`Slots.used_slot_count`)", "    used(-slot) >= SPLIT_AT"),
    Step(
        "take a block (`Slab.take`)",
        "    record = take(RECORD_HEADER_SIZE + len(encoded_key) + len(encoded))",
    ),
    Step(
        "write the record (`Slab.write_record`)",
        "    expires_at = now_ms + lifetime\n"
        "    write_record(record, encoded_key, encoded, key_hash, now_ms, expires_at)",
    ),
    Step(
        "write the slot (`Slots.insert`)",
        "    insert(-slot, key_hash, encoded_key, record, len(encoded), expires_at)",
    ),
)

# Timed each by itself, on the same values, and the parser on bytes that are as cold.
PARTS_OF_ENCODING: Final = (
    Step("look at each member (`_walk`)", "_walk(value.values(), 1)"),
    Step("`orjson.dumps`", "orjson.dumps(value, None, _OPTIONS)"),
)
FLOOR: Final = (Step("`orjson.loads` alone", "orjson.loads(scattered[value])"),)


def _growing(steps: Sequence[Step], whole: str, names: dict[str, Any]) -> list[Loop]:
    """Return loops of no step, the first, the first two, …, all, and of the whole operation."""
    statements = [step.statement for step in steps]
    prefixes = [statements[:count] for count in range(len(steps) + 1)]
    return [make_loop(prefix, names) for prefix in (*prefixes, [whole])]


def _single(steps: Sequence[Step], names: dict[str, Any]) -> list[Loop]:
    """Return loops of no step, and of each by itself."""
    return [make_loop([], names), *(make_loop([step.statement], names) for step in steps)]


def _samples(make: Callable[[], tuple[str, Any]]) -> Iterator[Pairs]:
    while True:
        yield [make() for _ in range(KEYS)]


def _names(store: "KVStore") -> dict[str, Any]:
    """Return what the statements call and use."""
    from kvstore.format import codec, layout
    from kvstore.index import records

    return {
        **vars(layout),
        **vars(codec),
        "verify": records.verify,
        "xxh3_64_intdigest": xxh3_64_intdigest,
        "time_ns": time_ns,
        "TTL": TTL,
        "store": store,
        "seed": store._seed,
        "stripes": store._stripes,
        "words": store._words,
        "find": store._slots.find,
        "used": store._slots.used_slot_count,
        "insert": store._slots.insert,
        "take": store._slab.allocate,
        "read_record": store._records.read_record,
        "write_record": store._records.write_record,
    }


def take_apart(
    open_engine: OpenEngine, say: Say, directory: Path, records: int, turns: int, rounds: int
) -> dict[str, Any]:
    """Task: load a store and time all loops on it.

    Returns:
        By operation, for each round what each loop took; and what is seldom done, by record.
    """
    directory.mkdir()
    values = make_values(VALUE_SIZE, DISTINCT_VALUES)
    encoded = [bytearray(orjson.dumps(value)) for value in values]
    # A copy for each record, so that they lie as far from each other as in the file.
    scattered = [bytes(each) for each, _ in zip(cycle(encoded), range(records))]
    say(f"loading {records:,} records")
    with cast("KVStore", open_engine(directory)) as store:
        with (
            _timing(store._segments, "split_or_compact") as splits,
            _timing(store._file, "grow") as growths,
        ):
            for index, value in zip(range(records), cycle(values)):
                store.create(key_of(index), value, TTL)
        rng = random.Random(5)
        numbers = itertools.count(records)
        names = {**_names(store), "scattered": scattered}
        hot = make_keys(HOT_KEYS)
        reading = _growing(READ, "store.read(key)", names)
        parsing = _single(FLOOR, names)
        new = _samples(lambda: (key_of(next(numbers)), rng.choice(values)))
        operations = {
            "read cold": (reading, _samples(lambda: (key_of(rng.randrange(records)), None))),
            "read hot": (reading, _samples(lambda: (rng.choice(hot), None))),
            "parse cold": (parsing, _samples(lambda: ("", rng.randrange(records)))),
            "parse hot": (parsing, _samples(lambda: ("", rng.randrange(HOT_KEYS)))),
            "create": (_growing(CREATE, "store.create(key, value, TTL)", names), new),
            "encode": (_single(PARTS_OF_ENCODING, names), new),
        }
        taken: dict[str, list[list[float]]] = {operation: [] for operation in operations}
        for number, (operation, (loops, samples)) in product(range(rounds), operations.items()):
            say(f"round {number + 1} of {rounds}: {operation}")
            with_samples = [(loop, samples) for loop in loops]
            taken[operation].append(time_loops(with_samples, turns, rng))
    return {
        "rounds": taken,
        "seldom": {"splits": sum(splits) / records, "growth": sum(growths) / records},
    }


@contextmanager
def _timing(owner: object, method: str) -> Iterator[list[int]]:
    """Note the nanoseconds of each call of a method that is called seldom."""
    taken: list[int] = []
    original = getattr(owner, method)

    def timed(*arguments: Any) -> Any:
        begin = perf_counter_ns()
        try:
            return original(*arguments)
        finally:
            taken.append(perf_counter_ns() - begin)

    setattr(owner, method, timed)
    try:
        yield taken
    finally:
        delattr(owner, method)


def measure(plan: Plan) -> dict[str, Any]:
    """Look at each kvstore from outside, and take the plain one apart.

    Raises:
        Skipped: none is among the engines.
    """
    own = [engine for engine in plan.engines if engine in IMPLEMENTATIONS]
    if not own:
        raise Skipped("looks only at kvstore, which is not asked for")
    turns = QUICK_TURNS if plan.quick else TURNS
    rounds = plan.rounds or (2 if plan.quick else ROUNDS)
    sizes, old = (
        (outside.QUICK_RECORDS, outside.QUICK_OLD) if plan.quick else (outside.RECORDS, outside.OLD)
    )
    seen = {}
    for engine in own:
        with Worker(engine, plan.progress) as worker:
            folder = plan.place / engine
            figures = worker.call(look_from_outside, folder, sizes, old, turns, rounds)
        seen[engine] = summarise(figures)
    return {
        "value_size": VALUE_SIZE,
        "rounds": rounds,
        "outside": seen,
        "steps": _measure_steps(plan, turns, rounds) if PLAIN in own else None,
    }


def _measure_steps(plan: Plan, turns: int, rounds: int) -> dict[str, Any]:
    """Take the plain kvstore apart."""
    records = QUICK_RECORDS if plan.quick else RECORDS
    with Worker(PLAIN, plan.progress) as worker:
        taken = worker.call(take_apart, plan.place / "steps", records, turns, rounds)
    return {
        "records": records,
        "keys": KEYS * turns * rounds,
        "read": {
            how: _parts_of_whole(READ, taken["rounds"][f"read {how}"]) for how in ("cold", "hot")
        },
        "parse": {how: _parts(FLOOR, taken["rounds"][f"parse {how}"]) for how in ("cold", "hot")},
        "create": _parts_of_whole(CREATE, taken["rounds"]["create"]),
        "encode": _parts(PARTS_OF_ENCODING, taken["rounds"]["encode"]),
        "seldom": taken["seldom"],
    }


def _parts_of_whole(steps: Sequence[Step], rounds: list[list[float]]) -> list[dict[str, Any]]:
    """Return what each loop of `_growing` adds to the one before; last the whole operation."""
    names = [*(step.what for step in steps), AROUND]
    added = [[after - before for before, after in pairwise(each)] for each in rounds]
    wholes = [each[-1] - each[0] for each in rounds]
    return [
        *_named(names, added),
        {"what": WHOLE, "nanoseconds": spread(wholes)},
    ]


def _parts(steps: Sequence[Step], rounds: list[list[float]]) -> list[dict[str, Any]]:
    """Return what each loop of `_single` takes beyond the one of no step."""
    return _named(
        [step.what for step in steps],
        [[one - nothing for one in each] for nothing, *each in rounds],
    )


def _named(names: Sequence[str], rounds: list[list[float]]) -> list[dict[str, Any]]:
    return [
        {"what": name, "nanoseconds": spread(figures)}
        for name, figures in zip(names, zip(*rounds, strict=True), strict=True)
    ]


def format_result(result: dict[str, Any]) -> str:
    """Return a table for each kvstore, and one for each operation that was taken apart."""
    tables = [
        table
        for engine, seen in result["outside"].items()
        for table in format_outside(engine, seen)
    ]
    if result["steps"]:
        tables += _format_steps(result["steps"])
    return "\n\n".join(tables)


def _format_steps(result: dict[str, Any]) -> list[str]:
    read = markdown_table(
        [f"one read of {PLAIN}", "cold, ns", "hot, ns"],
        [
            [cold["what"], _nanoseconds(cold), _nanoseconds(hot)]
            for cold, hot in zip(
                [*result["read"]["cold"], *result["parse"]["cold"]],
                [*result["read"]["hot"], *result["parse"]["hot"]],
                strict=True,
            )
        ],
    )
    create = markdown_table(
        [f"one create of {PLAIN}", "ns"],
        [
            *([part["what"], _nanoseconds(part)] for part in result["create"]),
            *([f"of encoding: {part['what']}", _nanoseconds(part)] for part in result["encode"]),
            ["seldom: a full segment is split", f"{result['seldom']['splits']:,.0f}"],
            ["seldom: the file grows", f"{result['seldom']['growth']:,.0f}"],
        ],
    )
    return [read, create]


def _nanoseconds(part: dict[str, Any]) -> str:
    return show_nanoseconds(part["nanoseconds"])
