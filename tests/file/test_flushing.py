"""Flushes shared between threads: who leads, who follows, and what a failure means for all.

Nothing here waits for time to pass. A flush is a function that stops at a gate, and a thread is
known to wait for its turn once it has found a lock taken.
"""

import errno
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import kvstore.file.group_commit
from kvstore.file.group_commit import GroupCommit

PATIENCE_SECONDS = 60


class Disk:
    """Flushes that stop at a gate, and end as they were told to."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self._gates: list[threading.Event] = []
        self._outcomes: list[BaseException | None] = []
        self._stops = True

    def __call__(self) -> None:
        gate = threading.Event()
        if not self._stops:
            gate.set()
        self._gates.append(gate)
        self._outcomes.append(None)
        number = len(self._gates) - 1
        self.started.release()
        assert gate.wait(PATIENCE_SECONDS), "nobody let this flush end"
        outcome = self._outcomes[number]
        if outcome is not None:
            raise outcome

    @property
    def flushes(self) -> int:
        """How many were started."""
        return len(self._gates)

    def wait_for_start(self) -> None:
        """Return once a flush more has started."""
        assert self.started.acquire(timeout=PATIENCE_SECONDS), "no flush was started"

    def end(self, outcome: BaseException | None = None) -> None:
        """Let the newest flush end, by raising where an outcome is given."""
        self._outcomes[-1] = outcome
        self._gates[-1].set()

    def end_all(self) -> None:
        """Let the newest flush end, and all to come at once."""
        self.end_all_to_come()
        self.end()

    def end_all_to_come(self) -> None:
        """Let all to come end at once."""
        self._stops = False


class Waiters:
    """Tells when threads have gone to sleep, and may interrupt the next that would."""

    def __init__(self) -> None:
        self.asleep = threading.Semaphore(0)
        self.interrupt: BaseException | None = None

    def make_lock(self) -> "ToldLock":
        return ToldLock(self)


class ToldLock:
    """A lock that tells when somebody finds it taken."""

    def __init__(self, waiters: Waiters) -> None:
        self._waiters = waiters
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._waiters.asleep.release()
            self._lock.acquire()
            if self._waiters.interrupt is not None:
                self._lock.release()
                interrupt, self._waiters.interrupt = self._waiters.interrupt, None
                raise interrupt

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Callers:
    """Threads that call one shared flush."""

    def __init__(self, flush: GroupCommit, waiters: Waiters) -> None:
        self._flush = flush
        self._waiters = waiters
        self._threads: list[threading.Thread] = []
        self.outcomes: dict[str, BaseException | None] = {}

    def call(self, name: str, *, and_sleep: bool) -> None:
        """Have a thread call the flush; return once it sleeps, where it is to."""
        self.run(name, self._flush, and_sleep=and_sleep)

    def run(self, name: str, act: Callable[[], object], *, and_sleep: bool) -> None:
        def body() -> None:
            try:
                act()
            except BaseException as error:
                self.outcomes[name] = error
            else:
                self.outcomes[name] = None

        thread = threading.Thread(target=body, daemon=True, name=name)
        self._threads.append(thread)
        thread.start()
        if and_sleep:
            self.wait_for_sleepers(1)

    def wait_for_sleepers(self, count: int) -> None:
        for _ in range(count):
            assert self._waiters.asleep.acquire(timeout=PATIENCE_SECONDS), "nobody sleeps"

    def join(self) -> dict[str, BaseException | None]:
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), f"{thread.name} hangs"
        return self.outcomes


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def waiters() -> Waiters:
    return Waiters()


@pytest.fixture
def shared(disk: Disk, waiters: Waiters, monkeypatch: pytest.MonkeyPatch) -> GroupCommit:
    monkeypatch.setattr(kvstore.file.group_commit, "Lock", waiters.make_lock)
    return GroupCommit(disk)


@pytest.fixture
def callers(shared: GroupCommit, waiters: Waiters) -> Callers:
    return Callers(shared, waiters)


def test_call_that_finds_no_flush_running_leads_one(callers: Callers, disk: Disk) -> None:
    for count in (1, 2):
        callers.call(f"call {count}", and_sleep=False)
        disk.wait_for_start()
        disk.end()
        assert set(callers.join().values()) == {None}
        assert disk.flushes == count


def test_caller_during_a_running_flush_waits_for_the_next(callers: Callers, disk: Disk) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    callers.call("late", and_sleep=True)
    disk.end()
    disk.wait_for_start()
    assert "late" not in callers.outcomes
    disk.end()
    assert callers.join() == {"leader": None, "late": None}
    assert disk.flushes == 2


def test_followers_share_the_next_flush(callers: Callers, disk: Disk) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    for number in range(7):
        callers.call(f"follower {number}", and_sleep=True)
    disk.end()
    disk.wait_for_start()
    disk.end()
    outcomes = callers.join()
    assert len(outcomes) == 8
    assert set(outcomes.values()) == {None}
    assert disk.flushes == 2


def test_caller_during_the_second_flush_waits_for_the_third(callers: Callers, disk: Disk) -> None:
    callers.call("first", and_sleep=False)
    disk.wait_for_start()
    callers.call("second", and_sleep=True)
    disk.end()
    disk.wait_for_start()
    callers.call("third", and_sleep=True)
    disk.end()
    disk.wait_for_start()
    assert "third" not in callers.outcomes
    disk.end()
    assert set(callers.join().values()) == {None}
    assert disk.flushes == 3


def test_failure_reaches_the_leader_as_it_is_and_is_final_for_all_later_callers(
    callers: Callers, disk: Disk, shared: GroupCommit
) -> None:
    failure = OSError(errno.EIO, "the disk is gone")
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    for number in range(3):
        callers.call(f"follower {number}", and_sleep=True)
    disk.end(failure)
    outcomes = callers.join()
    assert outcomes.pop("leader") is failure
    for _ in range(2):
        with pytest.raises(OSError, match="an earlier flush failed") as error:
            shared()
        outcomes["later"] = error.value
    for outcome in outcomes.values():
        assert isinstance(outcome, OSError)
        assert outcome.errno == errno.EIO
        assert outcome.__cause__ is failure
    assert disk.flushes == 1


def test_failure_of_a_later_flush_takes_nothing_back_from_those_that_had_succeeded(
    callers: Callers, disk: Disk
) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    callers.call("follower", and_sleep=True)
    disk.end()
    disk.wait_for_start()
    disk.end(OSError(errno.ENOSPC, "no room"))
    outcomes = callers.join()
    assert outcomes["leader"] is None
    assert isinstance(outcomes["follower"], OSError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError, MemoryError])
def test_interrupted_flush_is_no_failure_and_its_followers_flush_again(
    callers: Callers, disk: Disk, kind: type[BaseException]
) -> None:
    """Nor does it count as a success: the one interrupted may have flushed nothing yet.

    A TimeoutError that a signal handler raises is an OSError too, but no word of the system's: it
    made the store useless until it was opened anew.
    """
    interrupt = kind()
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    callers.call("follower 1", and_sleep=True)
    callers.call("follower 2", and_sleep=True)
    disk.end(interrupt)
    disk.wait_for_start()
    assert callers.outcomes == {"leader": interrupt}
    disk.end()
    assert callers.join() == {"leader": interrupt, "follower 1": None, "follower 2": None}
    assert disk.flushes == 2


def test_followers_of_an_interrupted_second_flush_flush_once_more(
    callers: Callers, disk: Disk
) -> None:
    """They waited for the second; that it ended does not mean that it covered their writes."""
    interrupt = KeyboardInterrupt()
    callers.call("first", and_sleep=False)
    disk.wait_for_start()
    callers.call("one", and_sleep=True)
    callers.call("another", and_sleep=True)
    disk.end()
    disk.wait_for_start()
    disk.end(interrupt)
    disk.wait_for_start()
    assert len(callers.outcomes.keys() & {"one", "another"}) <= 1
    disk.end()
    outcomes = callers.join()
    assert outcomes.pop("first") is None
    assert set(outcomes.values()) == {interrupt, None}
    assert disk.flushes == 3


def test_followers_of_a_leader_interrupted_before_its_flush_have_another_lead(
    callers: Callers, disk: Disk, waiters: Waiters
) -> None:
    interrupt = KeyboardInterrupt()
    callers.call("first", and_sleep=False)
    disk.wait_for_start()
    callers.call("leader", and_sleep=True)
    callers.call("follower 1", and_sleep=True)
    callers.call("follower 2", and_sleep=True)
    waiters.interrupt = interrupt
    disk.end()
    disk.wait_for_start()
    callers.call("late", and_sleep=True)
    disk.end_all()
    assert callers.join() == {
        "first": None,
        "leader": interrupt,
        "follower 1": None,
        "follower 2": None,
        "late": None,
    }


def test_calls_after_the_end_return_at_once(disk: Disk, shared: GroupCommit) -> None:
    shared.end()
    shared()
    shared.end()
    assert disk.flushes == 0


def test_end_waits_for_the_running_flush(callers: Callers, disk: Disk, shared: GroupCommit) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    callers.run("end", shared.end, and_sleep=True)
    assert "end" not in callers.outcomes
    disk.end()
    assert callers.join() == {"leader": None, "end": None}
    callers.call("late", and_sleep=False)
    assert callers.join()["late"] is None
    assert disk.flushes == 1


def test_failure_outlives_the_end(callers: Callers, disk: Disk, shared: GroupCommit) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    disk.end(OSError(errno.EIO, "the disk is gone"))
    callers.join()
    shared.end()
    with pytest.raises(OSError, match="an earlier flush failed"):
        shared()


# --- flushes of a part -------------------------------------------------------------------------

PART = (4_096, 4_200)


class Components:
    """Tells which flushes there were: None for one of everything, else its start and end."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int] | None] = []
        self.outcome: BaseException | None = None
        self.shared = GroupCommit(self._flush, self._flush_part)

    def _flush(self) -> None:
        self._note(None)

    def _flush_part(self, start: int, end: int) -> None:
        self._note((start, end))

    def _note(self, what: tuple[int, int] | None) -> None:
        self.asked.append(what)
        outcome, self.outcome = self.outcome, None
        if outcome is not None:
            raise outcome


