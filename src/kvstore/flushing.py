"""Shared flushes: threads that wait for stable storage at the same time share one flush.

A flush covers what was written before it *started*. So a thread that arrives while one runs waits
for the next: the first to arrive leads that one, and all who arrive until it starts follow (the
group commit of databases).

The followers of a flush pass its gate one by one, each letting in the next. Woken all at once, as
by a condition, they would mostly queue for the interpreter's lock, and for the condition's own:
with eight threads and a fast disk that cost more than the flushes did (`bench/durable.py`).

Invariant: after a flush has failed, no later one is trusted. The kernel may have dropped the pages
that it could not write and would call the next flush a success.
"""

from collections.abc import Callable
from threading import Lock
from typing import Final

_NEXT: Final = "next"


class _Flush:
    """A flush that may be joined, or runs, or has ended: then its gate is open."""

    __slots__ = ("gate", "succeeded")

    def __init__(self) -> None:
        self.gate = Lock()
        self.succeeded = False


class SharedFlush:
    """One at a time, calls `flush`, which raises OSError where the disk did not take everything."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        # Locks are taken as they are, by `with`: what wraps one in functions of Python may be
        # interrupted by a signal between them, and leave it held for good.
        self._disk = Lock()  # held by the leader that flushes
        # Under `_NEXT` the flush that may be joined, if any. A dict, for its `setdefault` is one
        # step: of those who find none, one leads.
        self._joinable: dict[str, _Flush] = {}
        self._error: OSError | None = None
        self._ended = False

    def __call__(self) -> None:
        """Return when a flush that started after this call did has succeeded.

        After `end` it returns at once: the last flush covered everything.

        Raises:
            OSError: that flush, or any before it, failed.
        """
        while not self._take_part():
            pass

    def _take_part(self) -> bool:
        """Lead the next flush, or follow it; return False where its leader was interrupted."""
        own = _Flush()
        with own.gate:
            flush = self._joinable.setdefault(_NEXT, own)
            if flush is own:
                with self._disk:
                    # What is written from here on, this flush may not cover.
                    self._joinable.pop(_NEXT, None)
                    self._lead()
                    own.succeeded = True
        if flush is own:
            return True
        with flush.gate:
            pass
        if flush.succeeded:
            return True
        self._raise_failure()
        # Interrupted, its leader may have left it there. Should this take away another one, that
        # one is joined by nobody else, and no harm is done.
        self._joinable.pop(_NEXT, None)
        return False

    def _lead(self) -> None:
        self._raise_failure()
        if not self._ended:
            try:
                self._flush()
            except OSError as failure:
                self._error = failure
                raise

    def end(self) -> None:
        """Wait for the running flush, if any; from now on calls return at once."""
        self._ended = True
        with self._disk:
            pass

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise OSError(
                self._error.errno,
                "an earlier flush failed; no later one is trusted until the store is opened anew",
            ) from self._error
