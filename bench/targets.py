"""Targets of kvstore's figures, and what was measured: for each implementation, and for the next.

Factors are ratios of the medians that the tables show; all cases of one run took turns.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import updates
from engines.own import COMPILED, IMPLEMENTATIONS, PLAIN
from operations import OPERATIONS
from records import TEXT, WORDS
from updates import NEW

from harness import markdown_table, ratio

Results = Mapping[str, Mapping[str, Any]]


class Target(NamedTuple):
    """A target, and what was measured."""

    engine: str
    """Of kvstore's two, whose it is."""
    what: str
    measured: float
    bound: float
    unit: str
    at_least: bool = False
    """Whether more is better."""
    is_next: bool = False
    """Whether it is for what comes next."""

    @property
    def met(self) -> bool:
        """Whether the figure is within its bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


class Speed(NamedTuple):
    """How many times as fast as all of some peers one of kvstore's has to be."""

    own: str
    peers: tuple[str, ...]
    sizes: tuple[int, ...]
    """Of values, in bytes."""
    records: tuple[int, ...]
    least: tuple[float, ...]
    """Of each of `operations`."""
    shapes: tuple[str, ...] = (WORDS,)
    is_next: bool = False
    operations: tuple[str, ...] = OPERATIONS

    @property
    def name(self) -> str:
        """In words."""
        peers = self.peers[0] if len(self.peers) == 1 else "all that keep a file"
        sizes = " and ".join(f"{size:,}" for size in self.sizes)
        return f"beside {peers}, {sizes} B"


_BOTH: Final = (100, 1000)
_COUNT: Final = (100_000,)
_COUNTS: Final = (100_000, 1_000_000)
_UPDATED: Final = tuple({case.records for case in updates.FULL})
_USUAL: Final = (1.3, 1.3, 1.0, 1.3)
_SHAPES: Final = (WORDS, TEXT)
PEERS: Final = (
    *("sqlite3", "diskcache", "rocksdict", "plyvel", "unqlite", "semidbm", "kyotocabinet"),
    *("tkrzw", "lmdb"),
)
SPEEDS: Final = (
    *(
        Speed(COMPILED, (peer,), _BOTH, _COUNTS, least)
        for peer, least in {
            "dict": (0.9, 1.3, 0.8, 0.7),
            **dict.fromkeys(PEERS, _USUAL),
            "tkrzw": (1.1, 1.3, 1.0, 1.1),
            "lmdb": (2.0, 1.7, 1.5, 2.5),
        }.items()
    ),
    *(
        Speed(PLAIN, (peer,), _BOTH, _COUNT, (1.3, 1.3, 1.3, 1.3))
        for peer in ("sqlite3", "diskcache", "unqlite")
    ),
    *(
        Speed(COMPILED, (peer,), _BOTH, _UPDATED, (least,), _SHAPES, operations=("put",))
        for peer, least in {"dict": 0.9, **dict.fromkeys(updates.PEERS, 1.2)}.items()
    ),
    *(
        Speed(COMPILED, (peer,), (1000,), _UPDATED, (1.3,), _SHAPES, operations=("touch",))
        for peer in ("lmdb", "diskcache")
    ),
    Speed(PLAIN, ("lmdb",), (100,), _COUNT, (0.4, 0.7, 0.7, 0.8)),
    Speed(PLAIN, ("lmdb",), (1000,), _COUNT, (0.8, 0.7, 0.7, 0.8)),
    Speed(COMPILED, PEERS, (100,), _COUNTS, (1.3, 1.3, 1.3, 1.3), is_next=True),
    Speed(COMPILED, PEERS, (1000,), _COUNTS, (1.2, 1.25, 1.3, 1.3), is_next=True),
    Speed(COMPILED, PEERS, (16_000,), (10_000,), (1.1, 1.1, 1.2, 1.2), _SHAPES, is_next=True),
    Speed(COMPILED, ("dict",), _BOTH, _COUNTS, (1.0, 1.3, 1.0, 0.9), is_next=True),
)


def judge(results: Results) -> list[Target]:
    """Return all targets of which something was measured, those of the compiled one first."""
    found = [*_speeds(results), *_new(results.get("updates", {}).get("cases", ()))]
    for engine in IMPLEMENTATIONS:
        found += _own_cost(engine, results.get("operations", {}).get("cases", ()))
        found += _latency(engine, results.get("latency", {}))
        found += _durable(engine, results.get("durable", {}).get("rows", ()))
        found += _footprint(engine, results.get("footprint", {}).get("engines", {}).get(engine, {}))
    return sorted(found, key=lambda target: (target.is_next, target.engine))  # "kvstore" first


def targets_table(targets: Iterable[Target]) -> str:
    """Return a table with a row for each target."""
    return markdown_table(
        ["target", "of", "wanted", "measured", "met"],
        [
            [
                each.what,
                each.engine,
                f"at {'least' if each.at_least else 'most'} {_number(each.bound)}{each.unit}",
                f"{_number(each.measured)}{each.unit}",
                "yes" if each.met else "**no**",
            ]
            for each in targets
        ],
    )


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _speeds(results: Results) -> Iterator[Target]:
    cases = [
        case
        for name in ("operations", "updates")
        for case in results.get(name, {}).get("cases", ())
    ]
    for speed in SPEEDS:
        wanted = [
            case["microseconds"]
            for case in cases
            if case["size"] in speed.sizes
            and case["records"] in speed.records
            and case["shape"] in speed.shapes
        ]
        for operation, least in zip(speed.operations, speed.least, strict=True):
            factors = [
                ratio(micros[operation][peer], micros[operation][speed.own])
                for micros in wanted
                for peer in speed.peers
                if {peer, speed.own} <= micros.get(operation, {}).keys()
            ]
            if factors:
                what = f"{operation} {speed.name}"
                yield Target(speed.own, what, min(factors), least, "×", True, speed.is_next)


