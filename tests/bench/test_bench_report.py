"""The report of the benchmarks, made from results that are made up."""

import json
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
import report
from demands import Demand, SpeedSeen, judge, judge_speeds
from histogram import Histogram
from run import EXPERIMENTS
from workers import spread

from harness import RESULT_FORMAT, to_json

Result = dict[str, Any]

# How many times as long as kvstore each takes.
ENGINES: Final = {
    "kvstore": 1.0,
    "kvstore-plain": 1.6,
    "sqlite3": 2.0,
    "lmdb": 0.8,
    "diskcache": 9.0,
}
OPERATIONS: Final = ("create", "read", "miss", "delete")
MACHINE: Final = {
    "date": "2001-02-03T04:05:06+00:00",
    "cpu": "Abacus",
    "cpu_count": 3,
    "system": "Linux",
    "file_system": "ext4",
    "python": "CPython 3",
    "libraries": {"orjson": "1"},
    "engines": {"kvstore": "kvstore 7 (compiled)", "kvstore-plain": "kvstore 7 (plain)"},
}


def figures_of(time: float) -> dict[str, dict[str, float]]:
    """Return figures of all engines, of which kvstore takes `time`."""
    return {
        engine: spread([time * factor * noise for noise in (0.9, 1.0, 1.2)])
        for engine, factor in ENGINES.items()
    }


def operations() -> Result:
    return rows_of_operations(1000)


def million() -> Result:
    result = rows_of_operations(5000)
    for row in result["rows"]:  # with so many records, twice as long as with fewer
        if row["operation"] == "delete":
            row["microseconds"]["kvstore"] = spread([2 * row["microseconds"]["kvstore"]["median"]])
    return result


def rows_of_operations(records: int) -> Result:
    return {
        "failures": {"semidbm": "died, exit code -11"},
        "rows": [
            {
                "value_size": size,
                "records": records,
                "operation": operation,
                "microseconds": figures_of(10.0 + place),
                "ratio_to_kvstore": {name: each for name, each in ENGINES.items() if each != 1},
            }
            for size in (100, 1000)
            for place, operation in enumerate(OPERATIONS)
        ],
    }


def growth() -> Result:
    return {
        "value_size": 100,
        "base": 100_000,
        "failures": {"diskcache": "1,000 records when the time was used up"},
        "rows": [
            {
                "engine": engine,
                "records": records,
                "microseconds": {each: figures_of(10.0)[engine] for each in ("grow", *OPERATIONS)},
                "own_cost": {each: 1.7 for each in ("grow", *OPERATIONS) if records > 100_000},
            }
            for engine in ("kvstore", "kvstore-plain", "lmdb")
            for records in (10_000, 100_000, 3_000_000)
        ],
    }


def latency() -> Result:
    histogram = Histogram()
    histogram.add(range(1000, 1_000_000, 7))
    seen = {
        "records": 1_000_000,
        "microseconds": {name: histogram.summary() for name in ("create", "read", "control")},
        "histograms": {name: histogram.to_json() for name in ("create", "read", "control")},
        "longest_creates": [{"record": 5, "microseconds": 1000.0}],
    }
    return {
        "records": 1_000_000,
        "failures": {},
        "engines": {"kvstore": seen, "kvstore-plain": seen, "sqlite3": seen},
    }


def opening() -> Result:
    def engine(killed: list[float], came_back: int) -> Result:
        return {
            "records": 1000,
            "killed": killed,
            "closed": [0.001, 0.002],
            "came_back": came_back,
            "wrong": 0,
            "errors": {},
        }

    return {
        "records": 1000,
        "engines": {
            "kvstore": engine([0.0004, 0.0004], 1000),
            "kvstore-plain": engine([0.002, 0.0025], 1000),
            "lmdb": engine([0.001], 900),
            "sqlite3": {"killed": [], "closed": [], "errors": {"load": "died, exit code 1"}},
        },
    }


MADE_UP: Final = {
    "operations": operations,
    "million": million,
    "growth": growth,
    "latency": latency,
    "opening": opening,
}


def make_project(root: Path, *names: str) -> Path:
    """Make a project of results of some experiments, and a README with nothing between markers."""
    (root / report.RESULTS).mkdir(parents=True)
    for name in names:
        save(root, name, MADE_UP[name]())
    (root / "README.md").write_text(
        f"# Before\n\n{report.BEGIN}\nold figures\n{report.END}\n\nAfter.\n"
    )
    return root


