"""The benchmark: each experiment is measured to the end, and the report tells what it measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
import report
from engines import importable
from engines.own import COMPILED, PLAIN
from operations import OPERATIONS
from records import SHAPES
from run import EXPERIMENTS
from support.processes import PATIENCE_SECONDS, environment

import harness

pytest.importorskip("percentiles", reason="percentiles take hdrhistogram (extra `bench`)")

RUN: Final = Path(harness.__file__).with_name("run.py")


def run_bench(*arguments: object) -> str:
    """Run the benchmark with warnings as errors; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", RUN, "--tiny", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the results of all experiments, as if of a full run, and their report."""
    root = tmp_path_factory.mktemp("project")
    results = root / report.RESULTS
    printed = run_bench(
        "--engines", "dict,kvstore,kvstore-plain", "--dir", root, "--results", results
    )
    for name in EXPERIMENTS:
        assert f"## {name}" in printed
    for path in results.glob("*.json"):
        path.write_text(path.read_text().replace('"scale": "tiny"', '"scale": "full"'))
    for page in (report.PAGE, "README.md"):
        (root / page).write_text(f"Before.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    assert not report.make_report(root)
    return root


def result_of(project: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((project / report.RESULTS / f"{name}.json").read_text())
    return result


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_measured_to_the_end(project: Path, name: str) -> None:
    result = result_of(project, name)
    assert set(result["failures"]) <= {"the full disk"}  # it takes a right to mount
    assert result["machine"]["engines"].keys() - {COMPILED} == {"dict", PLAIN}
    assert (COMPILED in result["machine"]["engines"]) == bool(importable([COMPILED]))


def test_only_the_results_and_the_report_are_left(project: Path) -> None:
    assert {path.name for path in project.iterdir()} == {"bench", "README.md"}
    assert {path.name for path in (project / report.RESULTS).iterdir()} == {
        *(f"{name}.json" for name in EXPERIMENTS),
        *(f"{name}.svg" for name in ("operations-100", "values", "growth", "latency", "footprint")),
        report.TABLES,
    }


def test_results_are_small_and_no_time_is_negative(project: Path) -> None:
    text = "".join(path.read_text() for path in (project / report.RESULTS).glob("*.json"))
    assert len(text.splitlines()) < 1000
    assert ": -" not in text


def test_page_has_a_summary_five_charts_and_targets_between_its_markers(project: Path) -> None:
    page = (project / report.PAGE).read_text()
    assert page.startswith("Before.")
    assert page.endswith("After.\n")
    assert "old" not in page.split()
    micros = result_of(project, "operations")["cases"][0]["microseconds"]
    for operation in OPERATIONS:
        assert f"{micros[operation][PLAIN]['median']:.2f}" in page
    assert "what has expired, in `len`" in page
    assert page.count("![") == 5
    assert f"[targets](results/{report.TABLES}#targets)" in page


def test_readme_has_a_row_for_each_operation_and_shape_that_matters(project: Path) -> None:
    readme = (project / "README.md").read_text()
    if importable([COMPILED]):
        rows = [line.split("|")[1].strip() for line in readme.splitlines() if "**" in line]
        assert rows == [
            f"{operation}, {shape}" if operation in report.PARSING else operation
            for operation in OPERATIONS
            for shape in (SHAPES if operation in report.PARSING else SHAPES[:1])
        ]
    assert f"[{report.PAGE}]({report.PAGE})" in readme


def test_tables_hold_every_experiment(project: Path) -> None:
    tables = (project / report.RESULTS / report.TABLES).read_text()
    for name in (*EXPERIMENTS, "targets"):
        assert f"## {name.capitalize()}\n" in tables


def test_charts_are_xml_with_the_names_of_engines(project: Path) -> None:
    for chart in (project / report.RESULTS).glob("*.svg"):
        element = ElementTree.parse(chart).getroot()
        texts = {text.strip() for text in element.itertext()}
        assert {"dict", "kvstore-plain"} <= texts


def test_a_second_report_changes_nothing(project: Path) -> None:
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    report.make_report(project)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_two_builds_are_compared_in_turns() -> None:
    printed = run_bench(
        "--compare", sys.executable, sys.executable, "--engines", PLAIN, "--rounds", 1
    )
    for operation in OPERATIONS:
        assert f"{PLAIN}: {operation}, 500 records of 100 B" in printed
    assert f"{PLAIN}: create, p50 " in printed
    assert "new / old" in printed
    assert "failed" not in printed


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"format": harness.RESULT_FORMAT - 1}, "of format"),
        ({"format": harness.RESULT_FORMAT, "scale": "quick"}, "figures mean nothing"),
    ],
)
def test_result_of_another_format_or_of_a_quick_run_is_left_out(
    tmp_path: Path, header: dict[str, Any], why: str
) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(header))
    results, missing = report.read_results(tmp_path)
    assert not results
    assert why in missing["latency"]
    assert missing["durable"] == "not measured"


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(harness, "monotonic", lambda: now)
    progress = harness.Progress()
    progress.heading = "latency (2 of 6): "
    for now in (1.0, 59.0, 60.0, 61.0, 119.0, 125.0):
        progress.show(f"at {now:g}")
    progress.show("")
    told = ["1:00 latency (2 of 6): at 60", "2:05 latency (2 of 6): at 125"]
    assert capsys.readouterr().err.splitlines() == told
