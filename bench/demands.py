"""What is asked of kvstore's figures, and what was measured: two sets, one for each implementation.

Factors are ratios of the medians that the tables show, so that they can be worked out from there:
those of one run, in which the engines took turns.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, Final, NamedTuple

from engines.own import COMPILED, IMPLEMENTATIONS, PLAIN
from operations import OPERATIONS

Results = Mapping[str, Mapping[str, Any]]


class Demand(NamedTuple):
    """Something asked for."""

    engine: str
    """Which of kvstore's two it is asked of."""
    what: str
    wanted: str
    measured: str
    holds: bool


class Speed(NamedTuple):
    """How many times as fast as another engine one of kvstore's has to be."""

    own: str
    engine: str
    experiments: tuple[str, ...]
    sizes: tuple[int, ...]
    """Of values, in bytes."""
    least: Mapping[str, float]
    """Of some operations, by name."""


def _least(*factors: float) -> dict[str, float]:
    return dict(zip(OPERATIONS, factors, strict=True))


_BOTH_SIZES: Final = (100, 1000)
_BOTH_COUNTS: Final = ("operations", "million")
_OTHERS: Final = (
    "sqlite3",
    "diskcache",
    "rocksdict",
    "plyvel",
    "unqlite",
    "semidbm",
    "kyotocabinet",
)
SPEEDS: Final = (
    *(
        Speed(COMPILED, engine, _BOTH_COUNTS, _BOTH_SIZES, least)
        for engine, least in {
            "dict": _least(0.9, 1.3, 0.8, 0.7),
            "tkrzw": _least(1.1, 1.3, 1.0, 1.1),
            "lmdb": _least(2.0, 1.7, 1.5, 2.5),
            **dict.fromkeys(_OTHERS, _least(1.3, 1.3, 1.0, 1.3)),
        }.items()
    ),
    *(
        Speed(PLAIN, engine, ("operations",), _BOTH_SIZES, _least(1.3, 1.3, 1.3, 1.3))
        for engine in ("sqlite3", "diskcache", "unqlite")
    ),
    Speed(PLAIN, "lmdb", ("operations",), (100,), _least(0.4, 0.7, 0.7, 0.8)),
    Speed(PLAIN, "lmdb", ("operations",), (1000,), _least(0.8, 0.7, 0.7, 0.8)),
)
# By engine: the most milliseconds of p99.99 of create, and microseconds a record of recovery.
_MOST_PAUSE: Final = {COMPILED: 0.3, PLAIN: 2.0}
_MOST_RECOVERY: Final = {COMPILED: 0.5, PLAIN: 3.0}
_MOST_OPENED: Final = 1.5  # MiB
_MOST_GROWN: Final = 2.0  # MiB


def judge(results: Results) -> list[Demand]:
    """Return all else that was asked for and was measured, that of the compiled one first."""
    found: list[Demand] = []
    for name, look in _LOOKS.items():
        if name in results:
            found += look(results[name])
    order = list(IMPLEMENTATIONS)
    return sorted(found, key=lambda demand: order.index(demand.engine))


def facts(results: Results) -> list[tuple[str, str]]:
    """Return what else a user of kvstore would know: what it is, and the figure."""
    told = []
    if "space" in results:
        held = ", ".join(
            f"{each['records']:,} of {each['value_size']:,} B"
            for each in results["space"]["capacity"]
            if each["max_bytes"] == results["space"]["full_bytes"]
        )
        if held:
            told.append((f"records in {results['space']['full_bytes']:,} bytes of file", held))
    for engine in IMPLEMENTATIONS:
        own = results.get("opening", {}).get("engines", {}).get(engine, {})
        if closed := own.get("closed"):
            what = f"{engine}: opening a closed store of {own['records']:,} records"
            told.append((what, f"{median(closed) * 1e3:.1f} ms"))
    for engine in IMPLEMENTATIONS:
        if own := results.get("memory", {}).get("imports", {}).get(engine):
            what = f"{engine}: importing it, beyond orjson"
            told.append((what, f"{own['seconds']['median'] * 1e3:.0f} ms"))
    return told


# --- speed ---------------------------------------------------------------------------------------


class Factor(NamedTuple):
    """How many times as fast as another engine kvstore is at an operation, in the worst case."""

    factor: float
    size: int
    """Of the values, in that case."""
    records: int


class SpeedSeen(NamedTuple):
    """What was measured of a `Speed`."""

    speed: Speed
    worst: dict[str, Factor]
    """By operation."""
    measured: int
    """How many cases were, of so many wanted."""
    wanted: int

    def holds_at(self, operation: str) -> bool:
        """Say whether the factor of an operation is as asked for."""
        return self.worst[operation].factor >= self.speed.least[operation]

    @property
    def holds(self) -> bool:
        """Whether all that was measured is as asked for."""
        return all(map(self.holds_at, self.worst))


