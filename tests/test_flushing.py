"""Flushes shared between threads: who leads, who follows, and what a failure means for all.

Nothing here waits for time to pass. A flush is a function that stops at a gate, and a thread is
known to wait for its turn once it has found a lock taken.
"""

import errno
import threading
from collections.abc import Callable

import pytest

import kvstore.flushing
from kvstore.flushing import SharedFlush

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
        self._stops = False
        self.end()


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

    def __init__(self, flush: SharedFlush, waiters: Waiters) -> None:
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
def shared(disk: Disk, waiters: Waiters, monkeypatch: pytest.MonkeyPatch) -> SharedFlush:
    monkeypatch.setattr(kvstore.flushing, "Lock", waiters.make_lock)
    return SharedFlush(disk)


@pytest.fixture
def callers(shared: SharedFlush, waiters: Waiters) -> Callers:
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
    callers: Callers, disk: Disk, shared: SharedFlush
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


def test_interrupted_flush_is_no_failure_and_its_followers_flush_again(
    callers: Callers, disk: Disk
) -> None:
    """Nor does it count as a success: the one interrupted may have flushed nothing yet."""
    interrupt = KeyboardInterrupt()
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


def test_calls_after_the_end_return_at_once(disk: Disk, shared: SharedFlush) -> None:
    shared.end()
    shared()
    shared.end()
    assert disk.flushes == 0


def test_end_waits_for_the_running_flush(callers: Callers, disk: Disk, shared: SharedFlush) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    callers.run("end", shared.end, and_sleep=True)
    assert "end" not in callers.outcomes
    disk.end()
    assert callers.join() == {"leader": None, "end": None}
    callers.call("late", and_sleep=False)
    assert callers.join()["late"] is None
    assert disk.flushes == 1


def test_failure_outlives_the_end(callers: Callers, disk: Disk, shared: SharedFlush) -> None:
    callers.call("leader", and_sleep=False)
    disk.wait_for_start()
    disk.end(OSError(errno.EIO, "the disk is gone"))
    callers.join()
    shared.end()
    with pytest.raises(OSError, match="an earlier flush failed"):
        shared()