def test_call_for_a_part_flushes_it_alone_where_nothing_is_owed() -> None:
    parts = Components()
    assert parts.shared(PART) is False
    assert parts.asked == [PART]
    assert parts.shared() is True
    assert parts.asked == [PART, None]


def test_call_for_a_part_flushes_everything_where_no_other_flush_is_known(disk: Disk) -> None:
    disk.end_all_to_come()
    assert GroupCommit(disk)(PART) is True
    assert disk.flushes == 1


def test_what_is_owed_is_paid_by_one_flush_of_everything() -> None:
    parts = Components()
    parts.shared.require_full()
    assert [parts.shared(PART), parts.shared(PART)] == [True, False]
    assert parts.asked == [None, PART]


def test_what_one_cleared_itself_needs_its_part_alone_however_often() -> None:
    parts = Components()
    for _ in range(2):
        parts.shared.record_cleared(PART[0])
    parts.shared(PART)
    parts.shared((8_192, 8_200))
    assert parts.asked == [PART, (8_192, 8_200)]


def test_what_another_cleared_makes_it_a_flush_of_everything() -> None:
    parts = Components()
    parts.shared.record_cleared(PART[0])
    parts.shared.record_cleared(8_192)
    parts.shared(PART)
    parts.shared(PART)
    assert parts.asked == [None, PART]


