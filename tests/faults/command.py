"""The laboratory's command line: progress while it runs, and a table at the end."""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .catalogue import EXPERIMENTS, named
from .laboratory import Laboratory, Report

_SHOWN_EVERY_SECONDS = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Run experiments; return 0 if nothing was lost in any, else 1."""
    options = _parser().parse_args(arguments)
    chosen = [named(name) for name in options.only] if options.only else list(EXPERIMENTS)
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    progress = _Progress()
    laboratory = Laboratory(chosen, seed, options.jobs, progress)
    progress.laboratory = laboratory
    print(f"seed {seed}, {options.jobs} at a time", flush=True)
    try:
        if options.trial is not None:
            laboratory.run_trials(1, first=options.trial)
        elif options.minutes is not None:
            laboratory.run_for(options.minutes * 60)
        else:
            laboratory.run_trials()
    except KeyboardInterrupt:
        progress.end()
        print("interrupted; what was tried until then:")
    progress.end()
    print(table(laboratory.reports))
    if options.write is not None:
        options.write.write_text(json.dumps(_as_json(laboratory), indent=2) + "\n")
    return 1 if any(report.failures for report in laboratory.reports) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Hurt stores in every way, and look for anything lost.",
    )
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument(
        "--minutes", type=float, help="how long to go on; without it, the short form of each"
    )
    how_long.add_argument("--trial", type=int, help="only the trial of this number")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=[experiment.name for experiment in EXPERIMENTS],
        help="only this experiment; may be given several times: "
        + ", ".join(experiment.name for experiment in EXPERIMENTS),
    )
    parser.add_argument("--seed", type=int, help="repeat a run; random without it")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="trials at a time, default %(default)s",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table as JSON")
    return parser


class _Progress:
    """Shows on a terminal how far the laboratory is; every failure at once, wherever it goes."""

    laboratory: Laboratory

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._next = 0.0
        self._told: Counter[str] = Counter()  # failures that were printed, by experiment

    def __call__(self) -> None:
        for report in self.laboratory.reports:
            for text in report.failures[self._told[report.experiment.name] :]:
                self.end()
                print(f"LOST: {text}\n", flush=True)
            self._told[report.experiment.name] = len(report.failures)
        if sys.stderr.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SHOWN_EVERY_SECONDS
            trials = sum(report.trials for report in self.laboratory.reports)
            tried = sum(report.tried for report in self.laboratory.reports)
            seconds = time.monotonic() - self._started
            sys.stderr.write(
                f"\r\x1b[K{seconds:,.0f} s: {trials:,} trials, {tried:,} faults, "
                f"{self._told.total()} failed"
            )
            sys.stderr.flush()

    def end(self) -> None:
        """Take the line away."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def table(reports: list[Report]) -> str:
    """Return what was tried, and what was lost, a line an experiment."""
    lines = [("experiment", "fault", "trials", "tried", "", "lost")]
    for report in reports:
        lost = f"{len(report.failures)} trials failed" if report.failures else "nothing"
        lines.append(
            (
                report.experiment.name,
                report.experiment.fault,
                f"{report.trials:,}",
                f"{report.tried:,}",
                report.experiment.unit,
                lost if report.skipped is None else f"skipped: {report.skipped}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {2, 3}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _as_json(laboratory: Laboratory) -> dict[str, Any]:
    return {
        "seed": laboratory.seed,
        "python": platform.python_version(),
        "system": platform.platform(),
        "experiments": [
            {
                "name": report.experiment.name,
                "fault": report.experiment.fault,
                "skipped": report.skipped,
                "trials": report.trials,
                "tried": report.tried,
                "unit": report.experiment.unit,
                "failed_trials": len(report.failures),
                "seconds": round(report.seconds, 1),
            }
            for report in laboratory.reports
        ],
    }