def judge_speeds(results: Results) -> list[SpeedSeen]:
    """Return what was measured of all speeds asked for, but those of which nothing was."""
    seen = [_look_at(speed, results) for speed in SPEEDS]
    return [each for each in seen if each.measured]


def _look_at(speed: Speed, results: Results) -> SpeedSeen:
    factors: dict[str, list[Factor]] = {operation: [] for operation in speed.least}
    for name in speed.experiments:
        for row in results.get(name, {}).get("rows", ()):
            micros = row["microseconds"]
            if (
                row["value_size"] in speed.sizes
                and row["operation"] in speed.least
                and {speed.own, speed.engine} <= set(micros)
            ):
                factor = micros[speed.engine]["median"] / micros[speed.own]["median"]
                factors[row["operation"]].append(Factor(factor, row["value_size"], row["records"]))
    return SpeedSeen(
        speed,
        {operation: min(cases) for operation, cases in factors.items() if cases},
        sum(map(len, factors.values())),
        len(speed.experiments) * len(speed.sizes) * len(speed.least),
    )


# --- the rest ------------------------------------------------------------------------------------


def _growth(result: Mapping[str, Any]) -> Iterator[Demand]:
    own = [row for row in result["rows"] if row["engine"] == PLAIN and row["own_cost"]]
    if own and own[-1]["records"] == 3_000_000:
        costs = own[-1]["own_cost"]
        yield Demand(
            PLAIN,
            f"own cost at {own[-1]['records']:,} records over that at {result['base']:,}, "
            f"each operation",
            "at most 1.6×",
            ", ".join(f"{operation} {cost:.2f}×" for operation, cost in costs.items()),
            max(costs.values()) <= 1.6,
        )


def _latency(result: Mapping[str, Any]) -> Iterator[Demand]:
    tails = {
        engine: seen["microseconds"]["create"]["p99.99"] / 1000
        for engine, seen in result["engines"].items()
        # kvstore's where it got there, that of another as far as it got.
        if seen["records"] == result["records"] or engine not in IMPLEMENTATIONS
    }
    what = f"p99.99 of create while growing to {result['records']:,} records"
    for engine, most in _MOST_PAUSE.items():
        if engine in tails:
            yield _at_most(engine, what, tails[engine], most, "ms")
    if PLAIN in tails and "sqlite3" in tails:
        yield Demand(
            PLAIN,
            "the same, beside sqlite3's",
            f"under {tails['sqlite3']:.2f} ms",
            f"{tails[PLAIN]:.2f} ms",
            tails[PLAIN] < tails["sqlite3"],
        )


def _durable(result: Mapping[str, Any]) -> Iterator[Demand]:
    creates = {row["engine"]: row for row in result["rows"] if row["operation"] == "create"}
    if PLAIN not in creates:
        return
    own = creates[PLAIN]
    yield Demand(
        PLAIN,
        "throughput of durable creates, 8 threads over 1",
        "at least 3×",
        f"{own['speed_up']:.2f}×",
        own["speed_up"] >= 3,
    )
    single = {
        engine: row["operations_per_second"]["1"]["median"]
        for engine, row in creates.items()
        if engine in (PLAIN, "sqlite3", "lmdb")
    }
    for engine in sorted(single.keys() - {PLAIN}):
        yield Demand(
            PLAIN,
            f"durable creates of 1 thread, beside {engine}'s",
            f"at least {single[engine]:,.0f} a second",
            f"{single[PLAIN]:,.0f} a second",
            single[PLAIN] >= single[engine],
        )


def _memory(result: Mapping[str, Any]) -> Iterator[Demand]:
    for engine in IMPLEMENTATIONS:
        if beyond := result["beyond_libraries"].get(engine):
            opened = beyond["bytes_with_store_open"]["median"] / (1 << 20)
            what = "private memory of import and an open store, beyond the libraries'"
            yield _at_most(engine, what, opened, _MOST_OPENED, "MiB")
        heap = result["heap"].get(engine)
        if heap and heap["records"] == result["records"]:
            what = (
                f"growth of private memory from {result['first_records']:,} to "
                f"{heap['records']:,} records"
            )
            yield _at_most(engine, what, heap["growth_bytes"] / (1 << 20), _MOST_GROWN, "MiB")


def _opening(result: Mapping[str, Any]) -> Iterator[Demand]:
    for engine, most in _MOST_RECOVERY.items():
        own = result["engines"].get(engine, {})
        if own.get("killed"):
            micros = median(own["killed"]) / own["records"] * 1e6
            what = f"recovery of {own['records']:,} records after SIGKILL"
            yield _at_most(engine, what, micros, most, "µs a record")


def _at_most(engine: str, what: str, measured: float, most: float, unit: str) -> Demand:
    return Demand(engine, what, f"under {most:g} {unit}", f"{measured:.2f} {unit}", measured < most)


_LOOKS: Final[dict[str, Callable[[Mapping[str, Any]], Iterator[Demand]]]] = {
    "growth": _growth,
    "latency": _latency,
    "durable": _durable,
    "memory": _memory,
    "opening": _opening,
}