def _new(cases: Any) -> Iterator[Target]:
    of_own = [[case["microseconds"].get(name, {}).get(COMPILED) for name in NEW] for case in cases]
    if factors := [ratio(create, put) for create, put in of_own if create and put]:
        what = "put to an absent key beside create"
        yield Target(COMPILED, what, min(factors), 0.97, "×", True)


def _own_cost(engine: str, cases: Any) -> Iterator[Target]:
    sizes = {each["records"]: each["microseconds"] for each in cases if each["size"] == 100}
    small, large = sizes.get(100_000, {}), sizes.get(3_000_000, {})
    for operation in OPERATIONS:
        if engine in small.get(operation, {}) and engine in large.get(operation, {}):
            what = f"{operation} at 3,000,000 records over that at 100,000"
            cost = ratio(large[operation][engine], small[operation][engine])
            most = 1.6 if engine == PLAIN else 2.0 if operation == "delete" else 1.5
            yield Target(engine, what, cost, most, "×", is_next=engine == COMPILED)


def _latency(engine: str, result: Mapping[str, Any]) -> Iterator[Target]:
    if engine == COMPILED and (row := result.get("engines", {}).get(engine)):
        figures = row["microseconds"].get("put", {}).get("p99.9")
        if figures and row["puts"] == result["puts"]:
            what = f"p99.9 of {row['puts']:,} puts over synced records"
            yield Target(engine, what, figures["median"], 60, " µs")
    # Those of kvstore where it got to all records, those of another as far as it got.
    creates = {
        name: each["microseconds"]["create"]
        for name, each in result.get("engines", {}).items()
        if name not in IMPLEMENTATIONS or each["records"] == result["records"]
    }
    limits = [("p99.99", 300, False), ("p99.9", 50, True), ("p99.99", 120, True)]
    if engine == PLAIN:
        limits = [("p99.99", 2000, False)]
        if theirs := creates.get("sqlite3", {}).get("p99.99"):
            limits.append(("p99.99", theirs["median"], False))
    for name, most, is_next in limits:
        if figures := creates.get(engine, {}).get(name):
            what = f"{name} of create while growing to {result['records']:,} records"
            yield Target(engine, what, figures["median"], most, " µs", is_next=is_next)


def _durable(engine: str, rows: Any) -> Iterator[Target]:
    creates = {row["engine"]: row for row in rows if row["operation"] == "create"}
    if engine not in creates:
        return
    own, is_next = creates[engine], engine == COMPILED
    what = "durable creates, 8 threads over 1"
    yield Target(engine, what, own["speed_up"], 3.5 if is_next else 3.0, "×", True, is_next)
    for peer in PEERS if is_next else ("lmdb", "sqlite3"):
        if peer in creates:
            pace, least = (each["per_second"]["1"]["median"] for each in (own, creates[peer]))
            what = f"durable creates of 1 thread, as many as {peer}"
            yield Target(engine, what, pace, least, " a second", True, is_next)
    puts = {row["engine"]: row["per_second"] for row in rows if row["operation"] == "put"}
    if is_next and engine in puts:
        for threads, pace in puts[engine].items():
            what = f"durable puts beside creates, threads: {threads}"
            beside = ratio(pace, own["per_second"][threads])
            yield Target(engine, what, beside, 0.9, "×", True)
    if is_next:
        what = "written for a durable create of 100 B"
        yield Target(engine, what, own["written_bytes"] / 1024, 16, " KiB", is_next=True)


def _footprint(engine: str, row: Mapping[str, Any]) -> Iterator[Target]:
    is_compiled = engine == COMPILED
    if "opened_bytes" in row:
        opened = row["opened_bytes"]["median"] / (1 << 20)
        what = "private memory of import and an open store, beyond the libraries'"
        yield Target(engine, what, opened, 1.5, " MiB")
        if is_compiled:
            yield Target(engine, what, opened, 1, " MiB", is_next=True)
            took = row["beyond_milliseconds"]["median"]
            yield Target(engine, "import, beyond the libraries'", took, 12, " ms", is_next=True)
    if row.get("records") == 1_000_000:
        grown = (row["late_bytes"] - row["early_bytes"]) / (1 << 20)
        yield Target(engine, "growth of private memory to 1,000,000 records", grown, 2, " MiB")
    if is_compiled and "updated" in row:
        grown = (row["updated"]["late_bytes"] - row["updated"]["early_bytes"]) / (1 << 20)
        what = f"growth of private memory in {row['updated']['puts']:,} puts, touches, deletes"
        yield Target(engine, what, grown, 2, " MiB")
    if "killed" in row:
        micros = row["killed"]["median"] / row["records"] * 1e3
        what = f"recovery of {row['records']:,} records after SIGKILL, for each"
        yield Target(engine, what, micros, 0.5 if is_compiled else 3, " µs")
        if is_compiled:
            yield Target(engine, what, micros, 0.3, " µs", is_next=True)
