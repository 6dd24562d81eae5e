"""Experiments, and the bench that runs them.

An experiment is one way of hurting a store, cut into small trials. Each trial runs in a process of
its own, forked from a process of one thread: what it may not do is hang, or die of a signal, and
then the others go on. Its random numbers follow from the laboratory's seed, the experiment's name
and the trial's number, and so does every file that it makes: these three repeat it (as far as it
does not depend on the moment of a kill, or on which thread comes first).
"""

import faulthandler
import itertools
import json
import os
import random
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from support.disks import quick_folder

# A trial takes seconds; one that takes so long hangs.
PATIENCE_SECONDS: Final = 300

Trial = Callable[[Path, random.Random], int]


@dataclass(frozen=True)
class Experiment:
    """One kind of fault.

    Attributes:
        name: on the command line, in words with hyphens.
        fault: what is done to the store, as a line of the closing table.
        unit: what is counted, in the plural: "images", "kills".
        trial: does it a few times in an empty folder, in up to a few seconds, and returns how many
            times; raises, as a rule AssertionError, where anything was lost.
        short: how many trials the test suite runs.
        unavailable: why it cannot be tried on this machine; None where it can.
    """

    name: str
    fault: str
    unit: str
    trial: Trial
    short: int = 1
    unavailable: Callable[[], str | None] = lambda: None


@dataclass
class Report:
    """What came of an experiment: trials made, faults tried in them, and each trial that failed."""

    experiment: Experiment
    skipped: str | None = None
    started: int = 0
    trials: int = 0
    tried: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def seconds_with_those_under_way(self) -> float:
        """Return the time that trials took, each that has not ended taken for an average one."""
        usual = self.seconds / self.trials if self.trials else 1.0
        return self.seconds + (self.started - self.trials) * usual


class Laboratory:
    """Runs trials, several at a time, and keeps a report of each experiment.

    Args:
        experiments: what to try.
        seed: of all that is random.
        jobs: how many trials run at a time.
        tell: called now and then, with nothing, while trials run: to show progress.
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        seed: int,
        jobs: int = 1,
        tell: Callable[[], object] = lambda: None,
    ) -> None:
        self.seed = seed
        self.reports = [Report(each, skipped=each.unavailable()) for each in experiments]
        self._jobs = jobs
        self._tell = tell

    def run_for(self, seconds: float) -> None:
        """Start trials for so long, of the experiment that has had the least time; end them all."""
        end = time.monotonic() + seconds
        available = [report for report in self.reports if report.skipped is None]

        def choose() -> Iterator[tuple[Report, int]]:
            while available and time.monotonic() < end:
                report = min(available, key=Report.seconds_with_those_under_way)
                yield report, report.started

        self._run(choose())

    def run_trials(self, count: int | None = None, first: int = 0) -> None:
        """Run so many trials of each experiment, by default as many as its short form has."""
        self._run(
            (report, number)
            for report in self.reports
            if report.skipped is None
            for number in range(first, first + (count or report.experiment.short))
        )

    def _run(self, chosen: Iterator[tuple[Report, int]]) -> None:
        with tempfile.TemporaryDirectory() as slow, quick_folder(Path(slow)) as folder:
            running: list[_Running] = []
            selector = selectors.DefaultSelector()
            try:
                while True:
                    while len(running) < self._jobs and (choice := next(chosen, None)):
                        trial = _Running(*choice, self.seed, folder)
                        selector.register(trial.said, selectors.EVENT_READ, trial)
                        running.append(trial)
                    if not running:
                        return
                    for key, _ in selector.select(timeout=0.5):
                        if key.data.hear():
                            selector.unregister(key.data.said)
                            running.remove(key.data)
                            key.data.end()
                    for trial in running:
                        trial.give_up_if_it_hangs()
                    self._tell()
            finally:
                for trial in running:
                    trial.kill()


class _Running:
    """A trial under way in a forked process, which leads a process group of its own."""

    def __init__(self, report: Report, number: int, seed: int, folder: Path) -> None:
        report.started += 1
        self._report = report
        self._name = f"{report.experiment.name}, trial {number}"
        self._number = number
        self._seed = seed
        self._started = time.monotonic()
        self._heard = b""
        self._hangs = False
        self._folder = tempfile.TemporaryDirectory(dir=folder)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.said, say = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self.said)
            self._try(say)
        os.close(say)

    def _try(self, say: int) -> NoReturn:
        """In the child: run the trial, and tell how many faults were tried or what went wrong."""
        code = 1
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it, and ends us
            os.dup2(self._errors.fileno(), 1)
            os.dup2(self._errors.fileno(), 2)
            faulthandler.enable()
            rng = random.Random(f"{self._seed}/{self._report.experiment.name}/{self._number}")
            # The same seed makes the same files, to the last byte.
            setattr(os, "urandom", random.Random(rng.random()).randbytes)  # noqa: B010 - typing
            try:
                told: object = self._report.experiment.trial(Path(self._folder.name), rng)
            except BaseException:
                told = traceback.format_exc()
            os.write(say, json.dumps(told).encode())
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)

    def hear(self) -> bool:
        """Take in what the child says; return whether that was all."""
        block = os.read(self.said, 65_536)
        self._heard += block
        return not block

    def give_up_if_it_hangs(self) -> None:
        """Have the child write where it is, and die, once it has taken too long."""
        waited = time.monotonic() - self._started
        if waited > PATIENCE_SECONDS and not self._hangs:
            self._hangs = True
            os.killpg(self._pid, signal.SIGABRT)
        elif waited > PATIENCE_SECONDS + 10:
            os.killpg(self._pid, signal.SIGKILL)

    def end(self) -> None:
        """Take note of what came of the trial."""
        _, status = os.waitpid(self._pid, 0)
        os.close(self.said)
        code = os.waitstatus_to_exitcode(status)
        told = json.loads(self._heard) if self._heard else None
        if isinstance(told, int):
            self._report.tried += told
        else:
            ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            how = f"hung for {PATIENCE_SECONDS} seconds" if self._hangs else f"ended with {ended}"
            self._errors.seek(0)
            written = self._errors.read()[-8000:].decode(errors="replace")
            self._report.failures.append(
                f"{self._name}, seed {self._seed}:\n{told or how}\n--- what it wrote\n{written}"
                f"\n--- to try it again: python -m tests.faults --seed {self._seed} "
                f"--only {self._report.experiment.name} --trial {self._number}"
            )
        self._report.trials += 1
        self._report.seconds += time.monotonic() - self._started
        self._errors.close()
        self._folder.cleanup()

    def kill(self) -> None:
        """End the child and all that it started, whatever it is at."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self.said)
        self._errors.close()
        self._folder.cleanup()


def stop_clock_between_calls(start_seconds: int = 1_700_000_000) -> None:
    """In a trial: have every look at the clock show a millisecond more, and nothing else."""
    import kvstore.store

    clock = itertools.count(start_seconds * 10**9, 10**6)
    setattr(kvstore.clock, "time_ns", clock.__next__)  # noqa: B010 - a plain one is no valid typing


def run_short_forms(say: Callable[[str], object], hear: Callable[[], str | None]) -> None:
    """Run experiments as the test suite asks for them; say what failed in each, as JSON."""
    from .catalogue import named

    while (asked := hear()) is not None:
        name, seed, scale = json.loads(asked)
        experiment = named(name)
        laboratory = Laboratory([experiment], seed)
        laboratory.run_trials(max(1, round(experiment.short * scale)))
        (report,) = laboratory.reports
        assert report.trials, report.skipped
        say(json.dumps(report.failures))