def test_what_is_cleared_while_a_flush_runs_is_left_for_the_next() -> None:
    class Clearing(Components):
        def _note(self, what: tuple[int, int] | None) -> None:
            super()._note(what)
            if len(self.asked) < 3:
                self.shared.record_cleared(8_192)

    parts = Clearing()
    parts.shared(PART)
    parts.shared(PART)
    parts.shared(PART)
    parts.shared(PART)
    assert parts.asked == [PART, None, None, PART]


@pytest.mark.parametrize("owed", [False, True])
def test_flush_that_was_interrupted_is_owed_whole(owed: bool) -> None:
    parts = Components()
    parts.shared.record_cleared(PART[0])
    if owed:
        parts.shared.require_full()
    parts.outcome = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        parts.shared(PART)
    parts.shared(PART)
    parts.shared(PART)
    assert parts.asked == [None if owed else PART, None, PART]


def test_failure_of_a_part_is_final_for_everything() -> None:
    parts = Components()
    parts.outcome = OSError(errno.EIO, "the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        parts.shared(PART)
    for part in (PART, None):
        with pytest.raises(OSError, match="an earlier flush failed"):
            parts.shared(part)
    assert parts.asked == [PART]


def test_calls_for_a_part_after_the_end_say_that_everything_is_flushed() -> None:
    parts = Components()
    parts.shared.end()
    assert parts.shared(PART) is True
    assert parts.asked == []


def test_those_who_wait_for_their_parts_share_a_flush_of_everything(
    disk: Disk, waiters: Waiters, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int] | None] = []

    def flush() -> None:
        asked.append(None)
        disk()

    def flush_part(start: int, end: int) -> None:
        asked.append((start, end))
        disk()

    monkeypatch.setattr(kvstore.file.group_commit, "Lock", waiters.make_lock)
    callers = Callers(shared := GroupCommit(flush, flush_part), waiters)
    callers.run("leader", lambda: shared(PART), and_sleep=False)
    disk.wait_for_start()
    for number in range(7):
        part = (8_192 + number, 8_200 + number)
        callers.run(f"follower {number}", partial(shared, part), and_sleep=True)
    disk.end()
    disk.wait_for_start()
    assert set(callers.outcomes) == {"leader"}
    disk.end()
    assert set(callers.join().values()) == {None}
    assert asked == [PART, None]
    # For a while others may be about to wait again.
    disk.end_all_to_come()
    assert shared(PART) is True
    assert shared(PART) is False


