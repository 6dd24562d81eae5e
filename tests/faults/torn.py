"""Files copied while a store writes to them: nothing is lost, or the copy says that it is torn."""

import random
from pathlib import Path
from typing import Final
from unittest import mock

from support.clock import FakeClock
from support.torn import History, backwards, differing_pages, forwards, tear, use

import kvstore.clock

from .laboratory import Experiment

COPIES: Final = 20  # a trial, of one history


def copy_while_written(folder: Path, rng: random.Random) -> int:
    """Make copies of a history's file over random parts of it, and use each; return how many."""
    clock = FakeClock()
    with mock.patch.object(kvstore.clock, "time_ns", clock):
        history = History(folder / "live.kvs", rng, clock).live(steps=6)
        for number in range(COPIES):
            said, copy = tear(history.images, rng)
            try:
                use(folder / "copy.kvs", copy, history.still, rng)
            except BaseException as error:
                error.add_note(f"copy {number}: {said}")
                raise
    return COPIES


def copy_at_every_page(folder: Path, rng: random.Random) -> int:
    """Tear copies between two moments at pages that differ, in both directions."""
    clock = FakeClock()
    with mock.patch.object(kvstore.clock, "time_ns", clock):
        history = History(folder / "live.kvs", rng, clock).live(steps=3)
        pairs = [sorted(rng.sample(range(len(history.images)), 2)) for _ in range(5)]
        moments = max(
            ([history.images[first], history.images[last]] for first, last in pairs),
            key=lambda pair: len(differing_pages(*pair)),
        )
        tried = 0
        pages = differing_pages(*moments)
        for page in rng.sample(pages, min(COPIES, len(pages))):
            for make in (forwards, backwards):
                try:
                    copy = make(moments, [page])
                    use(folder / "copy.kvs", copy, history.still, rng)
                except BaseException as error:
                    error.add_note(f"{make.__name__}, cut at page {page:,}")
                    raise
                tried += 1
    return tried


EXPERIMENTS = (
    Experiment(
        "torn-copies",
        "copied a page at a time, in any order, while it is written, closed, killed and opened",
        "copies",
        copy_while_written,
        short=2,
    ),
    Experiment(
        "torn-copies-at-every-page",
        "copied from either end, with all of a change made between two pages",
        "copies",
        copy_at_every_page,
    ),
)
