"""Targets of kvstore's figures, and what was measured, for each implementation.

Factors are ratios of the medians that the tables show; all cases of one run took turns.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from engines.own import COMPILED, IMPLEMENTATIONS, PLAIN
from operations import OPERATIONS
from records import WORDS

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
    where: str = ""
    """Of several figures, which one was the worst."""

    @property
    def met(self) -> bool:
        """Whether the figure is within its bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


class Speed(NamedTuple):
    """How many times as fast as all of some peers one of kvstore's has to be, in every case."""

    own: str
    peers: tuple[str, ...]
    sizes: tuple[int, ...]
    """Of values, in bytes."""
    least: Mapping[str, float]
    """By operation."""

    @property
    def name(self) -> str:
        """In words."""
        peers = self.peers[0] if len(self.peers) == 1 else "the fastest on disk"
        return f"beside {peers}, {' and '.join(f'{size:,}' for size in self.sizes)} B"


PEERS: Final = (
    *("sqlite3", "diskcache", "rocksdict", "plyvel", "unqlite", "semidbm", "kyotocabinet"),
    *("tkrzw", "lmdb", "snkv", "pysciqlop-cache", "babeldb"),
)
_JUDGED: Final = ("create", "put", "read", "miss", "delete")


def _least(*factors: float) -> dict[str, float]:
    return dict(zip(_JUDGED, factors, strict=True))


SPEEDS: Final = (
    Speed(COMPILED, PEERS, (100,), _least(1.3, 1.2, 1.3, 1.3, 1.3)),
    Speed(COMPILED, PEERS, (1000,), _least(1.2, 1.2, 1.25, 1.3, 1.3)),
    Speed(COMPILED, PEERS, (16_000,), _least(1.1, 1.1, 1.1, 1.2, 1.2)),
    Speed(COMPILED, ("dict",), (100, 1000), _least(1.0, 0.9, 1.3, 1.0, 0.9)),
    *(
        Speed(PLAIN, (peer,), (100, 1000), dict.fromkeys(("create", "read", "miss", "delete"), 1.3))
        for peer in ("sqlite3", "diskcache", "unqlite")
    ),
    Speed(PLAIN, ("lmdb",), (100,), {"create": 0.4, "read": 0.7, "miss": 0.7, "delete": 0.8}),
    Speed(PLAIN, ("lmdb",), (1000,), {"create": 0.8, "read": 0.7, "miss": 0.7, "delete": 0.8}),
)


def judge(results: Results) -> list[Target]:
    """Return all targets of which something was measured, those of the compiled one first."""
    found = list(_speeds(results.get("operations", {}).get("cases", ())))
    for engine in IMPLEMENTATIONS:
        found += _own_cost(engine, results.get("operations", {}).get("cases", ()))
        found += _latency(engine, results.get("latency", {}))
        found += _batches(engine, results.get("batches", {}).get("engines", {}).get(engine, {}))
        found += _durable(engine, results.get("durable", {}).get("rows", ()))
        found += _footprint(engine, results.get("footprint", {}).get("engines", {}).get(engine, {}))
    return sorted(found, key=lambda target: target.engine)  # "kvstore" first


def targets_table(targets: Iterable[Target]) -> str:
    """Return a table with a row for each target."""
    return markdown_table(
        ["target", "of", "wanted", "measured", "met"],
        [
            [
                each.what,
                each.engine,
                f"at {'least' if each.at_least else 'most'} {_number(each.bound)}{each.unit}",
                f"{_number(each.measured)}{each.unit}{each.where and f' ({each.where})'}",
                "yes" if each.met else "**no**",
            ]
            for each in targets
        ],
    )


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _speeds(cases: Iterable[Mapping[str, Any]]) -> Iterator[Target]:
    for speed in SPEEDS:
        wanted = [case for case in cases if case["size"] in speed.sizes]
        for operation, least in speed.least.items():
            factors = {
                ratio(figures[peer], figures[speed.own]): f"{peer}, {case['name']}"
                for case in wanted
                for figures in (case["microseconds"].get(operation, {}),)
                for peer in speed.peers
                if {peer, speed.own} <= figures.keys()
            }
            if factors:
                worst = min(factors)
                what = f"{operation} {speed.name}"
                yield Target(speed.own, what, worst, least, "×", True, factors[worst])