def test_follower_that_its_leader_did_not_see_gets_a_flush_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The leader looks whether it is followed, then one joins it, before its range is flushed."""
    parts = Components()
    late = kvstore.file.group_commit._Flush()
    late.is_full, late.succeeded = False, True
    joinable = parts.shared._joinable

    class LateForOne(dict[str, kvstore.file.group_commit._Flush]):
        def setdefault(self, name: str, own: Any = None) -> Any:
            return joinable.setdefault(name, own) if late.is_followed else late

    monkeypatch.setattr(parts.shared, "_joinable", LateForOne())
    assert parts.shared(PART) is False
    assert parts.asked == [PART]
    assert late.is_followed


def test_what_is_owed_for_reuse_waits_for_a_flush_that_began_later() -> None:
    """Neither one of a part will do, nor one that was under way, nor one that failed."""
    parts = Components()
    shared = parts.shared
    assert not shared.reuse_waits
    shared(PART)
    shared.require_full_flush_for_reuse()
    seen = []

    class Amid(Components):
        def _note(self, what: tuple[int, int] | None) -> None:
            super()._note(what)
            seen.append(amid.shared.reuse_waits)
            if len(seen) == 1:
                amid.shared.require_full_flush_for_reuse()

    amid = Amid()
    amid.shared.require_full_flush_for_reuse()
    amid.shared(PART)
    assert amid.shared.reuse_waits, "for it was owed once more while the disk was at it"
    amid.shared(PART)
    assert not amid.shared.reuse_waits
    amid.shared(PART)
    assert (amid.asked, seen) == ([None, None, PART], [True, True, False])

    parts.outcome = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        shared()
    assert shared.reuse_waits
    shared(PART)
    assert parts.asked == [PART, None, None]
    assert not shared.reuse_waits
