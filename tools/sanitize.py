"""Runs the tests and the fuzzing of damaged files on extensions built with sanitizers.

    pip install '.[test]' && python tools/sanitize.py --minutes 5

The extensions are built in a temporary folder with AddressSanitizer and UndefinedBehaviorSanitizer:
they stop the process at a read or write outside of what was allocated or mapped, and at what C
leaves undefined. Python itself is the usual one, so memory that it forgets to free is not looked
for. Exits 0 if neither a sanitizer nor a test had anything to report. gcc only, on Linux.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parent.parent
FLAGS: Final = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
# A shared libubsan hands its log_path to libasan, and prints where pytest swallows it.
LINKED: Final = f"{FLAGS} -static-libubsan -Wl,-Bsymbolic"
LIBRARIES: Final = ("libasan.so", "libstdc++.so")  # the second for what others throw
UNFIT: Final = (  # they limit or count memory, of which a sanitizer takes several times as much
    "--ignore=tests/test_memory.py",
    "--ignore=tests/bench",
    "--deselect=tests/faults/test_faults.py::test_nothing_is_lost[little-memory]",
)
FUZZED: Final = (  # of the laboratory's experiments, those that put wrong bytes into a file
    "damage-bits",
    "damage-bytes",
    "damage-zeroed-pages",
    "damage-swapped-pages",
    "damage-truncation",
    "damage-garbage-at-the-end",
    "damage-swapped-slots",
    "damage-cut-at-boundaries",
    "forged-superblock",
    "forged-index",
    "forged-table",
    "forged-blocks",
    "hostile-content",
    "hostile-leftovers",
)


class Failure(Exception):
    """There is nothing to run; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Build and run; return 0 if nothing was found."""
    parser = argparse.ArgumentParser(
        prog="python tools/sanitize.py",
        description="Run the tests and the fuzzing of damaged files with sanitizers.",
    )
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of fuzzing after the tests, default %(default)s"
    )
    parser.add_argument(
        "tests", nargs="*", help="pytest's own arguments, after `--`; default all tests"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = list(_run_all(Path(folder), options.minutes, options.tests))
        except Failure as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    seconds = time.monotonic() - began
    for each in found:
        print(f"FAILED: {each}", file=sys.stderr)
    print(f"sanitizers: {len(found) or 'no'} failures in {seconds:,.0f} s")
    return 1 if found else 0


def _run_all(folder: Path, minutes: float, tests: list[str]) -> Iterator[str]:
    """Yield what failed."""
    _say("build with sanitizers")
    packages, reports = folder / "packages", folder / "reports"
    reports.mkdir()
    preloaded = _libraries()
    _build(folder, packages)
    environment = _environment(packages, reports, preloaded)
    _check_that_it_runs(environment)
    pytest = [sys.executable, "-m", "pytest", *UNFIT, *tests]
    fuzz = [sys.executable, "-m", "tests.faults", "--minutes", str(minutes)]
    for name in FUZZED:
        fuzz += ["--only", name]
    for name, command in (("tests", pytest), ("damaged files", fuzz)):
        _say(f"{name}: {' '.join(command[1:])}")
        status = subprocess.run(command, cwd=PROJECT, env=environment, check=False).returncode
        if status:
            yield f"{name}: exit status {status}"
        yield from _reported(reports, name)


def _libraries() -> str:
    """Return what is to be loaded before all else, as LD_PRELOAD has it."""
    compiler = os.environ.get("CC", "cc").split()
    paths = []
    for name in LIBRARIES:
        try:
            finished = subprocess.run(
                [*compiler, f"-print-file-name={name}"],
                capture_output=True,
                encoding="utf-8",
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise Failure(f"no C compiler, which must be gcc: {error}") from error
        path = Path(finished.stdout.strip())
        if path.is_absolute():
            paths.append(str(path.resolve()))
        elif "san" in name:
            raise Failure(
                f"{' '.join(compiler)} has no {name}; it must be gcc, with its sanitizers"
            )
    return ":".join(paths)


def _build(folder: Path, packages: Path) -> None:
    """Build a copy, and install it into `packages`."""
    copy = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(PROJECT, copy, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    finished = subprocess.run(
        [*pip, "--no-deps", "--target", str(packages), str(copy)],
        env={
            **os.environ,
            "CFLAGS": f"{os.environ.get('CFLAGS', '')} {FLAGS}",
            "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {LINKED}",
            "KVSTORE_REQUIRE_COMPILED": "1",
        },
        check=False,
    )
    if finished.returncode:
        raise Failure("the extensions were not built; the reason is above")


def _environment(packages: Path, reports: Path, preloaded: str) -> dict[str, str]:
    """Return the environment in which all processes report what their sanitizers find."""
    kept = {name: value for name, value in os.environ.items() if name != "KVSTORE_PURE"}
    log = f"log_path={reports / 'report'}"
    return {
        **kept,
        "PYTHONPATH": str(packages),
        "PYTHONMALLOC": "malloc",  # each object in an allocation of its own, with bounds
        # Address space that trials may still take. AddressSanitizer keeps up to 256 MiB of what was
        # freed, to see it used, and a report takes some more. Where there is none left, orjson
        # writes to a null pointer, which is reported as if it were an error of the extensions.
        "KVSTORE_TEST_MEMORY": "16",
        "LD_PRELOAD": preloaded,
        # Leaks: Python frees little at its end. Signals: a crash is reported, though pytest has a
        # handler for it too. Null: too large an allocation is a MemoryError, as without.
        "ASAN_OPTIONS": f"{log}:detect_leaks=0:handle_segv=2:handle_sigbus=2"
        ":allocator_may_return_null=1",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1",
    }


def _check_that_it_runs(environment: dict[str, str]) -> None:
    """Raise Failure unless it is these extensions that the tests will get."""
    code = (
        "from kvstore.compiled import IMPLEMENTATION, _fast_path; "
        "print(IMPLEMENTATION, _fast_path and _fast_path.__file__)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    expected = f"compiled {environment['PYTHONPATH']}"
    if finished.returncode or not finished.stdout.startswith(expected):
        raise Failure(
            f"the extensions with sanitizers do not run: {finished.stdout}{finished.stderr}"
        )


def _reported(reports: Path, name: str) -> Iterator[str]:
    """Yield a line for each report, having printed it; take it away."""
    for file in sorted(reports.iterdir()):
        text = file.read_text("utf-8", "replace").strip()
        file.unlink()
        if text:
            print(f"\n{text}\n", file=sys.stderr)
            first = next(
                (line for line in text.splitlines() if "error" in line.lower()), "a report"
            )
            yield f"{name}: {first}"


def _say(step: str) -> None:
    print(f"== {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
