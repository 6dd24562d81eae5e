"""A process of its own for each engine, and figures taken in turns.

A task is a function of a module that gets what opens its engine, what tells of its progress, and
arguments that can be pickled; so can what it returns. Engines take turns in shuffled order, never
two at a time: what slows the machine for a while slows each of them as often.
"""

import multiprocessing
import os
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from engines import ENGINES, OpenEngine

from harness import Progress

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Say(Protocol):
    """Tells of progress, in a few words."""

    def __call__(self, text: str, /) -> None: ...  # noqa: D102


Task = Callable[Concatenate[OpenEngine, Say, Arguments], Result]


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


class Skipped(Exception):
    """An experiment cannot be done here; the message says why."""


class WorkerError(Exception):
    """A task raised something, or its process died: `exit_code` is then that, or minus a signal."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    @property
    def brief(self) -> str:
        """What happened, in one line for a table."""
        return str(self).strip().splitlines()[-1]


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
        self, engine: str, progress: Progress | None = None, patience: float | None = None
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
        self._pipe.send((task, args, kwargs))
        while True:
            try:
                if not self._pipe.poll(self._patience):
                    self.kill()
                    raise WorkerError(f"{self.engine}: no sign of life in {self._patience:g} s")
                kind, told = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                code = self._process.exitcode
                raise WorkerError(f"{self.engine}: died, exit code {code}", code) from None
            if kind == "said":
                if self._progress is not None:
                    self._progress.show(f"{self.engine}: {told}")
            elif kind == "raised":
                raise WorkerError(f"{self.engine}: {told}")
            else:
                result: Result = told
                return result

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
        except BaseException:
            pipe.send(("raised", traceback.format_exc()))
        else:
            pipe.send(("done", result))


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

    So what slows a whole round counts for nothing. Empty where `to` was not measured.
    """
    own = by_engine.get(to, [])
    return {
        engine: median(a / b for a, b in zip(figures, own, strict=True))
        for engine, figures in by_engine.items()
        if own and engine != to
    }


def show_spread(figures: dict[str, Any]) -> str:
    """Return what `spread` returned, as text."""
    return "{median:.2f} ({min:.2f}–{max:.2f})".format(**figures)
