"""A process of its own for each engine, and figures taken in turns.

A task is a function of a module that gets what opens its engine, what tells of its progress, and
arguments that can be pickled; so can what it returns. Engines take turns in shuffled order, never
two at a time: what slows the machine for a while slows each of them as often. A task that keeps a
store open from turn to turn is a generator: it does a step a turn, and yields what that measured.
"""

import multiprocessing
import os
import random
import shutil
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, Self, TypeVar

from engines import ENGINES, OpenEngine

from harness import Progress

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Say(Protocol):
    """Tells of progress, in a few words."""

    def __call__(self, text: str, /) -> None: ...  # noqa: D102


Task = Callable[Concatenate[OpenEngine, Say, Arguments], Result]

PATIENCE: Final = 600.0  # seconds that a task may go on without a word


@dataclass(frozen=True)
class Plan:
    """What an experiment is asked for."""

    place: Path
    """A folder of its own, on the disk to be measured."""
    engines: list[str]
    """Which of `ENGINES`, each of which can be imported."""
    quick: bool
    """Whether small and short figures, that mean nothing, are wanted."""
    rounds: int | None
    """How often everything is to be measured, if not as often as the experiment has it."""
    progress: Progress
    tiny: bool = False
    """Whether they are to be smaller still, for a test of the harness; `quick` then too."""

    def only(self, engines: list[str]) -> "Plan":
        """Return the same plan for other engines."""
        return replace(self, engines=engines)


class Skipped(Exception):
    """An experiment cannot be done here; the message says why."""


class WorkerError(Exception):
    """A task raised something, or its process died: `exit_code` is then that, or minus a signal."""

    def __init__(self, engine: str, what: str, exit_code: int | None = None) -> None:
        super().__init__(f"{engine}: {what}")
        self.brief = what.rstrip().splitlines()[-1]  # of a traceback the error itself
        """What happened, in one line for a table."""
        self.exit_code = exit_code


@contextmanager
def noting_failure(errors: dict[str, str], what: str) -> Iterator[None]:
    """Go on where an engine fails, with an entry in `errors` of what it was to do."""
    try:
        yield
    except WorkerError as error:
        errors[what] = error.brief


