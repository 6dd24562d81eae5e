"""What is asked of kvstore's figures, and what was measured.

Factors are ratios of the medians that the tables show, so that they can be worked out from there.
"""

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, Final, NamedTuple

ALL: Final = ("create", "read", "miss", "delete")

Results = Mapping[str, Mapping[str, Any]]


class Demand(NamedTuple):
    """Something asked for."""

    what: str
    wanted: str
    measured: str
    holds: bool


class Speed(NamedTuple):
    """How many times as fast as another engine kvstore has to be."""

    engine: str
    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    least: float


SPEEDS: Final = (
    *(Speed(engine, ALL, (100, 1000), 1.3) for engine in ("sqlite3", "diskcache", "unqlite")),
    Speed("lmdb", ("read", "miss"), (100, 1000), 0.7),
    Speed("lmdb", ("create",), (100,), 0.4),
    Speed("lmdb", ("create",), (1000,), 0.8),
    Speed("lmdb", ("delete",), (100, 1000), 0.8),
)


def judge(results: Results) -> list[Demand]:
    """Return all that was asked for and was measured."""
    return [
        demand for name, look in _LOOKS.items() if name in results for demand in look(results[name])
    ]


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
    if closed := results.get("opening", {}).get("engines", {}).get("kvstore", {}).get("closed"):
        records = results["opening"]["engines"]["kvstore"]["records"]
        what = f"opening a closed store of {records:,} records"
        told.append((what, f"{median(closed) * 1e3:.1f} ms"))
    if own := results.get("memory", {}).get("imports", {}).get("kvstore"):
        told.append(
            ("importing kvstore, beyond orjson", f"{own['seconds']['median'] * 1e3:.0f} ms")
        )
    return told


def _speeds(result: Mapping[str, Any]) -> Iterator[Demand]:
    medians = {
        (row["operation"], row["value_size"]): {
            engine: figures["median"] for engine, figures in row["microseconds"].items()
        }
        for row in result["rows"]
    }
    for speed in SPEEDS:
        cases = [(operation, size) for operation in speed.operations for size in speed.sizes]
        factors = {
            case: medians[case][speed.engine] / medians[case]["kvstore"]
            for case in cases
            if case in medians and {"kvstore", speed.engine} <= set(medians[case])
        }
        if not factors:
            continue
        operation, size = worst = min(factors, key=factors.__getitem__)
        measured = f"{factors[worst]:.2f}×"
        if len(factors) > 1:
            measured += f" ({operation}, {size:,} B) to {max(factors.values()):.2f}×"
        if len(factors) < len(cases):
            measured += f"; {len(factors)} of {len(cases)} were measured"
        yield Demand(
            f"speed against {speed.engine}: {_join(speed.operations)}, "
            f"{_join([f'{size:,}' for size in speed.sizes])} B",
            f"at least {speed.least:g}×",
            measured,
            factors[worst] >= speed.least,
        )


def _join(words: Any) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _growth(result: Mapping[str, Any]) -> Iterator[Demand]:
    own = [row for row in result["rows"] if row["engine"] == "kvstore" and row["own_cost"]]
    if own and own[-1]["records"] == 3_000_000:
        costs = own[-1]["own_cost"]
        yield Demand(
            f"own cost at {own[-1]['records']:,} records over that at {result['base']:,}, "
            f"each operation",
            "at most 1.6×",
            ", ".join(f"{operation} {cost:.2f}×" for operation, cost in costs.items()),
            max(costs.values()) <= 1.6,
        )


def _latency(result: Mapping[str, Any]) -> Iterator[Demand]:
    seen = result["engines"]
    if "kvstore" not in seen or seen["kvstore"]["records"] != result["records"]:
        return
    tails = {
        engine: seen[engine]["microseconds"]["create"]["p99.99"] / 1000
        for engine in ("kvstore", "sqlite3")
        if engine in seen
    }
    own = tails["kvstore"]
    what = f"p99.99 of create while growing to {result['records']:,} records"
    yield _at_most(what, own, 2, "ms")
    if "sqlite3" in tails:
        yield Demand(
            "the same, beside sqlite3's",
            f"under {tails['sqlite3']:.2f} ms",
            f"{own:.2f} ms",
            own < tails["sqlite3"],
        )


def _durable(result: Mapping[str, Any]) -> Iterator[Demand]:
    creates = {row["engine"]: row for row in result["rows"] if row["operation"] == "create"}
    if "kvstore" not in creates:
        return
    own = creates["kvstore"]
    yield Demand(
        "throughput of durable creates, 8 threads over 1",
        "at least 3×",
        f"{own['speed_up']:.2f}×",
        own["speed_up"] >= 3,
    )
    single = {
        engine: row["operations_per_second"]["1"]["median"]
        for engine, row in creates.items()
        if engine in ("kvstore", "sqlite3", "lmdb")
    }
    for engine in sorted(single.keys() - {"kvstore"}):
        yield Demand(
            f"durable creates of 1 thread, beside {engine}'s",
            f"at least {single[engine]:,.0f} a second",
            f"{single['kvstore']:,.0f} a second",
            single["kvstore"] >= single[engine],
        )


def _memory(result: Mapping[str, Any]) -> Iterator[Demand]:
    beyond = result["beyond_libraries"].get("kvstore")
    if beyond:
        opened = beyond["bytes_with_store_open"]["median"]
        yield _at_most(
            "private memory of import and an open store, beyond the libraries'",
            opened / (1 << 20), 1.5, "MiB",
        )  # fmt: skip
    heap = result["heap"].get("kvstore")
    if heap and heap["records"] == result["records"]:
        yield _at_most(
            f"growth of private memory from {result['first_records']:,} to "
            f"{heap['records']:,} records",
            heap["growth_bytes"] / (1 << 20), 2, "MiB",
        )  # fmt: skip


def _opening(result: Mapping[str, Any]) -> Iterator[Demand]:
    own = result["engines"].get("kvstore", {})
    if own.get("killed"):
        yield _at_most(
            f"recovery of {own['records']:,} records after SIGKILL",
            median(own["killed"]) / own["records"] * 1e6, 3, "µs a record",
        )  # fmt: skip


def _at_most(what: str, measured: float, most: float, unit: str) -> Demand:
    return Demand(what, f"under {most:g} {unit}", f"{measured:.2f} {unit}", measured < most)


_LOOKS: Final[dict[str, Callable[[Mapping[str, Any]], Iterator[Demand]]]] = {
    "operations": _speeds,
    "growth": _growth,
    "latency": _latency,
    "durable": _durable,
    "memory": _memory,
    "opening": _opening,
}