def _own_cost(engine: str, cases: Any) -> Iterator[Target]:
    sizes = {
        each["records"]: each["microseconds"]
        for each in cases
        if (each["size"], each["shape"]) == (100, WORDS)
    }
    small, large = sizes.get(100_000, {}), sizes.get(3_000_000, {})
    for operation in OPERATIONS:
        if engine in small.get(operation, {}) and engine in large.get(operation, {}):
            what = f"{operation} at 3,000,000 records over that at 100,000"
            cost = ratio(large[operation][engine], small[operation][engine])
            yield Target(engine, what, cost, 2.0 if operation == "delete" else 1.5, "×")


def _latency(engine: str, result: Mapping[str, Any]) -> Iterator[Target]:
    row = result.get("engines", {}).get(engine, {})
    limits = {"p99.9": 50, "p99.99": 120} if engine == COMPILED else {"p99.99": 2000}
    for name, most in limits.items():
        figures = row and row["microseconds"]["create"].get(name)
        if figures and row["records"] == result["records"]:
            what = f"{name} of create while growing to {result['records']:,} records"
            yield Target(engine, what, figures["median"], most, " µs")
    figures = row and row["microseconds"].get("put", {}).get("p99.9")
    if engine == COMPILED and figures and row["puts"] == result["puts"]:
        what = f"p99.9 of {row['puts']:,} puts over synced records"
        yield Target(engine, what, figures["median"], 60, " µs")


def _batches(engine: str, row: Mapping[str, Any]) -> Iterator[Target]:
    wanted = {
        "get_many, unparsed": ("64 cold keys unparsed, beside read_bytes", 2.5),
        "get_many": ("64 cold keys, beside reads", 1.5),
        "put_many": ("new records of 100 B, beside creates", 1.5),
        "put_many, durable": ("batches of 100, beside durable puts", 20),
        "delete_many": ("64 cold keys, beside deletes", 2.0),
    }
    for name, (beside, least) in wanted.items():
        if engine == COMPILED and (times := row.get("times", {}).get(name)):
            what = f"{name.partition(',')[0]}, {beside}"
            yield Target(engine, what, times, least, "×", True)


def _durable(engine: str, rows: Any) -> Iterator[Target]:
    creates = {row["engine"]: row for row in rows if row["operation"] == "create"}
    if engine not in creates:
        return
    own = creates[engine]
    what = "durable creates, 8 threads over 1"
    yield Target(engine, what, own["speed_up"], 3.5 if engine == COMPILED else 3.0, "×", True)
    peers = {
        row["per_second"]["1"]["median"]: peer for peer, row in creates.items() if peer in PEERS
    }
    if peers:
        pace, fastest = own["per_second"]["1"]["median"], max(peers)
        what = f"durable creates of 1 thread, as many as {peers[fastest]}, the fastest on disk"
        yield Target(engine, what, pace, fastest, " a second", True)
    if engine == COMPILED:
        what = "bytes to the disk for a durable create of 100 B"
        yield Target(engine, what, own["written_bytes"] / 1024, 16, " KiB")


def _footprint(engine: str, row: Mapping[str, Any]) -> Iterator[Target]:
    is_compiled = engine == COMPILED
    if "opened_bytes" in row:
        opened = row["opened_bytes"]["median"] / (1 << 20)
        what = "private memory of import and an open store, beyond the libraries'"
        yield Target(engine, what, opened, 1 if is_compiled else 1.5, " MiB")
        if is_compiled:
            took = row["beyond_milliseconds"]["median"]
            yield Target(engine, "import, beyond the libraries'", took, 12, " ms")
    if row.get("records") == 1_000_000:
        grown = (row["late_bytes"] - row["early_bytes"]) / (1 << 20)
        yield Target(engine, "growth of private memory to 1,000,000 records", grown, 2, " MiB")
    if "updated" in row:
        grown = (row["updated"]["late_bytes"] - row["updated"]["early_bytes"]) / (1 << 20)
        what = f"growth of private memory in {row['updated']['puts']:,} puts, touches, deletes"
        yield Target(engine, what, grown, 2, " MiB")
    if "killed" in row:
        micros = row["killed"]["median"] / row["records"] * 1e3
        what = f"recovery of {row['records']:,} records after SIGKILL, for each"
        yield Target(engine, what, micros, 0.3 if is_compiled else 3, " µs")
