"""A process of its own for each figure of each engine, and engines that take turns.

A task is a function of a module that gets what opens its engine, what tells of its progress, and
arguments that can be pickled; so can what it returns. Engines take turns in shuffled order, never
two at a time: what slows the machine for a while slows each of them as often.
"""

import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Concatenate, Final, NamedTuple, ParamSpec, Self, TypeVar

from engines import Kind, OpenEngine

if TYPE_CHECKING:
    from harness import Plan

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Say = Callable[[str], None]  # tells of progress, in a few words
Task = Callable[Concatenate[OpenEngine, Say, Arguments], Result]

PATIENCE: Final = 300.0  # seconds that a task may go on without a word

_PROGRAM: Final = "import sys, workers; workers.serve(int(sys.argv[1]))"


class WorkerError(Exception):
    """A task raised something, or its process died: `exit_code` is then that, or minus a signal."""

    def __init__(self, what: str, exit_code: int | None = None) -> None:
        super().__init__(what)
        self.brief = what.rstrip().splitlines()[-1]  # of a traceback the error itself
        """What happened, in one line for a table."""
        self.exit_code = exit_code


@contextmanager
def noting_failure(failures: dict[str, str], what: str) -> Iterator[None]:
    """Go on where an engine fails, with an entry in `failures` of what it was to do."""
    try:
        yield
    except WorkerError as error:
        failures[what] = error.brief


class Worker:
    """A process that works with one engine, started afresh: nothing of the parent is in it.

    Args:
        plan: where to show what tasks tell; and the engines.
        engine: the name of one of these.
        patience: seconds without a word from a task until it is given up, and the process killed.
    """

    def __init__(self, plan: "Plan", engine: str, patience: float = PATIENCE) -> None:
        self._kind: Kind = plan.engines[engine]
        self._show = plan.progress.show
        self._engine = engine
        self._patience = patience
        self._pipe, far_end = Pipe()
        with far_end:
            self._process = subprocess.Popen(
                # -P: the folder that this is run from has no say in what is imported.
                [self._kind.python, "-P", "-c", _PROGRAM, str(far_end.fileno())],
                env={**os.environ, **search_path(self._kind), **self._kind.environment},
                pass_fds=[far_end.fileno()],
            )

    def call(
        self, task: Task[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Have the process do `task`, and return what that returns.

        Raises:
            WorkerError: it raised something, the process died of it, or it was not heard of.
        """
        with suppress(BrokenPipeError):  # of a dead process: reading from it tells how it died
            self._pipe.send((task, self._kind.open, args, kwargs))
        while True:
            try:
                if not self._pipe.poll(self._patience):
                    self.kill()
                    raise WorkerError(f"no sign of life in {self._patience:g} s")
                kind, told = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                code = self._process.wait()
                raise WorkerError(f"died, exit code {code}", code) from None
            if kind == "said":
                self._show(f"{self._engine}: {told}")
            elif kind == "raised":
                raise WorkerError(told)
            else:
                result: Result = told
                return result

    def kill(self) -> None:
        """End the process as it is, by SIGKILL."""
        self._process.kill()
        self._process.wait()

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self._pipe.close()
        self._process.wait()


def search_path(kind: Kind) -> dict[str, str]:
    """Return where the process finds modules: where we do, or with another Python only these."""
    here = str(Path(__file__).resolve().parent)
    path = sys.path if kind.python == sys.executable else ()
    return {"PYTHONPATH": os.pathsep.join([here, *path])}


def serve(descriptor: int) -> None:
    """In the child: do the tasks that come through this end of a pipe, until it is closed."""
    pipe = Connection(descriptor)

    def say(text: str, /) -> None:
        pipe.send(("said", text))

    with suppress(EOFError):
        while True:
            task, open_engine, args, kwargs = pipe.recv()
            try:
                result = task(open_engine, say, *args, **kwargs)
            except BaseException:
                pipe.send(("raised", traceback.format_exc()))
            else:
                pipe.send(("done", result))


class Job(NamedTuple):
    """Something that an engine does in each of some rounds."""

    engine: str
    name: str
    """That its results have; no two jobs share one."""
    arguments: tuple[Any, ...]
    """That the task gets, after a new folder and the number of the round."""
    rounds: int
    least: int = 1
    """So many are done in any case,"""
    seconds: float = inf
    """and more only as far as they will fit into this time."""


def rounds_in_turns(
    plan: "Plan",
    task: Callable[Concatenate[OpenEngine, Say, Path, int, ...], Result],
    jobs: Iterable[Job],
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """In each round do all jobs in shuffled order, each in a new process; one that fails is out.

    Returns:
        By the jobs' names, the results of the rounds that were done; and why some failed.
    """
    waiting = dict.fromkeys(jobs, 0.0)  # and the seconds that each took so far
    results: dict[str, list[Result]] = {job.name: [] for job in waiting}
    failures: dict[str, str] = {}
    rng = random.Random(2)
    number = 0
    while waiting:
        for job in rng.sample(list(waiting), len(waiting)):
            folder = plan.place / "store"
            folder.mkdir()
            begin = perf_counter()
            with noting_failure(failures, job.name), Worker(plan, job.engine) as worker:
                results[job.name].append(worker.call(task, folder, number, *job.arguments))
            shutil.rmtree(folder)
            waiting[job] += perf_counter() - begin
            done = number + 1
            # The next round takes as long as those before did.
            is_late = done >= job.least and waiting[job] * (done + 1) / done > job.seconds
            if job.name in failures or done >= job.rounds or is_late:
                del waiting[job]
        number += 1
    return results, failures