def save(root: Path, name: str, result: Result, **header: Any) -> None:
    header = {"format": RESULT_FORMAT, "machine": MACHINE, "quick": False, "seconds": 90} | header
    (root / report.RESULTS / f"{name}.json").write_text(json.dumps({**header, **result}))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with results of all experiments, and the report of them. Not to be changed."""
    root = make_project(tmp_path_factory.mktemp("project"), *MADE_UP)
    report.make_report(root)
    return root


def test_page_holds_the_figures_of_each_experiment(reported: Path) -> None:
    page = (reported / report.PAGE).read_text()
    assert "10.00 (9.00–12.00)" in page  # kvstore's create
    assert "1,000 records when the time was used up" in page
    assert "semidbm failed: died, exit code -11" in page
    assert "- sqlite3, load: died, exit code 1" in page
    assert "Abacus" in page
    assert "kvstore 7 (compiled), kvstore 7 (plain)" in page
    assert "## What the figures do not say" in page


def test_charts_are_xml_and_shown_in_the_page(reported: Path) -> None:
    charts = sorted((reported / report.RESULTS).glob("*.svg"))
    assert [chart.stem for chart in charts] == [
        *("growth", "latency", "million-100", "million-1000"),
        *("opening", "operations-100", "operations-1000"),
    ]
    for chart in charts:
        element = ElementTree.parse(chart).getroot()
        assert element.tag == "{http://www.w3.org/2000/svg}svg"
        texts = [text.strip() for text in element.itertext()]
        assert {"kvstore", "kvstore-plain"} <= set(texts)
        assert f"](results/{chart.name})" in (reported / report.PAGE).read_text()


def test_results_are_kept_with_lists_of_numbers_on_a_line() -> None:
    result = {"rounds": [1.5, -2e-7, 3], "words": ["[\n 1 ]", "2"], "nested": [[1, 2], [3]]}
    text = to_json(result)
    assert json.loads(text) == result
    assert '"rounds": [1.5, -2e-07, 3],' in text
    assert "\n    [1, 2]," in text


def test_a_second_run_changes_nothing(reported: Path) -> None:
    before = files_of(reported)
    report.make_report(reported)
    assert files_of(reported) == before


def test_readme_keeps_what_is_around_the_markers(reported: Path) -> None:
    text = (reported / "README.md").read_text()
    assert text.startswith(f"# Before\n\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\n\nAfter.\n")
    assert "old figures" not in text
    assert "](bench/results/operations-100.svg)" in text
    assert "20.0 (2.00×)" in text  # sqlite3's create
    assert "16.0 (1.60×)" in text  # the plain kvstore's
    assert "how many times as long as kvstore's; `kvstore` is the compiled" in text


def test_where_only_the_plain_kvstore_was_measured_others_are_beside_that(tmp_path: Path) -> None:
    make_project(tmp_path)
    result = operations()
    for row in result["rows"]:
        del row["microseconds"]["kvstore"]
        row["ratio_to_kvstore"] = {}
    save(tmp_path, "operations", result)
    report.make_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "20.0 (1.25×)" in text
    assert "as long as kvstore-plain's" in text
    page = (tmp_path / "bench" / "README.md").read_text()
    assert "times as fast kvstore-plain is as" in page
    assert "times as fast kvstore is as" not in text


def test_result_of_another_machine_or_version_says_so(tmp_path: Path) -> None:
    make_project(tmp_path, "operations")
    for name, machine in (
        ("growth", {**MACHINE, "date": "2002-03-04"}),
        ("opening", {**MACHINE, "engines": {"kvstore-plain": "kvstore 8 (plain)"}}),
    ):
        save(tmp_path, name, MADE_UP[name](), machine=machine)
    report.make_report(tmp_path)
    page = (tmp_path / report.PAGE).read_text()
    assert "--only growth`, 1.5 minutes, 2002-03-04." in page
    (line,) = (line for line in page.splitlines() if "not as the others" in line)
    assert "--only opening`" in line
    assert "kvstore 8 (plain)" in line


@pytest.mark.parametrize(
    "text",
    ["", report.BEGIN, report.END + report.BEGIN, report.BEGIN + report.END + report.END],
)
def test_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        report.put_between_markers(text, "part")


def test_experiment_without_results_is_left_out_with_a_word(tmp_path: Path) -> None:
    missing = report.make_report(make_project(tmp_path))
    assert missing.keys() == EXPERIMENTS.keys()
    page = (tmp_path / report.PAGE).read_text()
    assert "## Growth" not in page
    assert "growth, not measured" in page


def test_result_of_another_format_is_left_out(tmp_path: Path) -> None:
    make_project(tmp_path)
    save(tmp_path, "growth", {"rows": "as they once were"}, format=RESULT_FORMAT - 1)
    results, missing = report.read_results(tmp_path / report.RESULTS)
    assert "growth" not in results
    assert missing["growth"] == f"of format {RESULT_FORMAT - 1}, {RESULT_FORMAT} is expected"


def test_quick_result_is_left_out(tmp_path: Path) -> None:
    make_project(tmp_path)
    save(tmp_path, "growth", growth(), quick=True)
    results, missing = report.read_results(tmp_path / report.RESULTS)
    assert "growth" not in results
    assert missing["growth"] == "from a quick run, whose figures mean nothing"


def test_chart_of_a_result_that_is_gone_is_removed(tmp_path: Path) -> None:
    make_project(tmp_path)
    chart = tmp_path / report.RESULTS / "growth.svg"
    chart.write_text("<svg/>")
    report.make_report(tmp_path)
    assert not chart.exists()


def demands_of(results: dict[str, Result]) -> dict[tuple[str, str], Demand]:
    return {(each.engine, each.what): each for each in judge(results)}


def test_demands_are_judged_by_the_medians() -> None:
    demands = demands_of({name: make_result() for name, make_result in MADE_UP.items()})
    what = "recovery of 1,000 records after SIGKILL"
    assert demands["kvstore-plain", what].measured == "2.25 µs a record"
    assert demands["kvstore-plain", what].holds
    assert demands["kvstore", what].wanted == "under 0.5 µs a record"
    assert demands["kvstore", what].holds

    what = "p99.99 of create while growing to 1,000,000 records"
    assert demands["kvstore-plain", what][3:] == ("1.00 ms", True)
    assert demands["kvstore", what][2:] == ("under 0.3 ms", "1.00 ms", False)
    assert not demands["kvstore-plain", "the same, beside sqlite3's"].holds  # it is the same

    (own_cost,) = (each for each in demands.values() if each.what.startswith("own cost"))
    assert own_cost.engine == "kvstore-plain"
    assert "create 1.70×" in own_cost.measured
    assert not own_cost.holds


def speeds_of(results: dict[str, Result]) -> dict[tuple[str, str, tuple[int, ...]], SpeedSeen]:
    return {
        (each.speed.own, each.speed.engine, each.speed.sizes): each
        for each in judge_speeds(results)
    }


def test_speeds_are_judged_by_the_medians() -> None:
    speeds = speeds_of({"operations": operations()})
    seen = speeds["kvstore-plain", "sqlite3", (100, 1000)]
    assert seen.worst["create"].factor == pytest.approx(1.25)
    assert seen.worst["create"][1:] == (100, 1000)
    assert not seen.holds
    assert speeds["kvstore-plain", "diskcache", (100, 1000)].holds
    small, large = (speeds["kvstore-plain", "lmdb", (size,)] for size in (100, 1000))
    assert [small.holds_at(operation) for operation in OPERATIONS] == [True, False, False, False]
    assert not any(large.holds_at(operation) for operation in OPERATIONS)


def test_compiled_kvstore_is_judged_by_the_worst_of_both_numbers_of_records() -> None:
    speeds = speeds_of({"operations": operations(), "million": million()})
    seen = speeds["kvstore", "sqlite3", (100, 1000)]
    assert seen.worst == {
        "create": (2, 100, 1000),
        "read": (2, 100, 1000),
        "miss": (2, 100, 1000),
        "delete": (1, 100, 5000),
    }
    assert not seen.holds
    assert (seen.measured, seen.wanted) == (16, 16)
    assert speeds["kvstore", "diskcache", (100, 1000)].holds
    assert ("kvstore-plain", "tkrzw", (100, 1000)) not in speeds


def test_speeds_are_shown_with_what_is_asked_for_and_how_much_of_it_was_measured() -> None:
    result = operations()
    for row in result["rows"]:
        if (row["operation"], row["value_size"]) != ("read", 100):
            del row["microseconds"]["diskcache"]
    table = report.demands_table({"operations": result})
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert (
        "| diskcache, 100 and 1,000 B | – (of 1.3) | 9.00 (of 1.3) | – (of 1) | – (of 1.3) "
        "| 1 of 16 | in part |"
    ) in lines
    assert (
        "| sqlite3, 100 and 1,000 B | **1.25** (of 1.3) | **1.25** (of 1.3) "
        "| **1.25** (of 1.3) | **1.25** (of 1.3) | 8 of 8 | **no** |"
    ) in lines


def test_demands_of_the_compiled_kvstore_come_first() -> None:
    engines = [each.engine for each in judge({"opening": opening(), "latency": latency()})]
    assert engines == sorted(engines, key=len)
    assert len(set(engines)) == 2
