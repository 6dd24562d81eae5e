"""Where the time of an operation of kvstore goes, as far as can be told from outside of it.

Statements are timed as loops, less a loop that does nothing: the members of a store, and beside
them what no store in Python could do without (a call, a hash of the key, JSON made and parsed).
What one member does beyond another, and a store of empty values beyond one of others, tells what
the parts of an operation take. That works for both implementations, and is all that can be done
with the compiled one, whose parts are no objects of Python.

*Hot* is one key again and again: it is created, deleted, created, and each call timed by itself.
(The one whose delete is timed lies among others of its size. As most of them do, it frees a block
where none was free, so that this place is noted each time, and is full again each time.)
Else keys are random ones of a store of so many records, most of which the caches of the processor
do not hold; what is parsed for comparison lies as far apart. Then created keys are new, and as many
of those created before are deleted.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import orjson
from engines import OpenEngine
from loops import Loop, Pairs, make_loop, make_undoing_loop, time_loops
from workers import Say, spread
from xxhash import xxh3_64_intdigest

from harness import key_of, make_values, markdown_table

if TYPE_CHECKING:
    from kvstore import KVStore

VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
RECORDS: Final = (100_000, 1_000_000)
QUICK_RECORDS: Final = (1000, 5000)
KEYS: Final = 500  # in a turn
OLD: Final = 20_000  # records more, to be deleted while others are created
QUICK_OLD: Final = 2000
HOT: Final = "hot"


class Look(NamedTuple):
    """A statement that is timed."""

    what: str
    statement: str
    keys: str
    """Of which kind: see `_cold_samples`."""
    undo: str = ""
    """What has the store be as it was, for a hot key; this is not timed."""


class Difference(NamedTuple):
    """What one statement takes beyond another."""

    what: str
    longer: str
    shorter: str


CALL: Final = "a call of a method in C that does nothing"
LOADS: Final = "`orjson.loads` alone, of bytes as cold"
DUMPS: Final = "`orjson.dumps` alone"
FIND: Final = "`key in store`"
BYTES: Final = "`read_bytes`"
READ: Final = "**`read`**"
CREATE: Final = "**`create`**"
FIND_ABSENT: Final = "`key in store`, absent"
BYTES_EMPTY: Final = "`read_bytes` of a value of 2 bytes"
READ_EMPTY: Final = "`read` of a value of 2 bytes"
CREATE_EMPTY: Final = "`create` of a value of 2 bytes"

_MISS: Final = "try: read(key)\nexcept KeyError: pass"
LOOKS: Final = (
    Look(CALL, "count_of(key)", "present"),
    Look("a call of a method in Python that does nothing", "nothing(key)", "present"),
    Look("`xxh3_64` of the key alone", "xxh3_64_intdigest(key, 1)", "present, as bytes"),
    Look(LOADS, "loads(scattered[value])", "present"),
    Look(DUMPS, "dumps(value)", "new to other"),
    Look(FIND, "key in store", "present"),
    Look(FIND_ABSENT, "key in store", "absent"),
    Look("`read` of an absent key, its KeyError caught", _MISS, "absent"),
    Look(BYTES, "read_bytes(key)", "present"),
    Look(READ, "read(key)", "present"),
    Look(BYTES_EMPTY, "empty.read_bytes(key)", "present"),
    Look(READ_EMPTY, "empty.read(key)", "present"),
    Look(CREATE, "create(key, value, TTL)", "new", "delete(key)"),
    Look(CREATE_EMPTY, "empty.create(key, NOTHING, TTL)", "new to other", "empty.delete(key)"),
    Look("**`delete`**", "delete(key)", "old", "create(key, value, TTL)"),
)
DIFFERENCES: Final = (
    Difference("check, hash, lock and look up: `in` less a call", FIND, CALL),
    Difference("copy and verify: `read_bytes` less `in`", BYTES, FIND),
    Difference("of these, for 98 bytes more of value", BYTES, BYTES_EMPTY),
    Difference("parse: `read` less `read_bytes`", READ, BYTES),
    Difference("all of `read` but `orjson.loads`", READ, LOADS),
    Difference("all of `create` but `orjson.dumps`", CREATE, DUMPS),
    Difference("of these, look up: `in`, absent, less a call", FIND_ABSENT, CALL),
    Difference("value to JSON, checked, stored: 98 bytes more", CREATE, CREATE_EMPTY),
)

# By statement, for each case (hot, or a number of records) a figure a round.
Figures = dict[str, dict[str, list[float]]]


class _Nothing:
    def nothing(self, _key: str) -> None:
        pass


# Keys of each kind, with a number or a value, for a turn at a time.
Samples = Mapping[str, Iterator[Pairs]]


def look_from_outside(
    open_engine: OpenEngine,
    say: Say,
    directory: Path,
    sizes: Sequence[int],
    old: int,
    turns: int,
    rounds: int,
) -> Figures:
    """Task: time all statements; return nanoseconds."""
    directory.mkdir()
    figures: Figures = {look.what: {} for look in LOOKS}
    values = make_values(VALUE_SIZE, DISTINCT_VALUES)
    encoded = [bytearray(orjson.dumps(value)) for value in values]
    for records in sizes:
        # A copy for each record, so that they lie as far from each other as in the file.
        scattered = [bytes(each) for each, _ in zip(cycle(encoded), range(records))]
        full, empty = (
            _load(open_engine, say, directory / f"{name}-{records}", contents, records, old)
            for name, contents in (("full", values), ("empty", [{}]))
        )
        names = {
            "store": full,
            "empty": empty,
            **{name: getattr(full, name) for name in ("create", "read", "read_bytes", "delete")},
            "NOTHING": {},
            "TTL": TTL,
            "scattered": scattered,
            "loads": orjson.loads,
            "dumps": orjson.dumps,
            "xxh3_64_intdigest": xxh3_64_intdigest,
            "nothing": _Nothing().nothing,
            "count_of": ().count,
        }
        cases = {f"{records:,}": _cold_samples(records, old, values)}
        if records == sizes[-1]:
            cases = {HOT: _hot_samples(records, values), **cases}
        for case, samples in cases.items():
            for number in range(rounds):
                say(f"{case}, round {number + 1} of {rounds}")
                for what, nanoseconds in _time_all(names, samples, turns, case == HOT).items():
                    figures[what].setdefault(case, []).append(nanoseconds)
        full.close()
        empty.close()
    return figures


def _load(
    open_engine: OpenEngine,
    say: Say,
    folder: Path,
    values: Sequence[dict[str, Any]],
    records: int,
    old: int,
) -> "KVStore":
    folder.mkdir()
    store = cast("KVStore", open_engine(folder))
    say(f"loading {records:,} records")
    for index, value in zip(range(records + old), cycle(values)):
        store.create(key_of(index), value, TTL)
    return store


def _cold_samples(records: int, old: int, values: list[dict[str, Any]]) -> Samples:
    rng = random.Random(5)
    numbers = count(1 << 40)
    deletable = list(range(records, records + old))

    def present() -> Iterator[Pairs]:
        while True:
            indexes = rng.choices(range(records), k=KEYS)
            yield [(key_of(index), index) for index in indexes]

    def absent() -> Iterator[Pairs]:
        while True:
            yield [(key_of(rng.randrange(1 << 50, 1 << 51)), None) for _ in range(KEYS)]

    def new(*, is_deleted: bool) -> Iterator[Pairs]:
        while True:
            taken = [next(numbers) for _ in range(KEYS)]
            yield [(key_of(number), rng.choice(values)) for number in taken]
            if is_deleted:
                deletable.extend(taken)  # now that they were created

    def old_ones() -> Iterator[Pairs]:
        while True:
            rng.shuffle(deletable)
            yield [(key_of(deletable.pop()), None) for _ in range(KEYS)]

    def encoded() -> Iterator[Pairs]:
        while True:
            indexes = rng.choices(range(records), k=KEYS)
            yield [(key_of(index).encode(), index) for index in indexes]

    return {
        "present": present(),
        "present, as bytes": encoded(),
        "absent": absent(),
        "new": new(is_deleted=True),
        "new to other": new(is_deleted=False),
        "old": old_ones(),
    }


def _hot_samples(records: int, values: list[dict[str, Any]]) -> Samples:
    """Return one key of each kind, again and again."""
    key, index = key_of(7), 7
    created = {
        "absent": 1 << 50,
        "new": 1 << 50,
        "new to other": 1 << 50,
        "old": records,  # the first of these
    }
    samples: dict[str, Pairs] = {
        "present": [(key, index)] * KEYS,
        "present, as bytes": [(key.encode(), index)] * KEYS,
        **{kind: [(key_of(number), values[7])] * KEYS for kind, number in created.items()},
    }
    return {kind: cycle([pairs]) for kind, pairs in samples.items()}


def _time_all(
    names: dict[str, Any], samples: Samples, turns: int, is_hot: bool
) -> dict[str, float]:
    """Return the nanoseconds that each statement takes beyond a loop of nothing."""
    loops: list[tuple[Loop, Iterator[Pairs]]] = [
        (make_loop([], names), samples["present"]),
        (make_undoing_loop("", "", names), samples["present"]),
    ]
    plain, undoing = range(2)
    beyond = []
    for look in LOOKS:
        undoes = is_hot and bool(look.undo)
        beyond.append(undoing if undoes else plain)
        loop = (
            make_undoing_loop(look.statement, look.undo, names)
            if undoes
            else make_loop([look.statement], names)
        )
        loops.append((loop, samples[look.keys]))
    taken = time_loops(loops, turns, random.Random(6))
    return {
        look.what: taken[place] - taken[less]
        for place, (look, less) in enumerate(zip(LOOKS, beyond, strict=True), start=2)
    }


def summarise(figures: Figures) -> dict[str, Any]:
    """Return the spread of each statement's figures, and of the differences between some."""
    return {
        "statements": {
            what: {case: spread(rounds) for case, rounds in cases.items()}
            for what, cases in figures.items()
        },
        "differences": {
            each.what: {
                case: spread(
                    [a - b for a, b in zip(rounds, figures[each.shorter][case], strict=True)]
                )
                for case, rounds in figures[each.longer].items()
            }
            for each in DIFFERENCES
        },
    }


def format_outside(engine: str, result: Mapping[str, Any]) -> list[str]:
    """Return what `summarise` returned as two tables."""
    tables = []
    for part, heading in (
        ("statements", f"{engine}, ns"),
        ("differences", f"what that tells of {engine}, ns"),
    ):
        cases = sorted(next(iter(result[part].values())), key=lambda case: case != HOT)
        headings = [heading, *(case if case == HOT else f"of {case}" for case in cases)]
        rows = [
            [what, *(show_nanoseconds(figures[case]) for case in cases)]
            for what, figures in result[part].items()
        ]
        tables.append(markdown_table(headings, rows))
    return tables


def show_nanoseconds(figures: Mapping[str, float]) -> str:
    """Return what `spread` returned, as text."""
    return "{median:,.0f} ({min:,.0f}–{max:,.0f})".format(**figures)