class Worker:
    """A process that works with one engine, started afresh: nothing of the parent is in it.

    Args:
        engine: one of `ENGINES`.
        progress: where to show what tasks tell; None: nowhere.
        patience: seconds without a word from a task until it is given up, and the process killed.
    """

    def __init__(
        self, engine: str, progress: Progress | None = None, patience: float = PATIENCE
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.engine = engine
        self._progress = progress
        self._patience = patience
        self._pipe, far_end = context.Pipe()
        environment = ENGINES[engine].environment
        before = {name: os.environ.get(name) for name in environment}
        self._process = context.Process(target=_serve, args=(engine, far_end), daemon=True)
        # The child is to have it before it imports anything.
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            far_end.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        pid = self._process.pid
        if pid is None:
            raise AssertionError("it was started by __init__")
        return pid

    def call(
        self,
        task: Callable[Concatenate[OpenEngine, Say, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Have the process do `task`, and return what that returns.

        Raises:
            WorkerError: it raised something, the process died of it, or it was not heard of.
        """
        self._send((task, args, kwargs))
        result: Result = self._answer()[1]
        return result

    def steps(
        self,
        task: Callable[Concatenate[OpenEngine, Say, Arguments], Iterator[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Iterator[Result]:
        """Have the process do `task`, a generator: a step each time that the next item is wanted.

        Ended early, it is ended there too; then the worker is free for another task.

        Raises:
            WorkerError: it raised something, or the process died of it.
        """
        self._send((task, args, kwargs))
        goes_on = False
        try:
            while (answer := self._answer())[0] == "yielded":
                goes_on = True
                yield answer[1]
                goes_on = False
                self._send(True)
        finally:
            if goes_on:
                with suppress(OSError, WorkerError):  # it may be gone by now
                    self._send(False)
                    self._answer()

    def _send(self, message: object) -> None:
        with suppress(BrokenPipeError):  # of a dead process: reading from it tells how it died
            self._pipe.send(message)

    def _answer(self) -> tuple[str, Any]:
        """Return what the process comes to: that it has "done" its task, or "yielded" something."""
        while True:
            try:
                if not self._pipe.poll(self._patience):
                    self.kill()
                    raise WorkerError(self.engine, f"no sign of life in {self._patience:g} s")
                kind, told = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                code = self._process.exitcode
                raise WorkerError(self.engine, f"died, exit code {code}", code) from None
            if kind == "said":
                if self._progress is not None:
                    self._progress.show(f"{self.engine}: {told}")
            elif kind == "raised":
                raise WorkerError(self.engine, told)
            else:
                return kind, told

    def kill(self) -> None:
        """End the process as it is, by SIGKILL."""
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()


def _serve(engine: str, pipe: Connection) -> None:
    """In the child: do the tasks that come, until None does."""

    def say(text: str, /) -> None:
        pipe.send(("said", text))

    while (order := pipe.recv()) is not None:
        task, args, kwargs = order
        try:
            result = task(ENGINES[engine].open, say, *args, **kwargs)
            if isinstance(result, Generator):
                _step(result, pipe)
                result = None
        except BaseException:
            pipe.send(("raised", traceback.format_exc()))
        else:
            pipe.send(("done", result))


def _step(steps: Generator[Any, None, None], pipe: Connection) -> None:
    """In the child: do a step as often as the parent says so."""
    with closing(steps):
        for item in steps:
            pipe.send(("yielded", item))
            if not pipe.recv():
                return


@dataclass(frozen=True)
class Course(Generic[Result]):
    """How the steps of a task went with one engine."""

    items: list[Result]
    """What they yielded."""
    failure: str | None
    """Why there are no more of them, where that is no good reason."""


def steps_in_turns(
    plan: Plan,
    task: Callable[Concatenate[OpenEngine, Say, Path, Arguments], Iterator[Result]],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> dict[str, Course[Result]]:
    """Have each engine, in a process and a folder of its own, do the steps of `task` in turns.

    An engine that fails is out, and the others go on.

    Args:
        plan: which engines, and where.
        task: gets, after what every task does, the folder, which is new and is removed at the end.
        *args: what else it gets.
        **kwargs: likewise, by name.
    """
    courses: dict[str, Course[Result]] = {}
    with ExitStack() as stack:
        running: dict[str, tuple[Iterator[Result], list[Result]]] = {}
        for engine in plan.engines:
            folder = plan.place / engine
            folder.mkdir()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            worker = stack.enter_context(Worker(engine, plan.progress))
            running[engine] = worker.steps(task, folder, *args, **kwargs), []
        rng = random.Random(2)
        while running:
            for engine in rng.sample(list(running), len(running)):
                steps, items = running[engine]
                failure = None
                try:
                    items.append(next(steps))
                    continue
                except StopIteration:
                    pass
                except WorkerError as error:
                    failure = error.brief
                del running[engine]
                courses[engine] = Course(items, failure)
                shutil.rmtree(plan.place / engine, ignore_errors=True)
    return {engine: courses[engine] for engine in plan.engines}


def failures(courses: dict[str, Course[Any]]) -> dict[str, str]:
    """Return why the engines that failed did."""
    return {
        engine: course.failure for engine, course in courses.items() if course.failure is not None
    }


def failed_rows(reasons: dict[str, str], columns: int) -> list[list[str]]:
    """Return rows of a table of so many columns, for what `failures` returned."""
    return [[engine, why, *[""] * (columns - 2)] for engine, why in reasons.items()]


def in_turns(engines: Sequence[str], rounds: int, seed: int = 2) -> Iterator[tuple[int, str]]:
    """Yield the number of a round and an engine: in each round all of them, in shuffled order."""
    rng = random.Random(seed)
    for number in range(rounds):
        for engine in rng.sample(list(engines), len(engines)):
            yield number, engine


def spread(figures: Sequence[float]) -> dict[str, float]:
    """Return the median of some rounds' figures, and their extremes."""
    return {"median": median(figures), "min": min(figures), "max": max(figures)}


def ratios(by_engine: dict[str, list[float]], to: str = "kvstore") -> dict[str, float]:
    """Return, for each engine, the median of the rounds' ratios of its figure to that of `to`.

    So what slows a whole round counts for nothing; of the one that did more rounds, as many as of
    the other. Empty where `to` was not measured.
    """
    own = by_engine.get(to, [])
    return {
        engine: median(a / b for a, b in zip(figures, own, strict=False))
        for engine, figures in by_engine.items()
        if own and engine != to
    }


def show_spread(figures: dict[str, Any]) -> str:
    """Return what `spread` returned, as text."""
    return "{median:.2f} ({min:.2f}–{max:.2f})".format(**figures)
